"""``vit-fast info``: versions, devices, the compiled extension and backends, for the head of a bug report."""

import importlib.metadata
import platform
from typing import Annotated

import typer

_PACKAGES = ("vit-fast", "torch", "triton", "torchvision", "timm", "transformers", "open_clip_torch", "numpy")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_version(wanted):
    if wanted:
        from vit_fast import __version__

        print(f"vit-fast {__version__}")
        raise typer.Exit


def show_version(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The flags that stand before a verb."""


def info() -> None:
    """Print versions, the devices, what the compiled extension is, and which backend may run which operation here."""
    import torch

    import vit_fast
    from vit_fast.bench import machine
    from vit_fast.diagnosis import extension_facts

    from .output import say

    say(f"{'python':<16} {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        say(f"{package:<16} {_version(package)}")
    say(f"{'commit':<16} {machine.commit()}")
    say(f"{'cpu':<16} {machine.cpu_name()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        facts = ", ".join(f"{name} {value}" for name, value in machine.gpu_state(device).items())
        say(f"{f'cuda:{index}':<16} {machine.name(device)}{', ' + facts if facts else ''}")
    if not torch.cuda.is_available():
        say(f"{'cuda':<16} no device")
    for name, text in extension_facts():
        say(f"{name:<16} {text}")
    say()
    say(str(vit_fast.status()))
