"""What this device's memory and libraries reach, in one run: the ceilings for every claim of speed.

    python -P benchmarks/limits.py --json FILE [--seconds 90] [--device cuda:0] [--only copy]

Copies, matrix products at the shapes of ViT-S, B, L and H (alone, with bias, with cuBLASLt's GELU, with a residual as
C; of ViT-B at the largest batch also in float8 e4m3, with a scale a tensor and a scale a row), GELU and LayerNorm as
kernels of their own, attention by backend, loads from L2 without arithmetic, and the cost of a launch, also in a stack
of our prepared blocks with and without programmatic dependent launch (``configs.use_pdl``), and with the tiles of every
other product in reverse (``configs.alternate_tile_order``). On a GPU a time is
the median of single calls between CUDA events, the L2 cache overwritten before each; "sustained" is the mean of calls
back to back for half a second, at the clock that the chip then keeps (short calls are captured in a CUDA graph for it,
so that the device and not the host sets the pace, and find their data in L2). Inputs are random bfloat16, or e4m3 with
bfloat16 results. An item that fails says why and the next one runs; one that does not fit into memory is tried with
half the images. FILE is written after every item. On a CPU the sizes are small and say nothing about a GPU.
"""

import contextlib
import functools
import gc
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit_fast.kernels import configs, folding

import vit_fast
from vit_fast.bench import machine, measure
from vit_fast.bench.errors import WrongValueError

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError as error:
    triton, triton_missing = None, error

TOWERS = {  # name: (tokens, width, MLP width)
    "ViT-B": (197, 768, 3072),
    "ViT-S": (197, 384, 1536),
    "ViT-L": (197, 1024, 4096),
    "ViT-H": (257, 1280, 5120),
}
ATTENTION = ((12, 197, 64), (12, 257, 64), (12, 577, 64), (16, 256, 72), (16, 257, 80))  # heads, tokens, head size
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Figures = dict[str, Any]  # the row of an item, or a part of it
FORMS = ("alone", "bias", "bias + GELU", "residual")
FLOAT8_FORMS = ("float8, a scale a tensor", "float8, a scale a row")
CHAIN = 64  # dependent launches
DEPTH = 12  # blocks of a stack
TILE_ROWS, TILE_COLUMNS = 128, 32  # of int32: 16 KiB


@dataclass(frozen=True)
class Item:
    """One thing to measure: ``work(images)`` returns its figures; without ``images``, ``work()``."""

    name: str
    shape: str
    work: Callable
    images: int | None = None
    needs_cuda: bool = False


@dataclass(frozen=True)
class Clock:
    """Takes times on one device."""

    device: torch.device
    calls: int
    sustained_seconds: float

    def once(self, call: Callable[[], Any]) -> float:
        """Median seconds of a single call."""
        for _ in range(3):
            call()
        return statistics.median(measure.step_times(call, self.calls, self.device))

    def back_to_back(self, call: Callable[[], Any], one: float) -> float:
        """Mean seconds of calls back to back; ``one`` is about the time of one."""
        repeat = 1
        if self.device.type == "cuda" and one < 50e-6:
            repeat = 50
            call = captured(call, repeat)
        count = max(3, math.ceil(self.sustained_seconds / (one * repeat)))

        def work():
            for _ in range(count):
                call()

        return measure.seconds(work, self.device)[0] / (count * repeat)

    def figures(
        self, call: Callable[[], Any], flop: int | None = None, moved: int | None = None, sustained: bool = False
    ) -> dict[str, float]:
        """The figures of a call that does so many FLOP or moves so many bytes."""
        one = self.once(call)
        row = {"us": 1e6 * one}
        if flop:
            row["tflops"] = flop / one / 1e12
        if moved:
            row["tbs"] = moved / one / 1e12
        if sustained:
            lasting = self.back_to_back(call, one)
            row |= {"sustained_us": 1e6 * lasting, "sustained_tflops": flop / lasting / 1e12}
        return row

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random bfloat16 numbers on the device."""
        return (torch.randn(shape, device=self.device) * scale).to(torch.bfloat16)


def captured(call: Callable[[], Any], repeat: int) -> Callable[[], None]:
    """A call that replays a CUDA graph of ``repeat`` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the setup of a first call must not be captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph.replay


if triton is not None:

    @triton.jit
    def _add_one_kernel(out_ptr, x_ptr, size, PDL: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        if PDL:
            gdc_wait()
        x = tl.load(x_ptr + index, mask=index < size)
        if PDL:
            gdc_launch_dependents()
        tl.store(out_ptr + index, x + 1, mask=index < size)

    @triton.jit
    def _load_tiles_kernel(
        out_ptr, tiles, count, rounds, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr
    ):
        """out[p] = sum of ``rounds`` tiles of [count·ROWS, COLUMNS], from the p-th on, cyclically."""
        program = tl.program_id(0)
        total = tl.zeros([ROWS, COLUMNS], tl.int32)
        for turn in tl.range(0, rounds, num_stages=STAGES):
            total += tiles.load([(program + turn) % count * ROWS, 0])
        tl.store(out_ptr + program, tl.sum(tl.sum(total, 1), 0))


def load_tiles(words: torch.Tensor, programs: int, rounds: int, stages: int = 4) -> torch.Tensor:
    """int32 [programs]: every program reads ``rounds`` tiles by TMA and sums them."""
    count = words.shape[0] // TILE_ROWS
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    tiles = TensorDescriptor(words, list(words.shape), list(words.stride()), [TILE_ROWS, TILE_COLUMNS])
    _load_tiles_kernel[(programs,)](
        out, tiles, count, rounds, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, STAGES=stages, num_warps=4
    )
    return out


def expected_tile_sums(words: torch.Tensor, programs: int, rounds: int) -> torch.Tensor:
    """What ``load_tiles`` returns, by PyTorch."""
    sums = words.view(-1, TILE_ROWS * TILE_COLUMNS).sum(1, dtype=torch.int64)
    turns = torch.arange(rounds, device=words.device)
    picked = [sums[(program + turns) % len(sums)].sum() for program in range(programs)]
    return torch.stack(picked).to(torch.int32)


def add_one(out: torch.Tensor, x: torch.Tensor, pdl: bool) -> None:
    """out = x + 1; ``pdl``: by programmatic dependent launch."""
    launch = {"launch_pdl": True} if pdl else {}
    _add_one_kernel[(triton.cdiv(x.numel(), 1024),)](out, x, x.numel(), PDL=pdl, BLOCK=1024, num_warps=4, **launch)


def copy(clock: Clock, size: int) -> Figures:
    """A copy of so many bytes."""
    rate = measure.copy_bandwidth(clock.device, size)
    return {"us": 2e6 * size / rate, "tbs": rate / 1e12}


def float8_product(clock: Clock, form: str, rows: int, k: int, n: int) -> Callable[[], torch.Tensor]:
    """A call that multiplies e4m3 tensors; quantising them is not part of it."""
    x, weight = (clock.random(*shape).to(folding.E4M3) for shape in ((rows, k), (n, k)))
    shapes = ((), ()) if form == "float8, a scale a tensor" else ((rows, 1), (1, n))
    scales = (0.5 + torch.rand(shape, device=clock.device) for shape in shapes)
    return functools.partial(torch._scaled_mm, x, weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def product(clock: Clock, form: str, tokens: int, k: int, n: int, sustained: bool, images: int = 1) -> Figures:
    """A matrix product of one of the ``FORMS`` or ``FLOAT8_FORMS``."""
    rows = images * tokens
    if form in FLOAT8_FORMS:
        call = float8_product(clock, form, rows, k, n)
        return {"shape": f"{rows}×{k}→{n}"} | clock.figures(call, flop=2 * rows * k * n, sustained=sustained)
    x, weight = clock.random(rows, k), clock.random(n, k, scale=k**-0.5)
    bias, residual = clock.random(n), clock.random(rows, n) if form == "residual" else None
    call = {
        "alone": lambda: F.linear(x, weight),
        "bias": lambda: F.linear(x, weight, bias),
        "bias + GELU": lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True),
        "residual": lambda: torch.addmm(residual, x, weight.t()),
    }[form]
    return {"shape": f"{rows}×{k}→{n}"} | clock.figures(call, flop=2 * rows * k * n, sustained=sustained)


def gelu(clock: Clock, tokens: int, width: int, images: int) -> Figures:
    """GELU (erf) as a kernel of its own."""
    x = clock.random(images * tokens, width)
    return {"shape": f"{len(x)}×{width}"} | clock.figures(lambda: F.gelu(x), moved=2 * x.nbytes)


def layer_norm(clock: Clock, tokens: int, width: int, images: int) -> Figures:
    """LayerNorm as a kernel of its own."""
    x, weight, bias = clock.random(images * tokens, width), clock.random(width), clock.random(width)
    call = functools.partial(F.layer_norm, x, (width,), weight, bias, 1e-6)
    return {"shape": f"{len(x)}×{width}"} | clock.figures(call, moved=2 * x.nbytes)


def attention(clock: Clock, backend: str, heads: int, tokens: int, head_size: int, images: int) -> Figures:
    """scaled_dot_product_attention by one backend."""
    q, k, v = clock.random(images, tokens, 3, heads, head_size).permute(2, 0, 3, 1, 4).unbind(0)

    flop, moved = 4 * images * heads * tokens**2 * head_size, 4 * q.nbytes
    with sdpa_kernel([SDPA[backend]]):
        row = clock.figures(lambda: F.scaled_dot_product_attention(q, k, v), flop, moved)
    return {"shape": f"{images}×{heads}×{tokens}×{head_size}"} | row


def l2_loads(clock: Clock) -> Figures:
    """Loads by TMA from a tensor that stays in L2, without arithmetic."""
    if triton is None:
        raise triton_missing
    size, rounds = 16 << 20, 256
    shape = (size // 4 // TILE_COLUMNS, TILE_COLUMNS)
    words = torch.randint(-1000, 1000, shape, dtype=torch.int32, device=clock.device)  # no sum overflows
    programs = 4 * torch.cuda.get_device_properties(clock.device).multi_processor_count
    found = load_tiles(words, programs, rounds)
    if not torch.equal(found, expected_tile_sums(words, programs, rounds)):
        raise AssertionError("the tiles that were loaded do not sum to what they hold")
    moved = programs * rounds * TILE_ROWS * TILE_COLUMNS * 4
    one = clock.once(lambda: load_tiles(words, programs, rounds))
    return {"us": 1e6 * one, "tbs": moved / one / 1e12, "note": "the first round fills L2 from memory"}


def launches(clock: Clock, step: Callable[..., None], graph: bool) -> Figures:
    """Microseconds of each of CHAIN dependent launches; ``step(out, x)`` sets out = x + 1."""
    buffers = [torch.zeros(4096, device=clock.device) for _ in range(2)]

    def call():
        for turn in range(CHAIN):
            step(buffers[1 - turn % 2], buffers[turn % 2])

    call()
    run = captured(call, 1) if graph else call
    before = buffers[0].clone()
    run()
    if not torch.equal(buffers[0], before + CHAIN):
        raise AssertionError(f"{CHAIN} dependent steps of + 1 do not add {CHAIN}")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(clock.calls)]
    for start, end in events:
        torch.cuda.synchronize(clock.device)
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(clock.device)
    return {"us": 1e3 * statistics.median(start.elapsed_time(end) for start, end in events) / CHAIN}


def stack(clock: Clock, tower: str, rule: str, on: bool, images: int = 1) -> Figures:
    """A stack of prepared blocks in a CUDA graph, with what ``configs.use_pdl`` or ``configs.alternate_tile_order``
    (``rule``) decides ``on`` or off. The results must be equal."""
    tokens, width, hidden = TOWERS[tower]

    def linear(rows, columns):
        return clock.random(rows, columns, scale=columns**-0.5), clock.random(rows)

    def block():
        first = ((None, None), linear(3 * width, width), linear(width, width), None)
        return folding.prepare_block(*first, (None, None), linear(hidden, width), linear(width, hidden), None)

    x, weights = clock.random(images, tokens, width), folding.flatten(block() for _ in range(DEPTH))

    def call():
        return vit_fast.ops.prepared_blocks(x, weights, width // 64, 0.125, "gelu", 1e-6, 1e-6)

    shipped = getattr(configs, rule)
    with vit_fast.backend("triton"):
        try:
            setattr(configs, rule, lambda *arguments: False)
            expected = call()
            setattr(configs, rule, lambda *arguments: on)
            if not torch.equal(call(), expected):
                raise AssertionError(f"kernels compute something else with {rule}")
            run = captured(call, 1)
        finally:
            setattr(configs, rule, shipped)
    return clock.figures(run)


def host_cost(clock: Clock, make: Callable[[], Callable[[], Any]]) -> Figures:
    """Microseconds of host time of a call; on a GPU its kernels run asynchronously."""
    call, count, best = make(), 200, math.inf
    call()
    for _ in range(5):
        measure.synchronize(clock.device)
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - start)
    measure.synchronize(clock.device)
    return {"us": 1e6 * best / count}


def triton_step(pdl: bool) -> Callable[..., None]:
    """A step of ``launches`` by a Triton kernel."""

    def step(out, x):
        if triton is None:
            raise triton_missing
        add_one(out, x, pdl)

    return step


def host_items(clock: Clock) -> Iterator[Item]:
    """What a call costs on the host."""

    def operator():
        x = torch.zeros(1, device=clock.device)
        return lambda: torch.add(x, 1.0)

    def linear():
        x, weight = clock.random(1, 64), clock.random(64, 64)
        return lambda: F.linear(x, weight)

    def fused():
        x, weight, bias = clock.random(1, 64), clock.random(64), clock.random(64)
        return lambda: vit_fast.ops.layer_norm(x, weight, bias)

    def kernel():
        x, out = (torch.zeros(1, device=clock.device) for _ in range(2))
        return lambda: triton_step(False)(out, x)

    for name, make in (("torch.add", operator), ("F.linear", linear), ("vit_fast.ops.layer_norm", fused)):
        yield Item(f"host cost of {name}", "1 row", functools.partial(host_cost, clock, make))
    yield Item("host cost of a Triton launch", "1 row", functools.partial(host_cost, clock, kernel), needs_cuda=True)


def launch_items(clock: Clock, images: int) -> Iterator[Item]:
    """What a launch costs on the device, and what the order of tiles does."""
    shape = f"{CHAIN} × 4096 elements"

    def torch_step(out, x):
        torch.add(x, 1.0, out=out)

    for name, step, graph in (
        ("from the host", torch_step, False),
        ("in a CUDA graph", torch_step, True),
        ("in a CUDA graph, Triton", triton_step(False), True),
        ("in a CUDA graph, Triton with launch_pdl", triton_step(True), True),
    ):
        work = functools.partial(launches, clock, step, graph)
        yield Item(f"dependent launch {name}", shape, work, needs_cuda=True)
    for name, on in (("in turn", False), ("early", True)):
        work, shape = functools.partial(stack, clock, "ViT-B", "use_pdl", on), f"{DEPTH} of ViT-B, 1 image"
        yield Item(f"prepared blocks in a CUDA graph, launched {name}", shape, work, needs_cuda=True)
    for name, on in (("one order", False), ("alternate order", True)):
        work = functools.partial(stack, clock, "ViT-B", "alternate_tile_order", on)
        shape = f"{DEPTH} of ViT-B, {images} images"
        yield Item(f"prepared blocks in a CUDA graph, tiles in {name}", shape, work, images, needs_cuda=True)


def product_items(clock: Clock, towers: Iterable[str], images: int, forms: tuple[str, ...] = FORMS) -> Iterator[Item]:
    """The matrix products of a transformer block."""
    for tower in towers:
        tokens, width, hidden = TOWERS[tower]
        for layer, k, n in (
            ("qkv", width, 3 * width),
            ("proj", width, width),
            ("fc1", width, hidden),
            ("fc2", hidden, width),
        ):
            many, shape = images if images > 1 else None, f"{images * tokens}×{k}→{n}"
            for form in forms:
                sustained = form == "alone" or tower == "ViT-B"
                work = functools.partial(product, clock, form, tokens, k, n, sustained)
                yield Item(f"{tower} {layer}, {form}", shape, work, many, needs_cuda=form in FLOAT8_FORMS)


def items(clock: Clock, on_gpu: bool) -> Iterator[Item]:
    """All items, the most telling first: time may run out."""
    images, square = (256, 8192) if on_gpu else (1, 512)
    for size in (1 << 30, 256 << 20, 4 << 30) if on_gpu else (64 << 20,):
        yield Item("copy", f"{size >> 20} MiB", functools.partial(copy, clock, size))
    work = functools.partial(product, clock, "alone", square, square, square, True)
    yield Item("square product", f"{square}×{square}→{square}", work)
    yield from product_items(clock, ["ViT-B"], images, FORMS + FLOAT8_FORMS)
    tokens, width, hidden = TOWERS["ViT-B"]
    rows = images * tokens
    yield Item("GELU (erf)", f"{rows}×{hidden}", functools.partial(gelu, clock, tokens, hidden), images)
    yield Item("LayerNorm", f"{rows}×{width}", functools.partial(layer_norm, clock, tokens, width), images)
    for heads, tokens, head_size in ATTENTION:
        for backend in SDPA:
            work = functools.partial(attention, clock, backend, heads, tokens, head_size)
            shape, needs_cuda = f"{images}×{heads}×{tokens}×{head_size}", backend in ("cudnn", "efficient")
            yield Item(f"attention, {backend}", shape, work, images, needs_cuda)
    yield from launch_items(clock, images)
    yield from host_items(clock)
    yield Item("loads from L2 by TMA", "16 KiB tiles of 16 MiB", functools.partial(l2_loads, clock), needs_cuda=True)
    if on_gpu:
        yield from product_items(clock, TOWERS, 1)
        yield from product_items(clock, [tower for tower in TOWERS if tower != "ViT-B"], images)


def measured(item: Item, on_gpu: bool) -> Figures:
    """The row of an item, also if the item fails."""
    row = {"name": item.name, "shape": item.shape}
    if item.needs_cuda and not on_gpu:
        return row | {"note": "needs a CUDA device"}
    images, note = item.images, ""
    while True:
        try:
            with torch.inference_mode():
                found = item.work() if images is None else item.work(images=images)
            return row | found | ({"note": note} if note else {})
        except Exception as error:  # recorded in the row of this item; the others go on
            if isinstance(error, torch.OutOfMemoryError) and images and images > 1:
                images //= 2
                note = f"{item.images} images do not fit: measured with {images}"
            else:
                return row | {"note": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        release(on_gpu)  # here, after the exception and the tensors in its frames are freed


def release(on_gpu: bool) -> None:
    """Frees cached memory that nothing refers to."""
    gc.collect()
    if on_gpu:
        with contextlib.suppress(RuntimeError):  # after an illegal access every call fails; each item reports it
            torch.cuda.empty_cache()


def facts(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    known = {
        "device": str(device),
        "device_name": machine.name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__ if triton else None,
        "commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size >> 20,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return known


def write(path: Path, known: dict[str, Any], rows: list[Figures]) -> None:
    """The file of the results."""
    path.write_text(json.dumps({"machine": known, "items": rows}, indent=1, ensure_ascii=False) + "\n")


def print_rows(known: dict[str, Any], rows: list[Figures]) -> None:
    """The items as a table."""
    columns = (("us", "µs"), ("tflops", "TFLOP/s"), ("tbs", "TB/s"))
    columns += (("sustained_us", "sustained µs"), ("sustained_tflops", "sustained TFLOP/s"))
    table = Table("item", "shape", title=f"{known['device_name']}, torch {known['torch']}")
    for _, head in columns:
        table.add_column(head, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        figures = (f"{row[key]:.4g}" if key in row else "" for key, _ in columns)
        table.add_row(row["name"], row["shape"], *figures, row.get("note", ""))
    console = Console()
    Console(width=None if console.is_terminal else 180, markup=False).print(table)
    if known["device"] == "cpu":
        print("These are CPU numbers, of small sizes: they say nothing about a GPU.")


def main(
    path: Annotated[Path, typer.Option("--json", help="Write machine and items here.")],
    seconds: Annotated[float, typer.Option(min=1.0, help="Time; what does not fit into it is not measured.")] = 90.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one]")] = None,
    only: Annotated[str, typer.Option(help="A regular expression: items whose names it matches.")] = "",
) -> None:
    """What this device's memory and libraries reach; see the head of benchmarks/limits.py."""
    begun = time.monotonic()
    try:
        target = machine.target_device(device)
    except WrongValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    on_gpu = target.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    clock = Clock(target, calls=20, sustained_seconds=0.5) if on_gpu else Clock(target, calls=3, sustained_seconds=0.02)
    known = facts(target) | {"before": machine.gpu_state(target)}
    rows = []
    for item in items(clock, on_gpu):
        if not re.search(only, item.name):
            continue
        if time.monotonic() - begun > seconds:
            rows.append({"name": item.name, "shape": item.shape, "note": "not measured: no time left"})
            continue
        rows.append(measured(item, on_gpu))
        release(on_gpu)
        write(path, known, rows)
    write(path, known | {"after": machine.gpu_state(target)}, rows)
    print_rows(known, rows)
    print(f"items: {path}")


if __name__ == "__main__":
    typer.run(main)
