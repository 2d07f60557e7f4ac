"""The coverage of a whole library: each architecture of its ViT family, built without memory, optimised, measured.

``LIBRARIES`` has a library's function, which yields its architectures. The committed tables are the files of
``docs/coverage/``; ``vit-fast coverage --library NAME`` prints them anew.
"""

import contextlib
import csv
import functools
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from .class_swap import optimize
from .fused_share import coverage
from .kernels.arguments import UnsupportedError
from .registry import create_model


@dataclass(frozen=True)
class Architecture:
    """An architecture of a library, and how it is built."""

    name: str
    family: str  # the library's module that defines it
    tags: tuple[str, ...]  # of its pretrained weights
    build: Callable[[], nn.Module]


@dataclass(frozen=True)
class ArchitectureRow:
    """What of an architecture runs fused, and which of its tags ``vit_fast.create_model`` builds."""

    architecture: str
    family: str
    tags: int
    share: float  # by FLOPs of blocks and patch embedding
    blocks: int
    fused_blocks: int
    created_tags: int
    reasons: str

    @property
    def fully_fused(self) -> bool:
        """Whether every block runs fused."""
        return self.blocks > 0 and self.fused_blocks == self.blocks


def timm_architectures() -> Iterator[Architecture]:
    """The architectures of timm's ViT family: those that the modules of ``integrations.timm.FAMILY`` register."""
    import timm
    from timm.models import _registry

    from .integrations.timm import FAMILY

    tags: dict[str, list[str]] = {}
    for name in timm.list_models(pretrained=True):
        tags.setdefault(name.partition(".")[0], []).append(name)
    current = set(timm.list_models())
    for family in FAMILY:
        for name in sorted(_registry._module_to_models.get(family, ())):
            if name in current:  # without names that stand for another one
                yield Architecture(name, family, tuple(tags.get(name, ())), functools.partial(timm.create_model, name))


LIBRARIES: dict[str, Callable[[], Iterator[Architecture]]] = {"timm": timm_architectures}


def architecture_row(architecture: Architecture, created_tags: int | None = None) -> ArchitectureRow:
    """Builds an architecture on the device meta, optimises it and measures its coverage.

    Args:
        created_tags: how many of its tags ``create_model`` builds, where that is known; default: they are built.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = architecture.build().eval()
    try:
        optimize(model)
    except UnsupportedError:
        pass  # nothing of it: the reasons are those of ``coverage``
    found = coverage(model)
    if created_tags is None:
        created_tags = sum(_is_created(tag) for tag in architecture.tags)
    return ArchitectureRow(
        architecture.name, architecture.family, len(architecture.tags), round(found.share, 4), found.blocks,
        found.fused_blocks, created_tags, "; ".join(found.reasons),
    )  # fmt: skip


def _is_created(tag: str) -> bool:
    """Whether ``vit_fast.create_model`` builds the model of a tag, with two blocks where it takes a depth."""
    arguments: tuple[dict[str, Any], ...] = (dict(depth=2), {})
    for kwargs in arguments:
        with torch.device("meta"), contextlib.suppress(TypeError, ValueError, AssertionError, UnsupportedError):
            create_model(tag, **kwargs)
            return True
    return False


def as_csv(rows: Sequence[ArchitectureRow]) -> str:
    """The rows as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(ArchitectureRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def from_csv(text: str) -> list[ArchitectureRow]:
    """The rows of a CSV file that ``as_csv`` has written."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(ArchitectureRow)}
    return [
        ArchitectureRow(**{name: kinds[name](value) for name, value in row.items()})
        for row in csv.DictReader(io.StringIO(text))
    ]


def as_json(rows: Sequence[ArchitectureRow]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"


def summary(rows: Sequence[ArchitectureRow]) -> list[tuple[str, int, int, int, int, int]]:
    """The cells of ``SUMMARY_HEADS`` for each family, and for all."""
    families = dict.fromkeys(row.family for row in rows)
    lines = [(family, *_sums([row for row in rows if row.family == family])) for family in families]
    return [*lines, ("all", *_sums(rows))]


def _sums(rows: Sequence[ArchitectureRow]) -> tuple[int, int, int, int, int]:
    fused = [row for row in rows if row.fully_fused]
    return (
        len(rows), len(fused), sum(row.tags for row in rows), sum(row.tags for row in fused),
        sum(row.created_tags for row in rows),
    )  # fmt: skip


SUMMARY_HEADS = ("module", "architectures", "fully fused", "tags", "tags fully fused", "tags of create_model")


_HEAD = """# Coverage

What of each architecture runs on the fused operations after `vit_fast.optimize`: its blocks and its patch embedding, in
one call on images of its own size without memory (`vit_fast.coverage`). Fully fused: every block. Share: of the FLOPs
of blocks and patch embedding. The last column counts the pretrained tags that `vit_fast.create_model` builds by itself.
`docs/coverage/` has a line for each architecture; `vit-fast coverage --library timm` prints them anew, and
`python -P tests/support/coverage_tables.py timm` writes the files and this page.

The attention of CaiT mixes its heads, and runs in plain PyTorch between the fused projections; projections of Gemma 4,
which may clamp, and gate and value of a split SwiGLU or GeGLU are linear layers of PyTorch inside of fused blocks.
"""
VERSIONS = {"timm": "timm 1.0.31: the modules of `timm.models` named below, without names that stand for another one."}


def page(tables: Mapping[str, Sequence[ArchitectureRow]]) -> str:
    """``docs/coverage.md`` of the rows of each library."""
    return "\n".join([_HEAD, *(as_markdown(name, rows) for name, rows in tables.items())])


def readme_table(tables: Mapping[str, Sequence[ArchitectureRow]]) -> str:
    """The table of the README: a line for each library."""
    heads = ("library", "architectures", "fully fused", "pretrained tags", "of these fully fused")
    lines = [(name, *_sums(rows)[:4]) for name, rows in tables.items()]
    return "\n".join(map(_line, (heads, ["---"] + 4 * ["---:"], *lines)))


def as_markdown(library: str, rows: Sequence[ArchitectureRow]) -> str:
    """The page of a library: a line for each family, and what does not run fully fused."""
    lines = [_line(SUMMARY_HEADS), _line(["---"] + 5 * ["---:"]), *map(_line, summary(rows))]
    partly = [row for row in rows if row.share < 1 or not row.fully_fused]
    reasons: dict[str, list[ArchitectureRow]] = {}
    for row in partly:
        reasons.setdefault(row.reasons, []).append(row)
    parts = [_line(("what stays", "architectures", "tags", "share")), _line(("---", "---", "---:", "---:"))]
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        low, high = min(row.share for row in group), max(row.share for row in group)
        share = f"{low:.1%}" if low == high else f"{low:.1%} – {high:.1%}"
        parts.append(_line((reason, ", ".join(row.architecture for row in group), sum(r.tags for r in group), share)))
    return "\n".join([f"## {library}", "", VERSIONS[library], "", *lines, "", *parts, ""])


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
