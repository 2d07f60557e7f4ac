"""The providers that a benchmark times, by name: the variants of our model and the baselines.

The column ``provider`` of a result has the name.
"""

from dataclasses import dataclass

import torch

from vit_fast.precisions import FP8, PRECISIONS, Precision

PLAIN = "vit_fast"


@dataclass(frozen=True)
class Variant:
    """A way to run our model.

    Attributes:
        provider: its name in the rows of a result.
        precision: the precision of ``vit_fast.prepare``; None for a model that is not prepared.
        graphed: whether ``vit_fast.graphed`` captures the model in CUDA graphs.
    """

    provider: str
    precision: Precision | None = None
    graphed: bool = False

    @property
    def products(self) -> str | None:
        """The dtype that its linear layers multiply, as text; None where it is that of the weights."""
        return self.precision.products if self.precision else None


VARIANTS = {"plain": Variant(PLAIN)}
for _precision in PRECISIONS.values():
    for _name, _graphed in ((_precision.variant, False), (_precision.graphed_variant, True)):
        if _name is not None:
            VARIANTS[_name] = Variant(f"{PLAIN}-{_name}", _precision, _graphed)
SCALED_MM = "scaled-mm"
# Other inference engines, on a CPU, made from timm's model (``engines``).
INT8_ENGINES = ("openvino-int8", "onnxruntime-int8")
ENGINES = ("openvino", "onnxruntime", *INT8_ENGINES)
FREEZING = "compile-freezing"
# The longest to compile come last, because a time budget cuts the list at its end.
BASELINES = (
    "eager",
    "torchvision",
    "transformers",
    *ENGINES,
    "compile",
    FREEZING,
    "compile-cudagraphs",
    "compile-max-autotune",
    SCALED_MM,
)
CPU_ONLY = (*ENGINES, FREEZING)
GPU_BASELINES = tuple(name for name in BASELINES if name not in CPU_ONLY)
# The modes of torch.compile.
COMPILE_MODES = {
    "compile": "default",
    FREEZING: "default",
    "compile-cudagraphs": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
    SCALED_MM: "max-autotune",
}
# The precision of each provider that has one. A provider whose products are narrower than its weights is compared
# with baselines of the same product dtype and with those that multiply in the weights' dtype, any other with the
# latter only.
PRECISION_OF = {variant.provider: variant.precision for variant in VARIANTS.values() if variant.precision}
PRECISION_OF |= {SCALED_MM: FP8}


def narrow_dtype(provider: str) -> torch.dtype | None:
    """The dtype that a provider's products multiply, where it is narrower than that of the weights; else None."""
    if provider in INT8_ENGINES:
        return torch.int8
    precision = PRECISION_OF.get(provider)
    return precision.product_dtype(torch.bfloat16) if precision and precision.products else None


OUR_GRAPHS = tuple(variant.provider for variant in VARIANTS.values() if variant.graphed)
# Providers that replay CUDA graphs, whose memory outlives the call.
GRAPHED = (*OUR_GRAPHS, "compile-cudagraphs", "compile-max-autotune", SCALED_MM)

# What can be profiled: our variants, under their names in --provider, and timm's model.
PROFILED_VARIANTS = {PLAIN: VARIANTS["plain"]}
PROFILED_VARIANTS |= {precision.variant: VARIANTS[precision.variant] for precision in PRECISIONS.values()}
PROFILED = (*PROFILED_VARIANTS, "eager", "compile", "compile-max-autotune")
