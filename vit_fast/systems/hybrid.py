"""The config-driven ViT and its ResNetV2 hybrids: jeonsworld's ViT-pytorch and Google's JAX program behind it.

    x = patch_embeddings(resnet(images))                       the ResNet in hybrids only (``resnetv2``)
    x = dropout([cls, x] + position_embeddings)
    block: x = x + dropout(out(attention(LN(x)))); x = x + dropout(fc2(dropout(gelu(fc1(LN(x))))))     LN eps 1e-6
    logits = head(LN(x)[:, 0])

==================  ==========================  =============================================
variant             "jeonsworld"                "google"
==================  ==========================  =============================================
GELU                exact                       tanh approximation
dropout after out   attention_dropout_rate      dropout_rate
ResNet arithmetic   "jeonsworld"                "google"
classifier          "token"                     "token", "gap", "unpooled", "token_unpooled"
representation_size ignored                     pre_logits: tanh(Linear) before the head
initialisation      that program's              that program's
==================  ==========================  =============================================

Without a variant the model is jeonsworld's, except that loading a Google .npz into a hybrid switches it to Google's
ResNet arithmetic, for which such weights were trained.
Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020; jeonsworld/ViT-pytorch (MIT);
google-research/vision_transformer (Apache-2.0).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vit_fast import ops, plain
from vit_fast.block import (
    attention_branch,
    attention_probabilities,
    mlp_branch,
    pack,
    pass_over_prepared,
    project_qkv,
    run_blocks,
)
from vit_fast.block_params import BlockParams, Norm
from vit_fast.checkpoints.errors import WeightsError
from vit_fast.checkpoints.fitting import resized_table
from vit_fast.checkpoints.loading import load_state_dict, loads
from vit_fast.kernels.reference import activate, attention_weights
from vit_fast.kernels.tracing import untraced

from .arguments import (
    Source,
    check_float,
    check_heads,
    check_images,
    fail,
    fail_images,
    integer,
    one_of,
    pair,
    rate,
    state_of,
)
from .hybrid_config import CONFIGS, Config, read
from .resnetv2 import MODES, ResNetV2

__all__ = ["CONFIGS", "PRESETS", "Config", "ResNetV2", "VisionTransformer", "build", "load"]

_FAMILY = "hybrid"
_CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
_ACTIVATIONS = ("gelu", "gelu_tanh")

PRESETS: dict[str, dict] = {
    name: dict(config=config, variant="google") if "+" in name else dict(config=config)
    for name, config in CONFIGS.items()
}


class Attention(nn.Module):
    """Self-attention of normalised tokens: [B, N, C] → ([B, N, C], probabilities [B, H, N, N] or None)."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear

    def __init__(self, dim: int, num_heads: int, attn_drop: float, out_drop: float, vis: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.vis = num_heads, (dim // num_heads) ** -0.5, vis
        self.attn_drop, self.out_drop = attn_drop, out_drop
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        probabilities = None
        if self.vis:
            heads = [t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k)]
            probabilities = attention_weights(*heads, self.scale)
        drop = self.attn_drop if self.training else 0.0
        x = ops.attention(q, self.num_heads, self.scale, k=k, v=v, dropout_p=drop)
        return F.dropout(self.out(x), self.out_drop, self.training), probabilities


class Mlp(nn.Module):
    """fc2(act(fc1(x))): [B, N, C] → [B, N, C]."""

    def __init__(self, dim: int, hidden: int, drop: float, activation: str) -> None:
        super().__init__()
        self.drop, self.activation = drop, activation
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(activate(self.fc1(x), self.activation), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class Block(plain.Fusible, nn.Module):
    """Pre-norm block: [B, N, C] → ([B, N, C], probabilities [B, H, N, N] or None)."""

    SUBMODULES = plain.submodules(
        attention_norm=plain.NORM,
        attn=(Attention,),
        attn__query=plain.LINEAR,
        attn__key=plain.LINEAR,
        attn__value=plain.LINEAR,
        attn__out=plain.LINEAR,
        ffn_norm=plain.NORM,
        ffn=(Mlp,),
        ffn__fc1=plain.LINEAR,
        ffn__fc2=plain.LINEAR,
    )

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_heads: int,
        attn_drop: float,
        out_drop: float,
        drop: float,
        activation: str,
        vis: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = Mlp(dim, hidden, drop, activation)
        self.attn = Attention(dim, num_heads, attn_drop, out_drop, vis)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them; query, key and value are packed at each call."""
        attn, ffn = self.attn, self.ffn
        qkv_weight, qkv_bias = pack((attn.query, attn.key, attn.value))
        return BlockParams(
            norm1=Norm.of(self.attention_norm),
            qkv_weight=qkv_weight,
            qkv_bias=qkv_bias,
            proj_weight=attn.out.weight,
            proj_bias=attn.out.bias,
            norm2=Norm.of(self.ffn_norm),
            fc1_weight=ffn.fc1.weight,
            fc1_bias=ffn.fc1.bias,
            fc2_weight=ffn.fc2.weight,
            fc2_bias=ffn.fc2.bias,
            num_heads=attn.num_heads,
            scale=attn.scale,
            activation=ffn.activation,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        attn, ffn = self.attn, self.ffn
        if not self.is_fused():
            y, probabilities = attn(plain.layer_norm(self.attention_norm, x))
            x = x + y
            return x + ffn(plain.layer_norm(self.ffn_norm, x)), probabilities
        attn_drop, out_drop = (attn.attn_drop, attn.out_drop) if attn.training else (0.0, 0.0)
        p = self.params()
        qkv = project_qkv(x, p)
        probabilities = attention_probabilities(qkv, p) if attn.vis else None
        x = attention_branch(x, p, attn_drop=attn_drop, proj_drop=out_drop, qkv=qkv)
        drop = ffn.drop if ffn.training else 0.0
        return mlp_branch(x, p, hidden_drop=drop, out_drop=drop), probabilities


class Embeddings(nn.Module):
    """Images [B, in, H, W] → tokens [B, K + N, C], K = 1 with a class token."""

    def __init__(
        self,
        hybrid_model: ResNetV2 | None,
        in_chans: int,
        dim: int,
        patch_size: tuple[int, int],
        grid_size: tuple[int, int],
        class_token: bool,
        drop: float,
    ) -> None:
        super().__init__()
        self.drop = drop
        self.hybrid = hybrid_model is not None
        if hybrid_model is not None:
            self.hybrid_model = hybrid_model
            in_chans = hybrid_model.out_chans
        self.patch_embeddings = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        tokens = grid_size[0] * grid_size[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens + class_token, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.hybrid_model(images) if self.hybrid else images
        table: torch.Tensor = self.position_embeddings
        prefix = None
        if self.cls_token is not None:
            prefix, table = self.cls_token + table[:, :1], table[:, 1:]
        x = plain.patch_embed(self.patch_embeddings, x, table, prefix)
        return F.dropout(x, self.drop, self.training)


class Encoder(nn.Module):
    """Blocks and the last LayerNorm: [B, N, C] → ([B, N, C], list of probabilities)."""

    def __init__(self, dim: int, depth: int, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(dim, **kwargs) for _ in range(depth)])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        maps = []

        def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            x, probabilities = block(x)
            if probabilities is not None:
                maps.append(probabilities)
            return x

        blocks: Any = self.layer
        if any(block.attn.vis for block in blocks):
            pass_over_prepared(blocks, "attention probabilities are asked for (vis)")
            for block in blocks:
                x = run(block, x)
        else:
            x = run_blocks(blocks, x, run=run)
        return plain.layer_norm(self.encoder_norm, x), maps


class Transformer(nn.Module):
    """Embeddings and encoder: images → (normalised tokens, list of probabilities)."""

    def __init__(self, embeddings: Embeddings, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.encoder(self.embeddings(images))


class VisionTransformer(nn.Module):
    """Config-driven ViT with jeonsworld's parameter names.

    Args:
        config: dict, object or ConfigDict (entries by key, by attribute or both), or a name of ``CONFIGS``:
            patches.size (ph, pw) in pixels (hybrids: in cells of the feature map) or patches.grid (gh, gw), which asks
            for patches of ⌊feature map / grid⌋, at least 1; hidden_size; transformer.{mlp_dim, num_heads, num_layers,
            attention_dropout_rate, dropout_rate}; classifier; representation_size; resnet.{num_layers, width_factor}.
        img_size: int or (height, width).
        num_classes: rows of the head; 0 for none (the logits are the features then).
        zero_head: a Google checkpoint's head is not copied but zeroed.
        vis: the forward returns attention probabilities.
        variant: "jeonsworld", "google" or None, see the head of the file.
        hybrid_mode: arithmetic of the ResNet, "jeonsworld" or "google"; None for the variant's.
        activation: "gelu" or "gelu_tanh"; None for the variant's.
        in_chans: channels of the images.

    ``forward(images, labels=None)``: images [B, in_chans, H, W] float; without labels (logits, maps), logits
    [B, num_classes] ([B, N, num_classes] where unpooled), maps a list of [B, H, N, N] softmax probabilities, one a
    layer, before dropout, empty without vis; with labels [B] the scalar mean cross-entropy alone. train() and eval()
    differ in dropout only.

    Raises:
        TypeError, ValueError: bad arguments, configs or images, naming what came and what is wanted.
    """

    google_policy = "R1"

    def __init__(
        self,
        config: Any,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 21843,
        zero_head: bool = False,
        vis: bool = False,
        *,
        variant: str | None = None,
        hybrid_mode: str | None = None,
        activation: str | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if isinstance(config, str):
            config = CONFIGS[one_of(_FAMILY, "config", config, tuple(CONFIGS))]
        google = variant is not None and one_of(_FAMILY, "variant", variant, MODES) == "google"
        self._follows_weights = variant is None and hybrid_mode is None
        hybrid_mode = one_of(_FAMILY, "hybrid_mode", hybrid_mode or ("google" if google else "jeonsworld"), MODES)
        activation = one_of(_FAMILY, "activation", activation or ("gelu_tanh" if google else "gelu"), _ACTIVATIONS)
        self.classifier = one_of(_FAMILY, "classifier", read(config, "classifier", "token"), _CLASSIFIERS)
        if self.classifier != "token" and not google:
            fail(_FAMILY, "classifier", self.classifier, "'token' (the others belong to variant='google')")
        num_classes = integer(_FAMILY, "num_classes", num_classes, 0)
        self.config, self.num_classes, self.zero_head, self.vis = config, num_classes, zero_head, vis
        self.img_size, self.in_chans = pair(_FAMILY, "img_size", img_size), integer(_FAMILY, "in_chans", in_chans)
        dim = self.embed_dim = integer(_FAMILY, "hidden_size", read(config, "hidden_size"))
        heads = integer(_FAMILY, "transformer.num_heads", read(config, "transformer.num_heads"))
        check_heads(_FAMILY, "num_heads", heads, "hidden_size", dim)
        attn_drop, drop = (
            rate(_FAMILY, name, read(config, f"transformer.{name}", 0.0))
            for name in ("attention_dropout_rate", "dropout_rate")
        )
        stem = None
        if read(config, "resnet", None) is not None:
            layers, width = read(config, "resnet.num_layers"), read(config, "resnet.width_factor", 1)
            stem = ResNetV2(self.in_chans, layers, width, hybrid_mode)
        self._stem_layers = None if stem is None else stem.num_layers
        self._set_patches(hybrid_mode)
        self.transformer = Transformer(
            Embeddings(stem, self.in_chans, dim, self.patch_size, self.grid_size, "token" in self.classifier, drop),
            Encoder(
                dim,
                integer(_FAMILY, "transformer.num_layers", read(config, "transformer.num_layers")),
                hidden=integer(_FAMILY, "transformer.mlp_dim", read(config, "transformer.mlp_dim")),
                num_heads=heads,
                attn_drop=attn_drop,
                out_drop=drop if google else attn_drop,
                drop=drop,
                activation=activation,
                vis=vis,
            ),
        )
        size = read(config, "representation_size", None) if google else None
        if size is not None:
            self.pre_logits = nn.Sequential()
            self.pre_logits.fc = nn.Linear(dim, integer(_FAMILY, "representation_size", size))
        self.head = nn.Linear(size or dim, num_classes) if num_classes else nn.Identity()
        self._init_google() if google else self._init_jeonsworld()
        half = (0.5,) * self.in_chans
        self.default_cfg = dict(
            input_size=(self.in_chans, *self.img_size), mean=half, std=half, num_classes=num_classes
        )

    def _feature_size(self, mode: Any) -> Any:
        if self._stem_layers is None:
            return self.img_size
        return ResNetV2.feature_size(self.img_size, self._stem_layers, mode)

    def _set_patches(self, mode: str) -> Any:
        """patch_size and grid_size from the config and the size of the image, in hybrids of the feature map."""
        size = self._feature_size(mode)
        grid, patch = (read(self.config, f"patches.{name}", None) for name in ("grid", "size"))
        if grid is None and patch is None:
            raise ValueError("vit_fast.systems.hybrid: config.patches has neither size nor grid, expected one")
        if grid is not None:
            patch = tuple(max(1, n // g) for n, g in zip(size, pair(_FAMILY, "patches.grid", grid)))
        self.patch_size = pair(_FAMILY, "patches.size", patch)
        self.grid_size = tuple(n // p for n, p in zip(size, self.patch_size))
        if not all(self.grid_size):
            raise ValueError(
                f"vit_fast.systems.hybrid: img_size is {self.img_size[0]}×{self.img_size[1]}, expected at least one "
                f"patch of {self.patch_size[0]}×{self.patch_size[1]} on {size[0]}×{size[1]}"
            )

    @torch.no_grad()
    def _init_jeonsworld(self) -> None:
        blocks: Any = self.transformer.encoder.layer
        for block in blocks:
            for linear in (block.ffn.fc1, block.ffn.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    @torch.no_grad()
    def _init_google(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # LeCun's normal, truncated at two standard deviations.
                std = math.prod(module.weight.shape[1:]) ** -0.5 / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            gn3: Any = getattr(module, "gn3", None)
            if gn3 is not None:
                nn.init.zeros_(gn3.weight)
        self._init_jeonsworld()
        transformer: Any = self.transformer
        for block in transformer.encoder.layer:
            for linear in block.attn.children():
                nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(transformer.embeddings.position_embeddings, std=0.02)
        if self.num_classes:
            head: Any = self.head
            nn.init.zeros_(head.weight)

    @property
    def hybrid_mode(self) -> str | None:
        """Arithmetic of the ResNet; None without one."""
        return self.transformer.embeddings.hybrid_model.mode if self._stem_layers is not None else None

    def set_hybrid_mode(self, mode: str) -> None:
        """Switches the arithmetic of the ResNet; the grid of tokens must not change."""
        one_of(_FAMILY, "hybrid_mode", mode, MODES)
        if self._stem_layers is None:
            fail(_FAMILY, "hybrid_mode", mode, "a config with a resnet for it")
        old, new = self._feature_size(self.hybrid_mode), self._feature_size(mode)
        if old != new:
            raise ValueError(
                f"vit_fast.systems.hybrid: feature map is {new[0]}×{new[1]} in hybrid_mode {mode!r}, "
                f"expected {old[0]}×{old[1]}; build with hybrid_mode={mode!r}"
            )
        self.transformer.embeddings.hybrid_model.set_mode(mode)

    def check_google_weights(self) -> None:
        """Called before a Google .npz is loaded."""
        if self._follows_weights and self._feature_size("google") != self._feature_size("jeonsworld"):
            raise WeightsError(
                "vit_fast.systems.hybrid: weights are Google's, expected a model built with hybrid_mode='google' "
                "(its feature map has another size at this img_size)"
            )

    def google_weights_loaded(self) -> None:
        """Called after a Google .npz has been loaded."""
        if self._follows_weights and self._stem_layers is not None:
            self.set_hybrid_mode("google")

    def load_from(self, weights: Mapping[str, Any]) -> None:
        """Loads a Google checkpoint, as ``numpy.load`` returns it; the original's method."""
        load(self, weights)

    @untraced
    def _check_images(self, images: torch.Tensor) -> Any:
        check_images(_FAMILY, images, self.in_chans)
        check_float(_FAMILY, images)
        if tuple(images.shape[2:]) != self.img_size:
            fail_images(_FAMILY, images, f"{self.img_size[0]}×{self.img_size[1]}")

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor | None) -> Any:
        if not self.num_classes:
            fail(_FAMILY, "num_classes", 0, "1 or more for labels")
        rows = logits.reshape(-1, self.num_classes)
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"vit_fast.systems.hybrid: labels are {type(labels).__name__}, expected a torch.Tensor")
        if labels.numel() != rows.shape[0] or labels.is_floating_point():
            raise ValueError(
                f"vit_fast.systems.hybrid: labels have shape {list(labels.shape)} and dtype {labels.dtype}, "
                f"expected {rows.shape[0]} integers"
            )
        return F.cross_entropy(rows, labels.reshape(-1).long())

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        self._check_images(images)
        x, maps = self.transformer(images)
        if self.classifier == "token":
            x = x[:, 0]
        elif self.classifier == "gap":
            x = x.mean(dim=1)
        if hasattr(self, "pre_logits"):
            x = torch.tanh(self.pre_logits(x))
        logits = self.head(x)
        if torch.jit.is_tracing():
            maps = maps or ()  # torch.jit.trace cannot return an empty list
        return (logits, maps) if labels is None else self._loss(logits, labels)


def build(
    config: Any = "ViT-B_16",
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 21843,
    zero_head: bool = False,
    vis: bool = False,
    **kwargs: Any,
) -> VisionTransformer:
    """A ``VisionTransformer``, whose docstring describes all arguments, variant, hybrid_mode, activation and in_chans
    included."""
    return VisionTransformer(config, img_size, num_classes, zero_head, vis, **kwargs)


@loads(VisionTransformer)
def load(model: VisionTransformer, source: Source, old_grid: tuple[int, int] | None = None) -> VisionTransformer:
    """Loads jeonsworld's or Google's weights.

    Args:
        source: a path (.pth, .pt, .bin, .safetensors, .npz), a state_dict, or what ``numpy.load`` gives of an .npz.
            A position table of another grid is resized by R1 (bilinear, corners aligned).
        old_grid: the (rows, columns) of the weights' table (not of an .npz); default the model's own grid where the
            count is the same, else a square.
    Returns:
        the model.
    Raises:
        WeightsError: unreadable file, missing or unexpected keys, wrong shapes; nothing is changed then. A key that a
            Google checkpoint lacks raises a ``WeightsError`` that is a ``KeyError`` too.
    """
    if isinstance(source, Mapping):
        source = {name: torch.as_tensor(value) if hasattr(value, "dtype") else value for name, value in source.items()}
    key = "transformer.embeddings.position_embeddings"
    own = model.transformer.embeddings.position_embeddings

    def fit(state: Mapping[str, Any]) -> Any:
        if key not in state or (old_grid is None and state[key].shape == own.shape):
            return state
        prefix = int(model.transformer.embeddings.cls_token is not None)
        subject = f"vit_fast.systems.hybrid: {key}"
        table = resized_table(subject, state[key], old_grid, model.grid_size, model.google_policy, prefix)
        return {**state, key: table}

    return load_state_dict(model, state_of(_FAMILY, source), fit)
