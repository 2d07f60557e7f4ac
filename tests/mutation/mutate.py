"""Mutants of a Python source: copies with one small fault, everything else unchanged to the byte.

Mutated are comparisons, arithmetic, conditions, numbers, truth values, dtypes, axes, masks, ``other=``, terms and
factors, swapped strides, statements that can go, and calls with a neighbour (min and max, exp2 and exp).
Not mutated, because no result depends on it: docstrings, messages of errors and refusals, annotations, assertions (which
tell the type checker), decorators
(``do_not_specialize``, caches), and the keywords of SPEED. A subscript's ``None`` is not mutated either: its mutants
would only crash.

A mutant is named by its function, the text before and after, and its number among equal ones in that function, so
that the name stays valid after edits elsewhere in the file.
"""

import ast
import re
from collections import Counter
from dataclasses import dataclass

SPEED = {"num_warps", "num_stages", "group_m", "GROUP_M", "eviction_policy", "cache_modifier"}
COMPARE = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
# Operator → its text, its replacements, and whether the left and the right operand may replace the expression.
BINARY = {
    ast.Add: ("+", "-", True, True), ast.Sub: ("-", "+", True, False), ast.Mult: ("*", "/", True, True),
    ast.Div: ("/", "*", True, False), ast.FloorDiv: ("//", "%", True, False), ast.Mod: ("%", "//", True, False),
    ast.BitAnd: ("&", "|", True, True), ast.BitOr: ("|", "&", True, True), ast.LShift: ("<<", ">>", True, False),
    ast.RShift: (">>", "<<", True, False), ast.BitXor: ("^", "|", True, True), ast.Pow: ("**", "*", False, False),
}  # fmt: skip
CALLS = {
    "max": "min", "min": "max", "all": "any", "any": "all", "tl.maximum": "tl.minimum", "tl.minimum": "tl.maximum",
    "tl.max": "tl.min", "tl.sum": "tl.max", "tl.exp2": "tl.exp", "tl.log2": "tl.log", "tl.rsqrt": "tl.sqrt",
    "torch.rsqrt": "torch.sqrt", "torch.exp": "torch.exp2", "math.gcd": "max",
}  # fmt: skip
DTYPES = {
    "tl.float32": "tl.float16", "tl.float64": "tl.float32", "tl.int64": "tl.int32",
    "torch.float64": "torch.float32", "torch.float32": "torch.float64", "torch.float16": "torch.bfloat16",
    "torch.bfloat16": "torch.float16", "torch.int64": "torch.int32",
}  # fmt: skip
ALONE = {"abs", "tl.abs", "tuple", "reversed"}  # f(x) becomes x
DROPPED_METHODS = {"contiguous", "bit_length", "to", "T", "t", "detach"}  # x.f(…) becomes x


@dataclass(frozen=True)
class Mutant:
    name: str
    source: str


def _children(node):
    """The child nodes in which a fault could change a result."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "exc", "ctx"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)
            ):
                continue
            if isinstance(child, ast.keyword) and child.arg in SPEED:
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            yield child


def _walk(node, path=(), function="module"):
    """(node, its ancestors, name of its function or class)."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        function = node.name
    yield node, path, function
    for child in _children(node):
        yield from _walk(child, (*path, node), function)


class _Text:
    """The source as bytes, because ast counts columns in bytes."""

    def __init__(self, source):
        self.bytes = source.encode()
        self.lines = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def span(self, node):
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def __getitem__(self, span):
        return self.bytes[slice(*span)].decode(errors="ignore")


def _between(text, left, right, old, new):
    """The edit that replaces the operator between two operands."""
    begin, end = text.span(left)[1], text.span(right)[0]
    found = re.search(re.escape(old).replace(r"\ ", r"\s+"), text[begin, end])
    return begin + found.start(), begin + found.end(), new


def _call_edits(node, text, of):
    name = text[text.span(node.func)]
    if name in CALLS:
        yield *text.span(node.func), CALLS[name]
    elif name in ALONE and len(node.args) == 1:
        yield of(node, node.args[0])
    elif name.endswith(".cdiv"):
        yield of(node, node.args[0], " // ", node.args[1])
    elif name == "tl.where":
        yield of(node, node.args[1])
        yield (*text.span(node), f"tl.where({', '.join(text[text.span(node.args[i])] for i in (0, 2, 1))})")
    elif isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_METHODS and len(node.args) <= 1:
        yield of(node, node.func.value)
    for keyword in node.keywords:
        if keyword.arg == "mask" or (isinstance(keyword.value, ast.Name) and keyword.value.id.islower()):
            yield *text.span(keyword.value), "None"
    for one, two in zip(node.args, node.args[1:]):
        both = [text[text.span(argument)] for argument in (one, two)]
        if name in CALLS or name.endswith("reasons"):  # where the order of arguments does not matter
            continue
        if all("stride" in argument for argument in both) or all(re.fullmatch("[a-z][a-z0-9_]*", a) for a in both):
            yield text.span(one)[0], text.span(two)[1], f"{text[text.span(two)]}, {text[text.span(one)]}"


def _constant_edits(node, text, parent):
    span, value = text.span(node), node.value
    if isinstance(value, bool):
        yield *span, str(not value)
    elif isinstance(value, int):
        yield from ((*span, new) for new in {0: ("1",), 1: ("0", "2")}.get(value, (str(value + 1),)))
    elif isinstance(value, float):
        if isinstance(parent, ast.keyword) and parent.arg == "other":
            yield *span, 'float("nan")'
        else:
            yield from ((*span, new) for new in (("1.0",) if value == 0 else (repr(value * 1.1), f"-{text[span]}")))
    elif value == "-inf":
        yield *span, '"inf"'


def _edits(node, path, text, assigned):
    """(begin, end, new text) of every fault of one node."""
    parent = path[-1] if path else None

    def of(whole, *parts):
        new = "".join(part if isinstance(part, str) else f"({text[text.span(part)]})" for part in parts)
        return *text.span(whole), new

    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            yield _between(text, left, right, *COMPARE[type(op)])
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        old, new, keep_left, keep_right = BINARY[type(node.op)]
        if not any(isinstance(side, (ast.Tuple, ast.List, ast.JoinedStr)) for side in (node.left, node.right)):
            yield _between(text, node.left, node.right, old, new)
            yield from (of(node, side) for side, keep in ((node.left, keep_left), (node.right, keep_right)) if keep)
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:]):
            yield _between(text, left, right, old, new)
        for i in range(len(node.values)):
            kept = [f"({text[text.span(value)]})" for value in node.values[:i] + node.values[i + 1 :]]
            yield *text.span(node), f" {old} ".join(kept)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield of(node, node.operand)
    elif isinstance(node, ast.Call):
        yield from _call_edits(node, text, of)
    elif isinstance(node, ast.Constant):
        yield from _constant_edits(node, text, parent)
    elif isinstance(node, ast.Attribute) and text[text.span(node)] in DTYPES:
        yield *text.span(node), DTYPES[text[text.span(node)]]
    elif isinstance(node, ast.Attribute) and node.attr == "T":
        yield of(node, node.value)
    elif isinstance(node, ast.AugAssign):
        old, new = BINARY[type(node.op)][:2]
        yield _between(text, node.target, node.value, old + "=", new + "=")
        yield _between(text, node.target, node.value, old + "=", "=")
    elif isinstance(node, ast.comprehension):
        yield from ((*text.span(test), value) for test in node.ifs for value in ("True", "False"))
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield from ((*text.span(node.test), value) for value in ("True", "False")[isinstance(node, ast.While) :])
    reassigned = isinstance(node, ast.Assign) and all(
        name.id in assigned for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
    )
    if reassigned or isinstance(node, (ast.AugAssign, ast.Expr)):
        yield *text.span(node), "pass"


def _described(text, node, path, begin, end, new):
    """The text before and after the edit: of the smallest expression around it that identifies it, or of its lines."""
    low, high = begin, end
    for around in (node, *reversed(path)):
        if isinstance(around, ast.stmt) and around is not node:
            low = max(text.span(around)[0], text.bytes.rfind(b"\n", 0, begin))
            high = min(text.span(around)[1], text.bytes.find(b"\n", end))
        elif hasattr(around, "lineno") and not (hasattr(around, "body") and hasattr(around, "orelse")):
            low, high = text.span(around)
        if high - low >= 12 or isinstance(around, ast.stmt):
            break
    if high - low > 100:
        low, high = max(low, begin - 30), min(high, end + 30)
    return tuple(" ".join(part.split()) for part in (text[low, high], text[low, begin] + new + text[end, high]))


def mutants(source):
    """Every compilable mutant of a source, in the order of the text, without repetition."""
    text, tree = _Text(source), ast.parse(source)
    seen, numbers, assigned, found = {source}, Counter(), {}, []
    for node, path, function in _walk(tree):
        names = assigned.setdefault(function, set())
        if isinstance(node, ast.arg):
            names.add(node.arg)
        for begin, end, new in _edits(node, path, text, names):
            mutated = text[0, begin] + new + text[end, len(text.bytes)]
            if mutated in seen:
                continue
            seen.add(mutated)
            try:
                compile(mutated, "mutant", "exec")
            except SyntaxError:
                continue
            before, after = _described(text, node, path, begin, end, new)
            name = f"{function}: {before} → {after}"
            numbers[name] += 1
            found.append(Mutant(name + (f" #{numbers[name]}" if numbers[name] > 1 else ""), mutated))
        if isinstance(node, ast.Assign):
            names.update(name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
    return found
