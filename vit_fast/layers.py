"""The layers of ``VisionTransformer``: patch embedding, transformer block, MAP pooling; timm's parameter names.

A block runs as two fused branches (``block.py``) if its sub-modules are plain (``plain.py``); if one carries a hook or
a parametrization, or is of another class, the block runs module by module.

Shapes: images [B, in_chans, H, W]; tokens [B, N, C].
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from . import ops, plain
from .block import (
    attention_branch,
    attention_probabilities,
    drop_path_scale,
    mlp_branch,
    pass_over_prepared,
    prepared_for,
    project_qkv,
)
from .block_params import BlockParams, Norm
from .kernels.arguments import UnsupportedError
from .kernels.reference import activate, attention_weights, split_heads
from .patch_resize import resize_patch_embed


def check_bits(name: str, value: int) -> None:
    """Refuses a size that PyTorch cannot hold."""
    if value >= 2**63:
        raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected a number of 64 bits")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"vit_fast.VisionTransformer: {name} has {len(pair)} elements, expected an int or a pair")
    for size in pair:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected an int or a pair of ints")
        if size < 1:
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected 1 or more")
        check_bits(name, size)
    return pair[0], pair[1]


class LayerScale(nn.Module):
    """x · gamma, gamma [C]. Source: Touvron et al., "Going deeper with Image Transformers", 2021."""

    def __init__(
        self, dim: int, init_values: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def check_mask(tokens: int, attn_mask: torch.Tensor | None, is_causal: bool) -> None:
    """Raises ``TypeError`` or ``ValueError`` for a mask that ``attention_bias`` does not accept."""
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("vit_fast.VisionTransformer: attn_mask is given, expected None with is_causal=True")
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(f"vit_fast.VisionTransformer: attn_mask is {type(attn_mask).__name__}, expected a torch.Tensor")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise TypeError(f"vit_fast.VisionTransformer: attn_mask has dtype {attn_mask.dtype}, expected bool or a float")
    shape = tuple(attn_mask.shape)
    if len(shape) > 4 or any(size not in (1, tokens) for size in shape[-2:]):
        raise ValueError(
            f"vit_fast.VisionTransformer: attn_mask has shape {shape}, expected [B, H, {tokens}, {tokens}] or what "
            "broadcasts to it (prefix tokens count)"
        )


def attention_bias(
    x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor | None:
    """The mask of tokens x [B, N, C] as a float bias [B or 1, H or 1, N or 1, N or 1] that is added to the attention
    scores; None without a mask.

    Args:
        attn_mask: broadcasts to [B, H, N, N]; bool, True where a query may attend to a key, or a float that is added.
        is_causal: a token attends to itself and to those before it.
    Raises:
        TypeError: a mask of another type or dtype.
        ValueError: both at once, or a shape that does not broadcast.
    """
    if attn_mask is None and not is_causal:
        return None
    tokens = x.shape[1]
    check_mask(tokens, attn_mask, is_causal)
    if is_causal:
        return x.new_full((1, 1, tokens, tokens), -math.inf).triu(1)
    assert attn_mask is not None
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return x.new_zeros(()).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, C] → [B, N, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        proj_bias: bool,
        attn_drop: float,
        proj_drop: float,
        make_norm: Callable[[int], nn.Module],
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = make_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = make_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)

    def _norm_heads(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """q or k [B, N, C] through a norm of its heads, which sees [B, H, N, D] as in timm."""
        return norm(x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        qkv, drop = self.qkv(x), self.attn_drop if self.training else 0.0
        bias = attention_bias(x, attn_mask, is_causal)
        if all(plain.may_read("attention", norm, plain.NORM) for norm in (self.q_norm, self.k_norm)):
            norms: dict[str, Any] = dict(q_norm=Norm.of(self.q_norm), k_norm=Norm.of(self.k_norm))
        else:
            q, k, v = qkv.chunk(3, dim=-1)
            qkv, norms = self._norm_heads(q, self.q_norm), dict(k=self._norm_heads(k, self.k_norm), v=v)
        out = ops.attention(qkv, self.num_heads, self.scale, bias=bias, **norms, dropout_p=drop)
        return ops.dropout(self.proj(out), self.proj_drop if self.training else 0.0)


class Mlp(nn.Module):
    """fc2(act(fc1(x))): [..., C] → [..., C]; "swiglu" packs gate and value rows in fc1."""

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.activation, self.drop = activation, drop
        self.fc1 = nn.Linear(dim, hidden, bias=bias, **dd)
        self.fc2 = nn.Linear(hidden // 2 if activation == "swiglu" else hidden, dim, bias=bias, **dd)

    def init_weights(self) -> None:
        if self.activation == "swiglu":
            half = self.fc1.weight.shape[0] // 2
            if self.fc1.bias is not None:
                nn.init.ones_(self.fc1.bias[half:])
            nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drop = self.drop if self.training else 0.0
        return ops.dropout(self.fc2(ops.dropout(activate(self.fc1(x), self.activation), drop)), drop)


class Block(plain.Fusible, nn.Module):
    """Pre-norm transformer block: [B, N, C] → [B, N, C]."""

    RUNS_PREPARED = True
    SUBMODULES = plain.submodules(
        norm1=plain.NORM,
        attn=(Attention,),
        attn__qkv=plain.LINEAR,
        attn__q_norm=plain.NORM,
        attn__k_norm=plain.NORM,
        attn__proj=plain.LINEAR,
        ls1=(LayerScale, nn.Identity),
        norm2=plain.NORM,
        mlp=(Mlp,),
        mlp__fc1=plain.LINEAR,
        mlp__fc2=plain.LINEAR,
        ls2=(LayerScale, nn.Identity),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_norm: bool,
        proj_bias: bool,
        proj_drop: float,
        attn_drop: float,
        init_values: float | None,
        drop_path: float,
        activation: str,
        make_norm: Callable[[int], nn.Module],
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = make_norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, make_norm, dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.norm2 = make_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, proj_bias, proj_drop, dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()

    def params(self) -> BlockParams:
        """The weights as the fused branches take them."""
        attn, mlp = self.attn, self.mlp
        return BlockParams(
            norm1=Norm.of(self.norm1),
            qkv_weight=attn.qkv.weight,
            qkv_bias=attn.qkv.bias,
            proj_weight=attn.proj.weight,
            proj_bias=attn.proj.bias,
            norm2=Norm.of(self.norm2),
            fc1_weight=mlp.fc1.weight,
            fc1_bias=mlp.fc1.bias,
            fc2_weight=mlp.fc2.weight,
            fc2_bias=mlp.fc2.bias,
            num_heads=attn.num_heads,
            scale=attn.scale,
            activation=mlp.activation,
            gamma1=getattr(self.ls1, "gamma", None),
            gamma2=getattr(self.ls2, "gamma", None),
            q_norm=Norm.of(attn.q_norm),
            k_norm=Norm.of(attn.k_norm),
        )

    def _drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        scale = drop_path_scale(branch, self.drop_path, self.training)
        return branch if scale is None else branch * scale[:, None, None]

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        bias = attention_bias(x, attn_mask, is_causal)
        if (prepared := prepared_for(self, x)) is not None:
            return prepared.run_block(x, bias=bias)
        if not self.is_fused():
            masks = {} if bias is None else {"attn_mask": bias}  # a user's attention class may take no mask
            x = x + self._drop_path(self.ls1(self.attn(plain.layer_norm(self.norm1, x), **masks)))
            return x + self._drop_path(self.ls2(self.mlp(plain.layer_norm(self.norm2, x))))
        return self._fused(x, self.params(), bias=bias)

    def _fused(
        self,
        x: torch.Tensor,
        p: BlockParams,
        qkv: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        attn, mlp = self.attn, self.mlp
        attn_drop, proj_drop = (attn.attn_drop, attn.proj_drop) if attn.training else (0.0, 0.0)
        row_scale = partial(drop_path_scale, x, self.drop_path, self.training)
        x = attention_branch(x, p, row_scale=row_scale(), attn_drop=attn_drop, proj_drop=proj_drop, qkv=qkv, bias=bias)
        drop = mlp.drop if mlp.training else 0.0
        return mlp_branch(x, p, row_scale=row_scale(), hidden_drop=drop, out_drop=drop)

    def forward_with_attention(
        self, x: torch.Tensor, queries: slice | torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, probabilities [B, H, N, N]); the output still comes from the fused path.

        Raises:
            UnsupportedError: an attention of another class, which may have no probabilities.
        """
        pass_over_prepared(self, "attention maps are asked for")
        if plain.why_not_plain(self, (type(self),)) is None and self.is_fused():
            p = self.params()
            qkv = project_qkv(x, p)
            return self._fused(x, p, qkv=qkv), attention_probabilities(qkv, p, queries)
        attn = self.attn
        if type(attn) is not Attention:
            raise UnsupportedError(
                f"vit_fast.VisionTransformer: a block's attn is {type(attn).__module__}.{type(attn).__qualname__}, "
                "expected vit_fast.layers.Attention for attention maps"
            )
        seen: list[torch.Tensor] = []
        handle = attn.qkv.register_forward_hook(lambda module, inputs, qkv: seen.append(qkv))
        try:
            x = self(x)
        finally:
            handle.remove()
        q, k, _ = split_heads(seen[0], None, None, attn.num_heads)
        q, k = attn.q_norm(q), attn.k_norm(k)
        return x, attention_weights(q if queries is None else q[:, :, queries], k, attn.scale)


class PatchEmbed(nn.Module):
    """Holds the patch projection and the sizes: images [B, in_chans, H, W] → tokens [B, N, C]."""

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        bias: bool,
        dynamic_img_pad: bool,
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self._set_sizes(_pair("img_size", img_size), _pair("patch_size", patch_size))
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **dd)

    def _set_sizes(self, img_size: tuple[int, int], patch_size: tuple[int, int]) -> None:
        if any(size < patch for size, patch in zip(img_size, patch_size, strict=True)):
            raise ValueError(
                f"vit_fast.VisionTransformer: img_size is {img_size[0]}×{img_size[1]}, "
                f"expected at least one patch of {patch_size[0]}×{patch_size[1]}"
            )
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Changes the sizes (None keeps one); the projection is resized to its patch (``patch_resize``)."""
        old_patch, proj = self.patch_size, self.proj
        new_patch = old_patch if patch_size is None else _pair("patch_size", patch_size)
        new_image = self.img_size if img_size is None else _pair("img_size", img_size)
        if new_patch != old_patch and "weight" not in proj._parameters:
            raise UnsupportedError(
                f"vit_fast.VisionTransformer: patch_size is {patch_size!r}, expected {old_patch}: the weight of "
                f"patch_embed.proj ({type(proj).__name__}) is no plain parameter and cannot be resized"
            )
        self._set_sizes(new_image, new_patch)
        if new_patch != old_patch:
            weight = resize_patch_embed(proj.weight, new_patch)
            proj.weight = nn.Parameter(weight, requires_grad=proj.weight.requires_grad)
            proj.kernel_size = proj.stride = new_patch

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of the image for each token along a side: the longer one, or (height, width)."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """``feat_size`` of a pair, timm's name."""
        return self.feat_size(*img_size)

    def feat_size(self, height: int, width: int) -> tuple[int, int]:
        """The grid (rows, columns) of an image size."""
        if self.dynamic_img_pad:
            return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(plain.Fusible, nn.Module):
    """MAP pooling: one latent query attends to the tokens [B, N, C] → [B, C].

    Source: Zhai et al., "Scaling Vision Transformers", 2021.
    """

    OPERATION = "layernorm_mlp"
    SUBMODULES = plain.submodules(norm=(nn.LayerNorm,), mlp=(Mlp,), mlp__fc1=plain.LINEAR, mlp__fc2=plain.LINEAR)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        activation: str,
        make_norm: Callable[[int], nn.Module],
        dd: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.latent = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, dim * 2, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = make_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, True, 0.0, dd)

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.latent).expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, dim=-1)
        x = self.proj(ops.attention(q, self.num_heads, self.scale, k=k, v=v))
        if self.is_fused():
            norm, fc1, fc2 = Norm.of(self.norm), self.mlp.fc1, self.mlp.fc2
            assert norm is not None  # implied by is_fused()
            x = ops.layernorm_mlp(
                x,
                norm.weight,
                norm.bias,
                norm.eps,
                fc1.weight,
                fc1.bias,
                fc2.weight,
                fc2.bias,
                self.mlp.activation,
                None,
            )
        else:
            x = x + self.mlp(plain.layer_norm(self.norm, x))
        return x[:, 0]
