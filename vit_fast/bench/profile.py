"""Where the time of one forward pass goes, operation by operation, beside its roofline bound.

The roofline bound of an operation is the greater of its FLOP at the speed of a large matrix product in the dtype that
it multiplies, and its bytes at the speed of a copy, all measured in the same run. ``operations`` lists the operations,
torch.profiler tells when each kernel (on a CPU: operator) ran, and ``attribution`` which operation it belongs to. On a
GPU of ``gpus`` the time that ``predict`` says stands beside the measured one of our own variants, and by how much it is
wrong: every profile grades the model.
"""

import contextlib
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

import vit_fast
from vit_fast import backends
from vit_fast.input_size import input_size
from vit_fast.precisions import Precision

from . import attribution, gpus, machine, measure, models, operations, predict
from .errors import BenchError, is_out_of_memory, reason
from .providers import COMPILE_MODES
from .providers import PROFILED_VARIANTS as OURS

GAPS, STEP = "gaps (GPU idle)", "step under the profiler"
WARM_CALLS = {"cuda": 10, "cpu": 2}


@dataclass(frozen=True)
class Settings:
    """The checked settings; ``provider`` is one of ``providers.PROFILED``, ``batch`` the images a step."""

    model: str
    provider: str
    batch: int
    device: torch.device
    precision: str
    img_size: int | None
    model_kwargs: dict[str, Any]
    backend: str | None
    iterations: int

    @property
    def narrow(self) -> Precision | None:
        """The precision of a model whose products are narrower than its weights, else None."""
        variant = OURS.get(self.provider)
        return variant.precision if variant and variant.products else None

    def constructor_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of the model's constructor."""
        return self.model_kwargs | ({} if self.img_size is None else {"img_size": self.img_size})


def run(settings: Settings, tell: Callable[[str, float], None]) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """(facts of the run, rows, the Chrome trace's text).

    Rows are operations in the order of the forward pass, then kernels without an operation, then sum, gaps and step.
    """
    device, on_gpu = settings.device, settings.device.type == "cuda"
    if on_gpu and torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        raise BenchError(f"torch {torch.__version__} has no GPU profiler here (torch.profiler knows no CUDA activity)")
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    try:
        with forced:
            tell(f"{settings.model}: model", 0.0)
            model, pixels = _model_and_pixels(settings)
            narrow = settings.narrow
            if narrow:  # its traffic differs from the unprepared model's
                model = _provide(model, settings.provider)
            calls = operations.forward_operations(model, pixels)
            if not narrow:
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
            host = statistics.median(measure.host_seconds(call, settings.iterations, device))
            tell("profile", 0.6)
            trace, events = _trace(call, settings)
        tell("ceilings", 0.8)
        flop_rate = 1e12 * measure.matmul_peak(getattr(torch, settings.precision), device)
        narrow_rate = None
        if narrow and not narrow.why_emulated(device):
            dtype = narrow.product_dtype(getattr(torch, settings.precision))
            narrow_rate = 1e12 * measure.matmul_peak(dtype, device, narrow.product)
        byte_rate = measure.copy_bandwidth(device)
    except vit_fast.UnsupportedError as error:
        raise BenchError(reason(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        raise BenchError(f"out of memory at --batch-size {settings.batch}: {first}") from error
    found = attribution.attribute(events, calls, settings.iterations, on_gpu, flop_rate, byte_rate, narrow_rate)
    if on_gpu and not found.rows:
        raise BenchError(
            "torch.profiler recorded no GPU kernel: CUPTI is missing or may not be used here (another profiler is "
            "attached, or the driver restricts it to administrators); nothing can be attributed"
        )
    facts = _facts(settings, tuple(pixels.shape[2:]), choices, step, host, flop_rate, byte_rate, narrow_rate)
    rows = _rows(found, facts)
    predicted = _predicted(settings) if on_gpu else {}
    facts["predicted"] = predicted.pop("why not", None) or ("beside the measured" if predicted else None)
    for row in rows:
        row["predicted_us"] = said = predicted.get((row["operation"], row["module"]))
        row["predicted_error_percent"] = 100 * (said / row["us"] - 1) if said and row["us"] else None
    return facts, rows, trace


def _predicted(settings):
    """{(operation, module): microseconds a step} by the model of this GPU; why there is none under "why not"."""
    gpu = gpus.named(machine.name(settings.device))
    if gpu is None or settings.provider not in predict.PROVIDERS or settings.backend not in (None, "auto", "triton"):
        return {}
    wanted = predict.Settings(
        settings.model, settings.provider, settings.batch, gpu.name, settings.precision, settings.constructor_kwargs()
    )
    try:
        _, rows = predict.run(wanted)
    except Exception as error:  # told; what was measured is worth more than its prediction
        return {"why not": f"not predicted: {error}"}
    found = {(row["operation"], row["module"]): row["us"] for row in rows}
    return found | {(GAPS, ""): found["gaps between launches", ""], (STEP, ""): found["step", ""]}


def _model_and_pixels(settings):
    torch.manual_seed(0)
    owner, make = ("vit_fast", models.vit_fast_model) if settings.provider in OURS else ("timm", models.timm_model)
    model = make(settings.model, **settings.constructor_kwargs())
    model.to(settings.device, getattr(torch, settings.precision)).requires_grad_(False)
    size = input_size(model)
    if size is None:
        raise BenchError(
            f"{owner}'s model {settings.model!r} does not tell the size of its input, so it is not profiled"
        )
    pixels = torch.randn(settings.batch, *size, device=settings.device)
    return model, pixels.to(getattr(torch, settings.precision))


def _provide(model, provider):
    """The model as the provider runs it."""
    if provider in OURS and (precision := OURS[provider].precision):
        try:
            return vit_fast.prepare(model, precision=precision.name)
        except (ValueError, TypeError, vit_fast.UnsupportedError) as error:
            raise BenchError(f"--provider {provider}: {error}") from error
    if provider in COMPILE_MODES:
        return torch.compile(model, mode=COMPILE_MODES[provider], dynamic=False)
    return model


def _trace(call, settings):
    """The Chrome trace of the profiled steps: its text, and the events in it."""
    activities = [ProfilerActivity.CPU]
    if settings.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # The first profile of a process includes the start of the profiler.
    with torch.profiler.profile(activities=activities, acc_events=True):
        call()
        measure.synchronize(settings.device)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(settings.iterations):
            with record_function(attribution.STEP):
                call()
        measure.synchronize(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text(encoding="utf-8", errors="replace")
    return text, json.loads(text)["traceEvents"]


def _facts(settings, pixels, choices, step, host, flop_rate, byte_rate, narrow_rate):
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
        "matmul_peak_narrow_tflops": narrow_rate and narrow_rate / 1e12,
        "copy_tb_per_s": byte_rate / 1e12,
        "torch": torch.__version__,
        "triton": vit_fast.status(settings.device).versions.get("triton"),
        "vit_fast": vit_fast.__version__,
        "vit_fast_commit": machine.commit(),
        **machine.gpu_state(settings.device),
    }


def _line(operation, seconds, span, *, module="", calls=None, flop=None, moved=None, roofline=None, kernels=""):
    return {
        "operation": operation,
        "module": module,
        "calls": calls and round(calls, 3),
        "us_per_call": calls and 1e6 * seconds / calls,
        "us": 1e6 * seconds,
        "percent_of_step": 100 * seconds / span if span else 0.0,
        "gflop": flop and flop / 1e9,
        "mb": moved and moved / 1e6,
        "roofline_us": roofline and 1e6 * roofline,
        "percent_of_roofline": 100 * roofline / seconds if roofline and seconds else None,
        "kernels": kernels,
    }


def _rows(found, facts):
    span = found.span
    rows = []
    for row in found.rows:
        kernels = "; ".join(f"{name} ×{count:.3g}" for name, count in row.kernels.most_common())
        figures = dict(calls=row.calls, flop=row.flop, moved=row.bytes, roofline=row.roofline, kernels=kernels)
        rows.append(_line(row.operation, row.seconds, span, module=row.module, **figures))
    known = [row for row in found.rows if row.roofline is not None]
    sums = {"flop": "flop", "moved": "bytes", "roofline": "roofline"}
    sums = {word: sum(getattr(row, name) for row in known) for word, name in sums.items()}
    on_gpu = facts["device"] != "cpu"
    rows.append(_line("sum", sum(row.seconds for row in found.rows), span, **sums))
    if found.overlap > 1e-3 * span:
        rows.append(_line("of it beside other kernels", found.overlap, span))
    rows.append(_line(GAPS if on_gpu else "outside of operators", found.gaps, span))
    rows.append(_line(STEP, span, span))
    return rows
