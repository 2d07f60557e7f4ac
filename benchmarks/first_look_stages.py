"""The measurements of the first look at a GPU that no other script has; each writes its result as it goes.

    python -P benchmarks/first_look_stages.py NAME --json FILE [--device meta]

    stacks     two prepared blocks of ViT-B/16 at batch 256 with each form of the row statistics
    epilogues  what each part of an epilogue costs: fc1 and proj of ViT-B/16 at batch 256
    once       the two as prepared, once each: for ncu
    tiny       small split-K, PDL and linear_hopper calls against float64: for compute-sanitizer
    replays    1,000 replays of a captured stack on two streams at once, compared bit by bit
    sustained  a large product for ten seconds: rate, clocks, power

Correctness comes before time: what is out of the error budget is not timed. --device meta rehearses them without a
GPU: the host code of the kernels runs for a pretended H200, nothing is computed, and every time is 1 µs.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from vit_fast.kernels import configs, folding, reference

import vit_fast
from vit_fast import parity
from vit_fast.bench import gpus, launches, machine, measure

sys.path.insert(0, str(Path(__file__).resolve().parent))

import child
from tune.problems import partials_of
from tune.report import one_line
from tune.timing import kernel_seconds, median_us, out_of_budget

TOKENS, WIDTH, HIDDEN = 197, 768, 3072
CHECKED = 512  # rows compared with float64


class Bench:
    """A device, its tensors and its clock; on ``meta`` a rehearsal."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch, self.rehearsed = device, batch, device.type == "meta"

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random bfloat16 numbers."""
        return (torch.randn(shape, device=self.device) * scale).to(torch.bfloat16)

    def us(self, call: Callable[[], Any]) -> float:
        """Median microseconds of a call, without the host's time."""
        if self.rehearsed:
            call()
            return 1.0
        return median_us(call, 20, self.device, kernel_seconds)

    def fault(self, out: torch.Tensor, eager: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> str | None:
        """Why ``out`` is out of the error budget; ``eager`` takes the tensors, whose rows are those of ``out``, in any
        dtype and returns a function of the rest."""
        if self.rehearsed:
            return None
        out = out.flatten(0, -2)[:CHECKED]
        few = [t.flatten(0, -2)[:CHECKED] for t in tensors]
        return out_of_budget(parity.compare(out, eager(*few), eager(*(t.double() for t in few)), out.dtype))


@contextlib.contextmanager
def kernels(bench: Bench) -> Iterator[None]:
    """Our kernels run in this block, or in a rehearsal their host code."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if bench.rehearsed:
            stack.enter_context(launches.pretending(gpus.GPUS["h200"], []))
        else:
            stack.enter_context(vit_fast.backend("triton"))
        yield


def forms(
    bench: Bench,
) -> Iterator[tuple[str, Callable[[], torch.Tensor], Callable[..., torch.Tensor], tuple[Any, ...]]]:
    """(name, call, the same by PyTorch, the tensors that it takes) of fc1 and proj, from bare to as prepared."""
    from vit_fast.kernels import linear
    from vit_fast.kernels.layer_norm import RowPartials

    x, residual = (bench.random(bench.batch, TOKENS, WIDTH) for _ in range(2))
    for layer, features in (("fc1", HIDDEN), ("proj", WIDTH)):
        weight, bias = bench.random(features, WIDTH, scale=WIDTH**-0.5), bench.random(features)
        weight -= weight.float().mean(1, keepdim=True).to(weight.dtype)
        sums, wide, partials = weight.float().sum(1), bias.float(), RowPartials(*partials_of(x))

        def product(x, weight=weight, bias=bias):
            return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

        def normal(x):
            return F.layer_norm(x, (WIDTH,), eps=1e-6)

        yield f"{layer}: bias", functools.partial(linear.linear, x, weight, bias), product, (x,)
        if layer == "fc1":
            folded = functools.partial(linear.folded_linear, x, partials, 1e-6, weight, sums, wide)
            yield (
                "fc1: bias, GELU",
                functools.partial(linear.linear, x, weight, bias, "gelu"),
                lambda x, f=product: F.gelu(f(x)),
                (x,),
            )
            yield "fc1: bias, LayerNorm folded in", folded, lambda x, f=product: f(normal(x)), (x,)
            yield "fc1: as prepared", functools.partial(folded, "gelu"), lambda x, f=product: F.gelu(f(normal(x))), (x,)
        else:

            def added(x, residual, f=product):
                return residual + f(x)

            call = functools.partial(linear.linear, x, weight, bias, residual=residual)
            yield "proj: bias, residual", call, added, (x, residual)
            whole = functools.partial(linear.linear_with_partials, x, weight, wide, residual)
            yield "proj: as prepared", lambda whole=whole: whole()[0], added, (x, residual)


def epilogues(bench: Bench, keep: Callable[[Any], None], once: bool = False) -> bool:
    """What each part of an epilogue costs; ``once``: only the two as prepared, run once."""
    rows: list[dict[str, Any]] = []
    with kernels(bench):
        for name, call, eager, tensors in forms(bench):
            if once and "as prepared" not in name:
                continue
            row: dict[str, Any] = {"name": name, "us": None}
            try:
                row["fault"] = bench.fault(call(), eager, *tensors)
                if row["fault"] is None and not once:
                    row["us"] = bench.us(call)
            except Exception as error:  # recorded; the next form is tried
                row["fault"] = one_line(error)
            rows.append(row)
            keep({"rows": rows})
    return all(row["fault"] is None for row in rows)


def _stack(bench, width, depth):
    def linear(rows, columns):
        return bench.random(rows, columns, scale=columns**-0.5), bench.random(rows)

    def block():
        first = ((None, None), linear(3 * width, width), linear(width, width), None)
        return folding.prepare_block(*first, (None, None), linear(4 * width, width), linear(width, 4 * width), None)

    weights = folding.flatten(block() for _ in range(depth))

    def call(x):
        if bench.rehearsed:  # autocast, which operators ask for, knows no meta device
            from vit_fast.kernels.prepared_blocks import prepared_blocks as run
        else:
            run = vit_fast.ops.prepared_blocks
        return run(x, weights, width // 64, 0.125, "gelu", 1e-6, 1e-6)

    return weights, call


def stacks(bench: Bench, keep: Callable[[Any], None]) -> bool:
    """Two prepared blocks with each form of the row statistics (``configs.STATISTICS``)."""
    rows: list[dict[str, Any]] = []
    x, shipped = bench.random(bench.batch, TOKENS, WIDTH), configs.pick_stack_config
    weights, call = _stack(bench, WIDTH, 2)

    def eager(image, weights):
        return reference.prepared_blocks(image, weights, WIDTH // 64, 0.125, "gelu", 1e-6, 1e-6)

    with kernels(bench):
        for form in configs.STATISTICS:
            row: dict[str, Any] = {"name": form, "width": WIDTH, "us": None, "fault": None}
            row["picked"] = shipped(bench.batch * TOKENS, WIDTH, 90).statistics
            configs.pick_stack_config = lambda *args, form=form: configs.StackConfig(form)
            try:
                out = call(x)
                if not bench.rehearsed:
                    golden = eager(x[:1].double(), [weight.double() for weight in weights])
                    row["fault"] = out_of_budget(parity.compare(out[:1], eager(x[:1], weights), golden, out.dtype))
                if row["fault"] is None:
                    row["us"] = bench.us(lambda: call(x))
            except Exception as error:  # recorded; the next form is tried
                row["fault"] = one_line(error)
            finally:
                configs.pick_stack_config = shipped
            rows.append(row)
            keep({"rows": rows})
    return all(row["fault"] is None for row in rows)


def tiny(bench: Bench, keep: Callable[[Any], None]) -> bool:
    """Small calls of what shares memory between programs, launches or warps, against float64."""
    from vit_fast.kernels import linear

    rows: list[dict[str, Any]] = []

    def try_(name, call, eager, *tensors):
        try:
            fault = bench.fault(call(), eager, *tensors)
        except Exception as error:  # recorded; the next is tried
            fault = one_line(error)
        rows.append({"name": name, "fault": fault})
        keep({"rows": rows})

    on_gpu = bench.device.type == "cuda"
    x, residual = bench.random(1, 65, HIDDEN), bench.random(1, 65, WIDTH)
    weight, bias = bench.random(WIDTH, HIDDEN, scale=HIDDEN**-0.5), bench.random(WIDTH).float()

    def product(x):
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    def added(x, residual):
        return residual + product(x)

    with kernels(bench):
        for name, pdl in (("split-K", False), ("split-K launched by PDL", True)):
            if pdl and bench.device.type == "cpu":
                continue  # the interpreter has none
            call = functools.partial(linear.linear_with_partials, x, weight, bias, residual, pdl=pdl)
            try_(name, lambda call=call: call()[0], added, x, residual)
        if bench.rehearsed or (on_gpu and torch.cuda.get_device_capability(bench.device) == (9, 0)):
            from vit_fast.kernels.linear_hopper import LinearHopperConfig, linear_hopper

            wide = LinearHopperConfig(block_n=256, num_stages=3, cooperative=True)
            try_("linear_hopper", lambda: linear_hopper(x, weight, bias)[0], product, x)
            for name, config in (("linear_hopper", None), ("cooperative linear_hopper", wide)):
                call = functools.partial(linear_hopper, x, weight, bias, residual=residual, pdl=True, config=config)
                try_(f"{name} launched by PDL", lambda call=call: call()[0], added, x, residual)
    return all(row["fault"] is None for row in rows)


def replays(bench: Bench, keep: Callable[[Any], None], count: int = 1000) -> bool:
    """Replays a captured stack on two streams at once; every tenth result is compared with the first, bit by bit."""
    done = {"replays": 0, "differ": 0}
    with kernels(bench):
        _, call = _stack(bench, 192, 4)
        inputs = [bench.random(1, TOKENS, 192) for _ in range(2)]
        expected = [call(x) for x in inputs]
        if bench.rehearsed:
            keep(done | {"note": "rehearsed: nothing is captured"})
            return True
        torch.cuda.synchronize(bench.device)
        graphs = []
        for x in inputs:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.graph(graph, stream=stream):
                out = call(x)
            graphs.append((graph, stream, out))
        for turn in range(count // 2):
            for graph, stream, _ in graphs:
                with torch.cuda.stream(stream):
                    graph.replay()
            if turn % 10 == 9:
                torch.cuda.synchronize(bench.device)
                done["differ"] += sum(
                    not torch.equal(out, want) for (_, _, out), want in zip(graphs, expected, strict=True)
                )
            done["replays"] += 2
        torch.cuda.synchronize(bench.device)
        keep(done)
    return done["differ"] == 0


def sustained(bench: Bench, keep: Callable[[Any], None], seconds: float = 10.0) -> bool:
    """A large product back to back: TFLOP/s, clocks and power, second by second."""
    size = 8192
    x, weight = bench.random(size, size), bench.random(size, size)
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + (0 if bench.rehearsed else seconds)
    while time.monotonic() < end or not rows:
        calls, begun = 0, time.monotonic()
        while time.monotonic() < begun + 1 and not (bench.rehearsed and calls):
            for _ in range(20):
                F.linear(x, weight)
            if not bench.rehearsed:
                measure.synchronize(bench.device)
            calls += 20
        rate = 2 * size**3 * calls / (time.monotonic() - begun) / 1e12
        rows.append({"tflops": None if bench.rehearsed else rate, **machine.gpu_state(bench.device)})
        keep({"rows": rows})
    return True


MEASUREMENTS = {
    "stacks": stacks,
    "epilogues": epilogues,
    "once": functools.partial(epilogues, once=True),
    "tiny": tiny,
    "replays": replays,
    "sustained": sustained,
}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(MEASUREMENTS))],
    path: Annotated[Path, typer.Option("--json", help="File of the result.")],
    device: Annotated[str, typer.Option(help="cuda, or meta for a rehearsal.")] = "cuda",
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 256,
) -> None:
    """One measurement of the first look; see the head of benchmarks/first_look_stages.py."""
    if name not in MEASUREMENTS:
        raise typer.BadParameter(f"got {name!r}, wanted one of {', '.join(MEASUREMENTS)}", param_hint="NAME")
    if device not in ("cuda", "meta"):
        raise typer.BadParameter(f"got {device!r}, wanted cuda or meta", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("got cuda, and there is no CUDA device here", param_hint="--device")
    torch.manual_seed(0)
    passed = MEASUREMENTS[name](Bench(torch.device(device), batch), functools.partial(child.save, path))
    raise typer.Exit(0 if passed else 1)


if __name__ == "__main__":
    typer.run(main)
