"""Rules that rename the keys of a state_dict.

A rule is written as (a program's key, timm's key): {} is an index, {+} one that counts from 1; a trailing dot stands
for all keys below.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from .base import Translation

Rule = tuple[re.Pattern[str], str, list[int]]  # pattern, template, what is added to each index


def compile_rules(pairs: Iterable[tuple[str, str]], reverse: bool = False) -> list[Rule]:
    """Rules from the first key of each pair to the second; ``reverse``: from the second to the first."""
    rules = []
    for source, target in ((b, a) for a, b in pairs) if reverse else pairs:
        parts = re.split(r"(\{\+?\})", source)
        pattern = "".join(r"(\d+)" if part in ("{}", "{+}") else re.escape(part) for part in parts)
        shifts = [
            (new == "{+}") - (old == "{+}")
            for old, new in zip(re.findall(r"\{\+?\}", source), re.findall(r"\{\+?\}", target), strict=True)
        ]
        whole = "" if source.endswith(".") else "$"
        rules.append((re.compile(pattern + whole), target.replace("{+}", "{}"), shifts))
    return rules


def rename(key: str, rules: Iterable[Rule]) -> str | None:
    """The key under the first rule that fits, or None."""
    for pattern, target, shifts in rules:
        match = pattern.match(key)
        if match:
            return target.format(*(int(n) + s for n, s in zip(match.groups(), shifts))) + key[match.end() :]
    return None


def renamed(state: Mapping[str, torch.Tensor], rules: Iterable[Rule]) -> Translation:
    """Every key renamed; keys without a rule stay."""
    targets = {key: rename(key, rules) or key for key in state}
    out = {targets[key]: value for key, value in state.items()}
    return Translation(out, [((key,), target) for key, target in targets.items()])
