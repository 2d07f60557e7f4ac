"""Peak resident memory of a provider: a fresh process makes its model, calls it three times and tells how far its peak
rose above the one before the model was made.

That covers the weights, their packed or folded copies, what a compiler or an engine leaves loaded, and activations. The
engines load the file that this process has written, as a deployment does. ``python -m vit_fast.bench.peak_rss`` is the
fresh process: it reads arguments, as Python literals, on its standard input and prints bytes.
"""

import ast
import contextlib
import importlib
import subprocess
import sys
from typing import Any

import torch

import vit_fast

from . import baselines, engines, measure, models, training_step
from .contest import caller
from .providers import COMPILE_MODES, ENGINES, VARIANTS
from .settings import Settings

CALLS = 3
_SETTINGS = ("model", "precision", "amp_dtype", "img_size", "model_kwargs", "channels_last", "backend", "bench")
METHOD = f"growth of the peak resident memory of a fresh process, from before the model is made to {CALLS} calls"


def columns(
    settings: Settings, name: str, batch: int, pixels: torch.Tensor, others: dict[str, Any], timeout: float = 600
) -> dict[str, Any]:
    """The columns of a provider's row: MiB, or None, and the method or the reason."""
    if sys.platform == "win32":
        return {"peak_rss_mib": None, "peak_rss_method": "not measured: Windows does not tell it"}
    arguments: dict[str, Any] = {
        "settings": {key: getattr(settings, key) for key in _SETTINGS},
        "name": name,
        "shape": tuple(pixels.shape),
        "threads": torch.get_num_threads(),
        "engine": (str(others[name].path), others[name].precision) if name in ENGINES else None,
    }
    sent = repr(arguments).encode()
    words = [sys.executable, "-P", "-m", __name__]
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


def _caller(settings: Settings, name: str, pixels: torch.Tensor) -> Any:
    """The function that calls the provider's model, or does a step of training."""
    if settings.bench != "train":
        return caller(_model(settings, name), pixels, settings)
    module = _module(settings, name).train()
    model = baselines.compiled_model(module, name) if name in COMPILE_MODES else module
    return training_step.calls(module, model, pixels, settings)[training_step.STEP]


def _model(settings: Settings, name: str) -> Any:
    model = _module(settings, name)
    return baselines.compiled_model(model, name) if name in COMPILE_MODES else model


def _module(settings: Settings, name: str) -> Any:
    """The provider's model with timm's initial weights: their values do not change the memory."""
    kwargs = settings.constructor_kwargs()
    variant = next((variant for variant in VARIANTS.values() if variant.provider == name), None)
    make = models.vit_fast_model if variant else models.timm_model
    model: Any = make(settings.model, **kwargs)
    model.to(settings.device, getattr(torch, settings.precision), memory_format=settings.memory_format)
    if variant:
        return vit_fast.prepare(model, precision=variant.precision.name) if variant.precision else model
    if name in baselines.LIBRARIES:
        model = baselines.LIBRARIES[name](model).eval()
    return model


def _peak() -> int:
    """Peak resident bytes of this process. On Linux ru_maxrss begins at the peak of the process that started it."""
    try:
        return measure.resident("VmHWM:")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measures what standard input describes."""
    arguments = ast.literal_eval(sys.stdin.read())
    name, its_file = arguments["name"], arguments["engine"]
    settings = Settings(batch_sizes=arguments["shape"][:1], device=torch.device("cpu"), **arguments["settings"])
    torch.set_num_threads(arguments["threads"])
    pixels = torch.randn(arguments["shape"]).to(
        getattr(torch, settings.precision), memory_format=settings.memory_format
    )
    # What has to be imported is no part of the model.
    importlib.import_module("timm")
    if name in COMPILE_MODES:
        importlib.import_module("torch._inductor.compile_fx")
    if its_file:
        importlib.import_module(name.partition("-")[0])
    forced = vit_fast.backend(settings.backend) if settings.backend else contextlib.nullcontext()
    before = _peak()
    with forced:
        if its_file:
            call = caller(engines.load(name, *its_file), pixels, settings)
        else:
            call = _caller(settings, name, pixels)
        for _ in range(CALLS):
            call()
    print(_peak() - before)


if __name__ == "__main__":
    main()
