"""Do two models with the same weights give the same logits? The rule that must hold before anything is timed.

golden: timm in float64 on the same rounded weights and pixels. The model passes if its largest error against golden
is at most 1.25 times that of timm eager at the same precision, plus half a unit in the last place of the largest
golden logit; in float32 at most 2 times, plus 4 units; in float64, where eager is golden, 1024 units. Not finite, or
golden all zero, does not pass.

A model whose products are float8 is held to the plain PyTorch form of the same quantised model instead of to eager;
golden stays the unquantised model. Numbers near a tie round to one or the other neighbour, 6 % apart, so that two
correct forms differ by whole roundings: the largest error of one image moves by a quarter, the norm of all errors by a
twelfth (ViT-S and ViT-Ti on a CPU). Hence the norm is held to 1.25 times, the largest error to 2 times that form's. As
that form shares the quantised weights, a second limit bounds what quantising them costs: the norm stays below eager's
times the ratio of the unit roundoffs, 16 for bfloat16 and 128 for float16. A model in int8 is held the same way, by the
numbers of ``INT8_BUDGET``.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Budget(NamedTuple):
    """The error allowed against float64 for a model whose products are narrower than its weights.

    The model is held to the plain PyTorch form of the same quantised model. As that form shares the quantised weights,
    the norm of all errors must also stay below eager's times the ratio of the unit roundoffs.
    """

    largest: float  # factor on the largest error of that form
    norm: float  # factor on the norm of its errors
    roundoff: float  # the unit roundoff of a product's operands


FLOAT8_BUDGET = Budget(largest=2.0, norm=1.25, roundoff=2.0**-4)
# Half a step of 1/255 of a row's range, which is some eight times the spread of its values. In attention the kernels
# multiply bfloat16 where the processor can (int16 where it has VNNI alone), the plain form float32: that moved the norm
# of twenty logits by up to 1.3.
INT8_BUDGET = Budget(largest=2.0, norm=1.5, roundoff=2.0**-6)


@dataclass(frozen=True)
class Parity:
    """``max_abs``, ``cosine`` (the worst image) and ``top1`` are against timm eager, the errors against float64.

    A relative error is the norm of all errors over that of the golden logits. ``reference`` is what the model is held
    to: eager, or in float8 the plain form.
    """

    passed: bool
    max_abs: float
    cosine: float
    top1: float
    top1_float64: float
    cosine_float64: float
    error: float
    eager_error: float
    reference_error: float
    allowed: float
    relative_error: float
    eager_relative_error: float
    reference_relative_error: float

    def columns(self) -> dict[str, bool | float]:
        """The columns of a result row."""
        return {f"parity_{name}": value for name, value in asdict(self).items()}


def perturb(model: nn.Module) -> None:
    """Moves every parameter of a fresh model, so that none (a LayerScale near 0, a bias of 0) hides a fault."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02 if parameter.dim() > 1 else 0.1)


def golden_logits(model: nn.Module, pixels: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """float64 logits [B, classes] of a float64 copy of the model, a few images at a time."""
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        return torch.cat([model(part.double()) for part in pixels.split(chunk)])


def _ulp(dtype: torch.dtype, value: float) -> float:
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(value, info.smallest_normal))[1] - 1)


def compare(
    logits: torch.Tensor,
    eager: torch.Tensor,
    golden: torch.Tensor,
    dtype: torch.dtype,
    plain: torch.Tensor | None = None,
    budget: Budget | None = None,
) -> Parity:
    """Parity of logits [B, classes] computed at ``dtype``, under the rule at the head of this file.

    ``plain``: for a model with products narrower than its weights, the logits of its plain PyTorch form; ``budget`` is
    the error allowed against it, and is unused for other models.
    """
    reference = eager if plain is None else plain
    logits, eager, reference, golden = (t.detach().double().flatten(1) for t in (logits, eager, reference, golden))
    largest = golden.abs().max().item()
    forms = (logits, eager, reference)
    error, eager_error, reference_error = ((t - golden).abs().max().item() for t in forms)
    relative, eager_relative, reference_relative = (((t - golden).norm() / golden.norm()).item() for t in forms)
    factor, units, near = 1.25, 0.5, True
    if plain is not None and budget is not None:
        roundoffs = budget.roundoff / (torch.finfo(dtype).eps / 2)
        near = relative <= min(budget.norm * reference_relative, roundoffs * eager_relative)
        factor = budget.largest
    if dtype == torch.float32:
        factor, units = 2.0, 4.0
    if dtype == torch.float64:
        units = 2.0**10  # eager is golden itself; summing in another order is allowed
    allowed = factor * reference_error + units * _ulp(dtype, largest)
    trusted = math.isfinite(largest) and math.isfinite(reference_error) and largest > 0
    return Parity(
        passed=trusted and near and error <= allowed,
        max_abs=(logits - eager).abs().max().item(),
        cosine=F.cosine_similarity(logits, eager, dim=1).min().item(),
        top1=(logits.argmax(1) == eager.argmax(1)).double().mean().item(),
        top1_float64=(logits.argmax(1) == golden.argmax(1)).double().mean().item(),
        cosine_float64=F.cosine_similarity(logits, golden, dim=1).min().item(),
        error=error,
        eager_error=eager_error,
        reference_error=reference_error,
        allowed=allowed,
        relative_error=relative,
        eager_relative_error=eager_relative,
        reference_relative_error=reference_relative,
    )
