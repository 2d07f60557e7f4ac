"""The small vision models of transformers, as the tests of ``vit_fast.optimize`` build and call them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vit_fast.integrations.transformers.small_models import SMALL_MODELS

# transformers computes some of these in float32 for float64 inputs too.
_FLOAT32 = (
    "Git", "Aimv2", "Ovis2", "Pixtral", "InternVL with RMSNorm", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL MoE",
    "Qwen3.5", "Qwen3.5 MoE", "Qwen3-Omni", "GLM-4V", "GLM-4V MoE",
)  # fmt: skip
_BLOCKS = {"ViTMAE with its decoder": 3}
_POOLED = ("Siglip", "Siglip2", "Phi-4", "Aimv2")


class Case(NamedTuple):
    """A model, how many layers of it are swapped, and how many attentions run in it."""

    name: str
    blocks: int
    attentions: int
    inputs: Callable[[torch.dtype], dict[str, Any]]
    float32: bool

    def build(self, **arguments: Any) -> torch.nn.Module:
        """A model in eval mode, every parameter moved away from its initial value."""
        model = SMALL_MODELS[self.name].build(**arguments)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.2)
        return model


def _case(name: str) -> Case:
    blocks = _BLOCKS.get(name, 2)
    return Case(name, blocks, blocks + (name in _POOLED), SMALL_MODELS[name].inputs, name in _FLOAT32)


CASES = {name: _case(name) for name in SMALL_MODELS}


def output(model, inputs, **options):
    """The main output of a model, without tokens of padding."""
    result = model(**inputs, **options)
    if "logits" in result:
        return result.logits
    out = result[0] if torch.is_tensor(result[0]) else result[0][-1]  # a backbone's feature maps
    mask = inputs.get("patch_attention_mask")
    return out if mask is None else out[mask.flatten(1)]
