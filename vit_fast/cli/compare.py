"""The benchmark itself: vit_fast in its variants against its rivals, on the same weights, pixels and dtype, in one run.

timm's model is the reference of parity, or for a family (``families``) the plain PyTorch form. Parity comes first: a
provider whose logits are out of budget is not timed, and if it is one of ours, the run counts as failed. Then the
providers are timed in rounds, each once a round in random order, so that a clock that drifts drifts for all of them
(``speedup`` has the statistics). One row is one provider at one batch size; ``status`` is "ok" or says why the row has
no figures. ``product_dtype`` is what its matrix products multiply: a rival in float8 is compared with ours in float8
alone.

A time budget (``TimeBudget``) is planned before parity, by the time of one call of eager: batch sizes and providers
that do not fit are left out, and told. Compilations, whose time nobody knows ahead, end at a deadline.
"""

import contextlib
import copy
import functools
import gc
import random
import signal
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch

import vit_fast
from vit_fast import backends, parity

from . import CommandError, machine, measure, options, photographs, reason, scaled_mm, speedup
from .rivals import COMPILE_MODES, GRAPHED, AttentionOps, best_attention, build

PLAIN, PREPARED, GRAPH = "vit_fast", "vit_fast-prepared", "vit_fast-graphed"
FP8, FP8_GRAPH = "vit_fast-fp8", "vit_fast-fp8-graphed"
VARIANTS = {"plain": PLAIN, "prepared": PREPARED, "graphed": GRAPH, "fp8": FP8, "fp8-graphed": FP8_GRAPH}
OUR_GRAPHS = (GRAPH, FP8_GRAPH)
IN_FLOAT8 = (FP8, FP8_GRAPH, scaled_mm.NAME)
MIN_ROUNDS = 3
# What a batch size costs at least, in calls of the eager model: parity in float64 and eager's own logits; for each
# provider its first calls, that for the memory, and the rounds.
PARITY_CALLS, PROVIDER_CALLS = 5, 4 + MIN_ROUNDS
LEAST_COMPILE = 5.0  # seconds below which no compilation is tried
PEAK_SECONDS = 2.0  # what the peak of a matrix product takes


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
    variants: tuple[str, ...] = ("plain",)
    rivals: tuple[str, ...] = ("eager",)
    warm_iterations: int = 10
    bench_iterations: int = 40
    channels_last: bool = False
    pretrained: bool = False
    images: Path | None = None
    backend: str | None = None
    family: str | None = None
    load_average: float | None = None

    @property
    def compute_dtype(self):
        return getattr(torch, self.amp_dtype or self.precision)


class TimeBudget:
    """Seconds for the whole command from ``start`` on; a limit of 0 sets no end. Knows what compiling has taken."""

    def __init__(self, limit, start):
        self.limit, self.start = limit, start
        self.compiled = {}

    def spent(self):
        return time.perf_counter() - self.start

    def left(self):
        return self.limit - self.spent() if self.limit else float("inf")

    def compile_seconds(self, name):
        """What compiling this rival takes by what this run has seen: its own longest time, else that of any."""
        return self.compiled.get(name, max(self.compiled.values(), default=0.0))


class _OutOfTime(BaseException):
    """No Exception, so that no compiler takes it for a failure of its own."""


@contextlib.contextmanager
def _deadline(seconds):
    """Raises ``_OutOfTime`` in its block after so many seconds; only a main thread on a Unix can."""
    main = threading.current_thread() is threading.main_thread()
    if seconds == float("inf") or not main or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number, frame):
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Plan:
    """What a time budget has room for: {batch size: the least seconds that it takes}, and the providers timed there."""

    batches: dict
    providers: tuple[str, ...]


@dataclass
class Contest:
    """Models with the same weights, their pixels, and what every row says of them, ``float8_facts`` in float8.

    ``ours`` and ``rivals`` map a provider to its module, ``absent`` those of either that have none to the reason.
    """

    reference: torch.nn.Module
    ours: dict
    rivals: dict
    absent: dict
    pixels: torch.Tensor
    flops: int
    facts: dict
    float8_facts: dict
    kernel_cache: Path


@dataclass
class Provider:
    """One contestant at one batch size: how to call it, and under which context; its row, its times in seconds."""

    name: str
    call: object
    row: dict
    ours: bool = False
    context: object = contextlib.nullcontext
    rounds: list = field(default_factory=list)  # of lists of step times
    latencies: list = field(default_factory=list)
    warm_seconds: float = 0.0
    logits: object = None
    operators: list | None = None  # None where they are not known: compiled, in a graph, or in kernels of our own

    @property
    def in_float8(self):
        return self.name in IN_FLOAT8

    @property
    def steps(self):
        return [step for steps in self.rounds for step in steps]

    def same_as(self, other):
        """Whether both run the same operators and give the same bits."""
        return bool(self.operators) and self.operators == other.operators and torch.equal(self.logits, other.logits)


def run(settings, budget, tell, keep=lambda rows: None):
    """Measures all batch sizes; whether vit_fast failed on any of them.

    After Ctrl-C the rows of a batch size that has enough rounds are kept too, then KeyboardInterrupt goes on.

    Args:
        tell: called with a text and the done fraction as the work goes on; ``tell.warn`` prints a line.
        keep: called with the rows of each batch size as soon as they are there.
    """
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    with forced:
        _tell_of_short_time(settings, budget, tell)
        tell(f"{settings.model}: models and pixels", 0.0)
        contest = _prepare(settings, budget, tell)
        plan = _plan(settings, contest, budget, tell)
        failed, count = False, len(settings.batch_sizes)
        for index, batch in enumerate(settings.batch_sizes):

            def tell_batch(text, done, index=index, batch=batch):
                tell(f"batch {batch}: {text}", (index + done) / count)

            providers = _providers(settings, contest, batch, plan)
            interrupted = False
            if batch in plan.batches:
                later = {size: plan.batches[size] for size in settings.batch_sizes[index + 1 :] if size in plan.batches}
                try:
                    failed |= _bench_batch(settings, contest, batch, providers, budget, later, tell_batch)
                except _Interrupted as stop:
                    interrupted, failed = True, failed or stop.failed
            keep([provider.row for provider in providers])
            if interrupted:
                raise KeyboardInterrupt
            _release(settings.device)
    return failed


class _Interrupted(Exception):
    """Ctrl-C after enough rounds of a batch size, whose rows are filled in."""

    def __init__(self, failed):
        super().__init__()
        self.failed = failed


def _making_seconds(settings):
    """What making the models takes, by the time of a few random numbers: each parameter is drawn three times."""
    words = dict(settings.model_kwargs, **({"img_size": settings.img_size} if settings.img_size else {}))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in vit_fast.create_model(settings.model, **words).parameters())
    sample = torch.empty(1 << 18)
    drawn, _ = measure.seconds(lambda: torch.nn.init.trunc_normal_(sample), torch.device("cpu"))
    return 3 * drawn * parameters / sample.numel()


def _tell_of_short_time(settings, budget, tell):
    if not budget.limit or settings.family:
        return
    making = _making_seconds(settings)
    if making > 0.5 * budget.left():
        tell.warn(
            f"of the time budget of {budget.limit:.3g} s, imports have taken {budget.spent():.0f} s, and making the "
            f"models takes some {making:.0f} s; one of ours beside one rival at one batch size is never left out"
        )


def _plan(settings, contest, budget, tell):
    """What there is time for, by the time of a call of eager with one image; what there is not is told."""
    ours, rivals = _names(settings, contest)
    if not budget.limit:
        return Plan(dict.fromkeys(settings.batch_sizes, 0.0), (*ours, *rivals))
    call = _caller(contest.reference, contest.pixels[:1], settings)
    step = min(measure.seconds(call, settings.device)[0] for _ in range(2))

    def least(batch, providers):
        return step * batch * (PARITY_CALLS + PROVIDER_CALLS * len(providers))

    # The compiled ones are weighed when their turn comes, by what compiling has taken.
    providers = tuple(name for name in (*ours, *rivals) if name not in COMPILE_MODES and name not in contest.absent)
    first, *others = settings.batch_sizes
    left_out = []
    if least(first, providers) > budget.left():
        dropped = providers
        providers = tuple(name for side in (ours, rivals) for name in [n for n in side if n in dropped][:1])
        left_out += [name for name in dropped if name not in providers]
    batches, total = {first: least(first, providers)}, least(first, providers)
    for batch in others:
        if total + least(batch, providers) <= budget.left():
            batches[batch] = least(batch, providers)
            total += batches[batch]
        else:
            left_out.append(f"batch {batch}")
    compiled = tuple(name for name in rivals if name in COMPILE_MODES and name not in providers)
    if budget.left() - total < LEAST_COMPILE:
        left_out, compiled = [*compiled, *left_out], ()
    if contest.facts["matmul_peak_tflops"] is None:
        left_out.append("the peak of a matrix product")
    if left_out:
        tell.warn(
            f"the time budget of {budget.limit:.3g} s leaves out {', '.join(left_out)}; what remains takes about "
            f"{total:.0f} s more"
        )
    return Plan(batches, providers + compiled)


def _family_models(settings):
    """(reference, {provider of ours: module}, rivals, absent) of a family."""
    from . import families

    our_model, rivals = families.contestants(settings.family, parity.perturb)
    for model in (our_model, *rivals.values()):
        model.to(settings.device, getattr(torch, settings.precision))
    return rivals["torch"], {PLAIN: our_model}, rivals, {}


def _models(settings):
    """(timm's model, {provider of ours: module}, rivals, absent) with the same weights."""
    words = dict(settings.model_kwargs)
    if settings.img_size is not None:
        words["img_size"] = settings.img_size
    torch.manual_seed(0)
    timm_model = options.timm_model(settings.model, settings.pretrained, **words).eval()
    try:
        our_model = vit_fast.create_model(settings.model, **words).eval()
    except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
        raise CommandError(f"vit_fast cannot make the model {settings.model!r}: {reason(error)}") from error
    if not settings.pretrained:
        parity.perturb(timm_model)
    our_model.load_state_dict(timm_model.state_dict(), strict=True)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format

    # Parameters keep requires_grad, as in a program that only infers: without it, torch makes batched products of some.
    def settle(model):
        model.to(settings.device, getattr(torch, settings.precision), memory_format=layout)

    settle(timm_model)
    settle(our_model)
    rivals, absent = build(settings.rivals, timm_model, settings.device)
    for name, model in rivals.items():
        if name not in IN_FLOAT8:  # its e4m3 weights would become the dtype of the others
            settle(model)
    ours, unsupported = _variants(settings.variants, our_model)
    return timm_model, ours, rivals, absent | unsupported


def _variants(words, model):
    """({provider: module}, {provider: why it has none}) of our model's variants, each with its own copy of it.

    A graphed one is here the prepared model: a graph is of one batch size, and captured by its first call.
    """
    ours, absent = {}, {}
    for name in map(VARIANTS.get, words):
        precision = "fp8" if name in IN_FLOAT8 else None
        try:
            ours[name] = model if name == PLAIN else vit_fast.prepare(copy.deepcopy(model), precision=precision)
        except vit_fast.UnsupportedError as error:
            absent[name] = str(error)
    return ours, absent


def _graphed(model, batch):
    """A function of pixels that captures a CUDA graph when it is first called, and then replays it."""
    captured = functools.cache(lambda: vit_fast.graphed(model, batch_sizes=[batch]))
    return lambda pixels: captured()(pixels)


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


def _prepare(settings, budget, tell):
    kernel_cache = measure.kernel_cache()
    reference, ours, rivals, absent = (_family_models if settings.family else _models)(settings)
    height, width, mean, std = _input_of(reference, settings)
    photos = photographs.load(settings.images, max(settings.batch_sizes), height, width, mean, std)
    for skipped in photos.skipped:
        tell.warn(f"skipped {skipped}")
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    pixels = photos.pixels.to(settings.device, getattr(torch, settings.precision), memory_format=layout)
    flops = measure.flops_per_image(reference, pixels)
    peak_of = settings.device if budget.left() > 10 * PEAK_SECONDS else None
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
        "load_average": settings.load_average,
        **_product_facts(settings.compute_dtype, peak_of),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "timm": timm.__version__,
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    in_float8 = any(name in IN_FLOAT8 for name in (*ours, *rivals))
    missing = not in_float8 or measure.float8_missing(settings.device)
    float8_facts = _product_facts(measure.E4M3, None if missing else peak_of)
    return Contest(reference, ours, rivals, absent, pixels, flops, facts, float8_facts, kernel_cache)


def _product_facts(dtype, device):
    """Columns of the dtype that products multiply and of their peak; without a device that is not measured."""
    peak, sustained = measure.matmul_peaks(dtype, device) if device else (None, None)
    name = str(dtype).removeprefix("torch.").removesuffix("fn")
    return {"product_dtype": name, "matmul_peak_tflops": peak, "matmul_peak_sustained_tflops": sustained}


def _caller(model, pixels, settings, no_grad=torch.inference_mode):
    def call():
        cast = contextlib.nullcontext()
        if settings.amp_dtype:
            cast = torch.autocast(settings.device.type, settings.compute_dtype)
        with no_grad(), cast:
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


def _names(settings, contest):
    """The providers in their order: ours, rivals."""
    ours = [PLAIN] if settings.family else [VARIANTS[word] for word in settings.variants]
    return ours, [*(contest.rivals if settings.family else settings.rivals)]


def _providers(settings, contest, batch, plan):
    """Ours before the rivals; what has no module, or no time, has a row that says so."""
    our_names, rival_names = _names(settings, contest)
    pixels, providers = contest.pixels[:batch], []
    for name in (*our_names, *rival_names):
        model = contest.ours.get(name, contest.rivals.get(name))
        if name in OUR_GRAPHS and model is not None:
            model = _graphed(model, batch)
        if name in COMPILE_MODES:
            model = torch.compile(model, mode=COMPILE_MODES[name], dynamic=False)
        row = dict(contest.facts, provider=name, infer_batch_size=batch, status="ok")
        if name in IN_FLOAT8:
            row |= contest.float8_facts
        if name in contest.absent:
            row["status"] = f"not timed: {contest.absent[name]}"
        elif batch not in plan.batches or name not in plan.providers:
            row["status"] = f"not timed: no time left{' to compile it' if name in COMPILE_MODES else ''}"
        providers.append(Provider(name, _caller(model, pixels, settings), row, ours=name in our_names))
    return providers


def _bench_batch(settings, contest, batch, providers, budget, later, tell):
    """Fills in the rows of one batch size; whether vit_fast failed on it.

    later: {batch size: the least seconds that it takes} of those that follow.
    """
    pixels = contest.pixels[:batch]
    # torch.compile gives up on a function after a number of shapes, silently: each batch size starts afresh.
    torch._dynamo.reset()
    ours = [provider for provider in providers if provider.ours]
    rivals = [provider for provider in providers if not provider.ours and provider.row["status"] == "ok"]

    tell("parity", 0.0)
    try:
        golden = parity.golden_logits(contest.reference, pixels)
        eager = _caller(contest.reference, pixels, settings)().clone()
    except Exception as error:
        for provider in ours:
            provider.row["status"] = _outcome(error)
    for provider in ours:
        _attempt(provider, lambda p=provider: _judge(p, golden, eager, contest, pixels, settings), settings.device)
    well = [provider for provider in ours if provider.row["status"] == "ok"]
    if not well:
        first = ours[0].row["status"]
        why = "no variant of vit_fast to compare with" if first.startswith("not timed") else f"{ours[0].name}: {first}"
        for rival in rivals:
            rival.row["status"] = f"not timed: {why}"
        return any(provider.row["status"] != "out of memory" for provider in ours)

    timing = (MIN_ROUNDS + 1) * len(well + rivals) * well[0].warm_seconds
    compiled = [rival.name for rival in rivals if rival.name in COMPILE_MODES]
    attention = {}
    for index, rival in enumerate(rivals):
        tell(f"{rival.name}, first call", (index + 1) / (len(rivals) + 1) / 2)
        module = contest.rivals[rival.name]
        if id(module) not in attention:
            attention[id(module)] = _attention(module, pixels, settings)
        columns, operators, rival.context = attention[id(module)]
        rival.row.update(columns)
        if rival.name in COMPILE_MODES:
            # At every batch size, first those that stand first: time for them is kept back.
            before = compiled[: compiled.index(rival.name)]
            kept_back = sum(least + sum(map(budget.compile_seconds, before)) for least in later.values())
            seconds_left = budget.left() - timing - kept_back
        else:
            rival.operators, seconds_left = operators, float("inf")
        _first_call(rival, golden, eager, contest, pixels, settings, budget, seconds_left)
    weights = measure.weight_bytes(contest.reference)
    for provider in providers:
        _attempt(provider, lambda provider=provider: _memory(provider, weights, settings.device), settings.device)
    kept_back = sum(map(budget.compile_seconds, compiled[:1])) * len(later)
    seconds = max(budget.left() - kept_back, 0.0) / (1 + len(later))
    interrupted = _rounds(providers, settings, seconds, tell)
    _fill_in(providers, settings, contest, batch)
    failed = any(provider.row["status"].startswith(("failed", "parity failed")) for provider in ours)
    if interrupted:
        raise _Interrupted(failed)
    return failed


def _attempt(provider, work, device):
    """Does the work if the provider is still well; an exception becomes its status."""
    if provider.row["status"] != "ok":
        return
    try:
        with provider.context():
            work()
    except Exception as error:
        provider.row["status"] = _outcome(error)
    if provider.row["status"] != "ok":  # the exception, and the tensors its frames hold, are gone only here
        _release(device)


def _plain_logits(provider, contest, pixels, settings):
    """Logits of the plain PyTorch form of a model in float8; None of a model in the dtype of its weights."""
    if not provider.in_float8:
        return None
    if not provider.ours:
        return _caller(scaled_mm.plain(contest.rivals[provider.name]), pixels, settings)().clone()
    with vit_fast.backend("torch"):
        return _caller(contest.ours[provider.name], pixels, settings)().clone()


def _judge(ours, golden, eager, contest, pixels, settings):
    """Fills in the parity of one of ours, its first call and which backends ran."""
    cold = measure.is_cold(contest.kernel_cache, "*.cubin")
    try:
        with backends.recording() as choices:
            first, logits = measure.seconds(ours.call, settings.device)
    except vit_fast.UnsupportedError as error:
        if ours.name == PLAIN:
            raise
        ours.row["status"] = f"not timed: {error}"
        return
    counted = Counter(f"{chosen} {op}" for op, chosen, _ in choices)
    reasons = dict.fromkeys(reason for _, chosen, why in choices if chosen == "torch" for reason in why)
    used = sorted({chosen for _, chosen, _ in choices})
    logits = ours.logits = logits.clone()
    ours.warm_seconds, _ = measure.seconds(ours.call, settings.device)
    if used == ["torch"] and ours.name not in OUR_GRAPHS:
        with measure.Operators() as operators:
            _caller(contest.ours[ours.name], pixels, settings, torch.no_grad)()
        ours.operators = operators.calls
    plain = _plain_logits(ours, contest, pixels, settings)
    verdict = parity.compare(logits, eager, golden, settings.compute_dtype, plain)
    ours.row.update(
        verdict.columns(),
        first_call_s=first,
        cold_cache=cold if "triton" in used else None,
        vit_fast_backend="+".join(used),
        vit_fast_operations=", ".join(f"{name} ×{count}" for name, count in counted.items()),
        vit_fast_reasons="; ".join(reasons),
    )
    if not verdict.passed:
        ours.row["status"] = "parity failed"
    elif ours.in_float8 and all(op != "fp8_blocks" for op, *_ in choices):
        ours.row["status"] = "failed: no block ran in float8"


def _attention(module, pixels, settings):
    """The fastest way for a module to attend: (columns of its row, its operators, function that makes a context)."""
    way, context = best_attention(module, _caller(module, pixels, settings), settings.device)
    ops, operators = AttentionOps(), measure.Operators()
    with contextlib.suppress(Exception), context(), ops, operators:  # its first call will tell of the failure
        _caller(module, pixels, settings, torch.no_grad)()
    return {"attention": way, "attention_operators": ", ".join(sorted(ops.names))}, operators.calls, context


def _first_call(rival, golden, eager, contest, pixels, settings, budget, seconds_left):
    """Compiles the rival, unless the time left is too short for that, and compares its logits."""
    compiled = rival.name in COMPILE_MODES
    if compiled and seconds_left < max(budget.compile_seconds(rival.name), LEAST_COMPILE):
        rival.row["status"] = "not timed: no time left to compile it"
        return

    def work():
        cold = measure.is_cold(measure.compile_cache()) if compiled else None
        seconds, logits = measure.seconds(rival.call, settings.device)
        if compiled:
            budget.compiled[rival.name] = max(budget.compiled.get(rival.name, 0.0), seconds)
            rival.row.update(first_call_s=seconds, cold_cache=cold)
        rival.logits = logits = logits.clone()
        plain = _plain_logits(rival, contest, pixels, settings)
        verdict = parity.compare(logits, eager, golden, settings.compute_dtype, plain)
        rival.row.update(verdict.columns())
        if not verdict.passed:
            rival.row["status"] = "not timed: parity failed"

    try:
        with _deadline(seconds_left):
            _attempt(rival, work, settings.device)
    except _OutOfTime:
        budget.compiled[rival.name] = max(budget.compiled.get(rival.name, 0.0), seconds_left)
        rival.row["status"] = f"not timed: not compiled in the {seconds_left:.0f} s that were left for it"
        torch._dynamo.reset()


def _memory(provider, weights, device):
    if device.type == "cuda" and provider.name in (*OUR_GRAPHS, *GRAPHED):
        peak, method = None, "not measured: a CUDA graph keeps its memory between calls"
    else:
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


def _rounds(providers, settings, seconds, tell):
    """Times the providers round after round: as many as asked for, or as fit into the time, 3 at least.

    Whether Ctrl-C came after these; before, it is raised.
    """
    device, wanted = settings.device, settings.bench_iterations
    end = time.perf_counter() + seconds
    for provider in providers:
        warm = seconds / 5 / len(providers)
        _attempt(provider, lambda p=provider, s=warm: _warm_up(p, settings.warm_iterations, s, device), device)
    on_gpu = device.type == "cuda"
    rounds = min(wanted, 10) if on_gpu else wanted
    order, draw = list(providers), random.Random(0)
    try:
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() > end:
                break
            tell(f"round {turn + 1} of {rounds}", 0.5 + turn / rounds / 2)
            calls = (turn + 1) * wanted // rounds - turn * wanted // rounds
            draw.shuffle(order)  # so that each comes after every other one
            for provider in order:

                def work(provider=provider, calls=calls):
                    steps = measure.step_times(provider.call, calls, device)
                    latencies = [measure.seconds(provider.call, device)[0] for _ in range(calls)] if on_gpu else steps
                    provider.rounds.append(steps)
                    provider.latencies += latencies

                _attempt(provider, work, device)
    except KeyboardInterrupt:
        if turn < MIN_ROUNDS:
            raise
        return True
    return False


def _fill_in(providers, settings, contest, batch):
    state = machine.gpu_state(settings.device)
    timed = [provider for provider in providers if provider.row["status"] == "ok"]
    drift = speedup.drift([provider.rounds for provider in timed])
    for provider in timed:
        row = provider.row
        row.update(measure.summary(provider.steps, batch), **state)
        row["latency_ms"] = 1000 * statistics.median(provider.latencies)
        row["num_bench_iter"], row["drift"] = len(provider.steps), drift
        row["achieved_tflops"] = row["infer_samples_per_sec"] * contest.flops / 1e12
        peak = row["matmul_peak_tflops"]
        row["percent_of_peak"] = peak and 100 * row["achieved_tflops"] / peak
    rivals = [provider for provider in timed if not provider.ours]
    for rival in rivals:
        for provider in timed:
            ratio = provider.row["infer_samples_per_sec"] / rival.row["infer_samples_per_sec"]
            provider.row[f"speedup_vs_{rival.name.replace('-', '_')}"] = ratio
    ours = [provider for provider in timed if provider.ours]
    for provider in ours:
        fair = [rival for rival in rivals if provider.in_float8 or not rival.in_float8]
        if fair:
            best = max(fair, key=lambda rival: rival.row["infer_samples_per_sec"])
            ratio = provider.row["infer_samples_per_sec"] / best.row["infer_samples_per_sec"]
            provider.row.update(best_rival=best.name, speedup_vs_best_rival=ratio)
            found = speedup.speedup(provider.rounds, best.rounds, len(ours))
            provider.row.update(
                paired_speedup=found.ratio,
                paired_speedup_low=found.low,
                paired_speedup_high=found.high,
                compared_rounds=found.rounds,
                same_as_best_rival=provider.same_as(best),
            )
