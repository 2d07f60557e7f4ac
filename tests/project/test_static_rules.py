"""Rules over the source of kernels/, csrc/ and vit_fast/, read by Python's ast and never run.

A rule is a function of a source text that returns its violations as (line, words). Each is applied to every file it
is meant for, and shown to fail on a bad snippet and to pass on a good one.

``narrow_offsets`` follows integers through the device code. Triton computes in int32 what comes from program ids,
sizes and ``tl.arange``, and wraps silently: an offset is right only if a factor was int64 before the product.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
PACKAGE = sorted([*(ROOT / "vit_fast").rglob("*.py"), *(ROOT / "csrc").rglob("*.py")])
# Modules of kernels/ that vit_fast may import at once.
WITHOUT_TRITON = (
    "activation_names",
    "arguments",
    "block_options",
    "configs",
    "folding",
    "packing",
    "prepared_layer",
    "reference",
    "tracing",
)
WITH_TWIN = ()  # kernel files that may use what the interpreter lacks: each has a twin that it can run


def dotted(node):
    """The name of an expression, ``tl.dot`` or ``self.x``; empty where it is none."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def keywords(call):
    return {keyword.arg: keyword.value for keyword in call.keywords}


def is_literal(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def jit_functions(source):
    """The functions of a source that ``triton.jit`` decorates, by name."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            marks = (mark.func if isinstance(mark, ast.Call) else mark for mark in node.decorator_list)
            if any(dotted(mark) in ("triton.jit", "jit") for mark in marks):
                found[node.name] = node
    return found


# Kinds of an integer in device code, the most dangerous last: joined branches take the later one.
OTHER = "other"  # floats, masks, tuples, dtypes
CONST = "constant"
WIDE = "int64"
POSITION = "position"  # int32, within one axis of a tensor: an arange, a remainder, a loop variable
SIZE = "size"  # int32, an argument of the launch
STRIDE = "stride"
PROGRAM = "program"  # int32, no larger than a program id
PRODUCT = "int32 product"  # may have wrapped
POINTER = "pointer"
ORDER = (OTHER, CONST, WIDE, POSITION, SIZE, STRIDE, PROGRAM, PRODUCT, POINTER)


class Value(NamedTuple):
    kind: str
    divisors: frozenset = frozenset()  # names it was divided by: times them it is no larger than before
    below: str = ""  # a name that it is smaller than


def kind_of_argument(name, otherwise):
    """The kind of an argument of a launch by its name, alone or in a named tuple."""
    if name.lower().startswith("stride_"):
        return STRIDE
    return POINTER if name.endswith(("ptr", "src")) else otherwise


def join(values):
    return max(values, key=lambda value: ORDER.index(value.kind), default=Value(OTHER))


class Flow:
    """Follows the kinds of values through the jit functions of some sources, calls between them included."""

    def __init__(self, functions):
        self.functions = functions
        self.violations = set()
        self.stack = []

    def report(self, node, words):
        self.violations.add((node.lineno, f"{self.stack[-1]}: {words}: {ast.unparse(node)}"))

    def enter(self, function):
        """Runs a kernel; a parameter is what its name and annotation say."""
        arguments = {}
        for parameter in function.args.args:
            otherwise = SIZE if parameter.annotation is None else CONST
            arguments[parameter.arg] = Value(kind_of_argument(parameter.arg, otherwise))
        self.run(function, arguments)

    def run(self, function, arguments):
        if function.name in self.stack:
            return Value(OTHER)
        self.stack.append(function.name)
        returned = []
        self.block(function.body, arguments, returned)
        self.stack.pop()
        return join(returned)

    def block(self, statements, scope, returned):
        for node in statements:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, node.value, scope)
            elif isinstance(node, ast.AugAssign):
                target = ast.copy_location(ast.Name(node.target.id, ast.Load()), node)
                sum_ = ast.copy_location(ast.BinOp(target, node.op, node.value), node)
                scope[node.target.id] = self.value(sum_, scope)
            elif isinstance(node, ast.If):
                self.value(node.test, scope)
                branches = [dict(scope), dict(scope)]
                self.block(node.body, branches[0], returned)
                self.block(node.orelse, branches[1], returned)
                self.merge(scope, branches)
            elif isinstance(node, (ast.For, ast.While)):
                for _ in range(3):  # kinds only get worse, and no chain of them is longer
                    inside = dict(scope)
                    if isinstance(node, ast.For):
                        inside[node.target.id] = self.loop_variable(node.iter, scope)
                    self.block(node.body, inside, returned)
                    self.merge(scope, [scope, inside])
            elif isinstance(node, ast.Return) and node.value is not None:
                returned.append(self.value(node.value, scope))
            elif isinstance(node, ast.Expr):
                self.value(node.value, scope)

    @staticmethod
    def merge(scope, branches):
        for name in set().union(*branches):
            scope[name] = join([branch[name] for branch in branches if name in branch])

    def assign(self, target, value, scope):
        if isinstance(target, ast.Tuple):
            if isinstance(value, ast.Tuple):
                new = [self.value(element, scope) for element in value.elts]
            else:
                new = [self.value(value, scope)] * len(target.elts)
            scope.update((name.id, kind) for name, kind in zip(target.elts, new, strict=True))
        else:
            scope[target.id] = self.value(value, scope)

    def loop_variable(self, iterable, scope):
        """A loop variable stays below the end of its range."""
        values = [self.value(argument, scope) for argument in iterable.args]
        if dotted(iterable.func) == "tl.static_range":
            return Value(CONST)
        end = values[1 if len(values) > 1 else 0].kind
        return Value(end if end in (WIDE, PRODUCT) else POSITION)

    def value(self, node, scope):
        if isinstance(node, ast.Name):
            return scope.get(node.id, Value(CONST))
        if isinstance(node, ast.Subscript):
            return self.value(node.value, scope)
        if isinstance(node, ast.Attribute):
            if node.attr == "T":
                return self.value(node.value, scope)
            return Value(kind_of_argument(node.attr, OTHER))  # an argument in a named tuple, or no integer
        if isinstance(node, ast.UnaryOp):
            return self.value(node.operand, scope)
        if isinstance(node, ast.IfExp):
            self.value(node.test, scope)
            return join([self.value(node.body, scope), self.value(node.orelse, scope)])
        if isinstance(node, ast.Call):
            return self.call(node, scope)
        if isinstance(node, ast.BinOp):
            return self.arithmetic(node, scope)
        if isinstance(node, ast.Compare):
            for operand in node.comparators:
                self.meet(node, self.value(node.left, scope), self.value(operand, scope))
            return Value(OTHER)
        if isinstance(node, ast.Constant):
            return Value(CONST)
        if isinstance(node, ast.Tuple):  # of results of a function
            return join([self.value(element, scope) for element in node.elts])
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child, scope)
        return Value(OTHER)

    def meet(self, node, left, right):
        if {left.kind, right.kind} == {WIDE, PRODUCT}:
            self.report(node, "an int32 product meets an int64")

    def arithmetic(self, node, scope):
        operator, left, right = type(node.op), self.value(node.left, scope), self.value(node.right, scope)
        kinds = {left.kind, right.kind}
        if operator is ast.Mult:
            return self.multiply(node, left, right, scope)
        if operator in (ast.Add, ast.Sub) and POINTER in kinds:
            if PRODUCT in kinds:
                self.report(node, "an int32 product is added to a pointer")
            return Value(POINTER)
        if OTHER in kinds or operator is ast.Div:
            return Value(OTHER)
        self.meet(node, left, right)
        if WIDE in kinds:
            return Value(WIDE)
        if kinds == {CONST} or left.kind == PRODUCT:
            return Value(left.kind)
        if operator is ast.Mod:
            return Value(POSITION, below=dotted(node.right))
        if operator is ast.FloorDiv:
            names = {name.id for name in ast.walk(node.right) if isinstance(name, ast.Name)}
            return Value(SIZE if left.kind == CONST else left.kind, left.divisors | names)
        if right.kind == PRODUCT:
            return Value(PRODUCT)
        if operator is ast.Sub and left.kind in (POSITION, SIZE, PROGRAM):
            return Value(POSITION if left.kind == right.kind == PROGRAM else left.kind)
        if operator is ast.Add:
            return Value(join([left, right]).kind)
        return Value(PRODUCT)

    def multiply(self, node, left, right, scope):
        kinds = {left.kind, right.kind}
        if isinstance(node.left, ast.BinOp) and isinstance(node.left.op, ast.FloorDiv):
            if ast.dump(node.left.right) == ast.dump(node.right):  # x // n * n
                return self.value(node.left.left, scope)
        if STRIDE in kinds:
            if WIDE not in kinds:
                self.report(node, "a stride times what is not int64")
            return Value(WIDE)
        if POINTER in kinds or OTHER in kinds:
            return Value(OTHER)
        self.meet(node, left, right)
        if WIDE in kinds:
            return Value(WIDE)
        for factor, other, name in ((left, right, node.right), (right, left, node.left)):
            if names := factor.divisors & {dotted(name), other.below}:
                return Value(factor.kind, factor.divisors - names)
        if kinds <= {CONST, POSITION}:
            return join([left, right])
        return Value(PRODUCT)

    def call(self, node, scope):
        name = dotted(node.func).rpartition(".")[2] or getattr(node.func, "attr", "")
        values = [self.value(argument, scope) for argument in node.args]
        named = {keyword.arg: self.value(keyword.value, scope) for keyword in node.keywords}
        if name in self.functions:
            parameters = [parameter.arg for parameter in self.functions[name].args.args]
            return self.run(self.functions[name], {**dict(zip(parameters, values)), **named})
        dtype = next((dotted(argument) for argument in node.args if dotted(argument).startswith("tl.int")), None)
        if name == "to":
            before = self.value(node.func.value, scope)
            if dtype == "tl.int64":
                if before.kind == PRODUCT:
                    self.report(node, "an int32 product becomes int64 too late")
                return Value(WIDE)
            return Value(OTHER) if dtype is None else Value(PROGRAM)
        if name in ("full", "zeros"):
            return Value({None: OTHER, "tl.int64": WIDE}.get(dtype, CONST))
        if name in ("program_id", "num_programs"):
            return Value(PROGRAM)
        if name == "arange":
            return Value(POSITION)
        if name == "cdiv":
            return Value(values[0].kind, values[0].divisors | {dotted(node.args[1])} - {""})
        if name == "minimum" and not {value.kind for value in values} & {OTHER, WIDE}:
            least = min(values, key=lambda value: ORDER.index(value.kind)).kind
            return Value(POSITION if least == CONST else least)
        if name in ("minimum", "maximum", "where", "multiple_of", "max_contiguous", "broadcast_to"):
            return join([value for value in values if value.kind != CONST])
        if name in ("reshape", "permute", "trans") and not dotted(node.func).startswith("tl."):
            return self.value(node.func.value, scope)
        return Value(OTHER)


def narrow_offsets(source, *others):
    """Offsets that may wrap in int32: a stride times what is not int64, and int32 products that reach a pointer.

    ``others`` are sources whose jit functions this one calls. Host arithmetic is Python's and cannot wrap.
    """
    own, functions = jit_functions(source), {}
    for text in (*others, source):
        functions.update(jit_functions(text))
    called = {
        dotted(call.func).rpartition(".")[2]
        for function in functions.values()
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
    }
    flow = Flow(functions)
    for name, function in own.items():
        if name not in called:
            flow.enter(function)
    return sorted(flow.violations)


def loose_dots(source):
    """Dots that leave their precision or their accumulator to Triton's defaults."""
    return [
        (call.lineno, f"{dotted(call.func)} without {word}")
        for call in calls(source)
        if dotted(call.func).startswith("tl.dot")
        for word in ("input_precision", "out_dtype")
        if word not in keywords(call)
    ]


def _is_guard(node):
    if isinstance(node, ast.IfExp):
        return _is_guard(node.body) and dotted(getattr(node.orelse, "func", None)).endswith("nullcontext")
    return isinstance(node, ast.Call) and dotted(node.func).endswith(("torch.cuda.device", "device_guard"))


def unguarded_launches(source):
    """Launches outside a ``with`` of the device of their tensors, and grids that are not one-dimensional."""
    kernels, found = jit_functions(source), []

    def visit(node, guarded):
        if isinstance(node, ast.With):
            guarded = guarded or any(_is_guard(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name, grid = dotted(node.func.value), node.func.slice
            if name in kernels or name.endswith("_kernel"):
                if not guarded:
                    found.append((node.lineno, f"{name} is launched outside a device guard"))
                if not isinstance(grid, ast.Tuple) or len(grid.elts) != 1:
                    found.append((node.lineno, f"the grid of {name} is not a tuple of one"))
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse(source), False)
    return found


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


def unsafe_calls(source):
    """Code that runs what a file or a caller's text says; pickle's errors may be named."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):  # under its own name pickle is seen where it is used
            names = [alias.name for alias in node.names if alias.name != "pickle" or alias.asname]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "pickle":
            names = [dotted(node)]
        for name in names:
            if name.partition(".")[0] in PICKLES and not name.endswith("Error"):
                found.append((node.lineno, name))
        if not isinstance(node, ast.Call):
            continue
        name, named = dotted(node.func), keywords(node)
        if name in ("eval", "exec", "os.system", "os.popen"):
            found.append((node.lineno, name))
        if name == "torch.load" and not is_literal(named.get("weights_only"), True):
            found.append((node.lineno, "torch.load without weights_only=True"))
        elif "weights_only" in named and not is_literal(named["weights_only"], True):
            found.append((node.lineno, "weights_only is not True"))
        for word in ("allow_pickle", "shell"):
            if word in named and not is_literal(named[word], False):
                found.append((node.lineno, f"{word} is not False"))
    return found


PDL_INSTRUCTIONS = {f"triton.language.extra.cuda.gdc_{word}" for word in ("launch_dependents", "wait")}


def beyond_the_interpreter(source):
    """Features that Triton's interpreter lacks, so that no CPU test could see the kernel; the two instructions of
    PDL apart, which change no result and which the ledger looks after."""
    banned = {"inline_asm_elementwise", "extern_elementwise", "libdevice", "extra", "make_block_ptr", "advance"}
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            words = [f"{module}.{alias.name}" for alias in node.names]
            names = [part for word in words if word not in PDL_INSTRUCTIONS for part in word.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        found += [(node.lineno, name) for name in names if name in banned]
    return found


def unordered_or_tuned(source):
    """Atomics, whose sums come in any order, but for those that count; and autotuning on a user's call."""
    tree = ast.parse(source)
    counts = [
        call.func
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and dotted(call.func) == "tl.atomic_add" and len(call.args) > 1
        if isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, int)
    ]
    return [
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and (node.attr.startswith("atomic_") or node.attr == "autotune")
        if node not in counts
    ]


def kept_kernels(source):
    """Kernels kept on a module or an instance: they cannot be copied or pickled with it."""
    kernels, found = jit_functions(source), []
    for node in ast.walk(ast.parse(source)):
        targets, value = [], None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.Call) and dotted(node.func) == "setattr" and len(node.args) == 3:
            targets, value = [ast.Attribute(node.args[0], "")], node.args[2]
        for target in targets:
            parts = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and hasattr(value, "elts") else ()
            for place, kept in parts or [(target, value)]:
                inside = [dotted(part) for part in ast.walk(kept)]
                names = [name for name in inside if name in kernels or name.endswith("_kernel")]
                if isinstance(place, (ast.Attribute, ast.Subscript)) and names:
                    found.append((node.lineno, f"{names[0]} is kept in {ast.unparse(place)}"))
    return found


def early_triton(source):
    """Imports outside functions of Triton, or of a kernel file that imports it."""
    found, open_nodes = [], [ast.parse(source)]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        open_nodes += ast.iter_child_nodes(node)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            kernel = parts[parts.index("kernels") + 1 :][:1] if "kernels" in parts else []
            if parts[0] == "triton" or (kernel and kernel[0] not in WITHOUT_TRITON):
                found.append((node.lineno, f"import of {name}"))
    return found


def masked_loads_without_other(source):
    """Loads whose masked lanes hold anything."""
    return [
        (call.lineno, ast.unparse(call))
        for call in calls(source)
        if dotted(call.func) == "tl.load" and ("mask" in keywords(call) or len(call.args) > 1)
        if "other" not in keywords(call)
    ]


def untyped_interfaces(source):
    """Public functions and methods, those that a kernel is compiled from aside, without a type somewhere."""
    found, compiled = [], jit_functions(source)

    def look_in(body, method):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                look_in(node.body, True)
            elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
                static = any(dotted(mark) == "staticmethod" for mark in node.decorator_list)
                listed = [*node.args.posonlyargs, *node.args.args][method and not static :]
                listed += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
                names = [argument.arg for argument in listed if argument.annotation is None]
                names += ["its result"] if node.returns is None else []
                if names and node.name not in compiled:
                    found.append((node.lineno, f"{node.name} has no type for {', '.join(names)}"))

    look_in(ast.parse(source).body, False)
    return found


# Words that this project once used for what has a name in its field.
_OWN_WORDS = re.compile(r"\b(rivals?|rows? of blocks|arrivals|describable|constructor words?)\b", re.IGNORECASE)


def own_words(source):
    lines = enumerate(source.splitlines(), 1)
    return [(number, match[0]) for number, line in lines for match in _OWN_WORDS.finditer(line)]


RULES = {
    narrow_offsets: KERNELS,
    loose_dots: KERNELS,
    unguarded_launches: KERNELS + PACKAGE,
    unsafe_calls: KERNELS + PACKAGE,
    beyond_the_interpreter: [path for path in KERNELS if path.name not in WITH_TWIN],
    unordered_or_tuned: KERNELS + PACKAGE,
    kept_kernels: KERNELS + PACKAGE,
    early_triton: PACKAGE + [ROOT / "kernels" / f"{name}.py" for name in (*WITHOUT_TRITON, "__init__")],
    masked_loads_without_other: KERNELS,
    untyped_interfaces: KERNELS + PACKAGE,
    own_words: KERNELS + PACKAGE + sorted((ROOT / "benchmarks").rglob("*.py")) + [ROOT / "README.md"],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule):
    assert len(RULES[rule]) >= 4
    found = []
    for path in RULES[rule]:
        others = [other.read_text() for other in KERNELS if other != path] if rule is narrow_offsets else []
        found += [f"{path.relative_to(ROOT)}:{line}: {words}" for line, words in rule(path.read_text(), *others)]
    assert not found, "\n".join(found)


def test_rules_see_the_kernels():
    """What the rules look for is there to be found."""
    sources = {path.stem: path.read_text() for path in KERNELS}
    for name in ("attention", "layer_norm", "gemm", "patch_embed"):
        assert [function for function in jit_functions(sources[name]) if function.endswith("_kernel")]
        launches = [call for call in calls(sources[name]) if isinstance(call.func, ast.Subscript)]
        assert launches and all(dotted(call.func.value) in jit_functions(sources[name]) for call in launches)
    counts = {word: sum(dotted(call.func) == word for text in sources.values() for call in calls(text))
              for word in ("tl.dot", "tl.load", "tl.store")}  # fmt: skip
    assert min(counts.values()) >= 5, counts


def widenings(source):
    """(line, source without it) for each place that makes an int64."""
    for call in calls(source):
        if not call.args or dotted(call.args[-1]) != "tl.int64":
            continue
        text = ast.get_source_segment(source, call)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "to":
            new = ast.get_source_segment(source, call.func.value)
        else:
            new = text.replace("tl.int64", "tl.int32")
        lines = source.encode().splitlines(keepends=True)
        begin = sum(map(len, lines[: call.lineno - 1])) + call.col_offset
        end = sum(map(len, lines[: call.end_lineno - 1])) + call.end_col_offset
        data = source.encode()
        yield call.lineno, (data[:begin] + new.encode() + data[end:]).decode()


@pytest.mark.parametrize("path", [path for path in KERNELS if "tl.int64" in path.read_text()], ids=lambda p: p.stem)
def test_every_int64_is_needed(path):
    """Any one of them taken away, the rule sees it."""
    source, others = path.read_text(), [other.read_text() for other in KERNELS if other != path]
    assert not narrow_offsets(source, *others)
    mutants = list(widenings(source))
    assert mutants
    unseen = [line for line, mutant in mutants if not narrow_offsets(mutant, *others)]
    assert not unseen, f"{path.name}: int64 of lines {unseen} can go without a violation"


JIT = "import triton\nimport triton.language as tl\n@triton.jit\n"

# rule: (bad snippets, good snippets)
SNIPPETS = {
    narrow_offsets: (
        [
            JIT + "def kernel(x_ptr, stride_n):\n    tl.load(x_ptr + tl.program_id(0) * stride_n)",
            JIT + "def kernel(x_ptr, stride_n, B: tl.constexpr):\n    x_ptr += B * stride_n",
            JIT + "def kernel(x_ptr, STRIDE_N: tl.constexpr):\n    p = x_ptr + tl.arange(0, 16) * STRIDE_N",
            JIT + "def kernel(x_ptr, n, width):\n    row = tl.program_id(0)\n    tl.load(x_ptr + row * width)",
            JIT + "def kernel(x_ptr, B: tl.constexpr):\n    i = (tl.program_id(0) * B).to(tl.int64)\n    x_ptr += i",
            JIT + "def kernel(x_ptr, B: tl.constexpr):\n    x_ptr += tl.program_id(0) * B + tl.arange(0, B)",
            JIT + "def kernel(n, B: tl.constexpr):\n    m = tl.program_id(0).to(tl.int64)\n    m = m < n * B",
            JIT + "def kernel(x_ptr, n, w):\n    for i in range(0, n):\n        x_ptr += i * w",
            JIT + "def kernel(x_ptr, n, F: tl.constexpr):\n    r = tl.program_id(0).to(tl.int64)\n"
            "    if F:\n        r = tl.program_id(0)\n    x_ptr += r * n",
            JIT + "def helper(r, stride):\n    return r * stride\n"
            "@triton.jit\ndef kernel(x_ptr, stride_n):\n    x_ptr += helper(tl.program_id(0), stride_n)",
            JIT + "def kernel(t):\n    tl.load(t.x_ptr + tl.program_id(0) * t.stride_n)",
            JIT + "def kernel(t, n):\n    row = tl.program_id(0)\n    tl.load(t.x_ptr + row * n)",
            JIT + "def kernel(x_ptr, n, S: tl.constexpr, B: tl.constexpr):\n    r = tl.program_id(0) % B\n"
            "    x_ptr += r * (tl.cdiv(tl.cdiv(n, B), S) * B)",
        ],
        [
            JIT + "def kernel(x_ptr, stride_n):\n    tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride_n)",
            JIT + "def kernel(x_ptr, stride_n, B: tl.constexpr):\n    x_ptr += tl.full([], B, tl.int64) * stride_n",
            JIT + "def kernel(t):\n    tl.load(t.x_ptr + tl.program_id(0).to(tl.int64) * t.stride_n)",
            JIT + "def kernel(x_ptr, B: tl.constexpr):\n    i = tl.program_id(0).to(tl.int64) * B\n    x_ptr += i",
            JIT + "def kernel(x_ptr, n, B: tl.constexpr):\n    p = tl.program_id(0)\n    q = p // n\n"
            "    x_ptr += (p - q * n) * B + tl.arange(0, B)",
            JIT
            + "def kernel(x_ptr, stride_n, A: tl.constexpr):\n    stride_n = stride_n // A * A\n    x_ptr += stride_n",
            JIT + "def helper(r, stride):\n    return r * stride\n"
            "@triton.jit\ndef kernel(x_ptr, stride_n):\n    x_ptr += helper(tl.program_id(0).to(tl.int64), stride_n)",
            JIT + "def kernel(x_ptr, n, S: tl.constexpr, B: tl.constexpr):\n    r = tl.program_id(0) % S\n"
            "    x_ptr += r * (tl.cdiv(tl.cdiv(n, B), S) * B)",
        ],
    ),
    loose_dots: (
        ["tl.dot(a, b)", "tl.dot(a, b, out_dtype=tl.float32)", "tl.dot(a, b, c, input_precision='tf32')"],
        ["tl.dot(a, b, c, input_precision=PRECISION, out_dtype=ACC)", "torch.dot(a, b)"],
    ),
    untyped_interfaces: (
        [
            "def f(x):\n    pass",
            "def f(x: int):\n    pass",
            "def f(*args, **options: int) -> None:\n    pass",
            "class A:\n    def f(self, x) -> None:\n        pass",
            "class A:\n    def __init__(self):\n        pass",
            "class A:\n    @staticmethod\n    def f(x) -> None:\n        pass",
        ],
        [
            "def _f(x):\n    pass",
            "def f(x: int, *, y: str = '') -> None:\n    pass",
            "class _A:\n    def f(self, x):\n        pass",
            "class A:\n    def f(self) -> None:\n        def g(x):\n            pass",
            JIT + "def f(x):\n    pass",
        ],
    ),
    own_words: (["# the best rival", "# Rows of blocks", "arrivals = 0"], ["# row by row", "arrival of the tile"]),
    unguarded_launches: (
        [
            "_f_kernel[(1,)](x)",
            "with torch.no_grad():\n    module._f_kernel[(1,)](x)",
            JIT + "def f(x):\n    pass\ndef launch(x):\n    f[(1,)](x)",
            "with torch.cuda.device(d):\n    _f_kernel[(1, 1)](x)",
            "with torch.cuda.device(d):\n    _f_kernel[grid](x)",
            "with torch.cuda.device(d) if cuda else torch.no_grad():\n    _f_kernel[(1,)](x)",
        ],
        [
            "with torch.cuda.device(d):\n    _f_kernel[(n,)](x)",
            "with launch.device_guard(x):\n    if x:\n        _f_kernel[(n,)](x)",
            "with torch.cuda.device(d) if cuda else contextlib.nullcontext():\n    _f_kernel[(n,)](x)",
            "VERBS[name](x)",
        ],
    ),
    unsafe_calls: (
        [
            "from pickle import loads",
            "import pickle\npickle.load(file)",
            "import pickle as p",
            "import dill",
            "torch.load(path)",
            "torch.load(path, weights_only=False)",
            "load(path, weights_only=flag)",
            "eval(text)",
            "exec(text)",
            "os.system(text)",
            "subprocess.run(text, shell=True)",
            "np.load(path, allow_pickle=True)",
        ],
        [
            "torch.load(path, weights_only=True)",
            "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    pass",
            "model.eval()",
            "ast.literal_eval(text)",
            "np.load(path, allow_pickle=False)",
            "subprocess.run([program])",
        ],
    ),
    beyond_the_interpreter: (
        [
            "tl.inline_asm_elementwise('', '', [], tl.float32, True, 1)",
            "tl.extra.cuda.libdevice.tanh(x)",
            "from triton.language.extra import libdevice",
            "tl.make_block_ptr(x, (1,), (1,), (0,), (16,), (0,))",
            "pointer = tl.advance(pointer, (0, 16))",
        ],
        ["tl.exp2(x)", "from triton.tools.tensor_descriptor import TensorDescriptor"],
    ),
    unordered_or_tuned: (
        [
            "tl.atomic_add(x_ptr, x)",
            "tl.atomic_add(x_ptr, 1.0)",
            "tl.atomic_max(x_ptr, 1)",
            "@triton.autotune([], [])\ndef f():\n    pass",
        ],
        ["tl.store(x_ptr, x)", "tl.sum(x, 0)", "tl.atomic_add(count_ptr, 1, sem='acq_rel')"],
    ),
    kept_kernels: (
        [
            "self.run = _f_kernel",
            JIT + "def f(x):\n    pass\nclass A:\n    def __init__(self):\n        self.run = f",
            "self.runs = [attention._f_kernel]",
            "self.a, self.b = 1, _f_kernel",
            "setattr(module, 'run', _f_kernel)",
        ],
        ["run = _f_kernel", "self.run = reference.layer_norm"],
    ),
    early_triton: (
        [
            "import triton",
            "import triton.language as tl",
            "from triton import language",
            "try:\n    import triton\nexcept ImportError:\n    pass",
            "from .kernels import attention",
            "from vit_fast.kernels.linear import linear",
            "from .kernels.layer_norm import layer_norm",
        ],
        [
            "def f():\n    import triton",
            "from .kernels import arguments, reference",
            "from .kernels.arguments import UnsupportedError",
            "from .triton import TRITON",
            "import torch",
        ],
    ),
    masked_loads_without_other: (
        ["tl.load(p, mask=m)", "tl.load(p, m)"],
        ["tl.load(p)", "tl.load(p, mask=m, other=0.0)", "tl.store(p, x, mask=m)"],
    ),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_can_fail(rule):
    bad, good = SNIPPETS[rule]
    assert [snippet for snippet in bad if not rule(snippet)] == []
    assert [(snippet, rule(snippet)) for snippet in good if rule(snippet)] == []
    last = bad[0].count("\n") + 1
    assert all(1 <= line <= last + 1 and words for line, words in rule(bad[0]))
    shifted = [(line + 2, words) for line, words in rule(bad[0])]
    assert rule("\n\n" + bad[0]) == shifted
