"""Registers and shared memory of a kernel, and how many of its programs a multiprocessor holds at once.

They are those of the ahead-of-time ledger (tests/aot/ledger.json) where the checkout has it and it has the kernel with
the same tiles; of several entries those with the most words of the launch in common. Elsewhere a formula stands in.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .gpus import Gpu
from .launches import Launch

LEDGER = Path(__file__).resolve().parents[2] / "tests" / "aot" / "ledger.json"
_COMPILED = {89: 80, 120: 80}  # the same tiles and tensor-core instructions
_SAME = (
    *("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "ROWS", "CHUNKS", "D", "DV", "num_warps", "num_stages"),
    *("DESCRIPTORS", "TMA", "GATED"),
)


@dataclass(frozen=True)
class Resources:
    """Of one program.

    Attributes:
        registers: of a thread; ``shared``: bytes.
        source: "ledger" or "formula".
    """

    registers: int
    shared: int
    source: str

    def programs(self, gpu: Gpu, num_warps: int) -> int:
        """How many programs a multiprocessor holds at once, 1 at least."""
        per_warp = -(-self.registers * 32 // 256) * 256
        limits = (
            gpu.shared_kib * 1024 // (self.shared + 1024),
            gpu.registers // (per_warp * num_warps),
            gpu.threads // (32 * num_warps),
            24,
        )
        return max(1, min(limits))


def word(value: Any) -> str:
    """A constant of a launch as the ledger writes it."""
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(getattr(value, "value", value))


@functools.cache
def _ledger() -> dict[tuple[int, str], list[tuple[dict[str, str], str, Resources]]]:
    """{(arch, kernel): [(words of the launch, dtype of the case, resources)]}, of the newest Triton."""
    try:
        entries = json.loads(LEDGER.read_text())["entries"]
    except (OSError, ValueError, KeyError):
        return {}
    newest = max((entry["triton"] for entry in entries), default=None)
    found: dict[tuple[int, str], list[tuple[dict[str, str], str, Resources]]] = {}
    for entry in entries:
        if entry["triton"] == newest:
            words = dict(part.split("=", 1) for part in _parts(entry["config"]))
            resources = Resources(entry["regs"], entry["shared"], "ledger")
            found.setdefault((entry["arch"], entry["kernel"]), []).append((words, entry["dtype"], resources))
    return found


def _parts(config):
    """The name=value words of a config, whose values may hold spaces."""
    parts: list[str] = []
    for piece in config.split(" "):
        if "=" in piece or not parts:
            parts.append(piece)
        else:
            parts[-1] += f" {piece}"
    return [part.removesuffix(" launch_pdl") for part in parts]


def _formula(launch):
    """Shared memory: all stages of the tiles. Registers: the accumulators, and 64 (attention: 32) beside them."""
    a = {name: getattr(value, "value", value) for name, value in launch.arguments.items()}
    itemsize = max((t.element_size() for t in launch.tensors()), default=2)
    threads = 32 * a["num_warps"]
    if "BLOCK_K" in a:
        elements = a["BLOCK_M"] * a["BLOCK_N"] * (2 if a.get("GATED") else 1)
        narrow = min((t.element_size() for t in launch.tensors()), default=2)
        shared = (a["BLOCK_M"] + elements // a["BLOCK_M"]) * a["BLOCK_K"] * narrow * a["num_stages"]
        return Resources(min(255, 64 + elements // threads), shared, "formula")
    if "BLOCK_M" in a:
        keys = a.get("BLOCK_N") or sum(size for _, size in a["CHUNKS"])
        shared = (a["BLOCK_M"] + 2 * keys * max(1, a["num_stages"])) * a["D"] * itemsize
        return Resources(min(255, 32 + a["BLOCK_M"] * (keys + a["D"]) // threads), shared, "formula")
    return Resources(min(255, 32 + a.get("BLOCK", 0) * a.get("ROWS", 1) // threads), 1024, "formula")


def of(launch: Launch, dtype: torch.dtype, gpu: Gpu) -> Resources:
    """The resources of a program of a launch; ``dtype``: that of the model."""
    words = {"num_stages": "3"} | {name: word(value) for name, value in launch.arguments.items()}  # Triton's default
    arch = _COMPILED.get(gpu.arch, gpu.arch)
    alike = []
    for known, known_dtype, resources in _ledger().get((arch, launch.name), ()):
        if str(dtype) == f"torch.{known_dtype}" and all(known.get(name) == words.get(name) for name in _SAME):
            common = sum(words.get(name) == value for name, value in known.items())
            alike.append((common, resources.registers, resources.shared, resources))
    if not alike:
        return _formula(launch)
    most = max(common for common, *_ in alike)
    return max(entry for entry in alike if entry[0] == most)[-1]
