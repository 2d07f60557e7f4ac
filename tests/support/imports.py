"""What a source file imports, by full names."""

import ast


def imports(path, package):
    """(full name, whether it is inside a function) of everything that a file of a package imports, at any place."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {child for function in functions for child in ast.walk(function)}
    parents = package.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            yield from ((".".join([*base, *filter(None, [node.module]), a.name]), node in inside) for a in node.names)
