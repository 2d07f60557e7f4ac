"""What became of every key of a checkpoint: the report of a conversion, and the log of a load."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from .base import Log
from .errors import listed

_LOGGER = logging.getLogger("vit_fast")


@dataclass(frozen=True)
class Entry:
    """What became of a key. action: "kept", "mapped", "resized", "dropped" or "added"."""

    action: str
    sources: tuple[str, ...]
    target: str
    note: str = ""


class Report(list[Entry]):
    """Entries in the order of the written file, dropped keys last; its text is a table with a summary."""

    def count(self, action: str) -> int:  # type: ignore[override]
        """How many entries have this action."""
        return sum(entry.action == action for entry in self)

    def __str__(self) -> str:
        lines = []
        for entry in self:
            source, arrow = " + ".join(entry.sources), " → " if entry.sources and entry.target else ""
            text = source if entry.sources == (entry.target,) else source + arrow + entry.target
            lines.append(f"{entry.action:<8} {text}{f'  ({entry.note})' if entry.note else ''}")
        actions = ("kept", "mapped", "resized", "added", "dropped")
        lines.append(", ".join(f"{self.count(action)} {action}" for action in actions))
        return "\n".join(lines)


def report_of(
    first: Log,
    second: Log,
    state: Mapping[str, torch.Tensor],
    dropped: Iterable[tuple[str, str]],
    resized: Mapping[int, str],
) -> Report:
    """The report of two translations, one after the other.

    Args:
        first, second: their logs, as in ``base.Translation``.
        state: what the second one made.
        dropped: (source key, reason) of each key that was left out.
        resized: by the ``id`` of a tensor of ``state``, how it was resized.
    """
    report = Report()
    for sources, target in _joined(first, second):
        note = resized.get(id(state[target]), "")
        kept = sources == (target,)
        action = "resized" if note else "added" if not sources else "kept" if kept else "mapped"
        report.append(Entry(action, sources, target, note))
    report += [Entry("dropped", (key,), "", why) for key, why in dropped]
    return report


def _joined(first: Log, second: Log) -> Log:
    """The log of two translations, one after the other."""
    origin = {target: sources for sources, target in first}
    return [(tuple(name for source in sources for name in origin[source]), target) for sources, target in second]


def log_left_out(subject: str, dropped: Iterable[tuple[str, str]]) -> None:
    """One warning for keys of a file that a model does not take: (key, why) of each."""
    reasons: dict[str, list[str]] = {}
    for key, why in dropped:
        reasons.setdefault(why, []).append(key)
    if reasons:
        parts = "; ".join(f"{listed(keys)} ({why})" for why, keys in reasons.items())
        _LOGGER.warning("vit_fast: %s: left out: %s", subject, parts)
