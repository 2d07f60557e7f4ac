"""The coverage of a whole library: each architecture of its ViT family, built, optimised, measured.

``library_models`` builds the architectures. The committed tables are the files of ``docs/coverage/``;
``vit-fast coverage --library NAME`` prints them anew.
"""

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from .class_swap import optimize
from .fused_share import coverage
from .kernels.arguments import UnsupportedError
from .library_models import LIBRARIES as LIBRARIES
from .library_models import Architecture
from .registry import create_model


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


def architecture_row(architecture: Architecture, created_tags: int | None = None) -> ArchitectureRow:
    """Builds an architecture, optimises it and measures its coverage.

    Args:
        created_tags: how many of its tags ``create_model`` builds, where that is known; default: they are built.
    """
    model = architecture.build()
    try:
        optimize(model)
    except UnsupportedError:
        pass  # nothing of it: the reasons are those of ``coverage``
    found = coverage(model, architecture.example())
    if created_tags is None:
        created_tags = sum(_is_created(tag) for tag in architecture.tags) if architecture.is_timm else 0
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


def summary(rows: Sequence[ArchitectureRow]) -> list[tuple[Any, ...]]:
    """The cells of ``summary_heads`` for each family, and for all."""
    families, columns = dict.fromkeys(row.family for row in rows), len(summary_heads(rows)) - 1
    lines = [(family, *_sums([row for row in rows if row.family == family])[:columns]) for family in families]
    return [*lines, ("all", *_sums(rows)[:columns])]


def _sums(rows: Sequence[ArchitectureRow]) -> tuple[int, int, int, int, int]:
    fused = [row for row in rows if row.fully_fused]
    return (
        len(rows), len(fused), sum(row.tags for row in rows), sum(row.tags for row in fused),
        sum(row.created_tags for row in rows),
    )  # fmt: skip


_SUMMARY_HEADS = ("module", "architectures", "fully fused", "tags", "tags fully fused", "tags of create_model")


def summary_heads(rows: Sequence[ArchitectureRow]) -> tuple[str, ...]:
    """The heads of ``summary``, up to the last column that counts anything."""
    *_, fused_tags, created_tags = _sums(rows)
    return _SUMMARY_HEADS if created_tags else _SUMMARY_HEADS[:5] if fused_tags else _SUMMARY_HEADS[:3]


_HEAD = """# Coverage

What of each architecture runs on the fused operations after `vit_fast.optimize`: its blocks and its patch embedding, in
one call (`vit_fast.coverage`). Fully fused: every block. Share: of the FLOPs of blocks and patch embedding.
`docs/coverage/` has a line for each architecture; `vit-fast coverage --library timm` (transformers, open_clip) prints
them anew, and `python -P tests/support/coverage_tables.py timm` writes the files and this page.

`vit_fast.prepare` takes every block that runs fused, in the dtype of its weights, in float8 and, on a CPU, in int8:

| blocks | prepared | operations |
| --- | --- | --- |
| pre-norm, run by their model as one stack | the stack, norms and LayerScale folded | `prepared_blocks`, … |
| pre-norm, run one by one or with RoPE, biases, masks | each block, folded likewise | the same |
| all others | each linear layer, nothing folded | `prepared_linear`, … |

On a CPU with the C++ library the first word is `packed`, by precision `fp8` or `int8`. The others are, in timm, the
blocks of ViTamin (GeGLU with a norm of its own), differential attention, parallel and post-norm blocks, SAM's windows,
Sapiens2, CaiT and Gemma 4; in transformers SAM-HQ, InternVL, X-CLIP, Qwen2-VL to Qwen3.5 and GLM-4V; in open_clip
custom blocks; `torch.nn` with `norm_first=False`. float32 is prepared so on every device, and folded on a CPU with the
C++ library alone. Weights of less than 16 inputs or outputs, as those that mix CaiT's heads, stay with PyTorch on a GPU
and in float8. `vit_fast.graphed` captures what waits for no result on the host; timm's positions of Gemma 4 wait.
"""
_ABOUT = {
    "timm": """timm 1.0.31: the modules of `timm.models` named below, without names that stand for another one, on
images of their own size without memory. The last column counts the pretrained tags that `vit_fast.create_model` builds.
The attention of CaiT mixes its heads, and runs in plain PyTorch between the fused projections; projections of Gemma 4,
which may clamp, and gate and value of a split SwiGLU or GeGLU are linear layers of PyTorch inside of fused blocks. Of
the hybrids, the convolutional stem stays timm's, and counts as part of the patch embedding.""",
    "transformers": """transformers 5.23.0: a model of two layers, 48 wide, for each family of vision layers that
`vit_fast` knows; the modules are those of `transformers.models`. Patch embeddings weigh more in a model so small: of a
ViT-B/16 they are 0.7 % of the FLOPs. Those that are one linear layer stay PyTorch's.""",
    "open_clip": """open_clip_torch 3.3.0: the image towers of its configs that are ViTs, its own and those of timm, on
images of their own size without memory; ResNet, ConvNeXt, Swin and FastViT towers are none. Tags are pretrained
weights.""",
}


def page(tables: Mapping[str, Sequence[ArchitectureRow]]) -> str:
    """``docs/coverage.md`` of the rows of each library."""
    return "\n".join([_HEAD, *(as_markdown(name, rows) for name, rows in tables.items())])


def readme_table(tables: Mapping[str, Sequence[ArchitectureRow]]) -> str:
    """The table of the README: a line for each library."""
    heads = ("library", "architectures", "fully fused", "pretrained tags", "of these fully fused")
    lines = [
        (name, *_sums(rows)[:4]) if any(row.tags for row in rows) else (name, *_sums(rows)[:2], "–", "–")
        for name, rows in tables.items()
    ]
    return "\n".join(map(_line, (heads, ["---"] + 4 * ["---:"], *lines)))


def as_markdown(library: str, rows: Sequence[ArchitectureRow]) -> str:
    """The page of a library: a line for each family, and what does not run fully fused."""
    heads = summary_heads(rows)
    lines = [_line(heads), _line(["---"] + (len(heads) - 1) * ["---:"]), *map(_line, summary(rows))]
    partly = [row for row in rows if row.share < 1 or not row.fully_fused]
    reasons: dict[str, list[ArchitectureRow]] = {}
    for row in partly:
        reasons.setdefault(row.reasons, []).append(row)
    parts = [_line(("what stays", "architectures", "tags", "share")), _line(("---", "---", "---:", "---:"))]
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        low, high = min(row.share for row in group), max(row.share for row in group)
        share = f"{low:.1%}" if low == high else f"{low:.1%} – {high:.1%}"
        parts.append(_line((reason, ", ".join(row.architecture for row in group), sum(r.tags for r in group), share)))
    return "\n".join([f"## {library}", "", _ABOUT[library], "", *lines, "", *parts, ""])


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
