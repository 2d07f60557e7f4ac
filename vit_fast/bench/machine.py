"""Facts about this machine, which every row of a result contains, and the choice of its device."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .errors import WrongValueError


def _run(*words, timeout=10):
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """Short hash of the checkout that this package runs from, with "+" if it has uncommitted changes; without a
    checkout (a copy of it, an installed package) the value of the variable VIT_FAST_COMMIT, or None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("VIT_FAST_COMMIT")
    head = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "") if head else None


def cpu_name() -> str:
    """The processor's model name where the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def target_device(text: str | None) -> torch.device:
    """The device of a text such as "cpu" or "cuda:1"; None is CUDA's current device, or the CPU where there is none."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise WrongValueError(text, "cpu, cuda or cuda:N") from None
    if device.type not in ("cuda", "cpu"):
        raise WrongValueError(text, "cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise WrongValueError(text, "cpu: there is no CUDA device here")
        device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        if device.index >= count:
            raise WrongValueError(text, f"one of cuda:0 to cuda:{count - 1}")
    return device


def load_average() -> float | None:
    """The load average of the last minute, or None where the system does not have one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def name(device: torch.device) -> str:
    """Readable name of a torch device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, temperature and power of a CUDA device as nvidia-smi gives them now; empty without it."""
    fields = {
        "driver": "driver_version",
        "clock_sm_mhz": "clocks.sm",
        "clock_memory_mhz": "clocks.mem",
        "temperature_c": "temperature.gpu",
        "power_w": "power.draw",
    }
    if device.type != "cuda":
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".replace("GPU-GPU-", "GPU-")
    query = f"--query-gpu={','.join(fields.values())}"
    answer = _run("nvidia-smi", "-i", uuid, query, "--format=csv,noheader,nounits")
    values = answer.splitlines()[0].split(", ") if answer else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def gpu_facts() -> dict[str, Any]:
    """The current CUDA device, versions and commit; "missing" says why vit_fast cannot be measured, if so."""
    known: dict[str, Any] = {"commit": commit(), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    known["torch"] = torch.__version__
    if not torch.cuda.is_available():
        return known | {"missing": "torch finds no CUDA device"}
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    known |= {"gpu": name(device), "capability": list(capability), **gpu_state(device)}
    known["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    if capability < (8, 0):
        known["missing"] = f"the GPU has capability {capability[0]}.{capability[1]}, wanted 8.0 or more"
    return known
