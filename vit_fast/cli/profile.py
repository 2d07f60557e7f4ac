"""``vit-fast profile``: where the time of one forward pass goes, operation by operation, beside the least it can take.

The floor of an operation is the greater of its FLOP at the speed of a large matrix product, in float8 where it is, and
its bytes at the speed of a copy, all measured in the same run. ``operations`` says what there is to compute,
torch.profiler when each kernel (on a CPU: operator) ran, and ``attribution`` which operation it belongs to.
"""

import contextlib
import csv
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import CommandError, options, reason, require
from .output import save, say, show_table

OURS = ("vit_fast", "prepared", "fp8")
PROVIDERS = (*OURS, "eager", "compile", "compile-max-autotune")
BATCH_SIZE = {"cuda": 256, "cpu": 4}
ITERATIONS = {"cuda": 20, "cpu": 5}
WARM_CALLS = {"cuda": 10, "cpu": 2}
LEAST_SHARE = 0.1  # percent of the step below which an operator without an operation is only named
CPU_SENTENCE = "These are CPU numbers: they say nothing about a GPU, where the Triton kernels run instead."


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked."""

    model: str
    provider: str
    batch: int
    device: object
    precision: str
    img_size: int | None
    model_kwargs: dict
    backend: str | None
    iterations: int


def profile(
    model: options.Model = options.DEFAULT_MODEL,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images a step. [default: GPU 256, CPU 4]")
    ] = None,
    provider: Annotated[
        str,
        typer.Option(
            help="vit_fast, prepared (vit_fast.prepare), fp8 (its precision), or timm: eager, compile, "
            "compile-max-autotune."
        ),
    ] = "vit_fast",
    img_size: options.ImgSize = None,
    precision: options.Precision = None,
    device: options.Device = None,
    backend: options.Backend = None,
    model_kwargs: options.ModelKwargs = None,
    num_iter: Annotated[
        int | None, typer.Option(help="Forward passes, timed and then profiled. [default: GPU 20, CPU 5]")
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the rows here, .csv or .json.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Keep the profiler's Chrome trace here, .json.")] = None,
):
    """Profile a forward pass: time of every operation, its share of the step, and its floor on this device."""
    options.one_of("--provider", provider, PROVIDERS)
    for flag, value, least in (
        ("--batch-size", batch_size, 1),
        ("--img-size", img_size, 1),
        ("--num-iter", num_iter, 1),
    ):
        options.at_least(flag, value, least)
    precision = options.precision("--precision", precision)
    if backend is not None:
        options.backend_word(backend)
        if provider not in OURS:
            raise options.wrong(
                "--backend", backend, "it with --provider vit_fast, prepared or fp8: timm's models have one backend"
            )
    if results_file is not None and results_file.suffix not in (".csv", ".json"):
        raise options.wrong("--results-file", str(results_file), "a name that ends in .csv or .json")
    if trace is not None and trace.suffix != ".json":
        raise options.wrong("--trace", str(trace), "a name that ends in .json")
    words = options.keywords(model_kwargs)
    target = options.target_device(device)
    precision = precision or ("bfloat16" if target.type == "cuda" else "float32")
    if provider in ("prepared", "fp8") and precision == "float32":
        raise CommandError(
            f"--provider {provider}: vit_fast.prepare folds float16 and bfloat16, --precision is float32"
        )
    if provider in OURS:
        options.backend(backend, target)
        options.buildable(model, words if img_size is None else words | {"img_size": img_size})
    else:
        require("timm", "bench")
    options.output_files({"--results-file": results_file, "--trace": trace})

    from . import report

    settings = Settings(
        model=model,
        provider=provider,
        batch=batch_size or BATCH_SIZE[target.type],
        device=target,
        precision=precision,
        img_size=img_size,
        model_kwargs=words,
        backend=backend,
        iterations=num_iter or ITERATIONS[target.type],
    )
    with report.progress() as tell:
        facts, rows, trace_text = run(settings, tell)
    _print_table(rows, settings)
    say()
    for sentence in _sentences(facts, rows, settings):
        say(sentence)
    written = save("rows", results_file, lambda path: _write(facts, rows, path))
    written &= save("trace", trace, lambda path: path.write_text(trace_text, encoding="utf-8"))
    if not written:
        raise typer.Exit(1)


def run(settings, tell):
    """(facts of the run, rows as dicts, the Chrome trace's text); rows are operations, kernels without one, and the
    lines sum, gaps and step."""
    import torch

    import vit_fast
    from vit_fast import backends

    from . import attribution, measure, operations

    device, on_gpu = settings.device, settings.device.type == "cuda"
    if on_gpu and torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        raise CommandError(
            f"torch {torch.__version__} has no GPU profiler here (torch.profiler knows no CUDA activity)"
        )
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    try:
        with forced:
            tell(f"{settings.model}: model", 0.0)
            model, pixels = _model_and_pixels(settings)
            in_float8 = settings.provider == "fp8"
            if in_float8:  # other bytes flow than in the model as it is
                model = _provide(model, settings.provider)
            calls = operations.forward_operations(model, pixels)
            if not in_float8:
                model = _provide(model, settings.provider)

            def call():
                with torch.inference_mode():
                    return model(pixels)

            tell("warm-up", 0.1)
            with backends.recording() as choices:
                call()
            for _ in range(WARM_CALLS[device.type] - 1):
                call()
            tell("time without the profiler", 0.3)
            step = statistics.median(measure.step_times(call, settings.iterations, device))
            host = statistics.median(_host_seconds(call, settings.iterations, device))
            tell("profile", 0.6)
            trace, events = _trace(call, settings)
        tell("ceilings", 0.8)
        flop_rate = 1e12 * measure.matmul_peak(getattr(torch, settings.precision), device)
        float8_rate = None
        if in_float8 and not measure.float8_missing(device):
            float8_rate = 1e12 * measure.matmul_peak(measure.E4M3, device)
        byte_rate = copy_bandwidth(device)
    except torch.OutOfMemoryError as error:
        raise CommandError(f"out of memory at --batch-size {settings.batch}: {error}") from error
    except vit_fast.UnsupportedError as error:
        raise CommandError(reason(error)) from error
    found = attribution.attribute(events, calls, settings.iterations, on_gpu, flop_rate, byte_rate, float8_rate)
    if on_gpu and not found.rows:
        raise CommandError(
            "torch.profiler recorded no GPU kernel: CUPTI is missing or may not be used here (another profiler is "
            "attached, or the driver restricts it to administrators); nothing can be attributed"
        )
    facts = _facts(settings, tuple(pixels.shape[2:]), choices, step, host, flop_rate, byte_rate, float8_rate)
    return facts, _rows(found, facts), trace


def _model_and_pixels(settings):
    import torch

    import vit_fast
    from vit_fast.input_size import input_size

    words = dict(settings.model_kwargs)
    if settings.img_size is not None:
        words["img_size"] = settings.img_size
    torch.manual_seed(0)
    if settings.provider in OURS:
        owner, model = "vit_fast", vit_fast.create_model(settings.model, **words).eval()
    else:
        owner, model = "timm", options.timm_model(settings.model, **words).eval()
    model.to(settings.device, getattr(torch, settings.precision)).requires_grad_(False)
    size = input_size(model)
    if size is None:
        raise CommandError(
            f"{owner}'s model {settings.model!r} does not tell the size of its input, so it is not profiled"
        )
    pixels = torch.randn(settings.batch, *size, device=settings.device)
    return model, pixels.to(getattr(torch, settings.precision))


def _provide(model, provider):
    """The model as the provider runs it."""
    import torch

    import vit_fast

    if provider in ("prepared", "fp8"):
        try:
            return vit_fast.prepare(model, precision="fp8" if provider == "fp8" else None)
        except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
            raise CommandError(f"--provider {provider}: {error}") from error
    if provider.startswith("compile"):
        mode = "default" if provider == "compile" else provider.removeprefix("compile-")
        return torch.compile(model, mode=mode, dynamic=False)
    return model


def _host_seconds(call, count, device):
    """Seconds until a call returns on an idle device, which on a GPU is not when its work is done."""
    from . import measure

    for _ in range(count):
        measure.synchronize(device)
        start = time.perf_counter()
        call()
        yield time.perf_counter() - start


def _trace(call, settings):
    """The Chrome trace of the profiled steps: its text, and the events in it."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from . import attribution, measure

    activities = [ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True):  # the first one pays for the profiler's own start
        call()
        measure.synchronize(settings.device)
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(settings.iterations):
            with record_function(attribution.STEP):
                call()
        measure.synchronize(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8", errors="replace")
    return text, json.loads(text)["traceEvents"]


def copy_bandwidth(device, size=None):
    """Bytes a second that a copy reads and writes together, the best of 10; ``size`` bytes, far beyond the caches."""
    import torch

    from . import measure

    size = size or (1 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.zeros_like(source)
    return 2 * size / min(measure.step_times(lambda: target.copy_(source), 10, device))


def _facts(settings, pixels, choices, step, host, flop_rate, byte_rate, float8_rate):
    import torch

    import vit_fast

    from . import machine

    return {
        "model": settings.model,
        "provider": settings.provider,
        "batch_size": settings.batch,
        "img_size": "×".join(map(str, pixels)),
        "precision": settings.precision,
        "device": str(settings.device),
        "device_name": machine.name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "vit_fast_backend": "+".join(sorted({chosen for _, chosen, _ in choices})) or None,
        "iterations": settings.iterations,
        "step_ms": 1e3 * step,
        "host_ms": 1e3 * host,
        "images_per_second": settings.batch / step,
        "matmul_peak_tflops": flop_rate / 1e12,
        "matmul_peak_float8_tflops": float8_rate and float8_rate / 1e12,
        "copy_tb_per_s": byte_rate / 1e12,
        "torch": torch.__version__,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        **machine.gpu_state(settings.device),
    }


def _line(operation, seconds, span, *, module="", calls=None, flop=None, moved=None, floor=None, kernels=""):
    return {
        "operation": operation,
        "module": module,
        "calls": calls and round(calls, 3),
        "us_per_call": calls and 1e6 * seconds / calls,
        "us": 1e6 * seconds,
        "percent_of_step": 100 * seconds / span if span else 0.0,
        "gflop": flop and flop / 1e9,
        "mb": moved and moved / 1e6,
        "floor_us": floor and 1e6 * floor,
        "percent_of_floor": 100 * floor / seconds if floor and seconds else None,
        "kernels": kernels,
    }


def _rows(found, facts):
    span = found.span
    rows = []
    for row in found.rows:
        kernels = "; ".join(f"{name} ×{count:.3g}" for name, count in row.kernels.most_common())
        figures = dict(calls=row.calls, flop=row.flop, moved=row.bytes, floor=row.floor, kernels=kernels)
        rows.append(_line(row.operation, row.seconds, span, module=row.module, **figures))
    known = [row for row in found.rows if row.floor is not None]
    sums = {"flop": "flop", "moved": "bytes", "floor": "floor"}
    sums = {word: sum(getattr(row, name) for row in known) for word, name in sums.items()}
    on_gpu = facts["device"] != "cpu"
    rows.append(_line("sum", sum(row.seconds for row in found.rows), span, **sums))
    if found.overlap > 1e-3 * span:
        rows.append(_line("of it beside other kernels", found.overlap, span))
    rows.append(_line("gaps (GPU idle)" if on_gpu else "outside of operators", found.gaps, span))
    rows.append(_line("step under the profiler", span, span))
    return rows


_COLUMNS = (
    ("calls", "calls", ".3g"),
    ("us_per_call", "µs/call", ".1f"),
    ("us", "µs", ".1f"),
    ("percent_of_step", "% of step", ".1f"),
    ("gflop", "GFLOP", ".4g"),
    ("mb", "MB", ".4g"),
    ("floor_us", "floor µs", ".1f"),
    ("percent_of_floor", "% of floor", ".1f"),
)


def _is_small(row):
    """On a CPU an eager step calls dozens of operators that only look at tensors."""
    return row["floor_us"] is None and row["calls"] and row["percent_of_step"] < LEAST_SHARE


def _print_table(rows, settings):
    on_gpu = settings.device.type == "cuda"
    heads = ["operation", *(head for _, head, _ in _COLUMNS), *(["kernels"] if on_gpu else [])]
    lines = []
    for row in rows:
        if on_gpu or not _is_small(row):
            figures = ("" if row[key] is None else format(row[key], form) for key, _, form in _COLUMNS)
            known = row["floor_us"] is not None and row["kernels"]
            kernels = [row["kernels"] if known else ""] if on_gpu else []
            lines.append([f"{row['operation']} {row['module']}".strip(), *figures, *kernels])
    show_table(heads, lines, text=("kernels",))


def _sentences(facts, rows, settings):
    gpu = settings.device.type == "cuda"
    ran = f", backend {facts['vit_fast_backend']}" if facts["vit_fast_backend"] else ""
    threads = "" if gpu else f", {facts['cpu_threads']} threads"
    yield (
        f"{facts['model']} by {facts['provider']}{ran}: batch {facts['batch_size']}, {facts['img_size']} pixels, "
        f"{facts['precision']}, random weights and pixels, on {facts['device']}, {facts['device_name']}{threads}."
    )
    if not gpu:
        yield CPU_SENTENCE
    yield (
        f"Without the profiler a step takes {facts['step_ms']:.4g} ms, {facts['images_per_second']:.4g} images/s; the "
        f"call returns after {facts['host_ms']:.4g} ms (medians of {facts['iterations']}). The rows are means of as "
        "many steps under the profiler, which slows the host: gaps are shorter without it."
    )
    yield (
        f"Floor: the greater of FLOP at {facts['matmul_peak_tflops']:.4g} TFLOP/s (a large matrix product) and bytes "
        f"at {facts['copy_tb_per_s']:.3g} TB/s (a copy, read and write), both measured in this run; % of floor is "
        "floor / time, above 100 where data stay in a cache."
    )
    if facts["matmul_peak_float8_tflops"]:
        rate = facts["matmul_peak_float8_tflops"]
        yield f"FLOP of products in float8 at {rate:.4g} TFLOP/s, likewise measured (torch._scaled_mm)."
    elif settings.provider == "fp8":
        yield "This device has no products in float8: their emulation ran, and the floors are those of the emulation."
    if not gpu and (small := [row for row in rows if _is_small(row)]):
        share = sum(row["percent_of_step"] for row in small)
        names = ", ".join(row["operation"] for row in small)
        yield f"Not in the table, each below {LEAST_SHARE} % of the step, together {share:.2f} %: {names}."
    if not gpu and settings.provider.startswith("compile"):
        yield "What the compiler fused runs inside CompiledFxGraph, which has no events of its own on a CPU."


def _write(facts, rows, path):
    """JSON: {facts, rows}; CSV: a row a line, with the facts in each."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump({"facts": facts, "rows": rows}, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        else:
            writer = csv.DictWriter(file, [*rows[0], *facts])
            writer.writeheader()
            writer.writerows(row | facts for row in rows)
