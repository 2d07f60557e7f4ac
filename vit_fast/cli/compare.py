"""The benchmark itself: vit_fast against its rivals, on the same weights, pixels and dtype, in one run.

The first rival's model is the reference of parity: timm's, or for a family (``families``) the plain PyTorch form.

Parity comes first: a batch size whose logits are out of budget is not timed, and the run counts as failed. Then the
providers are timed in interleaved rounds, so that a clock that drifts drifts for all of them. One row is one provider
at one batch size; ``status`` is "ok" or says why the row has no figures.
"""

import contextlib
import gc
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch

import vit_fast
from vit_fast import backends

from . import CommandError, machine, measure, parity, photographs

COMPILE_MODES = {"compile": "default", "compile-max-autotune": "max-autotune"}
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    """What was asked for, checked. ``backend`` None leaves the choice to vit_fast and its environment."""

    model: str
    batch_sizes: tuple[int, ...]
    device: torch.device
    precision: str = "float32"
    amp_dtype: str | None = None
    img_size: int | None = None
    model_kwargs: dict = field(default_factory=dict)
    rivals: tuple[str, ...] = ("eager", *COMPILE_MODES)
    warm_iterations: int = 10
    bench_iterations: int = 40
    channels_last: bool = False
    pretrained: bool = False
    images: Path | None = None
    backend: str | None = None
    family: str | None = None

    @property
    def compute_dtype(self):
        return getattr(torch, self.amp_dtype or self.precision)


class TimeBudget:
    """Seconds for the whole command from ``start`` on; a limit of 0 sets no end."""

    def __init__(self, limit, start):
        self.limit, self.start = limit, start
        self.longest_compile = 0.0

    def left(self):
        return self.limit - (time.perf_counter() - self.start) if self.limit else float("inf")


@dataclass
class Contest:
    """Models with the same weights, their pixels, and what every row says of them."""

    reference: torch.nn.Module
    our_model: torch.nn.Module
    rivals: dict
    pixels: torch.Tensor
    flops: int
    facts: dict


@dataclass
class Provider:
    """One contestant at one batch size: how to call it, its row, its times in seconds."""

    name: str
    call: object
    row: dict
    steps: list = field(default_factory=list)
    latencies: list = field(default_factory=list)


def run(settings, budget, tell):
    """Rows of all batch sizes, and whether vit_fast failed on any of them.

    Args:
        tell: called with a text and the done fraction as the work goes on; ``tell.warn`` prints a line.
    """
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    with forced:
        tell(f"{settings.model}: models and pixels", 0.0)
        contest = _prepare(settings, tell)
        rows, failed = [], False
        count = len(settings.batch_sizes)
        for index, batch in enumerate(settings.batch_sizes):

            def tell_batch(text, done, index=index, batch=batch):
                tell(f"batch {batch}: {text}", (index + done) / count)

            share = 1 / (count - index)
            batch_rows, batch_failed = _bench_batch(settings, contest, batch, budget, share, tell_batch)
            rows += batch_rows
            failed |= batch_failed
            _release(settings.device)
    return rows, failed


def _perturb(model):
    """Moves every parameter of a fresh model, so that none (a LayerScale near 0, a bias of 0) hides a fault."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02 if parameter.dim() > 1 else 0.1)


def _family_models(settings):
    """(reference, our model, rivals) of a family."""
    from . import families

    our_model, rivals = families.contestants(settings.family, _perturb)
    for model in (our_model, *rivals.values()):
        model.to(settings.device, getattr(torch, settings.precision)).requires_grad_(False)
    return rivals["torch"], our_model, rivals


def _models(settings):
    """(timm's model, our model, rivals) with the same weights."""
    words = dict(settings.model_kwargs)
    if settings.img_size is not None:
        words["img_size"] = settings.img_size
    torch.manual_seed(0)
    try:
        timm_model = timm.create_model(settings.model, pretrained=settings.pretrained, **words).eval()
    except Exception as error:
        raise CommandError(f"timm cannot make the model {settings.model!r}: {error}") from error
    try:
        our_model = vit_fast.create_model(settings.model, **words).eval()
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise CommandError(f"vit_fast cannot make the model {settings.model!r}: {error}") from error
    if not settings.pretrained:
        _perturb(timm_model)
    our_model.load_state_dict(timm_model.state_dict(), strict=True)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    for model in (timm_model, our_model):
        model.to(settings.device, getattr(torch, settings.precision), memory_format=layout).requires_grad_(False)
    return timm_model, our_model, dict.fromkeys(settings.rivals, timm_model)


def _input_of(reference, settings):
    """(height, width, mean, std) of the images that a model takes."""
    if settings.family:
        from .families import FAMILIES

        channels, height, width = FAMILIES[settings.family].input_size
        return height, width, (0.5,) * channels, (0.5,) * channels
    config = reference.pretrained_cfg
    side = (settings.img_size,) * 2 if settings.img_size else config["input_size"][1:]
    height, width = getattr(getattr(reference, "patch_embed", None), "img_size", None) or side
    mean, std = config["mean"], config["std"]
    channels = settings.model_kwargs.get("in_chans", len(mean))
    if channels != len(mean):
        mean = std = (0.5,) * channels
    return height, width, mean, std


def _prepare(settings, tell):
    reference, our_model, rivals = (_family_models if settings.family else _models)(settings)
    height, width, mean, std = _input_of(reference, settings)
    photos = photographs.load(settings.images, max(settings.batch_sizes), height, width, mean, std)
    for skipped in photos.skipped:
        tell.warn(f"skipped {skipped}")
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    pixels = photos.pixels.to(settings.device, getattr(torch, settings.precision), memory_format=layout)
    flops = measure.flops_per_image(reference, pixels)
    facts = {
        "model": settings.model,
        "infer_img_size": height if height == width else f"{height}x{width}",
        "infer_gmacs": flops / 2e9,
        "param_count": sum(p.numel() for p in reference.parameters()) / 1e6,
        "precision": settings.precision,
        "amp_dtype": settings.amp_dtype,
        "channels_last": settings.channels_last,
        "weights": "pretrained" if settings.pretrained else "random",
        "images": photos.source,
        "device": str(settings.device),
        "device_name": machine.name(settings.device),
        "cpu_threads": torch.get_num_threads(),
        "matmul_peak_tflops": measure.matmul_peak(settings.compute_dtype, settings.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "timm": timm.__version__,
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Contest(reference, our_model, rivals, pixels, flops, facts)


def _caller(model, pixels, settings):
    def call():
        cast = contextlib.nullcontext()
        if settings.amp_dtype:
            cast = torch.autocast(settings.device.type, settings.compute_dtype)
        with torch.inference_mode(), cast:
            return model(pixels)

    return call


def _outcome(error):
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def _release(device):
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _bench_batch(settings, contest, batch, budget, share, tell):
    """The rows of one batch size, which may take ``share`` of the time left, and whether vit_fast failed on it."""
    pixels = contest.pixels[:batch]
    # torch.compile gives up on a function after a number of shapes, silently: each batch size starts afresh.
    torch._dynamo.reset()
    providers = [Provider("vit_fast", _caller(contest.our_model, pixels, settings), {})]
    for rival, model in contest.rivals.items():
        if rival in COMPILE_MODES:
            model = torch.compile(model, mode=COMPILE_MODES[rival], dynamic=False)
        providers.append(Provider(rival, _caller(model, pixels, settings), {}))
    for provider in providers:
        provider.row.update(contest.facts, provider=provider.name, infer_batch_size=batch, status="ok")
    ours, *rivals = providers
    rows = [provider.row for provider in providers]

    tell("parity", 0.0)
    try:
        golden, eager = _judge(ours, contest, pixels, settings)
    except Exception as error:
        ours.row["status"] = _outcome(error)
    for rival in rivals:
        if ours.row["status"] != "ok":
            rival.row["status"] = f"not timed: vit_fast: {ours.row['status']}"
    if ours.row["status"] != "ok":
        return rows, ours.row["status"] != "out of memory"

    timing = (MIN_ROUNDS + 1) * len(providers) * ours.row["first_call_s"]
    for index, rival in enumerate(rivals):
        tell(f"{rival.name}, first call", (index + 1) / (len(rivals) + 1) / 2)
        _first_call(rival, golden, eager, settings, budget, budget.left() * share - timing)
    weights = measure.weight_bytes(contest.reference)
    for provider in providers:
        _attempt(provider, lambda provider=provider: _memory(provider, weights, settings.device), settings.device)
    _rounds(providers, settings, budget, share, tell)
    _fill_in(providers, settings, contest, batch)
    return rows, ours.row["status"].startswith("failed")


def _attempt(provider, work, device):
    """Does the work if the provider is still well; an exception becomes its status."""
    if provider.row["status"] != "ok":
        return
    try:
        work()
    except Exception as error:
        provider.row["status"] = _outcome(error)
    if provider.row["status"] != "ok":  # the exception, and the tensors its frames hold, are gone only here
        _release(device)


def _judge(ours, contest, pixels, settings):
    """Fills in vit_fast's parity, its first call and which backends ran; returns golden and eager logits."""
    golden = parity.golden_logits(contest.reference, pixels)
    eager = _caller(contest.reference, pixels, settings)().clone()
    with backends.recording() as choices:
        first, logits = measure.seconds(ours.call, settings.device)
    counted = Counter(f"{chosen} {op}" for op, chosen, _ in choices)
    reasons = dict.fromkeys(reason for _, chosen, why in choices if chosen == "torch" for reason in why)
    verdict = parity.compare(logits, eager, golden, settings.compute_dtype)
    ours.row.update(
        verdict.columns(),
        first_call_s=first,
        vit_fast_backend="+".join(sorted({chosen for _, chosen, _ in choices})),
        vit_fast_operations=", ".join(f"{name} ×{count}" for name, count in counted.items()),
        vit_fast_reasons="; ".join(reasons),
    )
    if not verdict.passed:
        ours.row["status"] = "parity failed"
    return golden, eager


def _first_call(rival, golden, eager, settings, budget, seconds_left):
    """Compiles the rival, unless the time left is too short for that, and compares its logits."""
    compiled = rival.name in COMPILE_MODES
    if compiled and seconds_left < budget.longest_compile:
        rival.row["status"] = "not timed: no time left to compile it"
        return

    def work():
        seconds, logits = measure.seconds(rival.call, settings.device)
        rival.row.update(parity.compare(logits.clone(), eager, golden, settings.compute_dtype).columns())
        if compiled:
            rival.row["first_call_s"] = seconds
            budget.longest_compile = max(budget.longest_compile, seconds)

    _attempt(rival, work, settings.device)


def _memory(provider, weights, device):
    peak, method = measure.peak_memory(provider.call, weights, device)
    provider.row["peak_memory_mib"] = None if peak is None else peak / 2**20
    provider.row["peak_memory_method"] = method


def _warm_up(provider, calls, seconds, device):
    end = time.perf_counter() + seconds
    for _ in range(calls):
        if time.perf_counter() > end:
            break
        provider.call()
        if seconds < float("inf"):
            measure.synchronize(device)
    measure.synchronize(device)


def _rounds(providers, settings, budget, share, tell):
    """Times the providers in turn, round after round: as many as asked for, or as fit into the time, 3 at least."""
    device, wanted = settings.device, settings.bench_iterations
    seconds = max(budget.left(), 0.0) * share
    end = time.perf_counter() + seconds
    for provider in providers:
        warm = seconds / 5 / len(providers)
        _attempt(provider, lambda p=provider, s=warm: _warm_up(p, settings.warm_iterations, s, device), device)
    on_gpu = device.type == "cuda"
    rounds = min(wanted, 10) if on_gpu else wanted
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        tell(f"round {turn + 1} of {rounds}", 0.5 + turn / rounds / 2)
        calls = (turn + 1) * wanted // rounds - turn * wanted // rounds
        for position in range(len(providers)):
            provider = providers[(turn + position) % len(providers)]

            def work(provider=provider, calls=calls):
                steps = measure.step_times(provider.call, calls, device)
                provider.steps += steps
                latencies = [measure.seconds(provider.call, device)[0] for _ in range(calls)] if on_gpu else steps
                provider.latencies += latencies

            _attempt(provider, work, device)


def _fill_in(providers, settings, contest, batch):
    state = machine.gpu_state(settings.device)
    timed = [provider for provider in providers if provider.row["status"] == "ok"]
    for provider in timed:
        row = provider.row
        row.update(measure.summary(provider.steps, batch), **state)
        row["latency_ms"] = 1000 * statistics.median(provider.latencies)
        row["num_bench_iter"] = len(provider.steps)
        row["achieved_tflops"] = row["infer_samples_per_sec"] * contest.flops / 1e12
        row["percent_of_peak"] = 100 * row["achieved_tflops"] / row["matmul_peak_tflops"]
    for rival in timed:
        for provider in timed:
            if rival.name != "vit_fast":
                ratio = provider.row["infer_samples_per_sec"] / rival.row["infer_samples_per_sec"]
                provider.row[f"speedup_vs_{rival.name.replace('-', '_')}"] = ratio
