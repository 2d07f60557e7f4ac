"""Host time of a block that ``vit_fast.optimize`` has changed, against the library's own block, on tiny tensors.

    python -P benchmarks/block_host_time.py [--json FILE]

The tensors are so small (5 tokens, 48 channels) that Python and the dispatcher of PyTorch take most of the time. The
times are seconds of the processor, of one thread; both blocks run by turns, and the fastest turn of each counts. A
ratio above 1 is time that ``optimize`` adds.
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import ViTConfig, ViTModel

import vit_fast
from vit_fast.bench import machine

WIDTH, TOKENS = 48, 5
_TINY: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": 3, "depth": 1}


class Pair(NamedTuple):
    """A block, the same optimised, and what both take behind x."""

    name: str
    eager: nn.Module
    fast: nn.Module
    arguments: tuple[Any, ...] = ()


class Times(NamedTuple):
    """Microseconds of a call, fastest turn."""

    eager: float
    fast: float


def _pair(name: str, model: nn.Module, path: str, *arguments: Any) -> Pair:
    model = model.eval()
    fast = vit_fast.optimize(copy.deepcopy(model))
    return Pair(name, model.get_submodule(path), fast.get_submodule(path), arguments)


def pairs() -> Iterator[Pair]:
    """A block of timm's ViT, EVA-02 and BEiT, and of transformers' ViT."""
    yield _pair("timm ViT", timm.create_model("vit_tiny_patch16_224", img_size=32, **_TINY), "blocks.0")
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, **_TINY)
    yield _pair("timm EVA-02", eva, "blocks.0", eva.rope.get_embed())
    yield _pair("timm BEiT", timm.create_model("beit_base_patch16_224", img_size=32, **_TINY), "blocks.0")
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=3, intermediate_size=4 * WIDTH, image_size=32
    )
    model = ViTModel(config)
    name = next(name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer")
    yield _pair("transformers ViT", model, name)


def measure(pair: Pair, turns: int = 30, calls: int = 50) -> Times:
    """The times of both blocks of a pair, without gradients and on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(1, TOKENS, WIDTH)
    try:
        with torch.inference_mode():
            took = [[_turn(block, (x, *pair.arguments), calls) for block in pair[1:3]] for _ in range(turns)]
    finally:
        torch.set_num_threads(threads)
    return Times(*(min(times) for times in zip(*took, strict=True)))


def _turn(block: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        block(*arguments)
    return 1e6 * (time.thread_time() - start) / calls


def main(json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None) -> None:
    """Measure the host time of blocks; see the head of benchmarks/block_host_time.py."""
    table, rows = Table("block", "eager µs", "optimized µs", "added µs", "ratio"), []
    for pair in pairs():
        eager, fast = measure(pair)
        rows.append({"block": pair.name, "eager_us": eager, "optimized_us": fast, "ratio": fast / eager})
        table.add_row(pair.name, f"{eager:.0f}", f"{fast:.0f}", f"{fast - eager:+.0f}", f"{fast / eager:.2f}")
    Console().print(table)
    if json_file is not None:
        facts: dict[str, Any] = {"cpu": machine.cpu_name(), "commit": machine.commit(), "torch": torch.__version__}
        facts["cpu_library"] = not vit_fast.status("cpu").reasons["cpu"]
        json_file.write_text(json.dumps(facts | {"vit_fast": vit_fast.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
