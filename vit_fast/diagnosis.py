"""doctor(): does this library compute on this machine what it promises? A report fit for a bug tracker, in seconds.

Facts of the machine, why each backend runs or does not, and findings: every public operation × backend × dtype against
float64, gradients where the backend has its own, a small model in each precision through ``check``, the same bits
twice, and the errors of bad arguments. Nothing is changed: a backend that fails here is not quarantined.

Errors are held to the rule of whole models, ``parity``: 1.25 times eager's and half a unit in the last place, in
float32 2 times and 4 units. The tests of this repository are stricter, on thousands of cases.
"""

import functools
import importlib.metadata
import os
import platform
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import extension, ops
from .backends import Status, backend, quarantine, select, status
from .backends.cpu import CPU
from .certificate import check
from .kernels.arguments import UnsupportedError
from .parity import compare
from .precisions import PRECISIONS
from .prepared import prepare
from .vit import VisionTransformer

_PACKAGES = ("vit-fast", "torch", "triton", "timm", "numpy")
_VARIABLES = re.compile(r"VIT_FAST_.*|TRITON_.*|OMP_NUM_THREADS|MKL_NUM_THREADS|CUDA_VISIBLE_DEVICES|PYTORCH_.*")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Reasons of a backend that say that something is broken, and not that it is absent.
_BROKEN = re.compile(r"cannot be loaded|wrong results|fails to import|finds no GPU driver")

_Call = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """One line of a report. ``passed`` is None where nothing could be tried, as ``text`` says."""

    subject: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Report:
    """What ``doctor`` found; its text is the report."""

    facts: dict[str, str]
    status: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no finding is a failure."""
        return all(finding.passed is not False for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """All of it as numbers and strings, for JSON."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        wide = max(len(finding.subject) for finding in self.findings)
        marks = {True: "ok", False: "FAILED", None: "-"}
        failed = sum(finding.passed is False for finding in self.findings)
        tried = sum(finding.passed is not None for finding in self.findings)
        verdict = f"{failed} of {tried} checks FAILED" if failed else f"all {tried} checks passed"
        return "\n".join(
            [
                f"vit_fast.doctor: {verdict} in {self.seconds:.1f} s",
                "",
                *(f"{name:<{width}}  {text}" for name, text in self.facts.items()),
                "",
                self.status,
                "",
                *(f"{one.subject:<{wide}}  {marks[one.passed]:<6}  {one.text}" for one in self.findings),
            ]
        )


def _public(text: str) -> str:
    """A text without the names of its user and machine: for a bug tracker."""
    home, host = str(Path.home()), socket.gethostname()
    if len(home) > 1:  # "/" where there is no home
        text = text.replace(home, "~")
    text = re.sub(r"/(?:home|Users)/[^/\s:;,'\"]+", "~", text)
    return re.sub(rf"\b{re.escape(host)}\b", "<host>", text) if len(host) > 3 and host != "localhost" else text


def instruction_sets() -> str:
    """The levels of csrc/build.py that this processor has, and the one that torch itself uses."""
    from .csrc import build

    try:
        told = {word.replace("_", "") for word in Path("/proc/cpuinfo").read_text().split()}
    except OSError:
        told = set()
    levels = [
        level
        for level, flags in build.levels().items()
        if all(flag.startswith("-mprefer") or flag.removeprefix("-m") in told for flag in flags)
    ]
    return f"{', '.join(levels)}; torch uses {torch.backends.cpu.get_cpu_capability()}"


def extension_facts() -> Iterator[tuple[str, str]]:
    """(name, text) about the C++/CUDA extension: what is loaded or why not, and what building needs."""
    from .csrc import build, cache

    for name in cache.NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is told
            reasons = extension.load(name)
        yield f"{name} extension", "; ".join(reasons) or str(extension.library(name))
    yield "instruction sets", instruction_sets()
    tools = {"compiler": build.compiler(), "ninja": build.ninja(), "nvcc": build.nvcc(), "CUTLASS": build.cutlass()}
    for name, tool in tools.items():
        yield name, f"{tool}" if tool else f"not found; to build, {build.INSTALL[name]}"


def _facts() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    yield from extension_facts()
    yield "level in use", CPU.version() or "none: the cpu backend does not run"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"
    if torch.cuda.is_available():
        yield "cuda", str(torch.version.cuda)
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)]
    yield "environment", " ".join(variables) or "nothing set"


def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, str, _Call, list[torch.Tensor]]]:
    """(operation, shape, call, its tensors) of each public operation, a ViT's shape and one with tails."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, spread: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * spread).to(device, dtype)

    for tokens, width, heads in ((197, 192, 3), (7, 40, 5)):
        shape, hidden = f"[2, {tokens}, {width}]", 2 * width + 8
        x, weight, bias = normal(2, tokens, width), 1 + normal(width, spread=0.2), normal(width)
        w1, b1 = normal(hidden, width, spread=width**-0.5), normal(hidden)
        w2, gamma = normal(width, hidden, spread=hidden**-0.5), normal(width)
        wide = normal(2, tokens, hidden)
        yield "layer_norm", shape, ops.layer_norm, [x, weight, bias]
        yield "layer_norm_linear", shape, _layer_norm_linear, [x, weight, bias, w1, b1]
        yield "linear_residual", shape, _linear_residual, [wide, w2, bias, gamma, x]
        yield "layernorm_mlp", shape, _layernorm_mlp, [x, weight, bias, w1, b1, w2, bias, gamma]
        qkv, scale = normal(2, tokens, 3 * width), (width // heads) ** -0.5
        yield "attention", shape, lambda t, heads=heads, scale=scale: ops.attention(t, heads, scale), [qkv]
        patch = 16 if width == 192 else 5
        images, kernel = normal(1, 3, 2 * patch, 3 * patch), normal(width, 3, patch, patch, spread=0.04)
        named = f"[1, 3, {2 * patch}, {3 * patch}]"
        yield "patch_embed", named, _patch_embed, [images, kernel, bias, normal(1, 6, width), normal(1, 1, width)]


def _layer_norm_linear(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    ln_weight, ln_bias, weight, bias = others
    return ops.layer_norm_linear(x, ln_weight, ln_bias, 1e-6, weight, bias, "gelu")


def _linear_residual(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    weight, bias, gamma, residual = others
    return ops.linear_residual(x, weight, bias, gamma, residual)


def _layernorm_mlp(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    ln_weight, ln_bias, w1, b1, w2, b2, gamma = others
    return ops.layernorm_mlp(x, ln_weight, ln_bias, 1e-6, w1, b1, w2, b2, "gelu", gamma)


def _patch_embed(images: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    weight, bias, pos_embed, prefix_tokens = others
    return ops.patch_embed(images, weight, bias, pos_embed, prefix_tokens, weight.shape[-1])


def _gradient(call: _Call, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of the first tensor, for a gradient of the output that depends on the place alone."""
    first = tensors[0].detach().clone().requires_grad_()
    out = call(first, *tensors[1:])
    place = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    (grad,) = torch.autograd.grad(out, first, place)
    return grad


def _ulp(golden: torch.Tensor, dtype: torch.dtype) -> float:
    largest = golden.abs().max().to(dtype)
    return float(torch.nextafter(largest, torch.full_like(largest, torch.inf)).double() - largest.double())


def _compared(
    subject: str, run: Callable[[list[torch.Tensor]], torch.Tensor], name: str, tensors: list[Any]
) -> Finding:
    """A call on a backend against float64, and against itself."""
    dtype = tensors[0].dtype
    try:
        with backend(name):
            out, again = run(tensors), run(tensors)
    except UnsupportedError as error:
        failed = error.__cause__ is not None or bool(select.BACKENDS[name].quarantined)
        return Finding(subject, False if failed else None, _line(error))
    except Exception as error:  # to be reported, whatever it is
        return Finding(subject, False, _line(error))
    with backend("torch"):
        eager, golden = run(tensors), run([t.double() for t in tensors])
    parity, unit = compare(out.detach(), eager, golden, dtype), _ulp(golden, dtype)
    figures = (parity.error / unit, parity.eager_error / unit, parity.allowed / unit)
    text = "error {:.2f} ulp, eager's {:.2f}, allowed {:.2f}".format(*figures)
    same = torch.equal(out, again)
    return Finding(subject, parity.passed and same, text if same else f"{text}; a second call gave other bits")


def _line(error: Exception) -> str:
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    return " from ".join(quarantine.cause(one) for one in causes if isinstance(one, Exception))


def _operations(device: torch.device) -> Iterator[Finding]:
    names = [name for name in select.BACKENDS if name != "torch" and not select.unavailable(name, device)]
    if not names:
        yield Finding("operations", None, f"torch is the only backend that runs on {device.type}: nothing to compare")
    for name in names:
        for dtype in _DTYPES:
            for operation, shape, call, tensors in _cases(device, dtype):
                if operation not in select.BACKENDS[name].forward:
                    continue
                named = f"{name} {operation} {str(dtype).removeprefix('torch.')} {shape}"
                yield _compared(named, functools.partial(_forward, call), name, tensors)
                if operation in select.BACKENDS[name].backward:
                    yield _compared(f"{named} gradient", functools.partial(_gradient, call), name, tensors)


def _forward(call: _Call, tensors: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return call(*tensors)


def _models(device: torch.device) -> Iterator[Finding]:
    """A small ViT, as it is and prepared in each precision, through ``check``."""
    for dtype in _DTYPES[:2]:
        for precision in ("plain", *PRECISIONS):
            named = "plain" if precision == "plain" else f"prepared {precision or ''}".strip()
            subject = f"model {named} {str(dtype).removeprefix('torch.')}"
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2, num_classes=16, init_values=0.1)
            model = model.to(device, dtype).eval()
            try:
                if precision != "plain":
                    prepare(model, precision=precision)
                certificate = check(model)
            except (UnsupportedError, ValueError) as error:
                yield Finding(subject, None, _line(error))
                continue
            except Exception as error:  # to be reported, whatever it is
                yield Finding(subject, False, _line(error))
                continue
            parity = certificate.outputs[-1].parity
            ran = ", ".join(certificate.operations)
            text = f"error {parity.error:.2e}, allowed {parity.allowed:.2e}; ran {ran}"
            yield Finding(subject, certificate.passed, text)


def _bad_arguments(device: torch.device) -> Iterator[Finding]:
    """Mistakes, the exception that each must raise, and a word of its message."""
    x, weight = torch.ones(2, 3, 8, device=device), torch.ones(8, device=device)

    def unknown() -> None:
        with backend("nope"):
            pass

    mistakes: list[tuple[str, Callable[[], object], type[Exception], str]] = [
        ("layer_norm, no tensor", lambda: ops.layer_norm(1, weight, weight), TypeError, "x"),  # type: ignore[arg-type]
        ("layer_norm, 7 weights", lambda: ops.layer_norm(x, weight[:7], None), ValueError, "weight"),
        ("attention, width 8", lambda: ops.attention(x, 1, 1.0), ValueError, "qkv"),
        ("layer_norm_linear, activation", lambda: _layer_norm_linear_with(x, "nope"), ValueError, "activation"),
        ("linear_residual, shapes", lambda: ops.linear_residual(x, x[0], None, None, x), ValueError, "residual"),
        ("backend 'nope'", unknown, ValueError, "backend"),
        ("prepare, precision 'nope'", lambda: prepare(torch.nn.Identity(), precision="nope"), ValueError, "precision"),
    ]
    for named, mistake, wanted, word in mistakes:
        try:
            mistake()
        except Exception as error:  # which one is the question
            right = isinstance(error, wanted) and word in str(error) and str(error).startswith("vit_fast")
            yield Finding(f"bad argument: {named}", right, _line(error))
        else:
            yield Finding(f"bad argument: {named}", False, f"no error, expected {wanted.__name__}")


def _layer_norm_linear_with(x: torch.Tensor, activation: str) -> torch.Tensor:
    return ops.layer_norm_linear(x, None, None, 1e-6, x[0], None, activation)


def _backends(found: Status) -> Iterator[Finding]:
    """What is broken of the backends; one that is absent, or for another device, is none."""
    for name, reasons in found.reasons.items():
        for reason in reasons:
            if _BROKEN.search(reason):
                yield Finding(f"backend {name}", False, reason)
    for name, lost in found.quarantine.items():
        for operation, why in lost.items():
            yield Finding(f"backend {name}", False, f"{operation} failed earlier in this process: {why}")


def doctor(device: torch.device | str | None = None) -> Report:
    """Tries this library on this machine and reports, in some 10 seconds on two cores.

    Args:
        device: where; default the current CUDA device, else the CPU.
    Returns:
        ``Report``: print it, ask ``passed``, or write ``as_dict()`` as JSON. It names neither user nor machine.
    Raises:
        TypeError, ValueError: no device, or one that this machine does not have.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = status(device)
        place = torch.device(found.device)
        findings = [*_backends(found), *_operations(place), *_models(place), *_bad_arguments(place)]
        facts = dict(_facts())
        found = status(place)
    told = dict.fromkeys(str(warning.message) for warning in caught)
    findings += [Finding("warning", False, text) for text in told if text.startswith("vit_fast")]
    return Report(
        facts={name: _public(text) for name, text in facts.items()},
        status=_public(str(found)),
        findings=tuple(Finding(one.subject, one.passed, _public(one.text)) for one in findings),
        seconds=time.perf_counter() - start,
    )
