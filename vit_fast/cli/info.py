"""``vit-fast info``: what a bug report starts with."""

import importlib.metadata
import platform

_PACKAGES = ("vit-fast", "torch", "triton", "torchvision", "timm", "transformers", "open_clip_torch", "numpy")


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info():
    """Print versions, the devices, and which backend may run which operation here."""
    import torch

    import vit_fast

    from . import machine

    print(f"{'python':<16} {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        print(f"{package:<16} {_version(package)}")
    print(f"{'commit':<16} {machine.commit()}")
    print(f"{'cpu':<16} {machine.cpu_name()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        facts = ", ".join(f"{name} {value}" for name, value in machine.gpu_state(device).items())
        print(f"{f'cuda:{index}':<16} {machine.name(device)}{', ' + facts if facts else ''}")
    if not torch.cuda.is_available():
        print(f"{'cuda':<16} no device")
    print()
    print(vit_fast.status())
