"""``vit-fast bench``: vit_fast against timm, on the same weights, pixels and dtype, in one run.

Parity comes first: a batch size whose logits are out of budget is not timed and the command ends with status 1. Then
the providers are timed in interleaved rounds, so that a clock that drifts drifts for all of them.
"""

import contextlib
import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from . import CommandError, require

RIVALS = {"eager": None, "compile": "default", "compile-max-autotune": "max-autotune"}
PRECISIONS = ("float32", "bfloat16", "float16")
BACKENDS = ("auto", "triton", "cuda", "cpu", "torch")
FORMATS = ("csv", "json")
BATCH_SIZES = {"cuda": (1, 8, 64, 256), "cpu": (1, 4)}
TIME_BUDGET = {"cuda": 0.0, "cpu": 180.0}
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked."""

    model: str
    batch_sizes: tuple[int, ...]
    device: object
    precision: str
    amp_dtype: str | None
    img_size: int | None
    model_kwargs: dict
    rivals: tuple[str, ...]
    warm_iterations: int
    bench_iterations: int
    time_budget: float
    channels_last: bool
    pretrained: bool
    images: Path | None
    backend: str | None

    @property
    def compute_precision(self):
        return self.amp_dtype or self.precision


@dataclass
class Models:
    """The two models with the same weights, and what is known of them before any timing."""

    timm: object
    ours: object
    photographs: object
    flops: float
    facts: dict


@dataclass
class Provider:
    """One row's contestant: how to call it, and its row."""

    name: str
    call: object
    row: dict
    times: list = field(default_factory=list)
    latencies: list = field(default_factory=list)


class Budget:
    """Seconds of the whole command; 0 sets no end."""

    def __init__(self, limit):
        self.limit, self.start, self.compile_seconds = limit, time.perf_counter(), 0.0

    def left(self):
        return self.limit - (time.perf_counter() - self.start) if self.limit else float("inf")


def _wrong(flag, got, wanted):
    return typer.BadParameter(f"got {got!r}, wanted {wanted}", param_hint=flag)


def _one_of(flag, value, words):
    if value not in words:
        raise _wrong(flag, value, " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))))
    return value


def _list_of(flag, text, words):
    if text == "none":
        return ()
    return tuple(_one_of(flag, word, words) for word in dict.fromkeys(text.split(",")))


def _batch_sizes(text):
    try:
        sizes = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise _wrong("--batch-size", text, "a whole number of 1 or more, or several with commas between, like 1,8,64")
    return sizes


def _keyword(text):
    import ast

    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals):
        raise _wrong("--model-kwargs", text, "key=value, like depth=6")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _device(text):
    import torch

    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise _wrong("--device", text, "cpu, cuda or cuda:N") from None
    if device.type not in BATCH_SIZES:
        raise _wrong("--device", text, "cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise _wrong("--device", text, "cpu: there is no CUDA device here")
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= count:
            raise _wrong("--device", text, f"one of cuda:0 to cuda:{count - 1}")
    return device


def _output_file(flag, path):
    if path is None:
        return None
    if path.is_dir():
        raise _wrong(flag, str(path), "the name of a file, not of a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _wrong(flag, str(path), f"a file in a folder that can be made ({error})") from error
    return path


def _results_format(path, word):
    if word is not None:
        _one_of("--results-format", word, FORMATS)
        if path is None:
            raise _wrong("--results-format", word, "it together with --results-file")
        return word
    if path is not None:
        suffix = path.suffix.lstrip(".")
        if suffix not in FORMATS:
            raise _wrong("--results-file", str(path), "a name that ends in .csv or .json, or --results-format")
        return suffix
    return None


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="timm's name of the model.")] = "vit_base_patch16_224",
    batch_size: Annotated[
        str | None,
        typer.Option("--batch-size", "-b", help="One, or several: 1,8,64. [default: GPU 1,8,64,256, CPU 1,4]"),
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Pixels along a side. [default: the model's]")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 weights and images. [default: GPU bfloat16, CPU float32]"),
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="float32 weights under autocast.")] = False,
    amp_dtype: Annotated[
        str | None, typer.Option(help="bfloat16 or float16 for --amp. [default: GPU float16, CPU bfloat16]")
    ] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Images in channels-last layout.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]")
    ] = None,
    rivals: Annotated[
        str, typer.Option(help="Any of eager,compile,compile-max-autotune (timm through torch.compile), or none.")
    ] = ",".join(RIVALS),
    backend: Annotated[
        str | None, typer.Option(help="Force vit_fast's backend: auto, triton, cuda, cpu or torch.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of photographs. [default: the sample photograph of matplotlib]")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's trained weights (a download).")] = False,
    model_kwargs: Annotated[
        list[str] | None, typer.Option(help="A constructor word, like depth=6; may be given again.")
    ] = None,
    num_warm_iter: Annotated[int, typer.Option(min=0, help="Calls before the timing, per provider.")] = 10,
    num_bench_iter: Annotated[int, typer.Option(min=1, help="Timed calls, per provider and batch size.")] = 40,
    time_budget: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for all of it: fewer calls where time is short; 0: no limit. "
                     "[default: GPU 0, CPU 180]"),
    ] = None,
    results_file: Annotated[Path | None, typer.Option(help="Write the rows here, .csv or .json.")] = None,
    results_format: Annotated[str | None, typer.Option(help="csv or json. [default: as --results-file ends]")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw images/s by batch size here, .png, .svg or .pdf.")] = None,
):  # fmt: skip
    """Benchmark a model against timm eager and timm under torch.compile: parity first, then speed and memory."""
    start = Budget(0)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise _wrong("--plot", str(plot), "a name that ends in .png, .svg or .pdf")
    file_format = _results_format(results_file, results_format)
    if precision is not None:
        _one_of("--precision", precision, PRECISIONS)
    if amp_dtype is not None:
        _one_of("--amp-dtype", amp_dtype, PRECISIONS[1:])
        if not amp:
            raise _wrong("--amp-dtype", amp_dtype, "it together with --amp")
    if amp and precision not in (None, "float32"):
        raise _wrong("--amp", precision, "float32 weights: leave out --precision")
    if backend is not None:
        _one_of("--backend", backend, BACKENDS)
    rivals = _list_of("--rivals", rivals, tuple(RIVALS))
    sizes = _batch_sizes(batch_size) if batch_size is not None else None
    keywords = dict(_keyword(part) for text in model_kwargs or () for part in text.split())
    for module in ("timm", *(["matplotlib"] if plot else [])):
        require(module, "bench")
    target = _device(device)
    on_gpu = target.type == "cuda"
    settings = Settings(
        model=model,
        batch_sizes=sizes or BATCH_SIZES[target.type],
        device=target,
        precision="float32" if amp else precision or ("bfloat16" if on_gpu else "float32"),
        amp_dtype=(amp_dtype or ("float16" if on_gpu else "bfloat16")) if amp else None,
        img_size=img_size,
        model_kwargs=keywords,
        rivals=rivals,
        warm_iterations=num_warm_iter,
        bench_iterations=num_bench_iter,
        time_budget=TIME_BUDGET[target.type] if time_budget is None else time_budget,
        channels_last=channels_last,
        pretrained=pretrained,
        images=images,
        backend=backend,
    )
    results_file, plot = _output_file("--results-file", results_file), _output_file("--plot", plot)
    budget = Budget(settings.time_budget)
    budget.start = start.start

    from . import report

    with report.progress() as tell:
        rows, failed = _run(settings, budget, tell)
    report.print_report(rows, settings)
    if results_file is not None:
        report.write_rows(rows, results_file, file_format)
        print(f"rows: {results_file}")
    if plot is not None:
        report.draw(rows, plot)
        print(f"plot: {plot}")
    if failed:
        raise typer.Exit(1)


def _run(settings, budget, tell):
    import vit_fast

    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    with forced:
        tell("models")
        models = _prepare(settings)
        for skipped in models.photographs.skipped:
            tell.warn(f"skipped {skipped}")
        rows, failed = [], False
        for position, batch in enumerate(settings.batch_sizes):
            share = len(settings.batch_sizes) - position
            new_rows, new_failed = _bench_batch(settings, models, batch, budget, share, tell)
            rows += new_rows
            failed |= new_failed
    return rows, failed


def _perturb(model):
    """Moves every parameter of a fresh model, so that none (a LayerScale near 0, a bias of 0) hides a fault."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02 if parameter.dim() > 1 else 0.1)


def _prepare(settings):
    import timm
    import torch

    import vit_fast

    from . import machine, measure, photographs

    torch.manual_seed(0)
    words = dict(settings.model_kwargs)
    if settings.img_size is not None:
        words["img_size"] = settings.img_size
    try:
        theirs = timm.create_model(settings.model, pretrained=settings.pretrained, **words).eval()
    except Exception as error:
        raise CommandError(f"timm cannot make the model {settings.model!r}: {error}") from error
    try:
        ours = vit_fast.create_model(settings.model, **words).eval()
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise CommandError(f"vit_fast cannot make the model {settings.model!r}: {error}") from error
    if not settings.pretrained:
        _perturb(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    dtype = getattr(torch, settings.precision)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    theirs, ours = (m.to(settings.device, dtype, memory_format=layout).requires_grad_(False) for m in (theirs, ours))
    config = theirs.pretrained_cfg
    height, width = _image_size(theirs, settings)
    pixels = photographs.load(settings.images, max(settings.batch_sizes), height, width, config["mean"], config["std"])
    pixels = photographs.Photographs(
        pixels.pixels.to(settings.device, dtype, memory_format=layout), pixels.source, pixels.skipped
    )
    flops = measure.flops_per_image(theirs, pixels.pixels)
    compute = getattr(torch, settings.compute_precision)
    facts = {
        "model": settings.model,
        "infer_img_size": height if height == width else f"{height}x{width}",
        "infer_gmacs": flops / 2e9,
        "param_count": sum(p.numel() for p in theirs.parameters()) / 1e6,
        "precision": settings.precision,
        "amp_dtype": settings.amp_dtype,
        "channels_last": settings.channels_last,
        "weights": "pretrained" if settings.pretrained else "random",
        "images": pixels.source,
        "device": str(settings.device),
        "device_name": machine.name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "matmul_peak_tflops": measure.matmul_peak(compute, settings.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "timm": timm.__version__,
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Models(theirs, ours, pixels, flops, facts)


def _image_size(model, settings):
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = (settings.img_size,) * 2 if settings.img_size else model.pretrained_cfg["input_size"][1:]
    return tuple(size)


def _calls(settings, models, pixels):
    """Provider name → call without arguments."""
    import torch

    def running(model):
        def call():
            cast = contextlib.nullcontext()
            if settings.amp_dtype:
                cast = torch.autocast(settings.device.type, getattr(torch, settings.amp_dtype))
            with torch.inference_mode(), cast:
                return model(pixels)

        return call

    torch._dynamo.reset()
    calls = {"vit_fast": running(models.ours)}
    for rival in settings.rivals:
        mode = RIVALS[rival]
        calls[rival] = running(torch.compile(models.timm, mode=mode, dynamic=False) if mode else models.timm)
    return calls, running(models.timm)


def _is_out_of_memory(error):
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


def _outcome(error):
    if _is_out_of_memory(error):
        return "out of memory"
    line = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {line[0][:300] if line else ''}"


def _free(device):
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _bench_batch(settings, models, batch, budget, share, tell):
    """The rows of one batch size, and whether vit_fast failed on it."""
    import torch

    from . import machine, measure

    pixels = models.photographs.pixels[:batch]
    compute = getattr(torch, settings.compute_precision)
    calls, eager_call = _calls(settings, models, pixels)
    blank = {**models.facts, "infer_batch_size": batch, "status": "ok"}
    providers = [Provider(name, call, {**blank, "provider": name}) for name, call in calls.items()]
    rows = [provider.row for provider in providers]

    tell(f"batch {batch}: parity")
    try:
        verdict_rows = _parity(models, pixels, calls["vit_fast"], eager_call, compute)
    except Exception as error:
        outcome = _outcome(error)
        for row in rows:
            row["status"] = outcome if row["provider"] == "vit_fast" else "not timed: vit_fast did not run"
        _free(settings.device)
        return rows, outcome != "out of memory"
    golden, eager, verdict, backends = verdict_rows
    rows[0].update(verdict.columns(), **backends)
    if not verdict.passed:
        rows[0]["status"] = "parity failed"
        for row in rows[1:]:
            row["status"] = "not timed: parity of vit_fast failed"
        return rows, True

    weights = measure.weight_bytes(models.timm)
    running = []
    for provider in providers:
        tell(f"batch {batch}: {provider.name}, first call")
        if _first_calls(provider, settings, weights, budget, share, golden, eager, compute):
            running.append(provider)
    _rounds(running, settings, budget, share, batch, tell)
    state = machine.gpu_state(settings.device)
    for provider in running:
        row = provider.row
        row.update(measure.summary(provider.times, batch), latency_ms=1000 * _median(provider.latencies), **state)
        row["num_bench_iter"] = len(provider.times)
        row["achieved_tflops"] = row["infer_samples_per_sec"] * models.flops / 1e12
        row["percent_of_peak"] = 100 * row["achieved_tflops"] / row["matmul_peak_tflops"]
    speed = {row["provider"]: row.get("infer_samples_per_sec") for row in rows}
    for row in rows:
        for rival in settings.rivals:
            if speed[rival] and speed[row["provider"]]:
                row[f"speedup_vs_{rival.replace('-', '_')}"] = speed[row["provider"]] / speed[rival]
    _free(settings.device)
    return rows, rows[0]["status"].startswith("failed")


def _median(values):
    import statistics

    return statistics.median(values)


def _parity(models, pixels, call, eager_call, compute):
    """golden and eager logits, vit_fast's parity, and the columns that say which of its backends ran."""
    from vit_fast import backends

    from . import parity

    golden = parity.golden_logits(models.timm, pixels)
    eager = eager_call().clone()
    with backends.recording() as choices:
        logits = call().clone()
    counted = Counter(f"{chosen} {op}" for op, chosen, _ in choices)
    used = sorted({chosen for _, chosen, _ in choices})
    reasons = dict.fromkeys(reason for _, chosen, why in choices if chosen == "torch" for reason in why)
    columns = {
        "vit_fast_backend": "+".join(used),
        "vit_fast_operations": ", ".join(f"{name} ×{count}" for name, count in counted.items()),
        "vit_fast_reasons": "; ".join(reasons),
    }
    return golden, eager, parity.compare(logits, eager, golden, compute), columns


def _first_calls(provider, settings, weights, budget, share, golden, eager, compute):
    """Compiles and measures memory; False where this provider is not to be timed, its row says why."""
    from . import measure, parity

    compiled = bool(RIVALS.get(provider.name))
    if compiled and budget.left() / share < budget.compile_seconds:
        provider.row["status"] = "not timed: the time budget is used up"
        return False
    try:
        first, logits = measure.seconds(provider.call, settings.device)
        provider.row["compile_time_s"] = first
        if provider.name != "vit_fast":
            provider.row.update(parity.compare(logits.clone(), eager, golden, compute).columns())
        del logits
        peak, method = measure.peak_memory(provider.call, weights, settings.device)
        provider.row["peak_memory_mib"] = None if peak is None else peak / 2**20
        provider.row["peak_memory_method"] = method
    except Exception as error:
        provider.row["status"] = _outcome(error)
        _free(settings.device)
        return False
    if compiled:
        budget.compile_seconds = max(budget.compile_seconds, first) if settings.time_budget else 0.0
    return True


def _rounds(providers, settings, budget, share, batch, tell):
    """Times the providers in turn, one round after another; under a time budget as many rounds as fit, 3 at least."""
    from . import measure

    end = time.perf_counter() + budget.left() / share
    warm_end = time.perf_counter() + (budget.left() / share) / 5
    for provider in providers:
        for done in range(settings.warm_iterations):
            if done and time.perf_counter() > warm_end:
                break
            provider.call()
    measure.synchronize(settings.device)
    count = min(settings.bench_iterations, 10 if settings.device.type == "cuda" else settings.bench_iterations)
    for turn in range(count):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        tell(f"batch {batch}: round {turn + 1} of {count}")
        steps = (turn + 1) * settings.bench_iterations // count - turn * settings.bench_iterations // count
        for position in range(len(providers)):
            provider = providers[(turn + position) % len(providers)]
            provider.times += measure.step_times(provider.call, steps, settings.device)
            if settings.device.type == "cuda":
                provider.latencies += [measure.seconds(provider.call, settings.device)[0] for _ in range(steps)]
            else:
                provider.latencies = provider.times
