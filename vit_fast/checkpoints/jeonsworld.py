"""jeonsworld's ViT-pytorch and its ResNet hybrids.

query, key and value become rows of timm's qkv, and hybrids get the keys of timm's hybrids.
Source: jeonsworld/ViT-pytorch, models/modeling.py and modeling_resnet.py.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .base import Format, Translation
from .errors import WeightsError
from .key_rules import compile_rules, renamed

_LAYER, _STEM = "transformer.encoder.layer.{}", "transformer.embeddings.hybrid_model"
_UNIT, _TIMM_UNIT = f"{_STEM}.body.block{{+}}.unit{{+}}", "patch_embed.backbone.stages.{}.blocks.{}"
_PAIRS = (
    ("transformer.embeddings.position_embeddings", "pos_embed"),
    ("transformer.embeddings.cls_token", "cls_token"),
    ("transformer.embeddings.patch_embeddings.", "patch_embed.proj."),
    ("transformer.encoder.encoder_norm.", "norm."),
    (f"{_LAYER}.attention_norm.", "blocks.{}.norm1."),
    (f"{_LAYER}.ffn_norm.", "blocks.{}.norm2."),
    (f"{_LAYER}.ffn.", "blocks.{}.mlp."),
    (f"{_LAYER}.attn.out.", "blocks.{}.attn.proj."),
    (f"{_STEM}.root.conv.", "patch_embed.backbone.stem.conv."),
    (f"{_STEM}.root.gn.", "patch_embed.backbone.stem.norm."),
    (f"{_STEM}.root.conv.", "patch_embed.backbone.conv."),
    (f"{_STEM}.root.gn.", "patch_embed.backbone.norm."),
    *((f"{_UNIT}.conv{r}.", f"{_TIMM_UNIT}.conv{r}.") for r in (1, 2, 3)),
    *((f"{_UNIT}.gn{r}.", f"{_TIMM_UNIT}.norm{r}.") for r in (1, 2, 3)),
    (f"{_UNIT}.downsample.", f"{_TIMM_UNIT}.downsample.conv."),
    (f"{_UNIT}.gn_proj.", f"{_TIMM_UNIT}.downsample.norm."),
)
_QKV = re.compile(r"transformer\.encoder\.layer\.(\d+)\.attn\.(query|key|value)\.(weight|bias)")
_TO = compile_rules(_PAIRS, reverse=True)


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of jeonsworld's ViT-pytorch."""
    return "transformer.embeddings.patch_embeddings.weight" in state


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys: query, key and value become rows of qkv; hybrids get timm's hybrid keys.

    Raises:
        WeightsError: a query, key or value is missing (named).
    """
    stages = any(key.startswith(f"{_STEM}.body.") for key in state)
    pairs = [pair for pair in _PAIRS if stages == (".stem." in pair[1]) or ".root." not in pair[0]]
    rest = {key: value for key, value in state.items() if not _QKV.match(key)}
    out, log, _ = renamed(rest, compile_rules(pairs))
    packed: dict[str, dict[str, str]] = {}
    for key in state:
        match = _QKV.match(key)
        if match:
            packed.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = key
    for target, names in packed.items():
        missing = [name for name in ("query", "key", "value") if name not in names]
        if missing:
            raise WeightsError(f"vit_fast: {target} lacks {', '.join(missing)}, expected query, key and value")
        sources = tuple(names[name] for name in ("query", "key", "value"))
        out[target] = torch.cat([state[source] for source in sources])
        log.append((sources, target))
    return Translation(out, log)


def from_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """jeonsworld's keys: rows of qkv become query, key and value; pre_logits and head keep their names."""
    rest = {key: value for key, value in state.items() if ".attn.qkv." not in key}
    out, log, _ = renamed(rest, _TO)
    for key, value in state.items():
        if key not in rest:
            layer, kind = key.split(".")[1], key.rsplit(".", 1)[1]
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                target = f"{_LAYER.format(layer)}.attn.{name}.{kind}"
                out[target] = part.contiguous()
                log.append(((key,), target))
    return Translation(out, log)


FORMAT = Format(
    name="jeonsworld",
    recognise=recognise,
    to_timm=to_timm,
    from_timm=from_timm,
    of_model=recognise,
    is_target=True,
    policy="R1",
    facts=dict(eps=1e-6, pre_norm=True, value_skip=False),
)
