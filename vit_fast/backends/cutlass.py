"""Linear layers with their epilogue in one kernel, by CUTLASS (``csrc/cutlass``).

The backend ``cuda`` runs them where it can, in the place of a product by PyTorch and a pass over its result.

The library is built by ``vit-fast build --cutlass`` and loaded on the first use. Before its kernels serve on a device,
small calls of each are held against PyTorch there, since none of them has run on a GPU yet. Where a call cannot be
taken, ``reasons`` says why. The operator ``torch.ops.vit_fast_cutlass.linear`` writes into a tensor that is made here.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vit_fast import extension

_SCHEMA = (
    "linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? residual, Tensor? mean, "
    "Tensor? rstd, Tensor? sums, int activation, int family, int swizzle) -> ()"
)
# As in csrc/cutlass/linear.h and epilogue.h.
FAMILIES = {"multistage": 0, "pingpong": 1, "cooperative": 2}
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "quick_gelu": 3, "relu": 4}
SWIZZLES = (1, 2, 4, 8)
_HALF = (torch.bfloat16, torch.float16)
_ALIGNMENT = 8  # elements, 16 bytes: of sizes, strides and addresses
_COOPERATIVE_TILES = 264  # tiles of 128 × 256 that fill an H200 twice; not measured
_TOLERANCE = 2e-2  # of the first look, for each value of about 1; a rounding of bfloat16 is 0.4 %


@dataclass(frozen=True)
class CutlassConfig:
    """A kernel of the library: how its loop is organised, and how many tiles of a column follow each other (sm_90)."""

    family: str
    swizzle: int = 1


@functools.cache
def _define_operator() -> torch.library.Library:
    library = torch.library.Library("vit_fast_cutlass", "DEF")
    library.define(_SCHEMA)
    return library


def load() -> tuple[str, ...]:
    """Loads the library, once; returns why that is impossible in this process, empty if it is done."""
    _define_operator()
    return extension.load("cutlass")


def capability(device: torch.device) -> int:
    """10 · major + minor of the compute capability."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def configs(dtype: torch.dtype, arch: int) -> list[CutlassConfig]:
    """The kernels for a dtype on a device of a capability."""
    if dtype not in _HALF or arch < (80 if dtype == torch.bfloat16 else 75):
        return []
    hopper = ("pingpong", "cooperative") if arch == 90 and dtype == torch.bfloat16 else ()
    return [CutlassConfig("multistage"), *(CutlassConfig(name, swizzle) for name in hopper for swizzle in SWIZZLES)]


def pick_config(rows: int, features: int, dtype: torch.dtype, arch: int) -> CutlassConfig:
    """The kernel for a product [rows, features]: large tiles where they fill the chip. Not measured."""
    if arch != 90 or dtype != torch.bfloat16:
        return CutlassConfig("multistage")
    tiles = -(-rows // 128) * -(-features // 256)
    return CutlassConfig("cooperative" if tiles >= _COOPERATIVE_TILES else "pingpong")


def folds(x: Tensor) -> bool:
    """Whether the library has kernels with a LayerNorm folded in for the dtype and the device of a tensor."""
    return not load() and any(config.family != "multistage" for config in configs(x.dtype, capability(x.device)))


def _one_stride(x: Tensor) -> bool:
    """Whether the rows of x [..., C] follow each other at one stride, aligned."""
    if x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    continued = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if continued is None and (stride < x.shape[-1] or stride % _ALIGNMENT):
            return False
        if continued is not None and stride != continued:
            return False
        continued = size * stride
    return True


def reasons(
    x: Tensor,
    weight: Tensor,
    activation: str | None = None,
    residual: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> list[str]:
    """Why the library cannot run act(x weightᵀ + bias) or residual + gamma · (x weightᵀ + bias); empty where it can.

    Args:
        x: [..., K].
        weight: [N, K].
        activation: by name.
        residual: [..., N].
        row_scale: of images, which no kernel has.
    """
    if missing := load():
        return list(missing)
    found = []
    if x.dtype != weight.dtype or (residual is not None and residual.dtype != x.dtype) or x.dtype not in _HALF:
        dtypes = [str(t.dtype).removeprefix("torch.") for t in (x, weight, residual) if t is not None]
        found.append(f"dtypes are {', '.join(dtypes)}; CUTLASS's kernels take float16 or bfloat16 alone")
    elif not configs(x.dtype, capability(x.device)):
        found.append(f"{str(x.dtype).removeprefix('torch.')} products need a newer device")
    if activation not in ACTIVATIONS:
        found.append(f"activation {activation} is not among CUTLASS's epilogues")
    if row_scale is not None:
        found.append("row_scale is not among CUTLASS's epilogues")
    features, size = weight.shape
    if features % _ALIGNMENT or size % _ALIGNMENT or not weight.numel():
        found.append(f"weight is {features} × {size}, CUTLASS's kernels take multiples of {_ALIGNMENT}")
    if not 0 < x.numel() < 2**31 * size:
        found.append(f"x has {x.numel() // max(size, 1)} rows, CUTLASS's kernels take 1 to 2^31 - 1")
    for name, t in {"x": x, "residual": residual}.items():
        if t is not None and not _one_stride(t):
            found.append(f"{name} has strides {tuple(t.stride())}, CUTLASS's kernels take aligned rows at one stride")
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        found.append("weight is not contiguous, or does not begin at a multiple of 16 bytes")
    return found or list(_first_look(x.device))


def _vector(v: Tensor | None) -> Tensor | None:
    """A vector as the kernels read it: float32, contiguous, aligned."""
    if v is None:
        return None
    v = v.float().contiguous()
    return v.clone() if v.data_ptr() % 16 else v


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: CutlassConfig | None,
    activation: str | None = None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    features, size = weight.shape
    out = x.new_empty((*x.shape[:-1], features))
    config = config or pick_config(x.numel() // size, features, x.dtype, capability(x.device))
    mean, rstd, sums = norm or (None, None, None)
    torch.ops.vit_fast_cutlass.linear(
        out, x, weight, _vector(bias), _vector(gamma), residual, mean, rstd, _vector(sums), ACTIVATIONS[activation],
        FAMILIES[config.family], config.swizzle,
    )  # fmt: skip
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None, config: CutlassConfig | None = None
) -> Tensor:
    """act(x weightᵀ + bias), [..., N] in the dtype of x; ``reasons`` is empty for these arguments."""
    return _run(x, weight, bias, config, activation)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    config: CutlassConfig | None = None,
) -> Tensor:
    """residual + gamma · (x weightᵀ + bias), [..., N]; ``reasons`` is empty for these arguments."""
    return _run(x, weight, bias, config, gamma=gamma, residual=residual)


def folded_linear(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    sums: Tensor,
    bias: Tensor,
    activation: str | None = None,
    config: CutlassConfig | None = None,
) -> Tensor:
    """act(rstd · (x weightᵀ − mean · sums) + bias): a LayerNorm folded into weight and bias, [..., N].

    Args:
        x: [..., K], for which ``folds`` holds and ``reasons`` is empty.
        mean: of the rows of x, [rows] float32. rstd: 1/√(variance + eps), likewise.
        weight: [N, K]. sums: of its rows, [N] float32. bias: [N].
    """
    return _run(x, weight, bias, config, activation, norm=(mean, rstd, sums))


_looked: dict[torch.device, tuple[str, ...]] = {}
_looking = threading.Lock()


def _first_look(device: torch.device) -> tuple[str, ...]:
    """Why the kernels are not to be trusted on a device, with one warning; empty where they are."""
    known = _looked.get(device)
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return ("the kernels have not been tried yet, which cannot be done inside the capture of a CUDA graph",)
    with _looking:
        if device in _looked:
            return _looked[device]
        with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            wrong = tuple(_wrong(device))
        if wrong:
            wrong = (f"the cutlass extension computes wrong results on this machine: {'; '.join(wrong)}",)
        _looked[device] = wrong
    if wrong:
        text = f"vit_fast: {wrong[0]}; products by PyTorch are used. Run `vit-fast build --cutlass --force`."
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return wrong


def _calls(
    dtype: torch.dtype, config: CutlassConfig, device: torch.device
) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """(epilogue, what it gives in float32, the call) of a kernel, at sizes that no tile divides."""
    rows, features, size, draw = 200, 264, 72, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=draw, device="cpu") * 2 - 1).to(device)

    x, weight = random(rows, size).to(dtype), (random(features, size) * 3 * size**-0.5).to(dtype)
    residual = random(rows, features).to(dtype)
    bias, gamma, mean, rstd = random(features), random(features), random(rows), random(rows) + 1.5
    product, sums = x.float() @ weight.float().t(), weight.float().sum(1)
    yield "activation", F.gelu(product + bias), functools.partial(linear, x, weight, bias, "gelu", config)
    truth = residual.float() + gamma * (product + bias)
    yield "residual", truth, functools.partial(linear_residual, x, weight, bias, gamma, residual, config)
    if config.family != "multistage":
        truth = rstd[:, None] * (product - mean[:, None] * sums) + bias
        yield "fold", truth, functools.partial(folded_linear, x, mean, rstd, weight, sums, bias, None, config)


def _wrong(device: torch.device) -> Iterator[str]:
    """What is wrong, one line for a kernel."""
    kernels = [(dtype, config) for dtype in _HALF for config in configs(dtype, capability(device))]
    for dtype, config in kernels:
        if config.swizzle != 1:
            continue
        for epilogue, truth, call in _calls(dtype, config, device):
            named = f"{config.family} {epilogue} in {str(dtype).removeprefix('torch.')}"
            try:
                out = call()
            except Exception as error:  # a library may raise anything
                yield f"{named} raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                continue
            found = ((out.float() - truth).abs() / (truth.abs() + 0.1)).max().item()
            if not found <= _TOLERANCE:  # NaN too
                yield f"{named} has a relative error of {found:.1e}, allowed {_TOLERANCE:.0e}"
