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

Without a variant the model is jeonsworld's, except that a hybrid into which a Google .npz is loaded goes over to
Google's ResNet arithmetic, for which such weights were trained.
Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020; jeonsworld/ViT-pytorch (MIT);
google-research/vision_transformer (Apache-2.0).
"""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops, weights
from ..block import (
    BlockParams,
    Norm,
    attention_branch,
    attention_probabilities,
    is_plain,
    mlp_branch,
    project_qkv,
)
from ..kernels.reference import activate
from ..pos_embed import resize_pos_embed
from ..registry import register
from .resnetv2 import MODES, ResNetV2

_CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")
_ACTIVATIONS = ("gelu", "gelu_tanh")
_WHO = "vit_fast.systems.hybrid"


class Config(dict):
    """A dict whose entries are attributes too, all the way down."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            if isinstance(value, dict) and not isinstance(value, Config):
                self[key] = Config(value)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value

    def __deepcopy__(self, memo):
        return Config({key: copy.deepcopy(value, memo) for key, value in self.items()})


def _config(hidden_size, mlp_dim, num_heads, num_layers, dropout_rate=0.1, resnet=None, **patches):
    config = Config(
        patches=patches,
        hidden_size=hidden_size,
        transformer=dict(
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            num_layers=num_layers,
            attention_dropout_rate=0.0,
            dropout_rate=dropout_rate,
        ),
        classifier="token",
        representation_size=None,
    )
    if resnet is not None:
        config.resnet = Config(num_layers=resnet, width_factor=1)
    return config


_TI, _S, _B = (192, 768, 3, 12), (384, 1536, 6, 12), (768, 3072, 12, 12)
_L, _H = (1024, 4096, 16, 24), (1280, 5120, 16, 32)

CONFIGS: dict[str, Config] = {
    "testing": _config(1, 1, 1, 1, size=(16, 16)),
    "ViT-Ti_16": _config(*_TI, size=(16, 16)),
    "ViT-S_16": _config(*_S, size=(16, 16)),
    "ViT-S_32": _config(*_S, size=(32, 32)),
    "ViT-B_8": _config(*_B, size=(8, 8)),
    "ViT-B_16": _config(*_B, size=(16, 16)),
    "ViT-B_32": _config(*_B, size=(32, 32)),
    "ViT-L_16": _config(*_L, size=(16, 16)),
    "ViT-L_32": _config(*_L, size=(32, 32)),
    "ViT-H_14": _config(*_H, size=(14, 14)),
    "R50-ViT-B_16": _config(*_B, resnet=(3, 4, 9), grid=(14, 14)),
    "R+ViT-Ti_16": _config(*_TI, 0.0, resnet=(), size=(8, 8)),
    "R26+ViT-S_32": _config(*_S, 0.0, resnet=(2, 2, 2, 2), size=(1, 1)),
    "R26+ViT-B_32": _config(*_B, 0.0, resnet=(2, 2, 2, 2), size=(1, 1)),
    "R50+ViT-B_16": _config(*_B, 0.1, resnet=(3, 4, 9), size=(1, 1)),
    "R50+ViT-L_32": _config(*_L, 0.1, resnet=(3, 4, 6, 3), size=(1, 1)),
}

PRESETS: dict[str, dict] = {
    name: dict(config=config, variant="google") if "+" in name else dict(config=config)
    for name, config in CONFIGS.items()
}

_REQUIRED = object()


def _read(config, path, default=_REQUIRED):
    """An entry of a config of dicts, objects or both; ``default`` where it is absent or None."""
    value = config
    for name in path.split("."):
        if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
            value = value[name] if name in value.keys() else None
        else:
            value = getattr(value, name, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{_WHO}: config has no {path}, expected one")
            return default
    return value


def _int(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{_WHO}: {name} is {value!r}, expected an int of 1 or more")
    return value


def _pair(name, value):
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{_WHO}: {name} has {len(pair)} elements, expected an int or a pair")
    return tuple(_int(name, size) for size in pair)


def _rate(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{_WHO}: {name} is {value!r}, expected 0 ≤ rate < 1")
    return float(value)


def _choice(name, value, words):
    if value not in words:
        raise ValueError(f"{_WHO}: {name} is {value!r}, expected one of {', '.join(words)}")
    return value


class Attention(nn.Module):
    """Holds query, key, value and out; alone it maps normalised tokens [B, N, C] to (output, probabilities)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = self.num_attention_heads = num_heads
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(dim, dim))


class Mlp(nn.Module):
    """Holds fc1 and fc2."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)


class Block(nn.Module):
    """Pre-norm block: [B, N, C] → ([B, N, C], probabilities [B, H, N, N] or None)."""

    def __init__(self, dim, hidden, num_heads, attn_drop, out_drop, drop, activation, vis):
        super().__init__()
        self.attn_drop, self.out_drop, self.drop, self.activation, self.vis = attn_drop, out_drop, drop, activation, vis
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = Mlp(dim, hidden)
        self.attn = Attention(dim, num_heads)

    def params(self) -> BlockParams:
        """The weights as the fused branches take them; query, key and value are packed at each call."""
        attn, ffn = self.attn, self.ffn
        packed = (attn.query, attn.key, attn.value)
        return BlockParams(
            norm1=Norm(self.attention_norm.weight, self.attention_norm.bias, self.attention_norm.eps),
            qkv_weight=torch.cat([linear.weight for linear in packed]),
            qkv_bias=torch.cat([linear.bias for linear in packed]),
            proj_weight=attn.out.weight,
            proj_bias=attn.out.bias,
            norm2=Norm(self.ffn_norm.weight, self.ffn_norm.bias, self.ffn_norm.eps),
            fc1_weight=ffn.fc1.weight,
            fc1_bias=ffn.fc1.bias,
            fc2_weight=ffn.fc2.weight,
            fc2_bias=ffn.fc2.bias,
            num_heads=attn.num_heads,
            scale=(attn.query.weight.shape[0] // attn.num_heads) ** -0.5,
            activation=self.activation,
        )

    def is_fused(self) -> bool:
        """Whether the block runs as fused branches: nothing in it carries a hook or was replaced."""
        attn, ffn = self.attn, self.ffn
        return is_plain(self.attention_norm, attn.query, attn.key, attn.value, attn.out) and is_plain(
            self.ffn_norm, ffn.fc1, ffn.fc2
        )

    def forward(self, x):
        rates = (self.attn_drop, self.out_drop, self.drop) if self.training else (0.0, 0.0, 0.0)
        attn_drop, out_drop, drop = rates
        if not self.is_fused():
            return self._unfused(x, attn_drop, out_drop, drop)
        p = self.params()
        qkv = project_qkv(x, p)
        probabilities = attention_probabilities(qkv, p) if self.vis else None
        x = attention_branch(x, p, attn_drop=attn_drop, proj_drop=out_drop, qkv=qkv)
        return mlp_branch(x, p, proj_drop=drop), probabilities

    def _unfused(self, x, attn_drop, out_drop, drop):
        attn, ffn = self.attn, self.ffn
        y = self.attention_norm(x)
        q, k, v = attn.query(y), attn.key(y), attn.value(y)
        scale = (q.shape[-1] // attn.num_heads) ** -0.5
        probabilities = None
        if self.vis:
            heads = [t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k)]
            probabilities = torch.softmax(heads[0] @ heads[1].mT * scale, dim=-1)
        y = ops.attention(q, attn.num_heads, scale, k=k, v=v, dropout_p=attn_drop)
        x = x + F.dropout(attn.out(y), out_drop)
        y = F.dropout(activate(ffn.fc1(self.ffn_norm(x)), self.activation), drop)
        return x + F.dropout(ffn.fc2(y), drop), probabilities


class Embeddings(nn.Module):
    """Images [B, in, H, W] → tokens [B, K + N, C], K = 1 with a class token."""

    def __init__(self, hybrid_model, in_chans, dim, patch_size, grid_size, class_token, drop):
        super().__init__()
        self.drop = drop
        self.hybrid = hybrid_model is not None
        if self.hybrid:
            self.hybrid_model = hybrid_model
            in_chans = hybrid_model.out_chans
        self.patch_embeddings = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        tokens = grid_size[0] * grid_size[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens + class_token, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None

    def forward(self, images):
        x = self.hybrid_model(images) if self.hybrid else images
        table, prefix = self.position_embeddings, None
        if self.cls_token is not None:
            prefix, table = self.cls_token + table[:, :1], table[:, 1:]
        conv = self.patch_embeddings
        x = ops.patch_embed(x, conv.weight, conv.bias, table, prefix, conv.stride)
        return F.dropout(x, self.drop, self.training)


class Encoder(nn.Module):
    """Blocks and the last LayerNorm: [B, N, C] → ([B, N, C], list of probabilities)."""

    def __init__(self, dim, depth, **words):
        super().__init__()
        self.layer = nn.ModuleList([Block(dim, **words) for _ in range(depth)])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        maps = []
        for block in self.layer:
            x, probabilities = block(x)
            if probabilities is not None:
                maps.append(probabilities)
        norm = self.encoder_norm
        x = ops.layer_norm(x, norm.weight, norm.bias, norm.eps) if is_plain(norm) else norm(x)
        return x, maps


class Transformer(nn.Module):
    """Embeddings and encoder: images → (normalised tokens, list of probabilities)."""

    def __init__(self, embeddings, encoder):
        super().__init__()
        self.embeddings, self.encoder = embeddings, encoder

    def forward(self, images):
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
        TypeError, ValueError: bad words, configs or images, naming what came and what is wanted.
    """

    google_policy = "R1"

    def __init__(
        self,
        config,
        img_size: int | tuple[int, int] = 224,
        num_classes: int = 21843,
        zero_head: bool = False,
        vis: bool = False,
        *,
        variant: str | None = None,
        hybrid_mode: str | None = None,
        activation: str | None = None,
        in_chans: int = 3,
    ):
        super().__init__()
        if isinstance(config, str):
            config = CONFIGS[_choice("config", config, CONFIGS)]
        google = variant is not None and _choice("variant", variant, MODES) == "google"
        self._follows_weights = variant is None and hybrid_mode is None
        hybrid_mode = _choice("hybrid_mode", hybrid_mode or ("google" if google else "jeonsworld"), MODES)
        activation = _choice("activation", activation or ("gelu_tanh" if google else "gelu"), _ACTIVATIONS)
        self.classifier = _choice("classifier", _read(config, "classifier", "token"), _CLASSIFIERS)
        if self.classifier != "token" and not google:
            raise ValueError(f"{_WHO}: classifier is {self.classifier!r}, expected 'token' (others: variant='google')")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"{_WHO}: num_classes is {num_classes!r}, expected an int of 0 or more")
        self.config, self.num_classes, self.zero_head, self.vis = config, num_classes, zero_head, vis
        self.img_size, self.in_chans = _pair("img_size", img_size), _int("in_chans", in_chans)
        dim = self.embed_dim = _int("hidden_size", _read(config, "hidden_size"))
        heads = _int("transformer.num_heads", _read(config, "transformer.num_heads"))
        if dim % heads:
            raise ValueError(f"{_WHO}: hidden_size is {dim}, expected a multiple of num_heads {heads}")
        attn_drop, drop = (
            _rate(name, _read(config, f"transformer.{name}", 0.0)) for name in ("attention_dropout_rate", "dropout_rate")
        )
        stem = None
        if _read(config, "resnet", None) is not None:
            layers, width = _read(config, "resnet.num_layers"), _read(config, "resnet.width_factor", 1)
            stem = ResNetV2(self.in_chans, layers, width, hybrid_mode)
        self._stem_layers = None if stem is None else stem.num_layers
        self._set_patches(hybrid_mode)
        self.transformer = Transformer(
            Embeddings(
                stem, self.in_chans, dim, self.patch_size, self.grid_size, "token" in self.classifier, drop
            ),
            Encoder(
                dim,
                _int("transformer.num_layers", _read(config, "transformer.num_layers")),
                hidden=_int("transformer.mlp_dim", _read(config, "transformer.mlp_dim")),
                num_heads=heads,
                attn_drop=attn_drop,
                out_drop=drop if google else attn_drop,
                drop=drop,
                activation=activation,
                vis=vis,
            ),
        )
        size = _read(config, "representation_size", None) if google else None
        if size is not None:
            self.pre_logits = nn.Sequential()
            self.pre_logits.fc = nn.Linear(dim, _int("representation_size", size))
        self.head = nn.Linear(size or dim, num_classes) if num_classes else nn.Identity()
        self._init_google() if google else self._init_jeonsworld()
        half = (0.5,) * self.in_chans
        self.default_cfg = dict(
            input_size=(self.in_chans, *self.img_size), mean=half, std=half, num_classes=num_classes
        )

    def _feature_size(self, mode):
        if self._stem_layers is None:
            return self.img_size
        return ResNetV2.feature_size(self.img_size, self._stem_layers, mode)

    def _set_patches(self, mode):
        """patch_size and grid_size from the config and the size of what the patches are cut from."""
        size = self._feature_size(mode)
        grid, patch = (_read(self.config, f"patches.{name}", None) for name in ("grid", "size"))
        if grid is None and patch is None:
            raise ValueError(f"{_WHO}: config.patches has neither size nor grid, expected one")
        if grid is not None:
            patch = tuple(max(1, n // g) for n, g in zip(size, _pair("patches.grid", grid)))
        self.patch_size = _pair("patches.size", patch)
        self.grid_size = tuple(n // p for n, p in zip(size, self.patch_size))
        if not all(self.grid_size):
            raise ValueError(
                f"{_WHO}: img_size is {self.img_size[0]}×{self.img_size[1]} (patches are cut from {size[0]}×{size[1]}), "
                f"expected at least one patch of {self.patch_size[0]}×{self.patch_size[1]}"
            )

    @torch.no_grad()
    def _init_jeonsworld(self):
        for block in self.transformer.encoder.layer:
            for linear in (block.ffn.fc1, block.ffn.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)

    @torch.no_grad()
    def _init_google(self):
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                # LeCun's normal, truncated at two standard deviations.
                std = math.prod(module.weight.shape[1:]) ** -0.5 / 0.87962566103423978
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            gn3 = getattr(module, "gn3", None)
            if gn3 is not None:
                nn.init.zeros_(gn3.weight)
        self._init_jeonsworld()
        for block in self.transformer.encoder.layer:
            for linear in block.attn.children():
                nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.transformer.embeddings.position_embeddings, std=0.02)
        if self.num_classes:
            nn.init.zeros_(self.head.weight)

    @property
    def hybrid_mode(self) -> str | None:
        """Arithmetic of the ResNet; None without one."""
        return self.transformer.embeddings.hybrid_model.mode if self._stem_layers is not None else None

    def set_hybrid_mode(self, mode: str):
        """Switches the arithmetic of the ResNet; the grid of tokens must stay."""
        _choice("hybrid_mode", mode, MODES)
        if self._stem_layers is None:
            raise ValueError(f"{_WHO}: hybrid_mode is {mode!r}, expected a config with a resnet")
        old, new = self._feature_size(self.hybrid_mode), self._feature_size(mode)
        if old != new:
            raise ValueError(
                f"{_WHO}: feature map is {new[0]}×{new[1]} in hybrid_mode {mode!r}, expected {old[0]}×{old[1]}; "
                f"build with hybrid_mode={mode!r}"
            )
        self.transformer.embeddings.hybrid_model.set_mode(mode)

    def google_weights_loaded(self):
        """Called after a Google .npz has been loaded."""
        if self._follows_weights and self._stem_layers is not None:
            self.set_hybrid_mode("google")

    def load_from(self, weights):
        """The original's method: a Google checkpoint, as ``numpy.load`` gives it."""
        load(self, weights)

    def _check_images(self, images):
        if not isinstance(images, torch.Tensor):
            raise TypeError(f"{_WHO}: images are {type(images).__name__}, expected a torch.Tensor")
        wanted = (self.in_chans, *self.img_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"{_WHO}: images have shape {list(images.shape)}, expected [B, {wanted[0]}, {wanted[1]}, {wanted[2]}]"
            )
        if not images.is_floating_point():
            raise ValueError(f"{_WHO}: images have dtype {images.dtype}, expected a floating point dtype")

    def _loss(self, logits, labels):
        rows = logits.reshape(-1, self.num_classes)
        if not isinstance(labels, torch.Tensor):
            raise TypeError(f"{_WHO}: labels are {type(labels).__name__}, expected a torch.Tensor")
        if labels.numel() != rows.shape[0] or labels.is_floating_point():
            raise ValueError(
                f"{_WHO}: labels have shape {list(labels.shape)} and dtype {labels.dtype}, "
                f"expected {rows.shape[0]} integers"
            )
        return F.cross_entropy(rows, labels.reshape(-1).long())

    def forward(self, images, labels=None):
        self._check_images(images)
        x, maps = self.transformer(images)
        if self.classifier == "token":
            x = x[:, 0]
        elif self.classifier == "gap":
            x = x.mean(dim=1)
        if hasattr(self, "pre_logits"):
            x = torch.tanh(self.pre_logits(x))
        logits = self.head(x)
        return (logits, maps) if labels is None else self._loss(logits, labels)


def build(config="ViT-B_16", **words) -> VisionTransformer:
    """``VisionTransformer(config, **words)``; words: img_size, num_classes, zero_head, vis, variant, hybrid_mode,
    activation, in_chans."""
    return VisionTransformer(config, **words)


def load(model: VisionTransformer, source) -> VisionTransformer:
    """Loads jeonsworld's or Google's weights.

    Args:
        source: a path (.pth, .pt, .bin, .safetensors, .npz), a state_dict, or what ``numpy.load`` gives of an .npz.
            A position table of another grid is resized by R1 (bilinear, corners aligned).
    Returns:
        the model.
    Raises:
        WeightsError: unreadable file, missing or unexpected keys, wrong shapes; nothing is changed then. A key that a
            Google checkpoint lacks raises a ``WeightsError`` that is a ``KeyError`` too.
    """
    state = dict(source) if isinstance(source, Mapping) else weights.read_state_dict(source)
    state = weights.unwrap(state)
    key = "transformer.embeddings.position_embeddings"
    if key in state and state[key].shape != model.state_dict()[key].shape:
        prefix = int(model.transformer.embeddings.cls_token is not None)
        try:
            state[key] = resize_pos_embed(state[key], None, model.grid_size, model.google_policy, prefix)
        except ValueError as error:
            raise weights.WeightsError(f"{_WHO}: {key} does not fit: {error}") from error
    return weights.load_state_dict(model, state)


for _name, _words in PRESETS.items():
    register(_name, build=build, **_words)
