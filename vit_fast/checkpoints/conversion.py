"""Checkpoints of one program in the keys of another, with a report of every key.

Read: timm (and DeiT, T2T-ViT, which share its block names), OpenAI CLIP / open_clip / CLIP-ReID image towers,
Hugging Face's ViTs, DINOv2's and MAE's own files, jeonsworld's ViT-pytorch with its hybrids, Google's .npz, LANL's
ViTs, stacks of torch's TransformerEncoderLayer, and "canonical". Written: "timm", "canonical", "jeonsworld".

canonical keys are timm's with the block spelled ln1, qkv, out, ln2, fc1, fc2, gamma1, gamma2, straight under
``blocks.<i>.``. They hold any family's block. What the block does with them (eps, activation, pre-norm, value skip)
stands in the file's metadata as far as the source tells: names of keys tell neither an activation nor an eps. timm's
keys are refused to families whose block timm has not (post-norm, value skip).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vit_fast.pos_embed import check_policy

from . import dinov2, huggingface, mae
from .files import WeightsError, log_left_out, prefix_remedy, read_state_dict, resized_table
from .key_rules import compile_rules, rename, renamed

TARGETS = ("timm", "canonical", "jeonsworld")

# Families that differ from timm's names in few keys, which a file may lack.
_TIMMS_NAMES = {"timm", "dinov2", "mae"}

# What every block of a family does, whatever the words that its program was given; a word that is not here may vary.
FAMILIES = {
    "timm": {},
    "canonical": {},
    "clip": dict(pre_norm=True, value_skip=False),
    "huggingface": dict(pre_norm=True, value_skip=False),
    "dinov2": dict(eps=1e-6, pre_norm=True, value_skip=False),
    "mae": dict(pre_norm=True, value_skip=False),
    "jeonsworld": dict(eps=1e-6, pre_norm=True, value_skip=False),
    "google": dict(eps=1e-6, activation="gelu_tanh", pre_norm=True, value_skip=False),
    "lanl": dict(pre_norm=True, value_skip=True),
    "torch": dict(value_skip=False),
}
# The policy that resizes a family's position table.
_POLICIES = dict.fromkeys(FAMILIES, "R5") | {"jeonsworld": "R1", "google": "R2", "lanl": "R4", "torch": "R4"}

# (the family's key, timm's key), as ``checkpoints.key_rules`` describes them.
_CLIP = (
    ("conv1.weight", "patch_embed.proj.weight"),
    ("class_embedding", "cls_token"),
    ("positional_embedding", "pos_embed"),
    ("proj", "head.weight"),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.{}.ln_1.", "blocks.{}.norm1."),
    ("transformer.resblocks.{}.ln_2.", "blocks.{}.norm2."),
    ("transformer.resblocks.{}.ls_1.gamma", "blocks.{}.ls1.gamma"),
    ("transformer.resblocks.{}.ls_2.gamma", "blocks.{}.ls2.gamma"),
    ("transformer.resblocks.{}.attn.in_proj_weight", "blocks.{}.attn.qkv.weight"),
    ("transformer.resblocks.{}.attn.in_proj_bias", "blocks.{}.attn.qkv.bias"),
    ("transformer.resblocks.{}.attn.out_proj.", "blocks.{}.attn.proj."),
    ("transformer.resblocks.{}.mlp.c_fc.", "blocks.{}.mlp.fc1."),
    ("transformer.resblocks.{}.mlp.c_proj.", "blocks.{}.mlp.fc2."),
)
_TOWERS = ("visual.", "image_encoder.", "")
CLIP_SCALARS = ("input_resolution", "context_length", "vocab_size")  # buffers of OpenAI's archives
_CANONICAL = (
    ("blocks.{}.ln1.", "blocks.{}.norm1."),
    ("blocks.{}.qkv.", "blocks.{}.attn.qkv."),
    ("blocks.{}.out.", "blocks.{}.attn.proj."),
    ("blocks.{}.ln2.", "blocks.{}.norm2."),
    ("blocks.{}.fc1.", "blocks.{}.mlp.fc1."),
    ("blocks.{}.fc2.", "blocks.{}.mlp.fc2."),
    ("blocks.{}.gamma1", "blocks.{}.ls1.gamma"),
    ("blocks.{}.gamma2", "blocks.{}.ls2.gamma"),
)
_LANL = (
    ("backbone.blocks.{}.neuralnet.", "blocks.{}.mlp."),
    ("vit_backbone.blocks.{}.neuralnet.", "blocks.{}.mlp."),
    ("backbone.", ""),
    ("vit_backbone.", ""),
)
_TORCH = (
    *(
        (f"{stack}.{{}}.{theirs}", f"blocks.{{}}.{ours}")
        for stack in ("transformer_encoder.layers", "blocks")
        for theirs, ours in (
            ("self_attn.in_proj_weight", "attn.qkv.weight"),
            ("self_attn.in_proj_bias", "attn.qkv.bias"),
            ("self_attn.out_proj.", "attn.proj."),
            ("linear1.", "mlp.fc1."),
            ("linear2.", "mlp.fc2."),
            ("norm1.", "norm1."),
            ("norm2.", "norm2."),
        )
    ),
    ("cls_token_embedding", "cls_token"),
    ("position_embedding_table", "pos_embed"),
    ("linear_layer.", "head."),
    ("patch_embed.weight", "patch_embed.proj.weight"),
    ("patch_embed.bias", "patch_embed.proj.bias"),
    ("pre_logits.0.", "pre_logits.fc."),
)
_LAYER, _STEM = "transformer.encoder.layer.{}", "transformer.embeddings.hybrid_model"
_UNIT, _TIMM_UNIT = f"{_STEM}.body.block{{+}}.unit{{+}}", "patch_embed.backbone.stages.{}.blocks.{}"
_JEONSWORLD = (
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
            text = source if entry.sources == (entry.target,) else source + arrow + entry.target
            lines.append(f"{entry.action:<8} {text}{f'  ({entry.note})' if entry.note else ''}")
        actions = ("kept", "mapped", "resized", "added", "dropped")
        lines.append(", ".join(f"{self.count(action)} {action}" for action in actions))
        return "\n".join(lines)


def is_jeonsworld(state) -> bool:
    """Whether a mapping has the names of jeonsworld's ViT-pytorch."""
    return "transformer.embeddings.patch_embeddings.weight" in state


def is_canonical(state) -> bool:
    """Whether a mapping has canonical names."""
    return "blocks.0.ln1.weight" in state and "blocks.0.qkv.weight" in state


def is_clip(state) -> bool:
    """Whether a mapping has the names of a CLIP's image tower, alone or in a whole CLIP."""
    return any(f"{prefix}conv1.weight" in state and f"{prefix}class_embedding" in state for prefix in _TOWERS)


def jeonsworld_to_timm(state):
    """(state, log, dropped): query, key and value become rows of qkv; hybrids get timm's hybrid keys."""
    stages = any(key.startswith(f"{_STEM}.body.") for key in state)
    pairs = [pair for pair in _JEONSWORLD if stages == (".stem." in pair[1]) or ".root." not in pair[0]]
    rest = {key: value for key, value in state.items() if not _QKV.match(key)}
    out, log = renamed(rest, compile_rules(pairs))
    packed = {}
    for key in state:
        match = _QKV.match(key)
        if match:
            packed.setdefault(f"blocks.{match[1]}.attn.qkv.{match[3]}", {})[match[2]] = key
    for target, names in packed.items():
        missing = [name for name in ("query", "key", "value") if name not in names]
        if missing:
            raise WeightsError(f"vit_fast.convert: {target} lacks {', '.join(missing)}, expected query, key and value")
        sources = tuple(names[name] for name in ("query", "key", "value"))
        out[target] = torch.cat([state[source] for source in sources])
        log.append((sources, target))
    return out, log, []


def timm_to_jeonsworld(state):
    """(state, log): rows of qkv become query, key and value; pre_logits and head keep their names."""
    rest = {key: value for key, value in state.items() if ".attn.qkv." not in key}
    out, log = renamed(rest, compile_rules(_JEONSWORLD, reverse=True))
    for key, value in state.items():
        if key not in rest:
            layer, kind = key.split(".")[1], key.rsplit(".", 1)[1]
            for name, part in zip(("query", "key", "value"), value.chunk(3)):
                target = f"{_LAYER.format(layer)}.attn.{name}.{kind}"
                out[target] = part.contiguous()
                log.append(((key,), target))
    return out, log


def canonical_to_timm(state):
    """(state, log, dropped)."""
    return *renamed(state, compile_rules(_CANONICAL)), []


def timm_to_canonical(state):
    """(state, log)."""
    return renamed(state, compile_rules(_CANONICAL, reverse=True))


def _clip_to_timm(state):
    """(state, log, dropped): the image tower alone; the projection becomes the head's weight with a bias of zeros."""
    prefix = next(prefix for prefix in _TOWERS if f"{prefix}conv1.weight" in state)
    rules = compile_rules(_CLIP)
    out, log, dropped = {}, [], []
    for key, value in state.items():
        if not key.startswith(prefix) or key in CLIP_SCALARS:
            dropped.append((key, "not of the image tower"))
            continue
        name = key.removeprefix(prefix)
        new = rename(name, rules) or name
        if name == "proj":
            value = value.t().contiguous()
        elif new in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        out[new] = value
        log.append(((key,), new))
    if "head.weight" in out:
        out["head.bias"] = out["head.weight"].new_zeros(out["head.weight"].shape[0])
        log.append(((), "head.bias"))
    return out, log, dropped


def _timm_to_clip(state):
    """(state, log): the head's weight becomes the projection, which has no bias: one of zeros is left out."""
    out, log = {}, []
    rules = compile_rules(_CLIP, reverse=True)
    for key, value in state.items():
        if key == "head.bias" and not value.any():
            continue
        new = rename(key, rules) or key
        if key == "head.weight":
            value = value.t().contiguous()
        elif key in ("cls_token", "pos_embed"):
            value = value[0, 0] if key == "cls_token" else value[0]
        out[new] = value
        log.append(((key,), new))
    return out, log


def _torch_to_timm(state):
    out, log = renamed(state, compile_rules(_TORCH))
    if out.get("pos_embed", torch.empty(1, 1, 1)).dim() == 2:
        out["pos_embed"] = out["pos_embed"][None]
    return out, log, []


def _google_to_timm(state):
    from .google_npz import to_timm

    return to_timm(state)


def _as_it_is(state):
    return state, [((key,), key) for key in state]


_READ = {
    "timm": lambda state: (*_as_it_is(dict(state)), []),
    "canonical": canonical_to_timm,
    "clip": _clip_to_timm,
    "huggingface": huggingface.to_timm,
    "dinov2": dinov2.to_timm,
    "mae": mae.to_timm,
    "jeonsworld": jeonsworld_to_timm,
    "google": _google_to_timm,
    "lanl": lambda state: (*renamed(state, compile_rules(_LANL)), []),
    "torch": _torch_to_timm,
}
_OPTIONAL = ("head.", "head_dist.", "pre_logits.", "attn_pool.", "proj")  # what a model may be built without
_WRITE = {
    "timm": _as_it_is,
    "canonical": timm_to_canonical,
    "jeonsworld": timm_to_jeonsworld,
}
# The names that a model may have, its own first: how timm's keys become them.
_MODELS = (
    (is_jeonsworld, "jeonsworld", timm_to_jeonsworld),
    (lambda own: "class_embedding" in own, "clip", _timm_to_clip),
    (lambda own: "blocks.0.attn.qkv.weight" in own, "timm", _as_it_is),
)


def _recognised(state):
    """The family whose names a state_dict has, or None."""
    from .google_npz import is_google

    if is_google(state):
        return "google"
    if is_jeonsworld(state):
        return "jeonsworld"
    if is_canonical(state):
        return "canonical"
    if is_clip(state):
        return "clip"
    if huggingface.is_huggingface(state):
        return "huggingface"
    if mae.is_mae(state):
        return "mae"
    if dinov2.is_dinov2(state):
        return "dinov2"
    for key in state:
        if re.match(r"(vit_)?backbone\.blocks\.\d+\.neuralnet\.", key):
            return "lanl"
        if re.match(r"(transformer_encoder\.layers|blocks)\.\d+\.self_attn\.in_proj_weight$", key):
            return "torch"
        if re.match(r"blocks\.\d+\.attn\.qkv\.weight$", key):
            return "timm"
    return None


def _prefix_hint(state):
    """``prefix_remedy`` where keys of a known family stand under a prefix of at most three names."""
    parts = [key.split(".") for key in state]
    for count in (1, 2, 3):
        for prefix in dict.fromkeys(".".join(names[:count]) + "." for names in parts if len(names) > count):
            if _recognised({key.removeprefix(prefix): None for key in state if key.startswith(prefix)}):
                return prefix_remedy(prefix)
    return ""


def family_of(state) -> str:
    """The family whose names a state_dict has.

    Raises:
        WeightsError: none of them.
    """
    family = _recognised(state)
    if family is None:
        raise WeightsError(
            f"vit_fast.convert: keys such as {', '.join(sorted(state)[:4])} belong to no known family, "
            f"expected one of {', '.join(FAMILIES)}{_prefix_hint(state)}"
        )
    return family


def _check_family(given, state):
    """The family of a state_dict: the given one, which its keys must not contradict."""
    if given is None:
        return family_of(state)
    if given not in FAMILIES:
        raise ValueError(f"vit_fast.convert: family is {given!r}, expected one of {', '.join(FAMILIES)}")
    known = _recognised(state)
    if known is None and given in ("clip", "huggingface", "google"):  # which begin with a key that tells them
        return family_of(state)
    if known not in (None, given) and not {known, given} <= _TIMMS_NAMES:
        raise ValueError(f"vit_fast.convert: family is {given!r}, expected {known!r}, whose keys these are")
    return given


def _joined(first, second):
    """The log of two conversions, one after the other."""
    origin = {target: sources for sources, target in first}
    return [(tuple(name for source in sources for name in origin[source]), target) for sources, target in second]


def _fit_table(state, grid, old_grid, policy):
    """Resizes pos_embed in place; returns a note, or None where nothing changed."""
    table = state.get("pos_embed")
    if table is None or table.dim() != 3:
        raise WeightsError("vit_fast.convert: grid is given, expected a checkpoint with a table pos_embed [1, N, C]")
    prefix = sum(state[name].shape[-2] for name in ("cls_token", "dist_token", "reg_token") if name in state)
    rows, fits, problem = table.shape[1], [], None
    for count in dict.fromkeys((prefix, 0)):
        try:
            fits.append(resized_table("vit_fast.convert: pos_embed", table, old_grid, grid, policy, count))
        except WeightsError as error:
            problem = problem or error
    if not fits:
        raise problem
    if len(fits) == 2:
        raise WeightsError(
            f"vit_fast.convert: old_grid is None, expected rows and columns: the {rows} rows of pos_embed are a square "
            f"with {prefix} prefix rows and without"
        )
    state["pos_embed"] = fits[0]
    return None if fits[0] is table else f"{rows} → {fits[0].shape[1]} rows, {policy}"


def _fit_patches(state, patch_size):
    """Gives old patch weights [C, in_chans·P·P] their axes, in place; returns a note, or None where nothing changed."""
    old = state.get("patch_embed.proj.weight")
    if old is None or old.dim() != 2:
        return None
    columns = old.shape[1]
    if patch_size is None or columns % patch_size**2:
        raise WeightsError(
            f"vit_fast.convert: patch_size is {patch_size}, expected the side of the patches: "
            f"patch_embed.proj.weight has {columns} columns, in_chans · patch_size²"
        )
    channels = columns // patch_size**2
    state["patch_embed.proj.weight"] = old.reshape(old.shape[0], channels, patch_size, patch_size)
    return f"{columns} columns → {channels}×{patch_size}×{patch_size}"


def _fit_channels(state, in_chans):
    from .google_npz import adapt_in_chans

    for key in ("patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight", "patch_embed.proj.weight"):
        if key in state:
            have = state[key].shape[1]
            state[key] = adapt_in_chans(state[key], in_chans)
            return key, None if have == in_chans else f"{have} → {in_chans} channels"
    raise WeightsError("vit_fast.convert: in_chans is given, expected a checkpoint with a first convolution")


def convert_state_dict(
    state: Mapping,
    to: str = "timm",
    *,
    family: str | None = None,
    grid: tuple[int, int] | None = None,
    old_grid: tuple[int, int] | None = None,
    policy: str | None = None,
    patch_size: int | None = None,
    in_chans: int | None = None,
    drop_head: bool = False,
) -> tuple[dict[str, torch.Tensor], Report]:
    """A state_dict in other keys.

    Args:
        state: names to tensors or arrays, of any family that the head of this file names.
        to: "timm", "canonical" or "jeonsworld".
        family: the family of ``state``; None recognises it by its keys.
        grid, old_grid, policy: the position table is resized to ``grid`` (rows, columns) by ``policy`` (the family's
            own where None); ``old_grid`` None takes a square.
        patch_size: side of the patches, which old files tell not: their patch weights are a matrix.
        in_chans: channels of the first convolution: summed for one, tiled otherwise.
        drop_head: leaves out head, head_dist and pre_logits.
    Returns:
        (state_dict, report).
    Raises:
        ValueError: unknown words, a family that the keys contradict, or timm's keys asked for a family whose block
            timm has not.
        WeightsError: keys of no known family, or missing ones.
    """
    if to not in TARGETS:
        raise ValueError(f"vit_fast.convert: to is {to!r}, expected one of {', '.join(TARGETS)}")
    for name, value in (("old_grid", old_grid), ("policy", policy)):
        if value is not None and grid is None:
            raise ValueError(f"vit_fast.convert: {name} is {value!r}, expected grid with it")
    if policy is not None:
        check_policy(policy)
    state = {key: torch.as_tensor(value) for key, value in state.items()}
    family = _check_family(family, state)
    _check_block(to, f" for family {family!r}", family)
    state, log, dropped = _READ[family](state)
    dropped = list(dropped)
    notes = {"patch_embed.proj.weight": _fit_patches(state, patch_size)}
    if in_chans is not None:
        key, note = _fit_channels(state, in_chans)
        notes[key] = note or notes.get(key)
    if grid is not None:
        notes["pos_embed"] = _fit_table(state, tuple(grid), old_grid, policy or _POLICIES[family])
    if drop_head:
        origin = {target: sources for sources, target in log}
        for key in [key for key in state if key.split(".")[0] in ("head", "head_dist", "pre_logits")]:
            del state[key]
            dropped += [(source, "head") for source in origin[key]]
    resized = {id(state[key]): note for key, note in notes.items() if note}
    state, second = _WRITE[to](state)
    return {key: value.contiguous() for key, value in state.items()}, _report(log, second, state, dropped, resized)


def _report(first, second, state, dropped, resized):
    """Of the keys of a state: two logs, what was dropped and why, the notes of resized tensors by their id."""
    report = Report()
    for sources, target in _joined(first, second):
        note = resized.get(id(state[target]), "")
        kept = sources == (target,)
        action = "resized" if note else "added" if not sources else "kept" if kept else "mapped"
        report.append(Entry(action, sources, target, note))
    report += [Entry("dropped", (key,), "", why) for key, why in dropped]
    return report


def _check_block(to, subject, family):
    facts = FAMILIES[family]
    if to != "canonical" and (facts.get("value_skip") or family == "torch"):
        raise ValueError(
            f"vit_fast.convert: to is {to!r}, expected 'canonical'{subject}: its blocks "
            f"{'add the values to their output' if facts.get('value_skip') else 'may be post-norm'}, {to}'s do not"
        )


def for_model(model, state: Mapping) -> Mapping:
    """A state_dict of another program under a model's own names; unchanged where it has them, or is of no known family.

    What became of every key is logged at level INFO. Heads and pooling that the model was built without, and what no
    ViT here has (decoders, mask tokens, text towers), are left out with a warning.

    Raises:
        WeightsError: a file of a known family lacks a key, or has other heads than the model where it tells of them.
    """
    from . import google_npz

    own = model.state_dict()
    target, write = next(((name, write) for test, name, write in _MODELS if test(own)), (None, None))
    if google_npz.is_google(state):
        return google_npz.for_model(model, state)
    if target is None or own.keys() == state.keys():
        return state
    try:
        source = family_of(state)
    except WeightsError:
        return state
    if source in (target, "lanl", "torch"):
        return state
    state, log, dropped = _READ[source](dict(state))
    state, second = write(state)
    report = _report(log, second, state, dropped, {})
    absent = tuple(part for part in _OPTIONAL if not any(key.startswith(part) for key in own))
    for index, entry in enumerate(report):
        if entry.target.startswith(absent) and absent and entry.target:
            del state[entry.target]
            report[index] = Entry("dropped", entry.sources, "", "the model has no place for it")
    logging.getLogger("vit_fast").info("%s keys for %s:\n%s", source, type(model).__name__, report)
    left_out = [(source, entry.note) for entry in report if entry.action == "dropped" for source in entry.sources]
    log_left_out(f"{source} keys for {type(model).__name__}", left_out)
    return state


def convert_file(source, target, to: str = "timm", *, torchscript: bool = False, **words) -> Report:
    """Converts a file of ``weights.read_state_dict`` into a ``.safetensors`` file; words as in ``convert_state_dict``.

    Metadata of the target: the keys, the family, what its blocks do as far as that is known, and the "vit_fast."
    entries of a source that was converted before.

    Args:
        torchscript: also reads OpenAI's TorchScript archives, by ``torch.jit.load``: for sources that you trust.
    Raises:
        ImportError: safetensors is not installed.
        ValueError, WeightsError: see ``convert_state_dict``; nothing is written then.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"vit_fast.convert: target is {str(target)!r}, expected a file name ending in .safetensors")
    from safetensors import safe_open
    from safetensors.torch import save_file

    from . import google_npz

    state = read_state_dict(source, torchscript=torchscript)
    metadata = {}
    if Path(source).suffix == ".safetensors":
        with safe_open(source, "pt") as file:
            metadata = {key: v for key, v in (file.metadata() or {}).items() if key.startswith("vit_fast.")}
    family = _check_family(words.get("family"), state)
    origin = metadata.get("vit_fast.family", family)
    if origin != family and origin in FAMILIES:
        _check_block(to, f": the file is of family {origin!r}", origin)
    converted, report = convert_state_dict(state, to, **words)
    facts = {f"vit_fast.{name}": str(value) for name, value in FAMILIES[family].items()}
    if family == "google":
        facts["vit_fast.num_heads"] = str(google_npz.num_heads(state))
    known = {"format": "pt", "vit_fast.family": origin, **facts, **metadata, "vit_fast.keys": to}
    save_file(converted, target, known)
    return report
