"""The tuning problems: kernels at the shapes of ViTs, each with its eager form and libraries that compute the same."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

OPERATIONS = ("linear", "attention", "patch_embed", "layer_norm")
BATCHES = (256, 1, 64, 8)  # the most telling first


class Vit(NamedTuple):
    """The sizes of a ViT; ``prefix`` tokens stand before the patches."""

    tokens: int
    width: int
    heads: int
    hidden: int
    patch: int
    prefix: int


VITS = {
    "base": Vit(197, 768, 12, 3072, 16, 1),
    "large": Vit(197, 1024, 16, 4096, 16, 1),
    "small": Vit(197, 384, 6, 1536, 16, 1),
    "huge": Vit(257, 1280, 16, 5120, 14, 1),
    "so400m": Vit(256, 1152, 16, 4304, 14, 0),
}
SIDE = 224


class Work(NamedTuple):
    """A problem with its tensors."""

    kernel: Callable[[], torch.Tensor]
    eager: Callable[..., torch.Tensor]  # takes the tensors below, in any dtype
    tensors: tuple[torch.Tensor | None, ...]  # those with a batch dimension come first
    batched: int  # how many have a batch dimension
    libraries: dict[str, Callable[[], torch.Tensor]]
    hopper: Callable[..., torch.Tensor] | None = None  # takes a config: the same by linear_hopper, if it can
    cutlass: Callable[..., torch.Tensor] | None = None  # likewise by CUTLASS


@dataclass(frozen=True)
class Problem:
    """One kernel of an operation, at the shape of a model of ``VITS`` and a batch size."""

    operation: str
    name: str
    model: str
    batch: int

    def __str__(self) -> str:
        return f"{self.name} {self.model}-b{self.batch}"


@dataclass(frozen=True)
class Maker:
    """Makes random tensors or, for planning, unfilled ones that take no memory."""

    device: torch.device
    dtype: torch.dtype
    filled: bool

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        if not self.filled:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)


PLANNED = Maker(torch.device("cpu"), torch.bfloat16, filled=False)


LINEARS = ("qkv", "proj", "fc1", "fc2")
PREPARED = {f"prepared {name}": name for name in LINEARS}  # as vit_fast.prepare runs them
PARTIAL_WIDTH = 128


def linear_sizes(name: str, vit: Vit) -> tuple[int, int, str | None, bool]:
    """(in, out, activation, whether it ends a branch)."""
    return {
        "qkv": (vit.width, 3 * vit.width, None, False),
        "proj": (vit.width, vit.width, None, True),
        "fc1": (vit.width, vit.hidden, "gelu", False),
        "fc2": (vit.hidden, vit.width, None, True),
    }[PREPARED.get(name, name)]


def partials_of(x: torch.Tensor, filled: bool = True) -> tuple[torch.Tensor, int]:
    """(row-statistics partials of x (mean, M2), as the epilogue of the GEMM before writes them: [2, partials, rows],
    the width of one)."""
    part = min(PARTIAL_WIDTH, x.shape[-1])
    values = torch.empty(2, x.shape[-1] // part, x.numel() // x.shape[-1], device=x.device)
    if filled:
        parts = x.float().flatten(0, -2).unflatten(1, (-1, part))
        values[0] = parts.mean(2).t()
        values[1] = (parts.var(2, correction=0) * part).t()
    return values, part


def _by_hopper(*arguments, **options):
    """A function of a config that calls ``linear_hopper``, and imports it first."""

    def call(config):
        from vit_fast.kernels.linear_hopper import linear_hopper

        return linear_hopper(*arguments, config=config, **options)[0]

    return call


def _by_cutlass(name, x, *arguments):
    """A function of a config that calls a function of ``vit_fast.backends.cutlass``, and loads its library first."""

    def call(config):
        from vit_fast.backends import cuda, cutlass

        missing = cutlass.load() or (cuda.CUDA.load() if name == "folded_linear" else ())
        if missing:
            raise RuntimeError(missing[0])
        statistics = cuda.row_statistics(x, 1e-6) if name == "folded_linear" else ()
        return getattr(cutlass, name)(x, *statistics, *arguments, config)

    return call


def linear_work(problem: Problem, vit: Vit, new: Maker) -> Work:
    """A linear layer: alone, with GELU, at the end of a branch, or as ``vit_fast.prepare`` folds it."""
    from vit_fast.kernels import layer_norm, linear

    size, features, activation, ends = linear_sizes(problem.name, vit)
    x, weight, bias = new(problem.batch, vit.tokens, size), new(features, size, scale=size**-0.5), new(features)
    residual = new(problem.batch, vit.tokens, features) if ends else None
    libraries = {"F.linear, bias alone": lambda: F.linear(x, weight, bias)}
    if problem.name in PREPARED and not ends:
        partials = layer_norm.RowPartials(*partials_of(x, new.filled))
        sums = torch.empty(features, device=new.device)
        if new.filled:
            weight -= weight.float().mean(1, keepdim=True).to(weight.dtype)
            sums = weight.float().sum(1)
        wide_bias = bias.float()

        def eager(x, weight, bias):
            out = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6), weight, bias)
            return F.gelu(out) if activation else out

        def kernel():
            return linear.folded_linear(x, partials, 1e-6, weight, sums, wide_bias, activation)

        libraries["eager"] = lambda: eager(x, weight, bias)
        hopper = _by_hopper(x, weight, wide_bias, activation, norm=(partials, 1e-6, sums))
        cutlass = _by_cutlass("folded_linear", x, weight, sums, wide_bias, activation)
        return Work(kernel, eager, (x, weight, bias), 1, libraries, hopper, cutlass)
    if ends:
        gamma, wide_bias = None if problem.name in PREPARED else new(features), bias.float()

        def eager(x, residual, weight, bias):
            out = F.linear(x, weight, bias)
            return residual + (out if gamma is None else out * gamma.to(out.dtype))

        def kernel():
            if gamma is None:
                return linear.linear_with_partials(x, weight, wide_bias, residual)[0]
            return linear.linear(x, weight, bias, gamma=gamma, residual=residual)

        tensors = (x, residual, weight, bias)
        hopper = _by_hopper(x, weight, wide_bias, residual=residual, with_partials=True) if gamma is None else None
        libraries["eager"] = lambda: eager(*tensors)
        cutlass = _by_cutlass("linear_residual", x, weight, bias if gamma is not None else wide_bias, gamma, residual)
        return Work(kernel, eager, tensors, 2, libraries, hopper, cutlass)

    def eager(x, weight, bias):
        out = F.linear(x, weight, bias)
        return F.gelu(out) if activation else out

    if activation:
        libraries["cuBLASLt, GELU of tanh"] = lambda: torch._addmm_activation(
            bias, x.flatten(0, 1), weight.t(), use_gelu=True
        )
        libraries["eager"] = lambda: eager(x, weight, bias)
    hopper = _by_hopper(x, weight, bias, activation)
    cutlass = _by_cutlass("linear", x, weight, bias, activation)
    return Work(
        lambda: linear.linear(x, weight, bias, activation), eager, (x, weight, bias), 1, libraries, hopper, cutlass
    )


def attention_work(problem: Problem, vit: Vit, new: Maker) -> Work:
    """Attention over packed qkv."""
    from vit_fast.kernels import attention

    qkv, scale = new(problem.batch, vit.tokens, 3 * vit.width), (vit.width // vit.heads) ** -0.5

    def heads(qkv):
        return qkv.unflatten(2, (3, vit.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def eager(qkv):
        q, k, v = heads(qkv)
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)

    def sdpa(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads(qkv), scale=scale).transpose(1, 2).flatten(2)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    libraries = {f"SDPA {name}": functools.partial(sdpa, backend) for name, backend in backends.items()}
    return Work(lambda: attention.attention(qkv, vit.heads, scale), eager, (qkv,), 1, libraries)


def layer_norm_work(problem: Problem, vit: Vit, new: Maker) -> Work:
    """LayerNorm over the tokens."""
    from vit_fast.kernels import layer_norm

    x, weight, bias = new(problem.batch, vit.tokens, vit.width), new(vit.width), new(vit.width)

    def eager(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    libraries = {"F.layer_norm": lambda: eager(x, weight, bias)}
    return Work(lambda: layer_norm.layer_norm(x, weight, bias, 1e-6), eager, (x, weight, bias), 1, libraries)


def patch_embed_work(problem: Problem, vit: Vit, new: Maker) -> Work:
    """Patch embedding with its position table and prefix token."""
    from vit_fast.kernels import patch_embed

    step, patches = (vit.patch, vit.patch), vit.tokens - vit.prefix
    images, pos_embed = new(problem.batch, 3, SIDE, SIDE), new(1, patches, vit.width)
    weight = new(vit.width, 3, *step, scale=(3 * vit.patch**2) ** -0.5)
    tensors = (images, weight, new(vit.width), pos_embed, new(1, vit.prefix, vit.width) if vit.prefix else None)

    def eager(images, weight, bias, pos_embed, prefix):
        tokens = F.conv2d(images, weight, bias, step).flatten(2).transpose(1, 2) + pos_embed
        return tokens if prefix is None else torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1)

    libraries = {"eager, a convolution": lambda: eager(*tensors)}
    return Work(lambda: patch_embed.patch_embed(*tensors, step), eager, tensors, 1, libraries)


WORKS = {
    "linear": linear_work, "attention": attention_work, "layer_norm": layer_norm_work, "patch_embed": patch_embed_work,
}  # fmt: skip


def problems(
    only: tuple[str, ...] = OPERATIONS, models: tuple[str, ...] = tuple(VITS), batches: tuple[int, ...] = BATCHES
) -> list[Problem]:
    """All problems, the most telling first: by model, batch size and operation."""
    found = []
    for model, batch, operation in itertools.product(models, batches, OPERATIONS):
        if operation in only:
            names = (*PREPARED, *LINEARS) if operation == "linear" else (operation,)
            found += [Problem(operation, name, model, batch) for name in names]
    return found
