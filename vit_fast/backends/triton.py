"""The backend ``triton``: the kernels of ``vit_fast.kernels``, compiled for CUDA, interpreted for CPU tensors."""

import contextlib
import importlib.util
import os
import threading
import warnings
from typing import Any

import torch

from vit_fast.precisions import forms

from . import quarantine
from .base import Backend

_no_lock = contextlib.nullcontext()


class Triton(Backend):
    name = "triton"
    remedy = (
        "Install the triton that this torch asks for, update the GPU's driver, or delete Triton's cache "
        "(TRITON_CACHE_DIR, else ~/.triton/cache)."
    )

    def __init__(self) -> None:
        super().__init__()
        self._failure: tuple[str, ...] | None = None  # None: not tried yet
        self._interpreted = False  # as the environment said when the kernels were imported, as Triton reads it then
        self._no_driver: tuple[str, ...] | None = None  # None: not asked yet
        self._interpreter = threading.RLock()  # Triton's interpreter keeps its state in globals

    def load(self) -> tuple[str, ...]:
        if self._failure is None:
            self._interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
            self._failure = self._load()
            self.device_types = ("cuda", "cpu") if self._interpreted else ("cuda",)
        return self._failure

    def _load(self) -> tuple[str, ...]:
        """Why the kernels cannot be imported. A broken install gets one warning, a missing Triton none."""
        if importlib.util.find_spec("triton") is None:
            return ("triton is not installed",)
        try:
            self._fill_tables()
        except Exception as error:  # a broken install raises anything; the warning names it
            warnings.warn(
                f"vit_fast: triton is installed and fails to import ({error}); the torch backend is used. "
                "Reinstall triton in the version that this torch asks for.",
                stacklevel=2,
            )
            return (f"triton fails to import: {error}",)
        return ()

    def _fill_tables(self) -> None:
        # Not at the head of the file: importing vit_fast needs no Triton.
        from vit_fast.kernels import (
            attention,
            attention_bwd,
            dropout,
            layer_norm,
            layer_norm_bwd,
            layernorm_mlp,
            layernorm_mlp_bwd,
            linear,
            linear_bwd,
            patch_embed,
            patch_embed_bwd,
            prepared_linear,
        )

        stacks = {p.operation: kernels for p in forms() if (kernels := p.kernels())}
        self.not_supported = {
            "patch_embed": patch_embed.not_supported_reasons,
            "attention": attention.not_supported_reasons,
            "layer_norm": layer_norm.not_supported_reasons,
            "layer_norm_linear": linear.layer_norm_linear_not_supported_reasons,
            "linear_residual": linear.linear_residual_not_supported_reasons,
            "layernorm_mlp": layernorm_mlp.not_supported_reasons,
            "prepared_linear": prepared_linear.prepared_linear_not_supported_reasons,
            "fp8_linear": prepared_linear.fp8_linear_not_supported_reasons,
        } | {operation: kernels.not_supported_reasons for operation, kernels in stacks.items()}
        self.inference = {
            "attention": attention.attention,
            "layer_norm": layer_norm.layer_norm,
            "layer_norm_linear": linear.layer_norm_linear,
            "layernorm_mlp": layernorm_mlp.layernorm_mlp,
        }
        self.forward = {
            "patch_embed": patch_embed.patch_embed,
            "attention": attention.attention_fwd,
            "layer_norm": layer_norm.layer_norm_fwd,
            "layer_norm_linear": linear.layer_norm_linear_fwd,
            "linear_residual": linear.linear_residual,
            "layernorm_mlp": layernorm_mlp.layernorm_mlp_fwd,
            "prepared_linear": prepared_linear.prepared_linear,
            "fp8_linear": prepared_linear.fp8_linear,
        } | {operation: kernels.run for operation, kernels in stacks.items()}
        self.dropout = frozenset({"attention", "linear_residual", "layernorm_mlp"})
        self.keep_mask = dropout.keep_mask
        self.backward = {
            "attention": attention_bwd.attention_bwd,
            "layer_norm": layer_norm_bwd.layer_norm_bwd,
            "layer_norm_linear": linear_bwd.layer_norm_linear_bwd,
            "linear_residual": linear_bwd.linear_residual_bwd,
            "layernorm_mlp": layernorm_mlp_bwd.layernorm_mlp_bwd,
            "patch_embed": patch_embed_bwd.patch_embed_bwd,
        }
        self.backward_not_supported = {"attention": attention_bwd.backward_not_supported_reasons}

    def unavailable(self, device: torch.device) -> tuple[str, ...]:
        if reasons := self.load():
            return reasons
        device_type = device.type
        if device_type == "cuda":
            major, minor = torch.cuda.get_device_capability(device.index)
            if major < 8:
                return (f"Triton kernels need compute capability 8.0, the device has {major}.{minor}",)
            if self._no_driver is None:
                self._no_driver = self._driver_reasons()
            return self._no_driver
        if device_type == "cpu":
            if not self._interpreted:
                return ("Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1)",)
            return ()
        return (f"Triton kernels do not run on device type {device_type}",)

    def _driver_reasons(self) -> tuple[str, ...]:
        """Why Triton finds no driver beside a GPU that torch has found, with one warning; empty where it finds one."""
        from triton.runtime import driver

        try:
            driver.active.get_current_target()
        except Exception as error:  # of its own, of the loader and of the C compiler that builds its launcher
            reason = f"triton finds no GPU driver: {quarantine.cause(error)}"
            warnings.warn(f"vit_fast: {reason}; the next backend is used. {self.remedy}", RuntimeWarning, stacklevel=2)
            return (reason,)
        return ()

    def is_failure(self, error: Exception, device: torch.device) -> bool:
        # The interpreter is there to find faults in kernels: its errors are shown.
        return device.type != "cpu" and super().is_failure(error, device)

    def version(self) -> str | None:
        if self.load():
            return None
        import triton

        return str(triton.__version__)

    def launching(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return self._interpreter if device.type == "cpu" else _no_lock


TRITON = Triton()
