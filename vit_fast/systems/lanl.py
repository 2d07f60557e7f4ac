"""The ViT and the T2T-ViT of the Los Alamos tutorials: any image shape (C, H, W), sinusoid positions, a value skip.

Attention here returns v + proj(softmax(scale·q kᵀ) v), and that skip by v is part of the module:

    Encoding:          x = x + v + proj(attention(norm1(x)));   x = x + neuralnet(norm2(x))
    TokenTransformer:  x = v + proj(attention(norm1(x)));       x = x + neuralnet(norm2(x))

The scale is (chan/num_heads)^-0.5. T2T-ViT's own token transformer (``t2t.py``) has (input width)^-0.5, so weights are
not interchangeable. No dropout, no drop path; train and eval mode give the same output. LayerNorm eps 1e-5, exact GELU.
Classes keep the originals' names and order of arguments, modules the originals' ``state_dict`` keys. A block runs as
fused branches while its norms are LayerNorm and the kernels have its activation; other classes run unfused.
Source: S. Callis, "Vision Transformers Explained", Los Alamos National Laboratory; Yuan et al., "Tokens-to-Token ViT".
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vit_fast import ops, plain
from vit_fast.block import attention_branch, mlp_branch
from vit_fast.block_params import BlockParams, Norm
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.kernels.tracing import untraced

from . import arguments
from .soft_split import as_image, sinusoid_table, soft_split, split_grid

FAMILY = "lanl"


def _whole(name: str, value: Any) -> Any:
    return arguments.integer(FAMILY, name, value)


def _sizes(name: str, value: Any, wanted: str) -> Any:
    """A tuple or list of ints, checked to have as many as ``wanted`` has names."""
    names = wanted.split(", ")
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"vit_fast.systems.lanl: {name} is {value!r}, expected ({wanted})")
    if len(value) != len(names):
        arguments.fail(FAMILY, name, value, f"{len(names)} ints ({wanted})")
    return tuple(_whole(name, size) for size in value)


@untraced
def _check_tokens(x: torch.Tensor, width: int, count: int | None = None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"vit_fast.systems.lanl: tokens are {type(x).__name__}, expected a torch.Tensor")
    if x.dim() != 3 or x.shape[2] != width or (count is not None and x.shape[1] != count):
        raise ValueError(
            f"vit_fast.systems.lanl: tokens have shape {list(x.shape)}, "
            f"expected [B, {'N' if count is None else count}, {width}]"
        )


@untraced
def _check_images(x: torch.Tensor, img_size: Sequence[int]) -> Any:
    arguments.check_images(FAMILY, x, img_size[0])
    arguments.check_float(FAMILY, x)
    if tuple(x.shape[2:]) != img_size[1:]:
        arguments.fail_images(FAMILY, x, f"{img_size[1]}×{img_size[2]}")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.reset_parameters()


def count_tokens(w: int, h: int, k: int, s: int, p: int) -> tuple[int, int, int]:
    """(w', h', w'·h') of windows of side k, stride s, padding p, over w×h."""
    new = split_grid((w, h), k, s, p)
    return *new, new[0] * new[1]


def split_arguments(kernel: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of a soft split: 7 → 4, 2; 3 → 2, 1; 31 → 16, 8."""
    return kernel, (kernel + 1) // 2, (kernel + 1) // 4


class Patch_Tokenization(plain.Fusible, nn.Module):
    """Images [B, C, H, W] → tokens [B, (H/P)·(W/P), token_len]; ``split`` alone gives [B, P²·C, n]."""

    OPERATION = "patch_embed"
    SUBMODULES = plain.submodules(split=(nn.Unfold,), project=plain.LINEAR)

    def __init__(self, img_size: Sequence[int] = (1, 60, 100), patch_size: int = 50, token_len: int = 768) -> None:
        super().__init__()
        self.img_size = _sizes("img_size", img_size, "C, H, W")
        self.patch_size, self.token_len = _whole("patch_size", patch_size), _whole("token_len", token_len)
        for name, side in zip(("height", "width"), self.img_size[1:]):
            if side % self.patch_size:
                arguments.fail(FAMILY, f"img_size's {name}", side, f"evenly divisible by patch_size {self.patch_size}")
        self.num_tokens = self.img_size[1] * self.img_size[2] // self.patch_size**2
        self.split = nn.Unfold(kernel_size=self.patch_size, stride=self.patch_size)
        self.project = nn.Linear(self.patch_size**2 * self.img_size[0], self.token_len)

    def kernel(self) -> torch.Tensor:
        """The projection as a convolution kernel [token_len, C, P, P]."""
        return self.project.weight.unflatten(1, (self.img_size[0], self.patch_size, self.patch_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_images(x, self.img_size)
        if self.is_fused():
            return ops.patch_embed(x, self.kernel(), self.project.bias, None, None, self.patch_size)
        return self.project(self.split(x).transpose(1, 2))


class Attention(nn.Module):
    """v + proj(softmax(scale·q kᵀ) v): [B, N, dim] → [B, N, chan]; dim may differ from chan."""

    def __init__(
        self, dim: int, chan: int, num_heads: int = 1, qkv_bias: bool = False, qk_scale: float | None = None
    ) -> None:
        super().__init__()
        self.dim, self.chan = _whole("dim", dim), _whole("chan", chan)
        self.num_heads = _whole("num_heads", num_heads)
        arguments.check_heads(FAMILY, "num_heads", self.num_heads, "chan", self.chan)
        self.head_dim = self.chan // self.num_heads
        self.scale = float(qk_scale or self.head_dim**-0.5)
        self.qkv = nn.Linear(self.dim, self.chan * 3, bias=qkv_bias)
        self.proj = nn.Linear(self.chan, self.chan)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_tokens(x, self.dim)
        qkv = self.qkv(x)
        out = ops.attention(qkv, self.num_heads, self.scale)
        v = qkv.chunk(3, dim=-1)[2]
        if plain.may_read("linear_residual", self.proj, plain.LINEAR):
            return ops.linear_residual(out, self.proj.weight, self.proj.bias, None, v)
        return v + self.proj(out)


def _activation_name(act: Any) -> Any:
    """The kernels' name of an ``nn.GELU`` or an ``nn.ReLU``."""
    if type(act) is nn.ReLU:
        return "relu"
    return "gelu_tanh" if act.approximate == "tanh" else "gelu"


class NeuralNet(nn.Module):
    """fc2(act(fc1(x))): [..., in_chan] → [..., out_chan]; hidden and out default to in_chan."""

    def __init__(
        self,
        in_chan: int,
        hidden_chan: int | None = None,
        out_chan: int | None = None,
        act_layer: arguments.Layer = nn.GELU,
    ) -> None:
        super().__init__()
        in_chan = _whole("in_chan", in_chan)
        hidden_chan = _whole("hidden_chan", hidden_chan or in_chan)
        self.fc1 = nn.Linear(in_chan, hidden_chan)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_chan, _whole("out_chan", out_chan or in_chan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Layer(plain.Fusible, nn.Module):
    """Attention with its value skip, then the neural net; ``value_skip`` as in ``BlockParams``."""

    SUBMODULES = plain.submodules(
        norm1=(nn.LayerNorm,),
        attn=(Attention,),
        attn__qkv=plain.LINEAR,
        attn__proj=plain.LINEAR,
        norm2=(nn.LayerNorm,),
        neuralnet=(NeuralNet,),
        neuralnet__fc1=plain.LINEAR,
        neuralnet__act=(nn.GELU, nn.ReLU),
        neuralnet__fc2=plain.LINEAR,
    )
    value_skip: bool | str = True

    def __init__(
        self,
        dim: int,
        chan: int,
        num_heads: int,
        hidden_chan_mul: float,
        qkv_bias: bool,
        qk_scale: float | None,
        act_layer: arguments.Layer,
        norm_layer: arguments.Layer,
    ) -> None:
        super().__init__()
        arguments.positive(FAMILY, "hidden_chan_mul", hidden_chan_mul)
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, chan, num_heads, qkv_bias, qk_scale)
        self.norm2 = norm_layer(chan)
        self.neuralnet = NeuralNet(chan, int(chan * hidden_chan_mul), chan, act_layer)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, net = self.attn, self.neuralnet
        return BlockParams(
            Norm.of(self.norm1), attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias,
            Norm.of(self.norm2), net.fc1.weight, net.fc1.bias, net.fc2.weight, net.fc2.bias,
            num_heads=attn.num_heads, scale=attn.scale, activation=_activation_name(net.act),
            value_skip=self.value_skip,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_tokens(x, self.attn.dim)
        if self.is_fused():
            p = self.params()
            return mlp_branch(attention_branch(x, p), p)
        y = self.attn(self.norm1(x))
        x = y if self.value_skip == "only" else x + y
        return x + self.neuralnet(self.norm2(x))


class Encoding(_Layer):
    """Transformer block with a value skip: [B, N, dim] → [B, N, dim]."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        hidden_chan_mul: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__(dim, dim, num_heads, hidden_chan_mul, qkv_bias, qk_scale, act_layer, norm_layer)


class TokenTransformer(_Layer):
    """Attention from width dim to width chan, without another residual: [B, N, dim] → [B, N, chan]."""

    value_skip = "only"

    def __init__(
        self,
        dim: int,
        chan: int,
        num_heads: int = 1,
        hidden_chan_mul: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__(dim, chan, num_heads, hidden_chan_mul, qkv_bias, qk_scale, act_layer, norm_layer)


class ViT_Backbone(nn.Module):
    """Tokens [B, num_tokens, token_len] → [B, preds], raw outputs (regression or logits)."""

    def __init__(
        self,
        preds: int = 1,
        token_len: int = 768,
        num_tokens: int = 500,
        num_heads: int = 1,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.preds, self.token_len = _whole("preds", preds), _whole("token_len", token_len)
        self.num_tokens, self.num_heads = _whole("num_tokens", num_tokens), _whole("num_heads", num_heads)
        self.depth = _whole("depth", depth)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.token_len))
        table = sinusoid_table(self.num_tokens + 1, self.token_len)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            Encoding(
                self.token_len, self.num_heads, Encoding_hidden_chan_mul, qkv_bias, qk_scale, act_layer, norm_layer
            )
            for _ in range(self.depth)
        )
        self.norm = norm_layer(self.token_len)
        self.head = nn.Linear(self.token_len, self.preds)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {"cls_token"}

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens with the class token in front and positions added, [B, 1 + num_tokens, token_len] → [B, preds]."""
        for block in self.blocks:
            x = block(x)
        return self.head(plain.layer_norm(self.norm, x, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_tokens(x, self.token_len, self.num_tokens)
        return self.encode(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed)


class ViT_Model(plain.Fusible, nn.Module):
    """Images [B, C, H, W] → [B, preds]."""

    OPERATION = "patch_embed"
    SUBMODULES = plain.submodules(
        patch_tokens=(Patch_Tokenization,),
        patch_tokens__split=(nn.Unfold,),
        patch_tokens__project=plain.LINEAR,
        backbone=(ViT_Backbone,),
    )

    def __init__(
        self,
        img_size: Sequence[int] = (1, 400, 100),
        patch_size: int = 50,
        token_len: int = 768,
        preds: int = 1,
        num_heads: int = 1,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.patch_tokens = Patch_Tokenization(img_size, patch_size, token_len)
        self.backbone = ViT_Backbone(
            preds, token_len, self.patch_tokens.num_tokens, num_heads, Encoding_hidden_chan_mul, depth,
            qkv_bias, qk_scale, act_layer, norm_layer,
        )  # fmt: skip
        self.patch_tokens.apply(_init_weights)
        self.default_cfg = dict(input_size=self.patch_tokens.img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, without the prefix "backbone."."""
        return {"cls_token"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches, backbone = self.patch_tokens, self.backbone
        if not self.is_fused():
            return backbone(patches(x))
        _check_images(x, patches.img_size)
        table = backbone.pos_embed
        prefix = backbone.cls_token + table[:, :1]
        project = patches.project
        return backbone.encode(
            ops.patch_embed(x, patches.kernel(), project.bias, table[:, 1:], prefix, patches.patch_size)
        )


class Tokens2Token(nn.Module):
    """Three soft splits with two token transformers between them: [B, C, H, W] → [B, num_tokens, token_len]."""

    def __init__(
        self,
        img_size: Sequence[int] = (1, 1700, 500),
        softsplit_kernels: Sequence[int] = (7, 3, 3),
        num_heads: int = 1,
        token_chan: int = 64,
        token_len: int = 768,
        hidden_chan_mul: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.img_size = _sizes("img_size", img_size, "C, H, W")
        kernels = _sizes("softsplit_kernels", softsplit_kernels, "first, second, third")
        token_chan, self.token_len = _whole("token_chan", token_chan), _whole("token_len", token_len)
        self.splits = [split_arguments(kernel) for kernel in kernels]
        self.grids: list[tuple[int, int]] = []
        for split in self.splits:
            self.grids.append(split_grid(self.grids[-1] if self.grids else self.img_size[1:], *split))
            if min(self.grids[-1]) < 1:
                arguments.fail(
                    FAMILY, "softsplit_kernels", tuple(kernels),
                    f"windows that fit an image of {self.img_size[1]}×{self.img_size[2]}",
                )  # fmt: skip
        self.num_tokens = self.grids[2][0] * self.grids[2][1]
        rest = (token_chan, num_heads, hidden_chan_mul, qkv_bias, qk_scale, act_layer, norm_layer)
        self.transformer1 = TokenTransformer(self.img_size[0] * kernels[0] ** 2, *rest)
        self.transformer2 = TokenTransformer(token_chan * kernels[1] ** 2, *rest)
        self.project = nn.Linear(token_chan * kernels[2] ** 2, self.token_len)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_images(x, self.img_size)
        x = self.transformer1(soft_split(x.to(plain.dtype_of(self.project)), *self.splits[0]))
        x = self.transformer2(soft_split(as_image(x, self.grids[0]), *self.splits[1]))
        return self.project(soft_split(as_image(x, self.grids[1]), *self.splits[2]))


class T2T_ViT(nn.Module):
    """Images [B, C, H, W] → [B, preds]; ``num_heads`` is that of the token transformers and of the backbone."""

    def __init__(
        self,
        img_size: Sequence[int] = (1, 1700, 500),
        softsplit_kernels: Sequence[int] = (31, 3, 3),
        preds: int = 1,
        token_len: int = 768,
        token_chan: int = 64,
        num_heads: int = 1,
        T2T_hidden_chan_mul: float = 1.0,
        Encoding_hidden_chan_mul: float = 4.0,
        depth: int = 12,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        act_layer: arguments.Layer = nn.GELU,
        norm_layer: arguments.Layer = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.tokens_to_token = Tokens2Token(
            img_size, softsplit_kernels, num_heads, token_chan, token_len, T2T_hidden_chan_mul,
            qkv_bias, qk_scale, act_layer, norm_layer,
        )  # fmt: skip
        self.vit_backbone = ViT_Backbone(
            preds, token_len, self.tokens_to_token.num_tokens, num_heads, Encoding_hidden_chan_mul, depth,
            qkv_bias, qk_scale, act_layer, norm_layer,
        )  # fmt: skip
        self.tokens_to_token.apply(_init_weights)
        self.default_cfg = dict(input_size=self.tokens_to_token.img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay, without the prefix "vit_backbone."."""
        return {"cls_token"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit_backbone(self.tokens_to_token(x))


_VARIANTS = {
    cls.__name__: cls
    for cls in (
        ViT_Model, T2T_ViT, Attention, Patch_Tokenization, NeuralNet, Encoding, ViT_Backbone, TokenTransformer,
        Tokens2Token,
    )
}  # fmt: skip

PRESETS = {
    "lanl_vit": dict(variant="ViT_Model"),
    "lanl_vit_60x100": dict(variant="ViT_Model", img_size=(1, 60, 100), patch_size=20),
    "lanl_t2t_vit": dict(variant="T2T_ViT"),
    "lanl_t2t_vit_60x100": dict(variant="T2T_ViT", img_size=(1, 60, 100), softsplit_kernels=(7, 3, 3)),
}


def build(variant: str = "ViT_Model", **options: Any) -> nn.Module:
    """A class of this family by name, with its own arguments.

    Args:
        variant: "ViT_Model", "T2T_ViT", "Attention"; or a part: "Patch_Tokenization", "NeuralNet", "Encoding",
            "ViT_Backbone", "TokenTransformer", "Tokens2Token".
        options: that class's arguments; ``act_layer`` and ``norm_layer`` are classes, sizes tuples or lists.
    Raises:
        TypeError, ValueError: bad arguments or sizes.
    """
    arguments.one_of(FAMILY, "variant", variant, tuple(_VARIANTS))
    return _VARIANTS[variant](**options)


@loads(*_VARIANTS.values())
def load(model: nn.Module, source: arguments.Source, pos_embed: str = "strict") -> nn.Module:
    """Loads a state_dict or a file strictly.

    Args:
        source: a state_dict, or the path of a ``.pth``, ``.pt``, ``.safetensors`` or ``.npz`` file.
        pos_embed: "strict", or "recompute": the file's sinusoid table is ignored and the model's own kept, so that the
            weights fit another number of tokens.
    Raises:
        WeightsError: unreadable file, or keys or shapes that do not fit.
    """
    arguments.one_of(FAMILY, "pos_embed", pos_embed, ("strict", "recompute"))
    state = arguments.state_of(FAMILY, source)
    if pos_embed == "recompute":
        for key, value in model.state_dict().items():
            if key.rpartition(".")[2] == "pos_embed":
                state[key] = sinusoid_table(*value.shape[1:])
    return load_state_dict(model, state)
