"""DeiT and the ViT classes derived from timm 0.4: distillation token, pre-logits, and a literal variant (see below).

    x = dropout([cls_token, (dist_token), patch_embed(image)] + pos_embed)
    block: x = x + drop_path(dropout(proj(attention(qkv(norm1(x))))))
           x = x + drop_path(dropout(fc2(dropout(act(fc1(norm2(x)))))))                          LayerNorm eps 1e-6
    x = norm(x)

forward: images [B, in_c, H, W] → head(f) [B, num_classes], f = x[:, 0] or tanh(fc(x[:, 0])) with pre-logits.
Distilled, a = head(x[:, 0]) and b = head_dist(x[:, 1]): the tuple (a, b) in training, (a + b)/2 in evaluation. Current
timm averages in training too by default; so does this class after ``set_distilled_training(False)``.

A tutorial page ("the page" in this file) with this class feeds [B, N, D] to torch's encoder layers without batch_first:
attention then runs over the batch, and the logits do not depend on the image. ``compat="literal"`` keeps that
arithmetic; by default attention is over the tokens. State_dict keys are timm's; in literal mode the page's
(patch_embed.weight, pre_logits.0.*, blocks.{i} as torch's TransformerEncoderLayer).
Source: Touvron et al., "Training data-efficient image transformers & distillation through attention", 2021; timm 0.4.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast import plain
from vit_fast.checkpoints.errors import WeightsError
from vit_fast.checkpoints.fitting import resized_table
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.kernels.tracing import untraced
from vit_fast.layers import PatchEmbed
from vit_fast.pos_embed import check_policy
from vit_fast.vit import VisionTransformer, lecun_normal_

from . import arguments
from .encoder_layer import EncoderLayer

_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
_INITS = ("", "jax", "jax_nlhb", "moco", "wz", "skip")


def _presets() -> dict[str, Any]:
    presets = {}
    for size, (width, heads) in _WIDTHS.items():
        for image in (224, 384) if size == "base" else (224,):
            for distilled in ("", "_distilled"):
                preset = dict(
                    img_size=image, patch_size=16, embed_dim=width, depth=12, num_heads=heads,
                    distilled=bool(distilled), **_IMAGENET,
                )  # fmt: skip
                presets[f"deit_{size}{distilled}" + ("_384" if image == 384 else "")] = preset
                presets[f"deit_{size}{distilled}_patch16_{image}"] = preset
    for size, patch, width, depth, heads in (
        ("base", 16, 768, 12, 12), ("base", 32, 768, 12, 12), ("large", 16, 1024, 24, 16), ("large", 32, 1024, 24, 16)
    ):  # fmt: skip
        presets[f"vit_{size}_patch{patch}_224_in21k"] = dict(
            patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, representation_size=width,
            num_classes=21843,
        )  # fmt: skip
    return presets


PRESETS = _presets()


class OpenMlp(nn.Module):
    """fc2(act(fc1(x))) with any activation module; its block runs unfused."""

    def __init__(self, dim: int, hidden: int, act: nn.Module, drop: float, dd: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act, self.drop = act, drop
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(self.act(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(hidden), self.drop, self.training)


class _Heads(nn.Module):
    """Heads and outputs shared by ``DeiT`` and ``LiteralDeiT``."""

    pos_embed: nn.Parameter
    cls_token: nn.Parameter
    dist_token: nn.Parameter | None
    distilled_training = True

    def _make_heads(self, w: dict[str, Any], dd: dict[str, Any]) -> Any:
        width, self.num_classes = w["embed_dim"], w["num_classes"]
        self.num_tokens = 2 if w["distilled"] else 1
        size = w["representation_size"]
        self.has_logits = bool(size) and not w["distilled"]
        self.num_features = size if self.has_logits else width
        self.pre_logits: nn.Module = nn.Identity()
        if self.has_logits:
            layers = [("fc", nn.Linear(width, size, **dd)), ("act", nn.Tanh())]
            self.pre_logits = nn.Sequential(*(layer for _, layer in layers) if w["literal"] else (OrderedDict(layers),))
        self.head = self._make_head(dd)
        self.head_dist = self._make_head(dd) if w["distilled"] else None

    def _make_head(self, dd: dict[str, Any]) -> Any:
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes else nn.Identity()

    def forward_head(
        self, features: torch.Tensor | tuple[torch.Tensor, torch.Tensor], pre_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The result of ``forward_features`` → the output; with ``pre_logits`` it is returned unchanged."""
        if pre_logits:
            return features
        if self.head_dist is None:
            return self.head(features)
        outputs = self.head(features[0]), self.head_dist(features[1])
        return outputs if self.training and self.distilled_training else (outputs[0] + outputs[1]) / 2

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether a distilled model returns the tuple of both heads in training; it does by default."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """head, or (head, head_dist)."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, freshly initialised; 0 for none. ``global_pool`` can only be "token"."""
        arguments.one_of("deit", "global_pool", global_pool, (None, "token"))
        self.num_classes = arguments.integer("deit", "num_classes", num_classes, 0)
        dd = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = self._make_head(dd).train(self.training)
        if self.head_dist is not None:
            self.head_dist = self._make_head(dd).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that take no weight decay."""
        return {"pos_embed", "cls_token", "dist_token"}

    def _prefix(self) -> Any:
        return self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)


class DeiT(_Heads, VisionTransformer):  # type: ignore[misc]  # distilled models return pairs of tensors
    """``vit_fast.VisionTransformer`` with DeiT's tokens, heads, arguments and initialisation."""

    cls_token: nn.Parameter

    def __init__(self, w: dict[str, Any], dd: dict[str, Any]) -> None:
        rates = dict(
            pos_drop_rate=w["drop_ratio"], proj_drop_rate=w["drop_ratio"], attn_drop_rate=w["attn_drop_ratio"],
            drop_path_rate=w["drop_path_ratio"],
        )  # fmt: skip
        names: tuple[str, ...] = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
        names += ("mean", "std", "dynamic_img_size", "pos_embed_policy")
        act = w["act_layer"]
        activation = arguments.activation_name("deit", "act_layer", "gelu" if act is None else act)
        super().__init__(
            in_chans=w["in_c"], num_classes=0, act_layer=activation, weight_init="skip", **rates, **dd,
            **{name: w[name] for name in names},
        )  # fmt: skip
        width = self.embed_dim
        if w["embed_layer"] not in (None, PatchEmbed):
            self.patch_embed = _make_embed(w)
        self.dist_token = nn.Parameter(torch.empty(1, 1, width, **dd)) if w["distilled"] else None
        self._make_heads(w, dd)
        self.num_prefix_tokens = self.num_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens + self.patch_embed.num_patches, width, **dd))
        block: Any
        for block in self.blocks:
            block.attn.scale = w["qk_scale"] or block.attn.head_dim**-0.5
            if activation is None:
                block.mlp = OpenMlp(width, block.mlp.fc1.out_features, act().to(**dd), w["drop_ratio"], dd)
            if w["norm_layer"] is not None:
                block.norm1, block.norm2 = (_make_norm(w, dd) for _ in range(2))
        if w["norm_layer"] is not None:
            self.norm = _make_norm(w, dd)
        self.default_cfg = dict(
            input_size=(self.in_chans, *w["img_size"]), mean=self.mean, std=self.std, num_classes=self.num_classes
        )
        if w["weight_init"] != "skip":
            self.init_weights(w["weight_init"])

    @torch.no_grad()
    def init_weights(self, mode: str = "") -> None:
        """Initialises the parameters: "" as DeiT, "wz" as WZMIAOMIAO's rewrite, timm's "jax" and "jax_nlhb", "moco"."""
        super().init_weights(mode)
        for token in (self.cls_token, self.dist_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        if mode.startswith("jax"):
            nn.init.zeros_(self.cls_token)
        for module in self.modules() if mode == "wz" else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _init_linear(self, name: str, module: nn.Linear, mode: str) -> None:
        super()._init_linear("head" if name.startswith("head") else name, module, mode)
        if mode == "wz":
            nn.init.trunc_normal_(module.weight, std=0.01)
        elif mode.startswith("jax") and name.startswith("pre_logits"):
            lecun_normal_(module.weight)

    @untraced
    def _check_images(self, images: torch.Tensor) -> Any:
        if not isinstance(images, torch.fx.Proxy):
            arguments.check_images("deit", images, self.in_chans)
            size, expected = tuple(images.shape[2:]), self.patch_embed.img_size
            if not self.dynamic_img_size and size != expected:
                arguments.fail_images("deit", images, f"{expected[0]}×{expected[1]}; build with dynamic_img_size=True")
        return super()._check_images(images)

    def _embed(self, images: torch.Tensor) -> Any:
        if not isinstance(self.patch_embed, PatchEmbed):
            x = self.patch_embed(images)
            x = torch.cat([self._prefix().expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
            return F.dropout(x, self.pos_drop_rate, self.training)
        images, grid, mean, std = self._fit(images)
        table: Any = self._pos_table(grid)
        prefix, table = self._prefix() + table[:, : self.num_tokens], table[:, self.num_tokens :]
        x = plain.patch_embed(self.patch_embed, images, table, prefix, mean, std, cls=PatchEmbed)
        return F.dropout(x, self.pos_drop_rate, self.training)

    def forward_tokens(
        self, images: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Images → normalised tokens [B, num_tokens + N, D]."""
        return super().forward_features(images, attn_mask, is_causal)

    def forward_features(  # type: ignore[override]  # distilled models return a pair
        self, images: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images → f [B, num_features], or (x[:, 0], x[:, 1]) of a distilled model."""
        x, bias = self._embed_masked(images, attn_mask, is_causal)
        x = plain.layer_norm(self.norm, self._run_blocks(x, bias=bias), slice(self.num_tokens))
        return self.pre_logits(x[:, 0]) if self.dist_token is None else (x[:, 0], x[:, 1])

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions that group parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^cls_token|dist_token|pos_embed|patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )


class LiteralDeiT(_Heads, nn.Module):
    """The page's exact arithmetic: post-norm ReLU layers whose attention runs over the batch."""

    def __init__(self, w: dict[str, Any], dd: dict[str, Any]) -> None:
        super().__init__()
        self.embed_dim, self.in_chans, self.img_size = w["embed_dim"], w["in_c"], w["img_size"]
        self.grid_size = tuple(size // patch for size, patch in zip(w["img_size"], w["patch_size"], strict=True))
        self.drop, self.pos_embed_policy = w["drop_ratio"], w["pos_embed_policy"]
        width, hidden = self.embed_dim, int(w["embed_dim"] * w["mlp_ratio"])
        self.patch_embed = nn.Conv2d(self.in_chans, width, w["patch_size"], w["patch_size"], **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **dd))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width, **dd)) if w["distilled"] else None
        self._make_heads(w, dd)
        rows = self.num_tokens + math.prod(self.grid_size)
        self.pos_embed = nn.Parameter(torch.empty(1, rows, width, **dd))
        self.blocks = nn.Sequential(
            *(EncoderLayer(width, w["num_heads"], hidden, w["drop_ratio"]) for _ in range(w["depth"]))
        ).to(**dd)
        self.norm = _make_norm(w, dd) if w["norm_layer"] else nn.LayerNorm(width, eps=1e-5, **dd)
        self.default_cfg = dict(input_size=(self.in_chans, *self.img_size), num_classes=self.num_classes)
        if w["weight_init"] != "skip":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """trunc_normal 0.02 for tokens, table and linear weights, but xavier_uniform for the packed qkv projection."""
        for token in (self.cls_token, self.dist_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images → f [B, num_features], or (x[:, 0], x[:, 1]) of a distilled model."""
        arguments.check_images("deit", images, self.in_chans)
        arguments.check_float("deit", images)
        if tuple(images.shape[2:]) != self.img_size:
            arguments.fail_images("deit", images, f"{self.img_size[0]}×{self.img_size[1]}")
        table: torch.Tensor = self.pos_embed
        prefix, table = self._prefix() + table[:, : self.num_tokens], table[:, self.num_tokens :]
        x = plain.patch_embed(self.patch_embed, images, table, prefix)
        x = F.dropout(x, self.drop, self.training).transpose(0, 1)
        x = self.norm(self.blocks(x).transpose(0, 1))
        return self.pre_logits(x[:, 0]) if self.dist_token is None else (x[:, 0], x[:, 1])

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.forward_head(self.forward_features(images))


def _make_norm(w: dict[str, Any], dd: dict[str, Any]) -> Any:
    return w["norm_layer"](w["embed_dim"]).to(**dd)


def _make_embed(w: dict[str, Any]) -> Any:
    """The patch embedding of the argument embed_layer: images → tokens [B, num_patches, D]."""
    channels = "in_c" if "in_c" in inspect.signature(w["embed_layer"]).parameters else "in_chans"
    sizes = {name: w[name] for name in ("img_size", "patch_size", "embed_dim")}
    embed = w["embed_layer"](**{channels: w["in_c"]}, **sizes)
    if not isinstance(getattr(embed, "num_patches", None), int):
        arguments.fail("deit", "embed_layer", w["embed_layer"], "a module with num_patches")
    return embed


def _check(w: dict[str, Any]) -> Any:
    """Checks the arguments and normalises them to pairs, ints and floats."""
    for name in ("img_size", "patch_size"):
        w[name] = arguments.pair("deit", name, w[name])
    for name in ("in_c", "embed_dim", "depth", "num_heads"):
        w[name] = arguments.integer("deit", name, w[name])
    w["num_classes"] = arguments.integer("deit", "num_classes", w["num_classes"], 0)
    w["representation_size"] = arguments.integer("deit", "representation_size", w["representation_size"] or 0, 0)
    arguments.check_heads("deit", "num_heads", w["num_heads"], "embed_dim", w["embed_dim"])
    if int(w["embed_dim"] * arguments.positive("deit", "mlp_ratio", w["mlp_ratio"])) < 1:
        arguments.fail(
            "deit", "mlp_ratio", w["mlp_ratio"], f"a hidden width of 1 or more for embed_dim {w['embed_dim']}"
        )
    for name in ("drop_ratio", "attn_drop_ratio", "drop_path_ratio"):
        w[name] = arguments.rate("deit", name, w[name])
    if w["qk_scale"] and not math.isfinite(w["qk_scale"]):
        arguments.fail("deit", "qk_scale", w["qk_scale"], "a finite number")
    if any(size < patch for size, patch in zip(w["img_size"], w["patch_size"], strict=True)):
        arguments.fail("deit", "img_size", w["img_size"], f"at least one patch of {w['patch_size']}")
    for name in ("embed_layer", "norm_layer"):
        if w[name] is not None and not callable(w[name]):
            arguments.fail("deit", name, w[name], "a class")
    arguments.one_of("deit", "weight_init", w["weight_init"], _INITS)
    check_policy(w["pos_embed_policy"])
    return w


def build(
    img_size: arguments.Size = 224,
    patch_size: arguments.Size = 16,
    in_c: int | None = None,
    num_classes: int = 1000,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    representation_size: int | None = None,
    distilled: bool = False,
    drop_ratio: float | None = None,
    attn_drop_ratio: float | None = None,
    drop_path_ratio: float | None = None,
    embed_layer: arguments.Layer | None = None,
    norm_layer: arguments.Layer | None = None,
    act_layer: str | arguments.Layer | None = None,
    *,
    in_chans: int | None = None,
    drop_rate: float | None = None,
    attn_drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    weight_init: str = "",
    compat: str | None = None,
    dynamic_img_size: bool = False,
    pos_embed_policy: str = "R4",
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DeiT | LiteralDeiT:
    """A DeiT, with the arguments of the page (in_c, drop_ratio, ...) or of timm (in_chans, drop_rate, ...).

    Args:
        img_size, patch_size: int or (height, width).
        in_c or in_chans, num_classes: 3; 0 classes for no head.
        embed_dim, depth, num_heads, mlp_ratio: D, blocks, heads, hidden width / D.
        qkv_bias, qk_scale: the scale multiplies q·k; None or 0 is head_size ** −0.5.
        representation_size: width of tanh pre-logits; ignored when distilled.
        distilled: distillation token and second head.
        drop_ratio, attn_drop_ratio, drop_path_ratio (or *_rate): training only.
        embed_layer: a class of (img_size, patch_size, in_c or in_chans, embed_dim) that gives tokens and num_patches.
        norm_layer: a class or partial of one width; default LayerNorm with eps 1e-6. Other norms run unfused.
        act_layer: the class or name of the activation, default exact GELU; one without a kernel runs unfused.
        weight_init: "", "wz", "jax", "jax_nlhb", "moco" or "skip".
        compat: None, or "literal" for the page's own arithmetic (attn_drop_ratio, drop_path_ratio, qkv_bias, qk_scale,
            act_layer and embed_layer are then ignored, as there; norm_layer is the final norm's, default eps 1e-5).
        dynamic_img_size: any size on the patch grid, pos_embed resized by pos_embed_policy; not in literal mode.
        mean, std: normalisation of uint8 images.
    Returns:
        a model with attributes num_classes, embed_dim, num_features, num_tokens, has_logits, in training mode.
    Raises:
        TypeError, ValueError: bad arguments, named with what came and what is wanted.
    """
    one = arguments.one_of_two
    in_c = one("deit", "in_c", in_c, "in_chans", in_chans, 3)
    drop_ratio = one("deit", "drop_ratio", drop_ratio, "drop_rate", drop_rate, 0.0)
    attn_drop_ratio = one("deit", "attn_drop_ratio", attn_drop_ratio, "attn_drop_rate", attn_drop_rate, 0.0)
    drop_path_ratio = one("deit", "drop_path_ratio", drop_path_ratio, "drop_path_rate", drop_path_rate, 0.0)
    literal = arguments.one_of("deit", "compat", compat, (None, "literal")) == "literal"
    if in_c != 3 and mean == std == (0.5,) * 3:
        mean = std = (0.5,) * in_c
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    w = _check({name: value for name, value in locals().items() if name not in ("dd", "one")})
    return LiteralDeiT(w, dd) if literal else DeiT(w, dd)


Family = TypeVar("Family", DeiT, LiteralDeiT)


def _own_spelling(model: nn.Module, state: Mapping[str, Any]) -> Any:
    """The state with older key names (pre_logits.0, nested blocks) renamed and flat patch weights reshaped."""
    literal = isinstance(model, LiteralDeiT)
    old, new = ("blocks.layers.", "blocks.") if literal else ("pre_logits.0.", "pre_logits.fc.")
    state = {key.replace(old, new): value for key, value in state.items()}
    key = "patch_embed.weight" if literal else "patch_embed.proj.weight"
    own = model.state_dict().get(key)
    if key in state and state[key].dim() == 2 and own is not None and state[key].numel() == own.numel():
        state[key] = state[key].reshape(own.shape)
    return state


@loads(DeiT, LiteralDeiT)
def load(
    model: Family, source: arguments.Source, fine_tune: bool = False, old_grid: tuple[int, int] | None = None
) -> Family:
    """Loads weights of DeiT, timm, the rewrite, the page (literal models) or Google (.npz), strictly.

    Args:
        model: of ``build``.
        source: a state_dict, a checkpoint around one, or a ``.pth``, ``.pt``, ``.safetensors`` or ``.npz`` file.
        fine_tune: keeps the model's own heads where those of the weights do not fit.
        old_grid: the (rows, columns) of the weights' pos_embed; default the model's own grid where the count is the
            same, else a square. Another grid is resized by the model's pos_embed_policy (Google's by "R2").
    Returns:
        the model.
    Raises:
        WeightsError: unreadable file, or keys and shapes that do not fit (listed).
    """
    own = model.state_dict()
    grid = model.grid_size if isinstance(model, LiteralDeiT) else model.patch_embed.grid_size

    def fit(state: dict[str, Any]) -> Any:
        state = _own_spelling(model, state)
        table = state.get("pos_embed")
        if table is not None and table.dim() == 3 and (old_grid is not None or table.shape != own["pos_embed"].shape):
            try:
                state["pos_embed"] = resized_table(
                    "vit_fast.systems.deit: pos_embed", table, old_grid, grid, model.pos_embed_policy, model.num_tokens
                )
            except WeightsError:
                if old_grid is not None:
                    raise
        if fine_tune:
            state = {key: v for key, v in state.items() if not key.startswith("head") or _fits(own.get(key), v)}
            state |= {key: value for key, value in own.items() if key.startswith("head") and key not in state}
        return state

    return load_state_dict(model, arguments.state_of("deit", source), fit)


def _fits(own: torch.Tensor | None, value: Any) -> bool:
    return own is not None and own.shape == value.shape
