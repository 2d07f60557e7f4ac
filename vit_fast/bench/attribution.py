"""The events of torch.profiler's Chrome trace, attributed: one row for each operation of a model.

On a GPU the work is kernels, copies and fills. Each belongs to the host event that launched it (found by the
correlation number of the launch, or by its external id), and so to the outermost operator call around it that the
forward pass is known to make (``operations.forward_operations``); equal calls are told apart by their order. On a CPU
the work is the operators themselves: a known call counts with all that it calls, any other operator with its own time.
Where one call has several operations, each gets the next kernel of its family ("linear", "attention" and so on). So do
operations whose calls are not in the trace, because one operator or one CUDA graph runs them all, if there are as many
kernels of a family as operations. A kernel that belongs to no operation has a row under its own name.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .operations import Call, Operation, operator_name, tensor_sizes

STEP = "vit_fast profile step"  # the record_function around each forward pass
_HOST, _LAUNCH = ("cpu_op", "user_annotation"), ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")

# Operation families by pattern in a kernel's name; the first match counts. Kernels that inductor generates from several
# pointwise operations carry the names of all around them and have no family; nor have the reductions of split-K.
_FAMILIES = (
    (None, r"^triton_(poi|per|red)_|splitk.?reduce"),
    ("linear", r"^triton_tem_.*mm"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("patch_embed", r"patch_embed|fprop|conv(?!ert)"),
    ("layer_norm", r"layer_?norm|quantise_tokens"),
    ("linear", r"_linear_|gemm|nvjet|cutlass|cublas"),
)
_FAMILY_OF_OPERATION = {"convolution": "patch_embed"}


def family(kernel: str) -> str | None:
    """The kind of operation that a kernel's name stands for, or None."""
    return next((word for word, pattern in _FAMILIES if re.search(pattern, kernel, re.IGNORECASE)), None)


@dataclass
class KernelRow:
    """One operation, or one kernel or operator without an operation; figures are per step, times in seconds.

    Attributes:
        seconds: the measured time; ``roofline``: the roofline bound.
        kernels: kernel (on a CPU: operator) → how often it ran for this operation.
    """

    operation: str
    module: str
    calls: float = 0.0
    seconds: float = 0.0
    flop: float | None = None
    bytes: float | None = None
    roofline: float | None = None
    kernels: Counter[str] = field(default_factory=Counter)


@dataclass
class Attribution:
    """Rows in the order of the forward pass, then those without an operation; and seconds of the step: ``span`` from
    the first work to the last, ``gaps`` the part of it without any work, ``overlap`` of works that ran in parallel."""

    rows: list[KernelRow]
    span: float
    gaps: float
    overlap: float


class _Host:
    """A host event as a node of the tree of nested host events."""

    def __init__(self, event, parent):
        self.event, self.parent = event, parent
        # Inductor puts a hash behind the name of a compiled graph.
        self.name = "CompiledFxGraph" if "CompiledFxGraph" in event["name"] else event["name"]
        self.start, self.end = event["ts"], event["ts"] + event["dur"]
        self.inner = 0.0
        self.claim = None

    def operator(self):
        """Name of the nearest enclosing operator."""
        node = self
        while node and (node.event["cat"] in _LAUNCH or node.name == STEP):
            node = node.parent
        return node.name if node else ""


@dataclass
class _Work:
    name: str
    start: float
    duration: float
    host: _Host | None
    grid: str = ""


@dataclass(eq=False)
class _Claim:
    """One occurrence of a known call in the trace."""

    operations: tuple[Operation, ...] = ()
    works: list[_Work] = field(default_factory=list)


class _Calls:
    """The calls of a forward pass by operator and sizes; equal ones are told apart by their order."""

    def __init__(self, calls):
        self.calls = calls
        self.known, self.claims = defaultdict(list), defaultdict(list)
        for call in calls:
            self.known[call.operator, call.sizes].append(call)

    def claim(self, event):
        """A claim if an event is a known call, else None; ignores outputs that the profiler lists after the inputs."""
        sizes = tensor_sizes(event.get("args", {}).get("Input Dims", ()))
        for length in range(len(sizes), 0, -1):
            key = operator_name(event["name"]), sizes[:length]
            if key in self.known:
                self.claims[key].append(_Claim())
                return self.claims[key][-1]
        return None

    def settle(self, steps):
        """Gives every claim its operations; returns the operations of calls that were not claimed in every step."""
        complete = {key for key, calls in self.known.items() if len(self.claims[key]) == steps * len(calls)}
        for key, calls in self.known.items():
            operations = [call.operations for call in calls] if key in complete else [_any_of(calls)]
            for turn, claim in enumerate(self.claims[key]):
                claim.operations = operations[turn % len(operations)]
        unseen = (call for call in self.calls if (call.operator, call.sizes) not in complete)
        return [operation for call in unseen for operation in call.operations]


def _any_of(calls):
    """The operations of one of several equal calls that cannot be told apart, with the names of all their modules."""
    places = zip(*(call.operations for call in calls), strict=True)
    return tuple(replace(same[0], module=" or ".join(dict.fromkeys(o.module for o in same))) for same in places)


def _host_tree(events, calls):
    """All host events, parents before children, with the claims of known calls handed down."""
    nodes, stacks = [], defaultdict(list)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = stacks[event["pid"], event["tid"]]
        while stack and event["ts"] >= stack[-1].end:
            stack.pop()
        parent = stack[-1] if stack else None
        node = _Host(event, parent)
        if parent:
            parent.inner += event["dur"]
        node.claim = parent.claim if parent and parent.claim else calls.claim(event)
        stack.append(node)
        nodes.append(node)
    return nodes


def _device_works(events, nodes):
    launches, operators = {}, {}
    for node in nodes:
        index, number = (launches, "correlation") if node.event["cat"] in _LAUNCH else (operators, "External id")
        if node.event.get("args", {}).get(number):
            index[node.event["args"][number]] = node
    for event in events:
        facts = event.get("args", {})
        host = launches.get(facts.get("correlation")) or operators.get(facts.get("External id"))
        grid = "×".join(map(str, facts.get("grid", ())))
        yield _Work(event["name"], event["ts"], event["dur"], host, grid)


def _host_works(nodes):
    for node in nodes:
        inside = node.claim and node.parent and node.parent.claim is node.claim
        if node.name != STEP and not inside:
            own = node.event["dur"] if node.claim else max(node.event["dur"] - node.inner, 0.0)
            yield _Work(node.name, node.start, own, node)


def share_out(works: Iterable[Any], operations: Iterable[Operation]) -> Iterator[tuple[Any, Operation | None]]:
    """Pairs (work, operation or None): each operation gets the next work of its family, by the works' ``name``."""
    waiting = defaultdict(list)
    for operation in operations:
        waiting[_FAMILY_OF_OPERATION.get(operation.name, operation.name)].append(operation)
    for work in works:
        queue = waiting.get(family(work.name) or "")
        yield work, queue.pop(0) if queue else None


def _align(works, operations, steps):
    """Pairs (work, operation or None) for calls that are not in the trace: matches works by family and order.

    Matched only where a family has as many kernels as operations in each step.
    """
    by_family = defaultdict(list)
    for operation in operations:
        by_family[_FAMILY_OF_OPERATION.get(operation.name, operation.name)].append(operation)
    counts = Counter(family(work.name) for work in works)
    turn = Counter()
    for work in works:
        kind = family(work.name)
        fitting = by_family.get(kind, ())
        if fitting and counts[kind] == steps * len(fitting):
            yield work, fitting[turn[kind] % len(fitting)]
            turn[kind] += 1
        else:
            yield work, None


def _busy(works):
    """Length of the union of the intervals."""
    total, end = 0.0, float("-inf")
    for work in sorted(works, key=lambda work: work.start):
        total += max(work.start + work.duration - max(work.start, end), 0.0)
        end = max(end, work.start + work.duration)
    return total


class _Table:
    def __init__(self, calls, steps, *rates):
        self.steps, self.rates = steps, rates
        self.known = {}
        for call in calls:
            for operation in call.operations:
                self.row_of(operation)
        self.others = {}

    def row_of(self, operation):
        key = operation.name, operation.module
        return self.known.setdefault(key, KernelRow(*key, flop=0.0, bytes=0.0, roofline=0.0))

    def add_call(self, operation):
        row = self.row_of(operation)
        row.calls += 1 / self.steps
        row.flop += operation.flop / self.steps
        row.bytes += operation.bytes / self.steps
        row.roofline += operation.roofline_seconds(*self.rates) / self.steps

    def add_work(self, work, operation):
        if operation:
            row = self.row_of(operation)
        else:
            operator = work.host.operator() if work.host else ""
            name = f"{work.name} [{work.grid}]" if work.grid else work.name
            key = name, "" if operator == work.name else operator
            row = self.others.setdefault(key, KernelRow(*key))
            row.calls += 1 / self.steps
        row.seconds += work.duration * 1e-6 / self.steps
        row.kernels[work.name] += 1 / self.steps

    def rows(self):
        others = sorted(self.others.values(), key=lambda row: -row.seconds)
        return [row for row in self.known.values() if row.calls] + others


def attribute(
    events: Iterable[dict[str, Any]],
    calls: list[Call],
    steps: int,
    on_gpu: bool,
    flop_rate: float,
    byte_rate: float,
    narrow_rate: float | None = None,
) -> Attribution:
    """``Attribution`` of the complete events of a trace that holds ``steps`` forward passes, each inside ``STEP``.

    Args:
        events: the list ``traceEvents`` of a Chrome trace.
        calls: of one forward pass, from ``forward_operations``.
        flop_rate, byte_rate, narrow_rate: rates that the device reaches, for the roofline bounds.
    """
    events = [event for event in events if event.get("ph") == "X" and "dur" in event]
    table = _Table(calls, steps, flop_rate, byte_rate, narrow_rate)
    known = _Calls(calls)
    nodes = _host_tree([e for e in events if e.get("cat") in _HOST + _LAUNCH], known)
    unseen = known.settle(steps)
    if on_gpu:
        works = list(_device_works([e for e in events if e.get("cat") in _DEVICE], nodes))
    else:
        works = list(_host_works(nodes))
    works.sort(key=lambda work: work.start)

    def add_pairs(pairs):
        for work, operation in pairs:
            if operation:
                table.add_call(operation)
            table.add_work(work, operation)

    claims, unclaimed = {}, []
    for work in works:
        if claim := work.host and work.host.claim:
            claims[id(claim)] = claim
            claim.works.append(work)
        else:
            unclaimed.append(work)
    for claim in claims.values():
        if len(claim.operations) == 1:
            table.add_call(claim.operations[0])
            for work in claim.works:
                table.add_work(work, claim.operations[0])
        else:
            add_pairs(share_out(claim.works, claim.operations))
    add_pairs(_align(unclaimed, unseen, steps))
    return Attribution(table.rows(), *(1e-6 * value / steps for value in _times(works, nodes, on_gpu)))


def _times(works, nodes, on_gpu):
    """(span, gaps, overlap) in microseconds, summed over all steps."""
    total = sum(work.duration for work in works)
    if not on_gpu:
        span = sum(node.event["dur"] for node in nodes if node.name == STEP)
        return span, max(span - total, 0.0), 0.0
    if not works:
        return 0.0, 0.0, 0.0
    span = max(work.start + work.duration for work in works) - works[0].start
    busy = _busy(works)
    return span, span - busy, total - busy
