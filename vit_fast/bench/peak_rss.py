"""Peak resident memory of a provider: a fresh process makes its model, calls it three times and tells how far its peak
rose above the one before the model was made.

That covers the weights, their packed or folded copies, what a compiler or an engine leaves loaded, and activations. The
engines load the file that this process has written, as a deployment does. ``python -m vit_fast.bench.peak_rss`` is the
fresh process: it reads pickled arguments on its standard input and prints bytes.
"""

import contextlib
import importlib
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

import vit_fast

from . import baselines, engines, measure, models
from .contest import caller
from .providers import COMPILE_MODES, ENGINES, VARIANTS
from .settings import Settings

CALLS = 3
METHOD = f"growth of the peak resident memory of a fresh process, from before the model is made to {CALLS} calls"


def columns(
    settings: Settings, name: str, batch: int, pixels: torch.Tensor, others: dict[str, Any], timeout: float = 600
) -> dict[str, Any]:
    """The columns of a provider's row: MiB, or None, and the method or the reason."""
    if sys.platform == "win32":
        return {"peak_rss_mib": None, "peak_rss_method": "not measured: Windows does not tell it"}
    engine = engines.unloaded(others[name]) if name in ENGINES else None
    settings = replace(settings, batch_sizes=(batch,))
    words = [sys.executable, "-P", "-m", __name__]
    sent = pickle.dumps((settings, name, pixels.clone(), torch.get_num_threads(), engine))
    try:
        done = subprocess.run(words, input=sent, capture_output=True, timeout=timeout, check=True)
        return {"peak_rss_mib": int(done.stdout.split()[-1]) / 2**20, "peak_rss_method": METHOD}
    except subprocess.TimeoutExpired:
        reason = f"its process took more than {timeout:.0f} s"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1][:300] if lines else f"its process ended with status {error.returncode}"
    except (ValueError, IndexError):
        reason = "its process printed no figure"
    return {"peak_rss_mib": None, "peak_rss_method": f"not measured: {reason}"}


def _model(settings: Settings, name: str) -> Any:
    """The provider's model with timm's initial weights: their values do not change the memory."""
    kwargs = settings.constructor_kwargs()
    variant = next((variant for variant in VARIANTS.values() if variant.provider == name), None)
    if variant:
        model = models.vit_fast_model(settings.model, **kwargs)
    else:
        model = models.timm_model(settings.model, **kwargs)
    model.to(settings.device, getattr(torch, settings.precision), memory_format=settings.memory_format)
    if variant:
        return vit_fast.prepare(model, precision=variant.precision.name) if variant.precision else model
    if name in baselines.LIBRARIES:
        model = baselines.LIBRARIES[name](model).eval()
    return baselines.compiled_model(model, name) if name in COMPILE_MODES else model


def _peak() -> int:
    """Peak resident bytes of this process. On Linux ru_maxrss begins at the peak of the process that started it."""
    try:
        return measure.resident("VmHWM:")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measures what standard input describes."""
    settings, name, pixels, threads, engine = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    # What has to be imported is no part of the model.
    imports = [
        "timm",
        *["torch._inductor.compile_fx"] * (name in COMPILE_MODES),
        *[name.partition("-")[0]] * bool(engine),
    ]
    for module in imports:
        importlib.import_module(module)
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    before = _peak()
    with forced:
        call = caller(engine or _model(settings, name), pixels, settings)
        for _ in range(CALLS):
            call()
    print(_peak() - before)


if __name__ == "__main__":
    main()
