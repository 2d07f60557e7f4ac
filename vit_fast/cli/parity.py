"""Do two models with the same weights say the same? The rule that must hold before anything is timed.

golden: timm in float64 on the same rounded weights and pixels. The model passes if its largest error against golden
is at most 1.25 times that of timm eager at the same precision, plus half a unit in the last place of the largest
golden logit; in float32 at most 2 times, plus 4 units. Not finite, or golden all zero, does not pass.
"""

import copy
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Parity:
    """``max_abs``, ``cosine`` (the worst image) and ``top1`` are against timm eager, the errors against float64."""

    passed: bool
    max_abs: float
    cosine: float
    top1: float
    top1_float64: float
    error: float
    eager_error: float
    allowed: float

    def columns(self):
        """The columns of a result row."""
        return {f"parity_{name}": value for name, value in asdict(self).items()}


def golden_logits(model, pixels, chunk=8):
    """float64 logits [B, classes] of a float64 copy of the model, a few images at a time."""
    model = copy.deepcopy(model).double()
    with torch.inference_mode():
        return torch.cat([model(part.double()) for part in pixels.split(chunk)])


def _ulp(dtype, value):
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** (math.frexp(max(value, info.smallest_normal))[1] - 1)


def compare(logits, eager, golden, dtype):
    """Parity of logits [B, classes] computed at ``dtype``, under the rule at the head of this file."""
    logits, eager, golden = (t.detach().double().flatten(1) for t in (logits, eager, golden))
    largest = golden.abs().max().item()
    error, eager_error = ((t - golden).abs().max().item() for t in (logits, eager))
    factor, units = (2.0, 4.0) if dtype == torch.float32 else (1.25, 0.5)
    allowed = factor * eager_error + units * _ulp(dtype, largest)
    trusted = math.isfinite(largest) and math.isfinite(eager_error) and largest > 0
    return Parity(
        passed=trusted and error <= allowed,
        max_abs=(logits - eager).abs().max().item(),
        cosine=F.cosine_similarity(logits, eager, dim=1).min().item(),
        top1=(logits.argmax(1) == eager.argmax(1)).double().mean().item(),
        top1_float64=(logits.argmax(1) == golden.argmax(1)).double().mean().item(),
        error=error,
        eager_error=eager_error,
        allowed=allowed,
    )
