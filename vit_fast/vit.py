"""VisionTransformer: timm's words, timm's parameter names, this library's operations.

A block is two fused branches (``block.py``) whenever its sub-modules are plain (``plain.py``); where one carries a
hook, a parametrization or another class, its block runs module by module. Not here: RoPE, RMSNorm, windowed or parallel
blocks.

Shapes: images [B, in_chans, H, W]; tokens [B, K + N, C], K prefix tokens (class token, then registers) in front.
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
"""

import math
import operator
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import ops, plain
from .block import (
    BlockParams,
    Norm,
    attention_branch,
    attention_probabilities,
    call_blocks,
    drop_path_scale,
    mlp_branch,
    pass_over_prepared,
    project_qkv,
    run_blocks,
)
from .kernels.arguments import UnsupportedError
from .kernels.reference import activate, attention_weights, split_heads
from .kernels.tracing import is_fx_symbolic_tracing, untraced
from .layer_args import activation_of, library, norm_maker
from .patch_resize import resize_patch_embed
from .pos_embed import check_policy, resize_pos_embed

_POOLS = ("", "avg", "avgmax", "max", "token", "map")
_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_SWITCHES = (
    "qkv_bias", "qk_norm", "proj_bias", "class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm",
    "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad",
)  # fmt: skip
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "ReLU": "relu",
}


def _pair(name, value):
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"vit_fast.VisionTransformer: {name} has {len(pair)} elements, expected an int or a pair")
    for size in pair:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected an int or a pair of ints")
        if size < 1:
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected 1 or more")
    return pair


def _check_integer(name, value, minimum):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected an int")
    if value < minimum:
        raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected {minimum} or more")


def _check_number(name, value, wanted="a float"):
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected {wanted}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected a finite number")


def _activation_word(act_layer, mlp_layer):
    swiglu = _is_swiglu(mlp_layer)
    if act_layer is None:
        return "swiglu" if swiglu else "gelu"
    word = act_layer if isinstance(act_layer, str) else activation_of(act_layer)
    if swiglu and word not in ("silu", "SiLU", "swish"):
        raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected SiLU for a SwiGLU MLP")
    if not swiglu and word not in _ACTIVATIONS:
        words = ", ".join(_ACTIVATIONS)
        raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected one of {words}")
    return "swiglu" if swiglu else _ACTIVATIONS[word]


def _is_swiglu(mlp_layer):
    """Whether an mlp_layer is the packed SwiGLU rather than timm's Mlp."""
    if isinstance(mlp_layer, str | None):
        if mlp_layer not in (None, "mlp", "Mlp", "swiglu", "SwiGLUPacked"):
            raise ValueError(f"vit_fast.VisionTransformer: mlp_layer is {mlp_layer!r}, expected 'mlp' or 'swiglu'")
        return mlp_layer in ("swiglu", "SwiGLUPacked")
    cls, words = (mlp_layer.func, mlp_layer.keywords) if isinstance(mlp_layer, partial) else (mlp_layer, {})
    given = ("act_layer", "norm_layer", "bias", "drop")  # a block of timm passes these itself, whatever a partial holds
    left = {word: value for word, value in words.items() if word not in given}
    if isinstance(cls, type) and library(cls) in ("timm", __package__):
        if cls.__name__ == "Mlp" and not left:
            return False
        if cls.__name__ == "GluMlp" and left == {"gate_last": False}:
            return True
    raise ValueError(f"vit_fast.VisionTransformer: mlp_layer is {mlp_layer!r}, expected 'mlp' or 'swiglu'")


def lecun_normal_(weight):
    """A normal distribution cut off at twice its width, of variance 1/fan_in."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class LayerScale(nn.Module):
    """x · gamma, gamma [C]. Source: Touvron et al., "Going deeper with Image Transformers", 2021."""

    def __init__(self, dim, init_values, device=None, dtype=None):
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x):
        return x * self.gamma


def check_mask(tokens: int, attn_mask, is_causal: bool):
    """``TypeError`` or ``ValueError`` for what ``attention_bias`` does not take."""
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


def attention_bias(x, attn_mask=None, is_causal: bool = False):
    """What is added to the attention scores of tokens x [B, N, C] for a mask: a float [B or 1, H or 1, N or 1, N or 1],
    or None without one.

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
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    return x.new_zeros(()).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask


@torch.fx.wrap
def _without_masks(images, attn_mask, is_causal):
    """The images, in a graph of torch.fx, which was traced without masks."""
    if attn_mask is not None or is_causal:
        raise ValueError("vit_fast.VisionTransformer: a graph of torch.fx takes no attn_mask and no is_causal")
    return images


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, C] → [B, N, C]."""

    def __init__(self, dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, make_norm, dd):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = make_norm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = make_norm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)

    def _norm_heads(self, x, norm):
        """q or k [B, N, C] through a norm of its heads, which sees [B, H, N, D] as in timm."""
        return norm(x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)

    def forward(self, x, attn_mask=None, is_causal: bool = False):
        qkv, drop = self.qkv(x), self.attn_drop if self.training else 0.0
        bias = attention_bias(x, attn_mask, is_causal)
        if all(plain.may_read("attention", norm, plain.NORM) for norm in (self.q_norm, self.k_norm)):
            norms = dict(q_norm=Norm.of(self.q_norm), k_norm=Norm.of(self.k_norm))
        else:
            q, k, v = qkv.chunk(3, dim=-1)
            qkv, norms = self._norm_heads(q, self.q_norm), dict(k=self._norm_heads(k, self.k_norm), v=v)
        out = ops.attention(qkv, self.num_heads, self.scale, bias=bias, **norms, dropout_p=drop)
        return F.dropout(self.proj(out), self.proj_drop, self.training)


class Mlp(nn.Module):
    """fc2(act(fc1(x))): [..., C] → [..., C]; "swiglu" packs gate and value rows in fc1."""

    def __init__(self, dim, hidden, activation, bias, drop, dd):
        super().__init__()
        self.activation, self.drop = activation, drop
        self.fc1 = nn.Linear(dim, hidden, bias=bias, **dd)
        self.fc2 = nn.Linear(hidden // 2 if activation == "swiglu" else hidden, dim, bias=bias, **dd)

    def init_weights(self):
        if self.activation == "swiglu":
            half = self.fc1.weight.shape[0] // 2
            if self.fc1.bias is not None:
                nn.init.ones_(self.fc1.bias[half:])
            nn.init.normal_(self.fc1.weight[half:], std=1e-6)

    def forward(self, x):
        hidden = F.dropout(activate(self.fc1(x), self.activation), self.drop, self.training)
        return F.dropout(self.fc2(hidden), self.drop, self.training)


class Block(plain.Fusible, nn.Module):
    """Pre-norm transformer block: [B, N, C] → [B, N, C]."""

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
        self, dim, num_heads, mlp_ratio, qkv_bias, qk_norm, proj_bias, proj_drop, attn_drop, init_values,
        drop_path, activation, make_norm, dd,
    ):  # fmt: skip
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

    def _drop_path(self, branch):
        scale = drop_path_scale(branch, self.drop_path, self.training)
        return branch if scale is None else branch * scale[:, None, None]

    def forward(self, x, attn_mask=None, is_causal: bool = False):
        bias = attention_bias(x, attn_mask, is_causal)
        if not self.is_fused():
            masks = {} if bias is None else {"attn_mask": bias}  # another attention may know no masks
            x = x + self._drop_path(self.ls1(self.attn(plain.layer_norm(self.norm1, x), **masks)))
            return x + self._drop_path(self.ls2(self.mlp(plain.layer_norm(self.norm2, x))))
        return self._fused(x, self.params(), bias=bias)

    def _fused(self, x, p, qkv=None, bias=None):
        attn, mlp = self.attn, self.mlp
        attn_drop, proj_drop = (attn.attn_drop, attn.proj_drop) if attn.training else (0.0, 0.0)
        row_scale = partial(drop_path_scale, x, self.drop_path, self.training)
        x = attention_branch(x, p, row_scale=row_scale(), attn_drop=attn_drop, proj_drop=proj_drop, qkv=qkv, bias=bias)
        return mlp_branch(x, p, row_scale=row_scale(), proj_drop=mlp.drop if mlp.training else 0.0)

    def forward_with_attention(self, x, queries=None):
        """(output, probabilities [B, H, N, N]); the output comes from the fused path all the same.

        Raises:
            UnsupportedError: an attention of another class, which may have no probabilities.
        """
        if plain.why_not_plain(self, (type(self),)) is None and self.is_fused():
            p = self.params()
            qkv = project_qkv(x, p)
            return self._fused(x, p, qkv=qkv), attention_probabilities(qkv, p, queries)
        attn = self.attn
        if type(attn) is not Attention:
            raise UnsupportedError(
                f"vit_fast.VisionTransformer: a block's attn is {type(attn).__module__}.{type(attn).__qualname__}, "
                "expected vit_fast.vit.Attention for attention maps"
            )
        seen = []
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

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias, dynamic_img_pad, dd):
        super().__init__()
        self.dynamic_img_pad = dynamic_img_pad
        self._set_sizes(_pair("img_size", img_size), _pair("patch_size", patch_size))
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **dd)

    def _set_sizes(self, img_size, patch_size):
        if any(size < patch for size, patch in zip(img_size, patch_size, strict=True)):
            raise ValueError(
                f"vit_fast.VisionTransformer: img_size is {img_size[0]}×{img_size[1]}, "
                f"expected at least one patch of {patch_size[0]}×{patch_size[1]}"
            )
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = tuple(size // patch for size, patch in zip(img_size, patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ):
        """Changes the sizes, None keeps one; the projection is resized to its patch (``patch_resize``)."""
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

    def feat_size(self, height, width):
        """The grid (rows, columns) of an image size."""
        if self.dynamic_img_pad:
            return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(plain.Fusible, nn.Module):
    """MAP pooling: one latent query attends to the tokens [B, N, C] → [B, C].

    Source: Zhai et al., "Scaling Vision Transformers", 2021.
    """

    OPERATION = "layernorm_mlp"
    SUBMODULES = plain.submodules(norm=(nn.LayerNorm,), mlp=(Mlp,), mlp__fc1=plain.LINEAR, mlp__fc2=plain.LINEAR)

    def __init__(self, dim, num_heads, mlp_ratio, activation, make_norm, dd):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.latent = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, dim * 2, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = make_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, True, 0.0, dd)

    def init_weights(self):
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def forward(self, x):
        q = self.q(self.latent).expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, dim=-1)
        x = self.proj(ops.attention(q, self.num_heads, self.scale, k=k, v=v))
        if self.is_fused():
            norm, fc1, fc2 = Norm.of(self.norm), self.mlp.fc1, self.mlp.fc2
            x = ops.layernorm_mlp(x, *norm, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.mlp.activation, None)
        else:
            x = x + self.mlp(plain.layer_norm(self.norm, x))
        return x[:, 0]


class VisionTransformer(nn.Module):
    """Vision Transformer with timm's constructor words and exactly timm's ``state_dict`` keys.

    Args:
        img_size, patch_size: int or (height, width), pixels.
        in_chans: channels of the images.
        num_classes: 0 for no head.
        global_pool: "token", "avg", "avgmax", "max", "map" or "" (no pooling).
        embed_dim, depth, num_heads, mlp_ratio: C, blocks, H, hidden width / C.
        qkv_bias, qk_norm, proj_bias: biases and the LayerNorm of q and k.
        init_values: initial LayerScale, None for none.
        class_token, reg_tokens: prefix tokens.
        pos_embed: "learn" or "none".
        no_embed_class: the position embedding has no rows for prefix tokens.
        pre_norm: LayerNorm before the blocks (CLIP); the patch projection then has no bias.
        final_norm, fc_norm: LayerNorm after the blocks, before or after pooling (None: after for avg, avgmax, max).
        pool_include_prefix: pooling sees prefix tokens.
        dynamic_img_size: any image size on the patch grid; the position embedding is resized by pos_embed_policy.
        dynamic_img_pad: pads images to the patch grid.
        drop_rate, pos_drop_rate, patch_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: training only.
        weight_init: "", "jax", "jax_nlhb", "moco" or "skip".
        norm_layer: a LayerNorm class or partial, default eps 1e-6; a subclass with a forward of its own runs unfused.
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "relu" or a class that computes one of them.
        mlp_layer: "mlp" or "swiglu" (timm's classes are understood).
        pos_embed_policy: "R1" … "R5" (``vit_fast.resize_pos_embed``).
        mean, std: pixel normalisation applied to uint8 images only, a float a channel.

    ``forward``: images [B, in_chans, H, W] (float, normalised; or uint8) → logits [B, num_classes].

    Raises:
        TypeError, ValueError: bad words or sizes, naming what came and what is wanted.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        norm_layer=None,
        act_layer=None,
        mlp_layer=None,
        pos_embed_policy: str = "R5",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        device=None,
        dtype=None,
    ):
        super().__init__()
        self._check_words(locals())
        dd = {"device": device, "dtype": dtype}
        norm_layer = None if norm_layer in ("layernorm", "layer_norm") else norm_layer
        make_norm = norm_maker("vit_fast.VisionTransformer: norm_layer", norm_layer, 1e-6, **dd)
        activation = _activation_word(act_layer, mlp_layer)
        if activation == "swiglu" and int(embed_dim * mlp_ratio) % 2:
            raise ValueError(
                f"vit_fast.VisionTransformer: mlp_ratio is {mlp_ratio}, "
                f"expected an even hidden width for a SwiGLU MLP, got {int(embed_dim * mlp_ratio)}"
            )
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens, self.has_class_token = reg_tokens, class_token
        self.no_embed_class, self.pool_include_prefix = no_embed_class, pool_include_prefix
        self.dynamic_img_size, self.pos_embed_policy = dynamic_img_size, check_policy(pos_embed_policy)
        self.mean, self.std = tuple(mean), tuple(std)
        self.drop_rate, self.pos_drop_rate, self.patch_drop_rate = drop_rate, pos_drop_rate, patch_drop_rate
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, not pre_norm, dynamic_img_pad, dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        rows = self.patch_embed.num_patches + self._pos_prefix
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim, **dd)) if pos_embed == "learn" else None
        self.norm_pre = make_norm(embed_dim) if pre_norm else nn.Identity()
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim, num_heads, mlp_ratio, qkv_bias, qk_norm, proj_bias, proj_drop_rate, attn_drop_rate,
                    init_values, rate, activation, make_norm, dd,
                )
                for rate in rates
            )
        )  # fmt: skip
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=self.patch_embed.feat_ratio()) for i in range(depth)
        ]
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        self.norm = make_norm(embed_dim) if final_norm and not use_fc_norm else nn.Identity()
        pool = global_pool == "map"
        self.attn_pool = AttentionPool(embed_dim, num_heads, mlp_ratio, activation, make_norm, dd) if pool else None
        self.fc_norm = make_norm(embed_dim) if final_norm and use_fc_norm else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        if weight_init != "skip":
            self.init_weights(weight_init)

    @staticmethod
    def _check_words(words):
        def fail(name, wanted):
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {words[name]!r}, expected {wanted}")

        for name in ("in_chans", "embed_dim", "depth", "num_heads", "num_classes", "reg_tokens"):
            _check_integer(name, words[name], 0 if name in ("num_classes", "reg_tokens") else 1)
        for name in _SWITCHES:
            value = words[name]
            if not isinstance(value, int) or value not in (0, 1):
                if name != "fc_norm" or value is not None:
                    raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected a bool")
        if words["init_values"] is not None:
            _check_number("init_values", words["init_values"], "a float or None")
        for name in ("mean", "std"):
            if not isinstance(words[name], (tuple, list)):
                raise TypeError(
                    f"vit_fast.VisionTransformer: {name} is {type(words[name]).__name__}, expected a tuple of floats"
                )
            for i, value in enumerate(words[name]):
                _check_number(f"{name}[{i}]", value)
        if words["embed_dim"] % words["num_heads"]:
            fail("num_heads", f"a divisor of embed_dim {words['embed_dim']}")
        _check_number("mlp_ratio", words["mlp_ratio"])
        if int(words["embed_dim"] * words["mlp_ratio"]) < 1:
            fail("mlp_ratio", "a hidden width of 1 or more")
        if words["global_pool"] not in _POOLS:
            fail("global_pool", f"one of {', '.join(repr(pool) for pool in _POOLS)}")
        if words["global_pool"] == "token" and not words["class_token"]:
            fail("global_pool", "another pool where class_token is False")
        if words["pos_embed"] not in ("learn", "none", ""):
            fail("pos_embed", "'learn' or 'none'")
        if words["weight_init"] not in ("", "jax", "jax_nlhb", "moco", "skip"):
            fail("weight_init", "'', 'jax', 'jax_nlhb', 'moco' or 'skip'")
        for name in _RATES:
            _check_number(name, words[name])
            if not 0.0 <= words[name] < 1.0:
                fail(name, "0 ≤ rate < 1")

    @torch.no_grad()
    def init_weights(self, mode: str = ""):
        """Initialises the parameters: timm's scheme, or "jax", "jax_nlhb", "moco"."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                self._init_linear(name, module, mode)
            elif isinstance(module, nn.Conv2d) and mode.startswith("jax"):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (Mlp, AttentionPool)):
                module.init_weights()

    def _init_linear(self, name, module, mode):
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if mode.startswith("jax"):
            if name == "head":
                nn.init.zeros_(module.weight)
                nn.init.constant_(module.bias, -math.log(self.num_classes) if mode == "jax_nlhb" else 0.0)
            else:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None and "mlp" in name:
                    nn.init.normal_(module.bias, std=1e-6)
        elif mode == "moco" and name.endswith("qkv"):
            bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
        elif mode == "moco":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=0.02)

    @property
    def _pos_prefix(self):
        """Rows of the position embedding that belong to prefix tokens."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    def set_grad_checkpointing(self, enable: bool = True):
        """Recomputes each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def _check_pool(self, name, pool):
        if pool not in _POOLS or (pool == "token" and not self.has_class_token):
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {pool!r}, expected a pool it has")
        if pool == "map" and self.attn_pool is None:
            raise ValueError(f"vit_fast.VisionTransformer: {name} is 'map', expected a model built with it")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None):
        """A new head, freshly initialised; ``global_pool`` may change except to "map"."""
        _check_integer("num_classes", num_classes, 0)
        if global_pool is not None:
            self._check_pool("global_pool", global_pool)
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        like = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ):
        """Changes the sizes for good, None keeps one; resizes the position embedding and the patch projection."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            table = resize_pos_embed(
                self.pos_embed, old_grid, self.patch_embed.grid_size, self.pos_embed_policy, self._pos_prefix
            )
            self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)

    def _pos_table(self, grid):
        """pos_embed for a grid, resized where the grid is not the model's. In each call: a write through ``.data``, as
        teachers are updated, leaves no version by which a kept table could be known to be stale."""
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        return resize_pos_embed(
            self.pos_embed, self.patch_embed.grid_size, grid, self.pos_embed_policy, self._pos_prefix
        )

    @untraced
    def _check_images(self, images):
        """(rows, columns of pixels to pad; the grid) of images; a graph of torch.fx has the size of the model."""
        if isinstance(images, torch.fx.Proxy):
            for side, wanted in zip((2, 3), self.patch_embed.img_size, strict=True):
                torch._assert(images.shape[side] == wanted, f"vit_fast.VisionTransformer: expected {wanted} pixels")
            return (0, 0), self.patch_embed.grid_size
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"vit_fast.VisionTransformer: images are {type(images).__name__}, expected a torch.Tensor")
        if images.dim() != 4:
            raise ValueError(
                f"vit_fast.VisionTransformer: images have {images.dim()} dimensions, "
                f"expected 4 [B, {self.in_chans}, H, W]"
            )
        if images.shape[1] != self.in_chans:
            raise ValueError(
                f"vit_fast.VisionTransformer: images have {images.shape[1]} channels, expected {self.in_chans}"
            )
        # Plain ints: torch cannot differentiate a resized table under symbolic sizes, so a graph has one image size.
        height, width = (operator.index(size) for size in images.shape[2:])
        embed = self.patch_embed
        if not self.dynamic_img_size:
            if (height, width) != embed.img_size:
                raise ValueError(
                    f"vit_fast.VisionTransformer: images are {height}×{width}, expected {embed.img_size[0]}×"
                    f"{embed.img_size[1]}; build with dynamic_img_size=True or call set_input_size"
                )
        elif not embed.dynamic_img_pad and (height % embed.patch_size[0] or width % embed.patch_size[1]):
            raise ValueError(
                f"vit_fast.VisionTransformer: images are {height}×{width}, expected multiples of the patch "
                f"{embed.patch_size[0]}×{embed.patch_size[1]}; build with dynamic_img_pad=True to pad"
            )
        grid = embed.feat_size(height, width)
        if embed.dynamic_img_pad:
            return (grid[0] * embed.patch_size[0] - height, grid[1] * embed.patch_size[1] - width), grid
        if height < embed.patch_size[0] or width < embed.patch_size[1]:
            raise ValueError(
                f"vit_fast.VisionTransformer: images are {height}×{width}, "
                f"expected at least one patch of {embed.patch_size[0]}×{embed.patch_size[1]}"
            )
        return (0, 0), grid

    def _fit(self, images):
        """Images, checked and padded where the model pads; their grid; mean and std where they are uint8."""
        pad, grid = self._check_images(images)
        if pad != (0, 0):
            images = F.pad(images, (0, pad[1], 0, pad[0]))
        raw = not isinstance(images, torch.fx.Proxy) and images.dtype == torch.uint8
        return images, grid, self.mean if raw else None, self.std if raw else None

    def _embed(self, images):
        """Images → tokens with position embedding, dropouts and norm_pre: [B, K + N, C]."""
        images, grid, mean, std = self._fit(images)
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if len(tokens) > 1 else (tokens[0] if tokens else None)
        table = self._pos_table(grid)
        if table is not None and self._pos_prefix:
            prefix, table = prefix + table[:, : self._pos_prefix], table[:, self._pos_prefix :]
        x = plain.patch_embed(self.patch_embed, images, table, prefix, mean, std, cls=PatchEmbed)
        x = F.dropout(x, self.pos_drop_rate, self.training)
        if self.training and self.patch_drop_rate:
            x = self._drop_patches(x)
        return plain.layer_norm(self.norm_pre, x)

    def _embed_masked(self, images, attn_mask, is_causal):
        """(tokens, bias of their attention); a bad mask is refused before anything runs."""
        if is_fx_symbolic_tracing():
            return self._embed(_without_masks(images, attn_mask, is_causal)), None
        tells = isinstance(self.patch_embed, PatchEmbed) and not (self.training and self.patch_drop_rate)
        if attn_mask is not None and tells:  # the number of tokens, from the images alone
            rows, columns = self._check_images(images)[1]
            check_mask(self.num_prefix_tokens + rows * columns, attn_mask, is_causal)
        x = self._embed(images)
        return x, attention_bias(x, attn_mask, is_causal)

    def _drop_patches(self, x):
        """Keeps a random subset of the patch tokens of each image. Source: Li et al., "FLIP", 2022."""
        patches = x[:, self.num_prefix_tokens :]
        keep = max(1, int(patches.shape[1] * (1.0 - self.patch_drop_rate)))
        chosen = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :keep, None]
        patches = patches.gather(1, chosen.expand(-1, -1, patches.shape[2]))
        return torch.cat([x[:, : self.num_prefix_tokens], patches], dim=1)

    def _run_block(self, block, x, **masks):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **masks)
        return block(x, **masks)

    def _run_blocks(self, x, first=0, last=None, bias=None):
        """x through blocks[first:last]. Prepared weights know no bias: with one, the blocks run one by one."""
        if bias is None and (first, last) == (0, None):
            return call_blocks(self.blocks, x, self._run_block, self.grad_checkpointing)
        if bias is None:
            return run_blocks(self.blocks, x, first, last, self._run_block)
        pass_over_prepared(self.blocks, "attn_mask or is_causal is given")
        for block in self.blocks[first:last]:
            x = self._run_block(block, x, attn_mask=bias)
        return x

    def forward_features(self, images, attn_mask=None, is_causal: bool = False):
        """Images → normalised tokens [B, K + N, C]; the masks are those of ``forward``."""
        x, bias = self._embed_masked(images, attn_mask, is_causal)
        return plain.layer_norm(self.norm, self._run_blocks(x, bias=bias))

    def pool(self, x, pool_type: str | None = None):
        """Tokens [B, K + N, C] → [B, C] (or the tokens, for "")."""
        if pool_type is None:
            pool_type = self.global_pool
        else:
            self._check_pool("pool_type", pool_type)
        if pool_type == "token":
            return x[:, 0]
        if not pool_type:
            return x
        if not self.pool_include_prefix:
            x = x[:, self.num_prefix_tokens :]
        if pool_type == "map":
            return self.attn_pool(x)
        if pool_type == "avg":
            return x.mean(dim=1)
        if pool_type == "max":
            return x.amax(dim=1)
        return 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x, pre_logits: bool = False):
        """Normalised tokens → logits [B, num_classes], or the features before the head."""
        x = plain.layer_norm(self.fc_norm, self.pool(x))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images, attn_mask=None, is_causal: bool = False):
        """Images → logits [B, num_classes].

        Args:
            attn_mask: broadcasts to [B, H, K + N, K + N]: bool, True where a token may attend to another, or a float
                that is added to the scores. Attention then runs on the torch backend.
            is_causal: a token attends to itself and to those before it.
        """
        return self.forward_head(self.forward_features(images, attn_mask, is_causal))

    def _layer_indices(self, indices):
        depth = len(self.blocks)
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise ValueError(f"vit_fast.VisionTransformer: {indices} last layers asked for, expected 1 to {depth}")
            return list(range(depth - indices, depth))
        if not hasattr(indices, "__iter__") or not all(hasattr(index, "__index__") for index in indices):
            raise TypeError(f"vit_fast.VisionTransformer: indices is {indices!r}, expected an int or a list of ints")
        chosen = [depth + index if index < 0 else index for index in indices]
        for index, layer in zip(indices, chosen, strict=True):
            if not 0 <= layer < depth:
                raise ValueError(f"vit_fast.VisionTransformer: layer {index} asked for, expected 0 to {depth - 1}")
        return chosen

    def forward_intermediates(
        self,
        images,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask=None,
        is_causal: bool = False,
    ):
        """Features after chosen blocks.

        Args:
            indices: None all, int the last n, or a list (negative counts from the end).
            return_prefix_tokens: each intermediate becomes (patches, prefix tokens [B, K, C]).
            norm: applies the final norm to each.
            stop_early: runs no block after the last one asked for.
            output_fmt: "NCHW" [B, C, rows, columns] or "NLC" [B, N, C].
            intermediates_only: only the list.
            output_dict: {"image_features", "image_intermediates", "image_intermediates_prefix"}.
            attn_mask, is_causal: as in ``forward``.
        Returns:
            (normalised tokens, list of intermediates), or as asked above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"vit_fast.VisionTransformer: output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        chosen = self._layer_indices(indices)
        x, bias = self._embed_masked(images, attn_mask, is_causal)
        features, done = [], 0
        for i in sorted(set(chosen)):
            x = self._run_blocks(x, done, i + 1, bias)
            features.append(plain.layer_norm(self.norm, x) if norm else x)
            done = i + 1
        if not stop_early:
            x = self._run_blocks(x, done, None, bias)
        prefix = [y[:, : self.num_prefix_tokens] for y in features] if self.num_prefix_tokens else None
        features = [y[:, self.num_prefix_tokens :] for y in features]
        if output_fmt == "NCHW":
            rows, columns = self.patch_embed.feat_size(*images.shape[2:])
            features = [y.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for y in features]
        if output_dict:
            result = {"image_intermediates": features}
            if prefix is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = plain.layer_norm(self.norm, x)
            return result
        if return_prefix_tokens and prefix is not None:
            features = list(zip(features, prefix, strict=True))
        return features if intermediates_only else (plain.layer_norm(self.norm, x), features)

    def get_intermediate_layers(
        self,
        images,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask=None,
        return_class_token: bool = False,
    ):
        """Features after the last n (or the listed) blocks, as a list; DINO's interface.

        Args:
            reshape: [B, C, rows, columns] instead of [B, N, C].
            return_prefix_tokens: each becomes (patches, prefix tokens [B, K, C]), timm's word.
            return_class_token: each becomes (patches, class token [B, C]), DINOv2's word.
            norm: applies the final norm to each; by default not, as in timm (DINOv2 does).
            attn_mask: as in ``forward``.
        """
        if return_class_token and (return_prefix_tokens or not self.has_class_token):
            wanted = "return_prefix_tokens=False with it" if return_prefix_tokens else "a model with a class token"
            raise ValueError(f"vit_fast.VisionTransformer: return_class_token is True, expected {wanted}")
        layers = self.forward_intermediates(
            images,
            n,
            return_prefix_tokens=return_prefix_tokens or return_class_token,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )
        return [(patches, prefix[:, 0]) for patches, prefix in layers] if return_class_token else layers

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what ``forward_intermediates`` of the same indices does not need: the blocks behind the last one.

        Args:
            indices: the last n blocks, or a list (negative counts from the end).
            prune_norm: removes the final norm.
            prune_head: removes pooling, its norm and the head.
        Returns:
            the indices counted from the first block, which stay valid.
        """
        chosen = self._layer_indices(indices)
        self.blocks = self.blocks[: max(chosen) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def get_attention_maps(self, images, n: int | list[int] = 1, queries=None):
        """Attention probabilities of chosen blocks; all others, and their outputs, stay on the fast path.

        Args:
            n: the last n blocks, or a list of indices.
            queries: a slice or index tensor of query tokens (slice(0, 1): the class token's row); None for all.
        Returns:
            list of [B, H, queries, K + N], one a chosen block, in block order.
        """
        chosen = sorted(set(self._layer_indices(n)))
        x = self._embed(images)
        maps, done = [], 0
        for i in chosen:
            x = self._run_blocks(x, done, i)
            x, probabilities = self.blocks[i].forward_with_attention(x, queries)
            maps.append(probabilities)
            done = i + 1
        return maps
