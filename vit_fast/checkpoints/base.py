"""The description of one program's checkpoints: a ``Format``, declared in the program's own file.

Every format is translated to timm's keys and from there to others, so that a new one needs two functions at most. The
list of all formats is ``registry.FORMATS``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

Log = list[tuple[tuple[str, ...], str]]  # (source keys, the key that was made of them)


class Translation(NamedTuple):
    """A state_dict under other keys, and what became of each source key."""

    state: dict[str, torch.Tensor]
    log: Log
    dropped: Sequence[tuple[str, str]] = ()  # (a source key, why it is left out)


# What a model may be built without: how timm's keys of it begin.
OPTIONAL = ("head.", "head_dist.", "pre_logits.", "attn_pool.", "proj")


@dataclass(frozen=True)
class Format:
    """The keys under which one program saves a ViT, and how they become timm's.

    A key that the program does not know keeps its name in a translation, so that strict loading refuses it.

    Attributes:
        name: what users call it: "clip".
        recognise: whether a state_dict (or any mapping with its keys) has this program's keys.
        to_timm: translates a state_dict to timm's keys.
        from_timm: translates timm's keys to this program's, where that is of use: ``of_model`` or ``is_target``.
        of_model: whether a model's own ``state_dict`` has this program's keys; other checkpoints that are loaded into
            such a model are translated to them.
        is_target: whether ``convert_state_dict`` writes this format.
        policy: how a position table is resized, "R1" … "R5" of ``pos_embed``.
        facts: what every block of the program does, whatever its arguments; metadata of converted files. What may
            vary is left out.
        read_facts: further metadata that a state_dict tells.
        unlike_timm: what its blocks do that timm's do not, after "its blocks"; such checkpoints are not translated
            into formats of timm's block.
        any_block: whether the format holds blocks that are unlike timm's.
        variant_of: the name of a format from which it differs in few keys, which a file may lack.
        always_recognised: whether ``to_timm`` needs the keys that ``recognise`` looks for.
        optional: how the keys begin that are left out, with a warning, where a model has nothing under them.
        for_model: (model, state_dict) → the state_dict for this one model, where translating keys is not enough.
        loaded: called with a model after a checkpoint of this format has been loaded into it.
    """

    name: str
    recognise: Callable[[Mapping[str, Any]], bool]
    to_timm: Callable[[Mapping[str, torch.Tensor]], Translation]
    from_timm: Callable[[Mapping[str, torch.Tensor]], Translation] | None = None
    of_model: Callable[[Mapping[str, torch.Tensor]], bool] | None = None
    is_target: bool = False
    policy: str = "R5"
    facts: Mapping[str, Any] = field(default_factory=dict)
    read_facts: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]] | None = None
    unlike_timm: str | None = None
    any_block: bool = False
    variant_of: str | None = None
    always_recognised: bool = False
    optional: tuple[str, ...] = OPTIONAL
    for_model: Callable[[nn.Module, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    loaded: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        if (self.is_target or self.of_model) and self.from_timm is None:
            raise ValueError(f"vit_fast.checkpoints: format {self.name!r} is written, expected from_timm with it")
