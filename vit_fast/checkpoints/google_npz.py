"""Google's .npz checkpoints (JAX) in timm's keys.

Understood: google-research/vision_transformer, old ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
and newer ("_0", "_1", "_0") names, prefix "opt/target/" or none; big_vision, prefix "params/" or "params/img/", the
position table at "pos_embedding", MAP head, and blocks stacked along a leading layer axis; hybrids
("conv_root", "block1/unit1/…").

    conv kernels [kh, kw, in, out] → [out, in, kh, kw]; dense kernels [in, out] → [out, in]
    query, key, value [C, H, D] → rows of qkv [3C, C]; out [H, D, C] → proj [C, C]; biases flattened

Hybrids become timm's hybrid keys (patch_embed.backbone.…).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vit_fast.pos_embed import resize_pos_embed

from . import jeonsworld
from .base import Format, Log, Translation
from .errors import MissingKeyError, WeightsError
from .fitting import FIRST_CONVOLUTIONS, adapt_in_chans
from .report import log_left_out

_PREFIXES = ("", "opt/target/", "params/", "params/img/")
_MARKS = tuple(f"{prefix}{name}" for prefix in _PREFIXES for name in ("embedding/kernel", "Transformer/encoder"))
_OPTIONAL = ("head.", "pre_logits.", "attn_pool.", "cls_token", "pos_embed")  # of timm's keys: a model may be without
_HEADS_IN = re.compile(r"MultiHeadDotProductAttention_\d/(?:query|key|value)/(?:kernel|bias)$")

_Put = Callable[..., None]  # (target, source, ...): writes arrays under timm's keys


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has Google's names."""
    return any(key.startswith(_MARKS) for key in state if isinstance(key, str))


class _Reader:
    """Reads keys under the file's prefix and notes which were used."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        names = ("embedding/kernel", "Transformer/encoder")
        self.prefix = next(p for p in _PREFIXES if any(key.startswith((p + names[0], p + names[1])) for key in state))
        self.state = {key: torch.as_tensor(value) for key, value in state.items() if key.startswith(self.prefix)}
        self.used: set[str] = set()
        self.log: Log = []

    def has(self, start: str) -> bool:
        """Whether a key begins so. Callers then ask for every key of that part, so that a missing one is named."""
        return any(key.startswith(self.prefix + start) for key in self.state)

    def get(self, key: str) -> torch.Tensor:
        key = self.prefix + key
        if key not in self.state:
            raise MissingKeyError(f"vit_fast: Google checkpoint lacks {key!r}")
        self.used.add(key)
        return self.state[key]

    def layers(self) -> tuple[int, bool]:
        """(number of blocks, whether each of their weights is one array with a leading layer axis)."""
        if self.has("Transformer/encoderblock/"):
            return self.get("Transformer/encoderblock/LayerNorm_0/scale").shape[0], True
        pattern = re.compile(re.escape(self.prefix) + r"Transformer/encoderblock_(\d+)/")
        found = [int(match[1]) for match in map(pattern.match, self.state) if match]
        return max(found, default=-1) + 1, False

    def units(self) -> list[tuple[int, int]]:
        """(block, unit) of every unit of a hybrid's ResNet."""
        pattern = re.compile(re.escape(self.prefix) + r"block(\d+)/unit(\d+)/")
        return sorted({(int(match[1]), int(match[2])) for match in map(pattern.match, self.state) if match})


def _dense(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.t()


def _conv(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(3, 2, 0, 1)


def _heads_in(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.reshape(kernel.shape[0], -1).t()


def _heads_out(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.reshape(-1, kernel.shape[-1]).t()


def to_timm(state: Mapping[str, Any]) -> Translation:
    """Google's arrays in timm's keys, as contiguous float32 tensors; "pre_logits" becomes "pre_logits.fc".

    Args:
        state: names to arrays or tensors, as ``numpy.load`` or ``read_state_dict`` give them.
    Raises:
        MissingKeyError: a block or the stem lacks a key (named).
    """
    read = _Reader(state)
    out: dict[str, torch.Tensor] = {}

    def put(
        target: str,
        sources: str | list[str],
        *convert: Callable[[torch.Tensor], torch.Tensor],
        layer: int | None = None,
    ) -> None:
        """target = the sources, converted one by one and stacked along the rows."""
        sources = [sources] if isinstance(sources, str) else sources
        parts = [read.get(source) for source in sources]
        if layer is not None:
            parts = [part[layer] for part in parts]
        for function in convert:
            parts = [function(part) for part in parts]
        out[target] = (torch.cat(parts) if len(parts) > 1 else parts[0]).float().contiguous()
        read.log.append((tuple(read.prefix + source for source in sources), target))

    def norm(target: str, source: str, layer: int | None = None) -> None:
        put(f"{target}.weight", f"{source}/scale", torch.flatten, layer=layer)
        put(f"{target}.bias", f"{source}/bias", torch.flatten, layer=layer)

    def dense(target: str, source: str, layer: int | None = None) -> None:
        put(f"{target}.weight", f"{source}/kernel", _dense, layer=layer)
        put(f"{target}.bias", f"{source}/bias", layer=layer)

    if read.has("conv_root/") or read.has("gn_root/"):
        _stem(read, put, norm)
    if read.get("embedding/kernel").dim() != 4:
        raise WeightsError("vit_fast: Google checkpoint's embedding/kernel is not a convolution, expected 4 dimensions")
    put("patch_embed.proj.weight", "embedding/kernel", _conv)
    put("patch_embed.proj.bias", "embedding/bias")
    if read.has("cls"):
        put("cls_token", "cls")
    table = "pos_embedding" if read.has("pos_embedding") else "Transformer/posembed_input/pos_embedding"
    put("pos_embed", table)
    depth, stacked = read.layers()
    for i in range(depth):
        source = "Transformer/encoderblock" if stacked else f"Transformer/encoderblock_{i}"
        _block(read, put, norm, dense, f"blocks.{i}", source, i if stacked else None)
    norm("norm", "Transformer/encoder_norm")
    if read.has("MAPHead_0/"):
        _map_head(read, put, norm, dense)
    for name, target in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if read.has(f"{name}/"):
            dense(target, name)
    return Translation(out, read.log, [(key, "no place") for key in sorted(set(state) - read.used)])


def num_heads(state: Mapping[str, Any]) -> int | None:
    """The number of heads that the kernels of query, key and value [C, H, D] have; None where there is no such kernel.

    Raises:
        WeightsError: kernels or biases of different numbers.
    """
    heads = {key: value.shape[-2] for key, value in state.items() if _HEADS_IN.search(key) and len(value.shape) > 1}
    if len(set(heads.values())) > 1:
        raise WeightsError(
            f"vit_fast: Google checkpoint has kernels of {sorted(set(heads.values()))} heads, expected one number"
        )
    return next(iter(heads.values()), None)


def _attention(
    put: _Put, target: str, source: str, layer: int | None, projections: Mapping[str, Sequence[str]]
) -> None:
    for key, names in projections.items():
        kernels = [f"{source}/{name}/kernel" for name in names]
        put(f"{target}.{key}.weight", kernels, _heads_in, layer=layer)
        put(f"{target}.{key}.bias", [f"{source}/{name}/bias" for name in names], torch.flatten, layer=layer)
    put(f"{target}.proj.weight", f"{source}/out/kernel", _heads_out, layer=layer)
    put(f"{target}.proj.bias", f"{source}/out/bias", layer=layer)


def _block(read: _Reader, put: _Put, norm: _Put, dense: _Put, target: str, source: str, layer: int | None) -> None:
    old = any(read.has(f"{source}/{part}/") for part in ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3"))
    attention, norm2, mlp = (
        ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
        if old
        else ("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    )
    norm(f"{target}.norm1", f"{source}/LayerNorm_0", layer)
    _attention(put, f"{target}.attn", f"{source}/{attention}", layer, {"qkv": ("query", "key", "value")})
    norm(f"{target}.norm2", f"{source}/{norm2}", layer)
    dense(f"{target}.mlp.fc1", f"{source}/{mlp}/Dense_0", layer)
    dense(f"{target}.mlp.fc2", f"{source}/{mlp}/Dense_1", layer)


def _map_head(read: _Reader, put: _Put, norm: _Put, dense: _Put) -> None:
    """big_vision's attention pooling (SigLIP)."""
    source = "MAPHead_0/MultiHeadDotProductAttention_0"
    put("attn_pool.latent", "MAPHead_0/probe")
    _attention(put, "attn_pool", source, None, {"q": ("query",), "kv": ("key", "value")})
    norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
    dense("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
    dense("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")


def _stem(read: _Reader, put: _Put, norm: _Put) -> None:
    backbone = "patch_embed.backbone"
    units = read.units()
    stem = f"{backbone}.stem" if units else backbone
    put(f"{stem}.conv.weight", "conv_root/kernel", _conv)
    norm(f"{stem}.norm", "gn_root")
    for block, unit in units:
        source, target = f"block{block}/unit{unit}", f"{backbone}.stages.{block - 1}.blocks.{unit - 1}"
        for r in (1, 2, 3):
            put(f"{target}.conv{r}.weight", f"{source}/conv{r}/kernel", _conv)
            norm(f"{target}.norm{r}", f"{source}/gn{r}")
        if read.has(f"{source}/conv_proj/") or read.has(f"{source}/gn_proj/"):
            put(f"{target}.downsample.conv.weight", f"{source}/conv_proj/kernel", _conv)
            norm(f"{target}.downsample.norm", f"{source}/gn_proj")


def _square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _fit_table(state: dict[str, torch.Tensor], num_prefix: int, grid: tuple[int, int], policy: str) -> None:
    """pos_embed of a state in timm's keys for a grid, in place; num_prefix rows stand for prefix tokens.

    A class row that the model has no place for is added to the class token, one that the file lacks is a row of zeros:
    both leave the result as it was. Google's grids are square; others are taken as the model's where the count fits.
    """
    table = state["pos_embed"]
    if table.dim() == 2:
        table = table[None]
    rows, count = table.shape[1], grid[0] * grid[1]
    owns = [own for own in (num_prefix, 1, 0) if _square(rows - own)]
    if rows - num_prefix == count and not _square(count):
        own, old_grid = num_prefix, grid
    elif owns:
        own, old_grid = owns[0], None
    else:
        raise WeightsError(
            f"vit_fast: position table of the Google checkpoint has {rows} rows, "
            f"expected a square grid or {grid[0]}×{grid[1]}, with or without a class row"
        )
    if own < num_prefix:
        zeros = torch.zeros_like(table[:, :1]).expand(-1, num_prefix - own, -1)
        table = torch.cat([table[:, :own], zeros, table[:, own:]], dim=1)
    elif own > num_prefix:
        if "cls_token" in state:
            state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, own:]
    state["pos_embed"] = resize_pos_embed(table, old_grid, grid, policy, num_prefix)


def for_model(model: Any, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Google's arrays in a model's own keys, fitted to its image size and channels.

    The model has timm's or jeonsworld's keys; its position table is resized by ``model.google_policy`` (default "R2",
    as timm's loader). What the model was built without (a head, pre_logits, a class token) is left out with one logged
    warning; a head is zeroed where ``model.zero_head`` is set. ``model.check_google_weights()``, where there is such a
    method, may refuse.

    Raises:
        MissingKeyError, WeightsError: a key is missing, or the model is of another family.
    """
    own = {key: value.to("meta") for key, value in model.state_dict().items()}
    foreign = jeonsworld.recognise(own)
    own = jeonsworld.to_timm(own).state if foreign else own
    if "patch_embed.proj.weight" not in own:
        raise WeightsError(
            f"vit_fast: {type(model).__name__} takes no Google checkpoint, expected a model in timm's keys or hybrid"
        )
    if hasattr(model, "check_google_weights"):
        model.check_google_weights()
    heads = num_heads(state)
    for name, module in model.named_modules():
        own_heads = getattr(module, "num_heads", heads)
        if own_heads != heads:
            raise WeightsError(
                f"vit_fast: Google checkpoint has kernels of {heads} heads, expected {own_heads} "
                f"(num_heads of {type(model).__name__}'s {name})"
            )
    out = to_timm(state).state
    for key in FIRST_CONVOLUTIONS:
        if key in out and key in own:
            out[key] = adapt_in_chans(out[key], own[key].shape[1])
            break
    if "pos_embed" in own:
        holder = model if hasattr(model, "grid_size") else model.patch_embed
        num_prefix = own["pos_embed"].shape[1] - holder.grid_size[0] * holder.grid_size[1]
        _fit_table(out, num_prefix, tuple(holder.grid_size), getattr(model, "google_policy", "R2"))
    dropped = [key for key in out if key not in own and key.startswith(_OPTIONAL)]
    for part in _OPTIONAL:
        if any(key.startswith(part) for key in own):
            dropped = [key for key in dropped if not key.startswith(part)]
    log_left_out(
        f"Google checkpoint for {type(model).__name__}", [(key, "the model has no place for it") for key in dropped]
    )
    out = {key: value for key, value in out.items() if key not in dropped}
    if getattr(model, "zero_head", False):
        out |= {key: torch.zeros(own[key].shape) for key in ("head.weight", "head.bias") if key in own}
    return jeonsworld.from_timm(out).state if foreign else out


def loaded(model: Any) -> None:
    """Tells a model, where it has a method ``google_weights_loaded``, that it now holds Google's weights."""
    if hasattr(model, "google_weights_loaded"):
        model.google_weights_loaded()


def read_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """The number of heads, which no other format's files tell."""
    return {"num_heads": num_heads(state)}


FORMAT = Format(
    name="google",
    recognise=recognise,
    to_timm=to_timm,
    policy="R2",
    facts=dict(eps=1e-6, activation="gelu_tanh", pre_norm=True, value_skip=False),
    read_facts=read_facts,
    always_recognised=True,
    optional=_OPTIONAL,
    for_model=for_model,
    loaded=loaded,
)
