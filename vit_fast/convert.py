"""Checkpoints of one program in the keys of another, with a report of every key.

Read: timm (and DeiT, T2T-ViT, which share its block names), OpenAI CLIP / open_clip / CLIP-ReID image towers,
jeonsworld's ViT-pytorch with its hybrids, Google's .npz, LANL's ViTs, stacks of torch's TransformerEncoderLayer, and
"canonical". Written: "timm", "canonical", "jeonsworld".

canonical keys are timm's with the block spelled ln1, qkv, out, ln2, fc1, fc2, gamma1, gamma2, straight under
``blocks.<i>.``. They hold any family's block; what the block does with them (eps, activation, pre-norm, value skip)
stands in the file's metadata. timm's keys are refused to families whose block timm has not (post-norm, value skip).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .pos_embed import resize_pos_embed
from .weights import WeightsError, read_state_dict, unwrap

TARGETS = ("timm", "canonical", "jeonsworld")

# What a family's block does, as far as the family decides it, and the policy that resizes its position table.
FAMILIES = {
    "timm": dict(eps=1e-6, activation="gelu", pre_norm=True, value_skip=False, policy="R5"),
    "canonical": dict(eps=1e-6, activation="gelu", pre_norm=True, value_skip=False, policy="R5"),
    "clip": dict(eps=1e-5, activation="quick_gelu", pre_norm=True, value_skip=False, policy="R5"),
    "jeonsworld": dict(eps=1e-6, activation="gelu", pre_norm=True, value_skip=False, policy="R1"),
    "google": dict(eps=1e-6, activation="gelu_tanh", pre_norm=True, value_skip=False, policy="R2"),
    "lanl": dict(eps=1e-5, activation="gelu", pre_norm=True, value_skip=True, policy="R4"),
    "torch": dict(eps=1e-5, activation="relu", pre_norm=False, value_skip=False, policy="R4"),
}


@dataclass(frozen=True)
class Entry:
    """What became of a key. action: "kept", "mapped", "resized", "dropped" or "added"."""

    action: str
    sources: tuple[str, ...]
    target: str
    note: str = ""


class Report(list):
    """Entries in the order of the written file, dropped keys last; its text is a table with a summary."""

    def count(self, action: str) -> int:
        """Entries of an action."""
        return sum(entry.action == action for entry in self)

    def __str__(self):
        lines = []
        for entry in self:
            source, arrow = " + ".join(entry.sources), " → " if entry.sources and entry.target else ""
            text = source if entry.action == "kept" else source + arrow + entry.target
            lines.append(f"{entry.action:<8} {text}{f'  ({entry.note})' if entry.note else ''}")
        actions = ("kept", "mapped", "resized", "added", "dropped")
        lines.append(", ".join(f"{self.count(action)} {action}" for action in actions))
        return "\n".join(lines)


def _compiled(rules):
    return [(re.compile(pattern), target) for pattern, target in rules]


_CLIP = _compiled(
    [
        (r"conv1\.weight$", "patch_embed.proj.weight"),
        (r"class_embedding$", "cls_token"),
        (r"positional_embedding$", "pos_embed"),
        (r"proj$", "head.weight"),
        (r"ln_pre\.", "norm_pre."),
        (r"ln_post\.", "norm."),
        (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
        (r"transformer\.resblocks\.(\d+)\.ls_([12])\.", r"blocks.\1.ls\2."),
        (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
        (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
        (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
        (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
    ]
)
_TORCH = _compiled(
    [
        (r"(?:transformer_encoder\.layers|blocks)\.(\d+)\.self_attn\.in_proj_", r"blocks.\1.attn.qkv."),
        (r"(?:transformer_encoder\.layers|blocks)\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
        (r"(?:transformer_encoder\.layers|blocks)\.(\d+)\.linear([12])\.", r"blocks.\1.mlp.fc\2."),
        (r"transformer_encoder\.layers\.(\d+)\.norm([12])\.", r"blocks.\1.norm\2."),
        (r"cls_token_embedding$", "cls_token"),
        (r"position_embedding_table$", "pos_embed"),
        (r"linear_layer\.", "head."),
        (r"patch_embed\.(weight|bias)$", r"patch_embed.proj.\1"),
        (r"pre_logits\.0\.", "pre_logits.fc."),
    ]
)
_LANL = _compiled(
    [
        (r"(?:vit_)?backbone\.blocks\.(\d+)\.neuralnet\.", r"blocks.\1.mlp."),
        (r"(?:vit_)?backbone\.", ""),
    ]
)
_CANONICAL = _compiled(
    [
        (r"blocks\.(\d+)\.norm([12])\.", r"blocks.\1.ln\2."),
        (r"blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.qkv."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"blocks.\1.out."),
        (r"blocks\.(\d+)\.mlp\.fc([12])\.", r"blocks.\1.fc\2."),
        (r"blocks\.(\d+)\.ls([12])\.gamma$", r"blocks.\1.gamma\2"),
    ]
)
_FROM_CANONICAL = _compiled(
    [
        (r"blocks\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
        (r"blocks\.(\d+)\.qkv\.", r"blocks.\1.attn.qkv."),
        (r"blocks\.(\d+)\.out\.", r"blocks.\1.attn.proj."),
        (r"blocks\.(\d+)\.fc([12])\.", r"blocks.\1.mlp.fc\2."),
        (r"blocks\.(\d+)\.gamma([12])$", r"blocks.\1.ls\2.gamma"),
    ]
)
_STEM = r"transformer\.embeddings\.hybrid_model"
_JEONSWORLD = _compiled(
    [
        (r"transformer\.embeddings\.position_embeddings$", "pos_embed"),
        (r"transformer\.embeddings\.cls_token$", "cls_token"),
        (r"transformer\.embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"transformer\.encoder\.encoder_norm\.", "norm."),
        (r"transformer\.encoder\.layer\.(\d+)\.attention_norm\.", r"blocks.\1.norm1."),
        (r"transformer\.encoder\.layer\.(\d+)\.ffn_norm\.", r"blocks.\1.norm2."),
        (r"transformer\.encoder\.layer\.(\d+)\.ffn\.", r"blocks.\1.mlp."),
        (r"transformer\.encoder\.layer\.(\d+)\.attn\.out\.", r"blocks.\1.attn.proj."),
        (_STEM + r"\.root\.conv\.", "patch_embed.backbone.stem.conv."),
        (_STEM + r"\.root\.gn\.", "patch_embed.backbone.stem.norm."),
        (_STEM + r"\.body\.block(\d+)\.unit(\d+)\.", lambda m: _unit(m)),
    ]
)
_FROM_JEONSWORLD_UNIT = {"downsample.": "downsample.conv.", "gn_proj.": "downsample.norm.", "gn": "norm"}
_TO_JEONSWORLD = _compiled(
    [
        (r"pos_embed$", "transformer.embeddings.position_embeddings"),
        (r"cls_token$", "transformer.embeddings.cls_token"),
        (r"patch_embed\.proj\.", "transformer.embeddings.patch_embeddings."),
        (r"norm\.", "transformer.encoder.encoder_norm."),
        (r"blocks\.(\d+)\.norm1\.", r"transformer.encoder.layer.\1.attention_norm."),
        (r"blocks\.(\d+)\.norm2\.", r"transformer.encoder.layer.\1.ffn_norm."),
        (r"blocks\.(\d+)\.mlp\.", r"transformer.encoder.layer.\1.ffn."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"transformer.encoder.layer.\1.attn.out."),
    ]
)
