"""VisionTransformer: timm's arguments and parameter names, this library's operations.

Its parts are in ``layers.py``. Not here: RoPE, RMSNorm, windowed or parallel blocks.

Shapes: images [B, in_chans, H, W]; tokens [B, K + N, C], K prefix tokens (class token, then registers) in front.
Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import ops, plain
from .block import call_blocks, run_blocks
from .kernels.tracing import is_fx_symbolic_tracing, untraced
from .layer_args import activation_of, library, norm_maker
from .layers import AttentionPool, Block, Mlp, PatchEmbed, attention_bias, check_bits, check_mask
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


def _check_integer(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected an int")
    if value < minimum:
        raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected {minimum} or more")
    check_bits(name, value)


def _check_number(name: str, value: Any, wanted: str = "a float") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected {wanted}")
    if not -math.inf < value < math.inf:  # type: ignore[operator]  # for mypy, Real has no comparison operators
        raise ValueError(f"vit_fast.VisionTransformer: {name} is {value}, expected a finite number")


def _activation_word(act_layer: Any, mlp_layer: Any) -> str:
    swiglu = _is_swiglu(mlp_layer)
    if act_layer is None:
        return "swiglu" if swiglu else "gelu"
    word = act_layer if isinstance(act_layer, str) else activation_of(act_layer)
    if swiglu and word not in ("silu", "SiLU", "swish"):
        raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected SiLU for a SwiGLU MLP")
    if swiglu:
        return "swiglu"
    if word not in _ACTIVATIONS:
        names = ", ".join(_ACTIVATIONS)
        raise ValueError(f"vit_fast.VisionTransformer: act_layer is {act_layer!r}, expected one of {names}")
    return _ACTIVATIONS[word]


def _is_swiglu(mlp_layer: Any) -> bool:
    """Whether an mlp_layer is the packed SwiGLU rather than timm's Mlp."""
    if isinstance(mlp_layer, str | None):
        if mlp_layer not in (None, "mlp", "Mlp", "swiglu", "SwiGLUPacked"):
            raise ValueError(f"vit_fast.VisionTransformer: mlp_layer is {mlp_layer!r}, expected 'mlp' or 'swiglu'")
        return mlp_layer in ("swiglu", "SwiGLUPacked")
    cls, keywords = (mlp_layer.func, mlp_layer.keywords) if isinstance(mlp_layer, partial) else (mlp_layer, {})
    given = ("act_layer", "norm_layer", "bias", "drop")  # timm's block passes these itself and so overrides the partial
    left = {name: value for name, value in keywords.items() if name not in given}
    if isinstance(cls, type) and library(cls) in ("timm", __package__):
        if cls.__name__ == "Mlp" and not left:
            return False
        if cls.__name__ == "GluMlp" and left == {"gate_last": False}:
            return True
    raise ValueError(f"vit_fast.VisionTransformer: mlp_layer is {mlp_layer!r}, expected 'mlp' or 'swiglu'")


def lecun_normal_(weight: torch.Tensor) -> None:
    """Truncated normal initialisation, cut at two standard deviations, with variance 1/fan_in."""
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@torch.fx.wrap
def _without_masks(images: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool) -> torch.Tensor:
    """Returns the images; a leaf of torch.fx's trace that raises where a graph traced without masks is given one."""
    if attn_mask is not None or is_causal:
        raise ValueError("vit_fast.VisionTransformer: a graph of torch.fx takes no attn_mask and no is_causal")
    return images


class VisionTransformer(nn.Module):
    """Vision Transformer with timm's arguments and exactly timm's ``state_dict`` keys.

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
        TypeError, ValueError: bad arguments or sizes, naming what came and what is wanted.
    """

    # Facts about the weights; ``create_model`` sets both.
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

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
        norm_layer: Callable[..., nn.Module] | str | None = None,
        act_layer: Callable[..., nn.Module] | str | None = None,
        mlp_layer: Callable[..., nn.Module] | str | None = None,
        pos_embed_policy: str = "R5",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._check_arguments(locals())
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
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
    def _check_arguments(given: dict[str, Any]) -> None:
        def fail(name: str, wanted: str) -> None:
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {given[name]!r}, expected {wanted}")

        for name in ("in_chans", "embed_dim", "depth", "num_heads", "num_classes", "reg_tokens"):
            _check_integer(name, given[name], 0 if name in ("num_classes", "reg_tokens") else 1)
        for name in _SWITCHES:
            value = given[name]
            if not isinstance(value, int) or value not in (0, 1):
                if name != "fc_norm" or value is not None:
                    raise TypeError(f"vit_fast.VisionTransformer: {name} is {value!r}, expected a bool")
        if given["init_values"] is not None:
            _check_number("init_values", given["init_values"], "a float or None")
        for name in ("mean", "std"):
            if not isinstance(given[name], (tuple, list)):
                raise TypeError(
                    f"vit_fast.VisionTransformer: {name} is {type(given[name]).__name__}, expected a tuple of floats"
                )
            for i, value in enumerate(given[name]):
                _check_number(f"{name}[{i}]", value)
        if given["embed_dim"] % given["num_heads"]:
            fail("num_heads", f"a divisor of embed_dim {given['embed_dim']}")
        _check_number("mlp_ratio", given["mlp_ratio"])
        if int(given["embed_dim"] * given["mlp_ratio"]) < 1:
            fail("mlp_ratio", "a hidden width of 1 or more")
        if given["global_pool"] not in _POOLS:
            fail("global_pool", f"one of {', '.join(repr(pool) for pool in _POOLS)}")
        if given["global_pool"] == "token" and not given["class_token"]:
            fail("global_pool", "another pool where class_token is False")
        if given["pos_embed"] not in ("learn", "none", ""):
            fail("pos_embed", "'learn' or 'none'")
        if given["weight_init"] not in ("", "jax", "jax_nlhb", "moco", "skip"):
            fail("weight_init", "'', 'jax', 'jax_nlhb', 'moco' or 'skip'")
        for name in _RATES:
            _check_number(name, given[name])
            if not 0.0 <= given[name] < 1.0:
                fail(name, "0 ≤ rate < 1")

    @torch.no_grad()
    def init_weights(self, mode: str = "") -> None:
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

    def _init_linear(self, name: str, module: nn.Linear, mode: str) -> None:
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
    def _pos_prefix(self) -> int:
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

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def _check_pool(self, name: str, pool: str) -> None:
        if pool not in _POOLS or (pool == "token" and not self.has_class_token):
            raise ValueError(f"vit_fast.VisionTransformer: {name} is {pool!r}, expected a pool it has")
        if pool == "map" and self.attn_pool is None:
            raise ValueError(f"vit_fast.VisionTransformer: {name} is 'map', expected a model built with it")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
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
    ) -> None:
        """Changes the sizes permanently (None keeps one); resizes the position embedding and the patch projection."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            table = resize_pos_embed(
                self.pos_embed, old_grid, self.patch_embed.grid_size, self.pos_embed_policy, self._pos_prefix
            )
            self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)

    def _pos_table(self, grid: tuple[int, int]) -> torch.Tensor | None:
        """The position table of a grid, resized where the grid is not the model's.

        It is resized in each call and not kept: a write through ``.data``, by which DINO updates its teacher, changes
        no version counter, so a kept table could be stale without a sign of it.
        """
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        return resize_pos_embed(
            self.pos_embed, self.patch_embed.grid_size, grid, self.pos_embed_policy, self._pos_prefix
        )

    @untraced
    def _check_images(self, images: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """((rows, columns) of pixels to pad, the grid) of images; a torch.fx graph asserts the model's own size."""
        if isinstance(images, torch.fx.Proxy):
            shape: Any = images.shape
            for side, wanted in zip((2, 3), self.patch_embed.img_size, strict=True):
                torch._assert(shape[side] == wanted, f"vit_fast.VisionTransformer: expected {wanted} pixels")
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

    def _fit(self, images: torch.Tensor) -> tuple[Any, ...]:
        """(images, checked and perhaps padded; their grid; mean and std, for uint8 images)."""
        pad, grid = self._check_images(images)
        if pad != (0, 0):
            images = F.pad(images, (0, pad[1], 0, pad[0]))
        raw = not isinstance(images, torch.fx.Proxy) and images.dtype == torch.uint8
        return images, grid, self.mean if raw else None, self.std if raw else None

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images → tokens with position embedding, dropouts and norm_pre: [B, K + N, C]."""
        images, grid, mean, std = self._fit(images)
        tokens: list[torch.Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if len(tokens) > 1 else (tokens[0] if tokens else None)
        table = self._pos_table(grid)
        if table is not None and prefix is not None and self._pos_prefix:
            prefix, table = prefix + table[:, : self._pos_prefix], table[:, self._pos_prefix :]
        x = plain.patch_embed(self.patch_embed, images, table, prefix, mean, std, cls=PatchEmbed)
        x = ops.dropout(x, self.pos_drop_rate if self.training else 0.0)
        if self.training and self.patch_drop_rate:
            x = self._drop_patches(x)
        return plain.layer_norm(self.norm_pre, x)

    def _embed_masked(
        self, images: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens, attention bias of the mask); a bad mask is refused before anything runs."""
        if is_fx_symbolic_tracing():
            return self._embed(_without_masks(images, attn_mask, is_causal)), None
        tells = isinstance(self.patch_embed, PatchEmbed) and not (self.training and self.patch_drop_rate)
        if attn_mask is not None and tells:  # the image size alone gives the number of tokens
            rows, columns = self._check_images(images)[1]
            check_mask(self.num_prefix_tokens + rows * columns, attn_mask, is_causal)
        x = self._embed(images)
        return x, attention_bias(x, attn_mask, is_causal)

    def _drop_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Keeps a random subset of the patch tokens of each image. Source: Li et al., "FLIP", 2022."""
        patches = x[:, self.num_prefix_tokens :]
        keep = max(1, int(patches.shape[1] * (1.0 - self.patch_drop_rate)))
        chosen = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :keep, None]
        patches = patches.gather(1, chosen.expand(-1, -1, patches.shape[2]))
        return torch.cat([x[:, : self.num_prefix_tokens], patches], dim=1)

    def _run_block(self, block: nn.Module, x: torch.Tensor, **masks: torch.Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(partial(block, **masks), x, use_reentrant=False)
        return block(x, **masks)

    def _run_blocks(
        self, x: torch.Tensor, first: int = 0, last: int | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x through blocks[first:last]; one by one where there is an attention bias, which a prepared stack lacks."""
        if bias is None and (first, last) == (0, None):
            return call_blocks(self.blocks, x, self._run_block, self.grad_checkpointing)
        if bias is None:
            return run_blocks(self.blocks, x, first, last, self._run_block)
        for block in list(self.blocks)[first:last]:
            x = self._run_block(block, x, attn_mask=bias)
        return x

    def forward_features(
        self, images: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Images → normalised tokens [B, K + N, C]; the masks are those of ``forward``."""
        x, bias = self._embed_masked(images, attn_mask, is_causal)
        return plain.layer_norm(self.norm, self._run_blocks(x, bias=bias))

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
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
            return cast(AttentionPool, self.attn_pool)(x)
        if pool_type == "avg":
            return x.mean(dim=1)
        if pool_type == "max":
            return x.amax(dim=1)
        return 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Normalised tokens → logits [B, num_classes], or the features before the head."""
        x = plain.layer_norm(self.fc_norm, self.pool(x))
        x = ops.dropout(x, self.drop_rate if self.training else 0.0)
        return x if pre_logits else self.head(x)

    def forward(
        self, images: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Images → logits [B, num_classes].

        Args:
            attn_mask: broadcasts to [B, H, K + N, K + N]: bool, True where a token may attend to another, or a float
                that is added to the scores. Attention then runs on the torch backend.
            is_causal: a token attends to itself and to those before it.
        """
        return self.forward_head(self.forward_features(images, attn_mask, is_causal))

    def _layer_indices(self, indices: Any) -> list[int]:
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
        if not chosen:
            raise ValueError(f"vit_fast.VisionTransformer: indices is {indices!r}, expected one layer or more")
        for index, layer in zip(indices, chosen, strict=True):
            if not 0 <= layer < depth:
                raise ValueError(f"vit_fast.VisionTransformer: layer {index} asked for, expected 0 to {depth - 1}")
        return chosen

    def forward_intermediates(
        self,
        images: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
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
        if output_fmt == "NCHW" and self.training and self.patch_drop_rate:
            raise ValueError(
                "vit_fast.VisionTransformer: output_fmt is 'NCHW' in training with patch_drop_rate "
                f"{self.patch_drop_rate}, expected 'NLC': patches that are dropped leave no map"
            )
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
            result: dict[str, Any] = {"image_intermediates": features}
            if prefix is not None and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = plain.layer_norm(self.norm, x)
            return result
        intermediates: list[Any] = features
        if return_prefix_tokens and prefix is not None:
            intermediates = list(zip(features, prefix, strict=True))
        return intermediates if intermediates_only else (plain.layer_norm(self.norm, x), intermediates)

    def get_intermediate_layers(
        self,
        images: torch.Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: torch.Tensor | None = None,
        return_class_token: bool = False,
    ) -> list[torch.Tensor] | list[tuple[torch.Tensor, torch.Tensor]]:
        """Features after the last n (or the listed) blocks, as a list; DINO's interface.

        Args:
            reshape: [B, C, rows, columns] instead of [B, N, C].
            return_prefix_tokens: each becomes (patches, prefix tokens [B, K, C]), timm's name.
            return_class_token: each becomes (patches, class token [B, C]), DINOv2's name.
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
        del self.blocks[max(chosen) + 1 :]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return chosen

    def get_attention_maps(
        self, images: torch.Tensor, n: int | list[int] = 1, queries: slice | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
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
            x, probabilities = cast(Block, self.blocks[i]).forward_with_attention(x, queries)
            maps.append(probabilities)
            done = i + 1
        return maps
