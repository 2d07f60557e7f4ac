"""Hugging Face transformers: ViT, DeiT, ViT-MAE, DINOv2 (with and without registers), CLIP's and SigLIP's image towers.

The keys of saved files ("encoder.layer.0.attention.attention.query") and those of modules of version 5
("layers.0.attention.q_proj") are both understood. Three projections become rows of qkv, a gate and an up projection
rows of fc1, the visual projection a head with a bias of zeros.
Source: transformers/models/{vit,deit,vit_mae,dinov2,dinov2_with_registers,clip,siglip}/modeling_*.py.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .base import Format, Log, Translation
from .dinov2 import MASK, fold_class_row
from .errors import WeightsError
from .key_rules import compile_rules, rename
from .mae import DECODER

_PATCHES = re.compile(r"(.*)embeddings\.(patch_embeddings\.projection|patch_embedding)\.weight$")
_LAYERS = ("encoder.layer.{}", "encoder.layers.{}", "layers.{}")
_RULES = compile_rules(
    (
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.distillation_token", "dist_token"),
        ("embeddings.register_tokens", "reg_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.position_embedding.weight", "pos_embed"),
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("pre_layrnorm.", "norm_pre."),
        ("layernorm.", "norm."),
        ("post_layernorm.", "norm."),
        ("head.probe", "attn_pool.latent"),
        ("head.attention.out_proj.", "attn_pool.proj."),
        ("head.layernorm.", "attn_pool.norm."),
        ("head.mlp.", "attn_pool.mlp."),
        *(
            (f"{layer}.{theirs}", f"blocks.{{}}.{ours}")
            for layer in _LAYERS
            for theirs, ours in (
                ("layernorm_before.", "norm1."),
                ("norm1.", "norm1."),
                ("layer_norm1.", "norm1."),
                ("attention.output.dense.", "attn.proj."),
                ("attention.o_proj.", "attn.proj."),
                ("self_attn.out_proj.", "attn.proj."),
                ("layer_scale1.lambda1", "ls1.gamma"),
                ("layernorm_after.", "norm2."),
                ("norm2.", "norm2."),
                ("layer_norm2.", "norm2."),
                ("intermediate.dense.", "mlp.fc1."),
                ("mlp.fc1.", "mlp.fc1."),
                ("mlp.weights_in.", "mlp.fc1."),
                ("output.dense.", "mlp.fc2."),
                ("mlp.fc2.", "mlp.fc2."),
                ("mlp.weights_out.", "mlp.fc2."),
                ("mlp.down_proj.", "mlp.fc2."),
                ("layer_scale2.lambda1", "ls2.gamma"),
            )
        ),
    )
)
_OUTSIDE = compile_rules(
    (
        ("classifier.", "head."),
        ("cls_classifier.", "head."),
        ("distillation_classifier.", "head_dist."),
        ("visual_projection.weight", "head.weight"),
    )
)
# Projections that become rows of one, in this order.
_ROWS = {"query": 0, "q_proj": 0, "key": 1, "k_proj": 1, "value": 2, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
_PARTS = re.compile(
    r"(?:encoder\.)?layers?\.(\d+)\.(?:attention\.|self_attn\.|mlp\.)+"
    r"(query|key|value|q_proj|k_proj|v_proj|gate_proj|up_proj)\.(weight|bias)$"
)
_DROPPED = (
    (r"text_model\.|text_projection\.|logit_scale$|logit_bias$", "the text tower"),
    (r"(.*\.)?embeddings\.mask_token$", MASK),
    (r"(.*\.)?embeddings\.position_ids$", "row numbers, no weights"),
    (r"(.*\.)?pooler\.", "the pooler, which timm's ViTs have not"),
    (r"decoder\.", DECODER),
)


def _prefix(state: Iterable[str]) -> str | None:
    """What stands before the image tower's keys, or None where there is no such tower."""
    return next((match[1] for match in map(_PATCHES.match, state) if match), None)


def recognise(state: Mapping[str, Any]) -> bool:
    """Whether a mapping has the keys of transformers' ViTs."""
    return _prefix(state) is not None


def to_timm(state: Mapping[str, torch.Tensor]) -> Translation:
    """Timm's keys of the image tower; text tower, pooler, decoder and mask token are left out.

    Raises:
        WeightsError: a query, key, value, gate or up projection is missing (named).
    """
    prefix = _prefix(state)
    assert prefix is not None  # recognise
    out: dict[str, torch.Tensor] = {}
    log: Log = []
    dropped = []
    packed: dict[str, dict[int, str]] = {}  # target → the keys of its rows
    width = next(value.shape[0] for key, value in state.items() if _PATCHES.match(key))
    doubled = "classifier.weight" in state and state["classifier.weight"].shape[-1] == 2 * width
    for key, value in state.items():
        tower = key.removeprefix(prefix) if key.startswith(prefix) else ""
        why = next((why for pattern, why in _DROPPED if re.match(pattern, key)), None)
        if doubled and key.startswith("classifier."):
            why = "it classifies the class token beside the mean of the patch tokens"
        if why:
            dropped.append((key, why))
        elif match := _PARTS.match(tower):
            layer = "mlp.fc1" if match[2] in ("gate_proj", "up_proj") else "attn.qkv"
            packed.setdefault(f"blocks.{match[1]}.{layer}.{match[3]}", {})[_ROWS[match[2]]] = key
        elif tower in ("head.attention.in_proj_weight", "head.attention.in_proj_bias"):
            kind = tower.rsplit("_", 1)[1]
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = value.split((width, 2 * width))
            log += [((key,), f"attn_pool.{name}.{kind}") for name in ("q", "kv")]
        else:
            target = rename(tower, _RULES) or rename(key, _OUTSIDE) or key
            tokens = target in ("cls_token", "pos_embed")
            out[target] = value.reshape(1, -1, value.shape[-1]) if tokens else value
            log.append(((key,), target))
    for target, parts in packed.items():
        wanted = 2 if ".fc1." in target else 3
        if len(parts) != wanted:
            raise WeightsError(
                f"vit_fast: {target} has {', '.join(parts[row] for row in sorted(parts))} alone, "
                f"expected {'gate and up' if wanted == 2 else 'query, key and value'} projections"
            )
        sources = tuple(parts[row] for row in range(wanted))
        out[target] = torch.cat([state[source] for source in sources])
        log.append((sources, target))
    if "visual_projection.weight" in state:
        out["head.bias"] = out["head.weight"].new_zeros(out["head.weight"].shape[0])
        log.append(((), "head.bias"))
    fold_class_row(out, log)
    return Translation(out, log, dropped)


FORMAT = Format(
    name="huggingface",
    recognise=recognise,
    to_timm=to_timm,
    facts=dict(pre_norm=True, value_skip=False),
    always_recognised=True,
)
