"""Small models of all libraries as cases of one kind, and what ran fused in them once they are optimised."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support import library_models, transformers_models
from support.library_models import fused

import vit_fast


class Case(NamedTuple):
    """A function that builds a model, one of its inputs from a dtype, one of the output from both; ``float32``: whether
    the library computes parts in it always."""

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[torch.dtype], Any]
    output: Callable[[torch.nn.Module, Any], torch.Tensor]
    float32: bool = False


def case_of_images(build: Callable[[], torch.nn.Module]) -> Case:
    return Case(build, lambda dtype: torch.randn(2, 3, 32, 32).to(dtype), library_models.output)


def case_of_transformers(name: str) -> Case:
    case = transformers_models.CASES[name]
    return Case(case.build, case.inputs, transformers_models.output, case.float32)


def swapped(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """(path, module) of what runs fused, in its order."""
    return [(name, each) for name, each in model.named_modules() if isinstance(each, vit_fast.integrations.Fused)]


def blocks(model: torch.nn.Module) -> list[str]:
    """The paths of the optimised blocks."""
    return [name for name, module in swapped(model) if module.OPERATION == "block"]


def run(case: Case, model: torch.nn.Module, inputs: Any) -> tuple[torch.Tensor, bool]:
    """(output, whether anything but the patch embedding ran fused)."""
    with vit_fast.backends.recording() as choices:
        result = case.output(model, inputs)
    return result, any(operation != "patch_embed" for operation in fused(choices))


def close(actual: Any, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
