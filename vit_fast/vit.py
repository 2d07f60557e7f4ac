"""VisionTransformer: timm's words, timm's parameter names, this library's operations.

A block is two fused branches (``block.py``) whenever its sub-modules are plain; a sub-module that carries a hook, a
parametrization or another class runs through its own ``__call__`` and its block runs unfused. Not here: masks, causal
attention, RoPE, RMSNorm, windowed or parallel blocks.

Shapes: images [B, in_chans, H, W]; tokens [B, K + N, C], K prefix tokens (class token, then registers) in front.
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
"""

import math
import operator
from functools import partial
from numbers import Real
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import ops
from .block import (
    BlockParams,
    Norm,
    attention_branch,
    attention_probabilities,
    drop_path_scale,
    is_plain,
    mlp_branch,
    plain,
    project_qkv,
    run_blocks,
)
from .kernels.reference import activate
from .kernels.tracing import untraced
from .pos_embed import check_policy, resize_pos_embed

_POOLS = ("", "avg", "avgmax", "max", "token", "map")
_RATES = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
_SWITCHES = (
    "qkv_bias", "qk_norm", "proj_bias", "class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm",
    "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad",
)  # fmt: skip
_ACTIVATIONS = {
    None: "gelu",
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


def _word(cls):
    """The name of a class, of a partial's class, or the word itself."""
    if isinstance(cls, partial):
        cls = cls.func
    return cls.__name__ if isinstance(cls, type) else cls


def _activation_word(act_layer, mlp_layer):
    mlp = _word(mlp_layer)
    if mlp in ("SwiGLUPacked", "swiglu") or (
        mlp == "GluMlp" and isinstance(mlp_layer, partial) and mlp_layer.keywords.get("gate_last") is False
    ):
        if _word(act_layer) not in (None, "silu", "SiLU", "swish"):
            raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected SiLU for a SwiGLU MLP")
        return "swiglu"
    if mlp not in (None, "mlp", "Mlp"):
        raise ValueError(f"vit_fast.VisionTransformer: mlp_layer is {mlp_layer!r}, expected 'mlp' or 'swiglu'")
    word = _word(act_layer)
    if isinstance(act_layer, partial) and word == "GELU" and act_layer.keywords.get("approximate") == "tanh":
        return "gelu_tanh"
    if not isinstance(word, str | None) or word not in _ACTIVATIONS:
        words = ", ".join(str(key) for key in _ACTIVATIONS if key)
        raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected one of {words}")
    return _ACTIVATIONS[word]


def _norm_eps(norm_layer):
    """eps of a LayerNorm class, partial or word; timm's default 1e-6."""
    if norm_layer is None or norm_layer in ("layernorm", "layer_norm"):
        return 1e-6
    cls = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    may_build = isinstance(cls, FunctionType) or (isinstance(cls, type) and issubclass(cls, nn.LayerNorm))
    norm = norm_layer(1) if may_build else None
    if not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"vit_fast.VisionTransformer: norm_layer is {norm_layer!r}, expected a LayerNorm class")
    return norm.eps


def lecun_normal_(weight):
    """A normal distribution cut off at twice its width, of variance 1/fan_in."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@plain
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


@plain
class Attention(nn.Module):
    """Multi-head self-attention: [B, N, C] → [B, N, C]."""

    def __init__(self, dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, eps, dd):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=eps, **dd) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=eps, **dd) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)

    def forward(self, x):
        drop = self.attn_drop if self.training else 0.0
        out = ops.attention(
            self.qkv(x),
            self.num_heads,
            self.scale,
            q_norm=Norm.of(self.q_norm),
            k_norm=Norm.of(self.k_norm),
            dropout_p=drop,
        )
        return F.dropout(self.proj(out), self.proj_drop, self.training)


@plain
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


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, C] → [B, N, C]."""

    def __init__(
        self, dim, num_heads, mlp_ratio, qkv_bias, qk_norm, proj_bias, proj_drop, attn_drop, init_values,
        drop_path, activation, eps, dd,
    ):  # fmt: skip
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, eps, dd)
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
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

    def is_fused(self) -> bool:
        """Whether the block runs as fused branches: all of its sub-modules are plain."""
        attn, mlp = self.attn, self.mlp
        return is_plain(self.norm1, attn, self.ls1, self.norm2, mlp, self.ls2) and is_plain(
            attn.qkv, attn.q_norm, attn.k_norm, attn.proj, mlp.fc1, mlp.fc2
        )

    def _drop_path(self, branch):
        scale = drop_path_scale(branch, self.drop_path, self.training)
        return branch if scale is None else branch * scale[:, None, None]

    def forward(self, x):
        if not self.is_fused():
            x = x + self._drop_path(self.ls1(self.attn(self.norm1(x))))
            return x + self._drop_path(self.ls2(self.mlp(self.norm2(x))))
        return self._fused(x, self.params())

    def _fused(self, x, p, qkv=None):
        attn_drop, proj_drop = (self.attn.attn_drop, self.attn.proj_drop) if self.training else (0.0, 0.0)
        row_scale = partial(drop_path_scale, x, self.drop_path, self.training)
        x = attention_branch(x, p, row_scale=row_scale(), attn_drop=attn_drop, proj_drop=proj_drop, qkv=qkv)
        return mlp_branch(x, p, row_scale=row_scale(), proj_drop=proj_drop)

    def forward_with_attention(self, x, queries=None):
        """(output, probabilities [B, H, N, N]); the output comes from the fused path all the same."""
        p = self.params()
        qkv = project_qkv(x, p)
        return self._fused(x, p, qkv=qkv), attention_probabilities(qkv, p, queries)


@plain
class PatchEmbed(nn.Module):
    """Holds the patch projection and the sizes: images [B, in_chans, H, W] → tokens [B, N, C]."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias, dynamic_img_pad, dd):
        super().__init__()
        self.patch_size = _pair("patch_size", patch_size)
        self.dynamic_img_pad = dynamic_img_pad
        self._set_img_size(_pair("img_size", img_size))
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **dd)

    def _set_img_size(self, img_size):
        if any(size < patch for size, patch in zip(img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"vit_fast.VisionTransformer: img_size is {img_size[0]}×{img_size[1]}, "
                f"expected at least one patch of {self.patch_size[0]}×{self.patch_size[1]}"
            )
        self.img_size = img_size
        self.grid_size = tuple(size // patch for size, patch in zip(img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_size(self, height, width):
        """The grid (rows, columns) of an image size."""
        if self.dynamic_img_pad:
            return -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        return height // self.patch_size[0], width // self.patch_size[1]

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """MAP pooling: one latent query attends to the tokens [B, N, C] → [B, C].

    Source: Zhai et al., "Scaling Vision Transformers", 2021.
    """

    def __init__(self, dim, num_heads, mlp_ratio, activation, eps, dd):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.latent = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, dim * 2, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), activation, True, 0.0, dd)

    def init_weights(self):
        nn.init.trunc_normal_(self.latent, std=self.latent.shape[-1] ** -0.5)

    def forward(self, x):
        q = self.q(self.latent).expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, dim=-1)
        x = self.proj(ops.attention(q, self.num_heads, self.scale, k=k, v=v))
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        if is_plain(self.norm, self.mlp, fc1, fc2):
            norm = Norm.of(self.norm)
            x = ops.layernorm_mlp(x, *norm, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.mlp.activation, None)
        else:
            x = x + self.mlp(self.norm(x))
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
        norm_layer: a LayerNorm class or partial (its eps counts; default 1e-6).
        act_layer: "gelu", "gelu_tanh", "quick_gelu", "relu" or the class of one.
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
        eps = _norm_eps(norm_layer)
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
        self._pos_cache = {}

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, not pre_norm, dynamic_img_pad, dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        rows = self.patch_embed.num_patches + self._pos_prefix
        self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim, **dd)) if pos_embed == "learn" else None
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps, **dd) if pre_norm else nn.Identity()
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim, num_heads, mlp_ratio, qkv_bias, qk_norm, proj_bias, proj_drop_rate, attn_drop_rate,
                    init_values, rate, activation, eps, dd,
                )
                for rate in rates
            )
        )  # fmt: skip
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=max(self.patch_embed.patch_size))
            for i in range(depth)
        ]
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        self.norm = nn.LayerNorm(embed_dim, eps=eps, **dd) if final_norm and not use_fc_norm else nn.Identity()
        pool = global_pool == "map"
        self.attn_pool = AttentionPool(embed_dim, num_heads, mlp_ratio, activation, eps, dd) if pool else None
        self.fc_norm = nn.LayerNorm(embed_dim, eps=eps, **dd) if final_norm and use_fc_norm else nn.Identity()
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

    def __getstate__(self):
        return {**super().__getstate__(), "_pos_cache": {}}

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
    def set_input_size(self, img_size: int | tuple[int, int]):
        """Changes img_size for good and resizes the position embedding to it."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed._set_img_size(_pair("img_size", img_size))
        if self.pos_embed is not None:
            table = resize_pos_embed(
                self.pos_embed, old_grid, self.patch_embed.grid_size, self.pos_embed_policy, self._pos_prefix
            )
            self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)

    def _pos_table(self, grid):
        """pos_embed for a grid, resized where the grid is not the model's; cached while nothing can change it."""
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        resize = partial(
            resize_pos_embed, self.pos_embed, self.patch_embed.grid_size, grid, self.pos_embed_policy, self._pos_prefix
        )
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self.pos_embed.requires_grad):
            return resize()
        source = self.pos_embed
        version = 0 if source.is_inference() else source._version
        key = (source.data_ptr(), version, source.dtype, source.device, self.pos_embed_policy)
        if grid not in self._pos_cache or self._pos_cache[grid][0] != key:
            self._pos_cache[grid] = (key, resize())
        return self._pos_cache[grid][1]

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
        proj = self.patch_embed.proj
        if is_plain(self.patch_embed, proj):
            x = ops.patch_embed(images, proj.weight, proj.bias, table, prefix, proj.stride, mean, std)
        else:
            if mean is not None:
                images = ops.reference.normalise_pixels(images, mean, std, proj.weight.dtype)
            x = self.patch_embed(images)
            x = x if table is None else x + table
            x = x if prefix is None else torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)
        x = F.dropout(x, self.pos_drop_rate, self.training)
        if self.training and self.patch_drop_rate:
            x = self._drop_patches(x)
        return self._norm(self.norm_pre, x)

    def _drop_patches(self, x):
        """Keeps a random subset of the patch tokens of each image. Source: Li et al., "FLIP", 2022."""
        patches = x[:, self.num_prefix_tokens :]
        keep = max(1, int(patches.shape[1] * (1.0 - self.patch_drop_rate)))
        chosen = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :keep, None]
        patches = patches.gather(1, chosen.expand(-1, -1, patches.shape[2]))
        return torch.cat([x[:, : self.num_prefix_tokens], patches], dim=1)

    def _norm(self, module, x):
        if type(module) is nn.LayerNorm and is_plain(module):
            return ops.layer_norm(x, module.weight, module.bias, module.eps)
        return module(x)

    def _run_block(self, block, x):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def forward_features(self, images):
        """Images → normalised tokens [B, K + N, C]."""
        return self._norm(self.norm, run_blocks(self.blocks, self._embed(images), run=self._run_block))

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
        x = self._norm(self.fc_norm, self.pool(x))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

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
        Returns:
            (normalised tokens, list of intermediates), or as asked above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"vit_fast.VisionTransformer: output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        chosen = self._layer_indices(indices)
        x = self._embed(images)
        features, done = [], 0
        for i in sorted(set(chosen)):
            x = run_blocks(self.blocks, x, done, i + 1, self._run_block)
            features.append(self._norm(self.norm, x) if norm else x)
            done = i + 1
        if not stop_early:
            x = run_blocks(self.blocks, x, done, None, self._run_block)
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
                result["image_features"] = self._norm(self.norm, x)
            return result
        if return_prefix_tokens and prefix is not None:
            features = list(zip(features, prefix, strict=True))
        return features if intermediates_only else (self._norm(self.norm, x), features)

    def get_intermediate_layers(
        self,
        images,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ):
        """Features after the last n (or the listed) blocks, as a list; DINOv2's words."""
        return self.forward_intermediates(
            images,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

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
            x = run_blocks(self.blocks, x, done, i, self._run_block)
            x, probabilities = self.blocks[i].forward_with_attention(x, queries)
            maps.append(probabilities)
            done = i + 1
        return maps
