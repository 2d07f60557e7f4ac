"""Whom a benchmark times, by name: the variants of our model and the baselines.

A provider is one of either; its name stands in the column ``provider``.
"""

from dataclasses import dataclass

from vit_fast.precisions import FP8, PRECISIONS, Precision

PLAIN = "vit_fast"


@dataclass(frozen=True)
class Variant:
    """A way to run our model.

    Attributes:
        provider: its name in the rows of a result.
        precision: what ``vit_fast.prepare`` folds its weights to; None where it does not.
        graphed: whether ``vit_fast.graphed`` captures it in CUDA graphs.
    """

    provider: str
    precision: Precision | None = None
    graphed: bool = False

    @property
    def products(self) -> str | None:
        """What its linear layers multiply, in words; None where it is the dtype of the weights."""
        return self.precision.products if self.precision else None


VARIANTS = {"plain": Variant(PLAIN)}
for _precision in PRECISIONS.values():
    for _name, _graphed in ((_precision.variant, False), (_precision.graphed_variant, True)):
        VARIANTS[_name] = Variant(f"{PLAIN}-{_name}", _precision, _graphed)
SCALED_MM = "scaled-mm"
# The longest to compile last: what a time budget cuts is the end.
BASELINES = ("eager", "torchvision", "transformers", "compile", "compile-cudagraphs", "compile-max-autotune", SCALED_MM)
# The modes of torch.compile.
COMPILE_MODES = {
    "compile": "default",
    "compile-cudagraphs": "reduce-overhead",
    "compile-max-autotune": "max-autotune",
    SCALED_MM: "max-autotune",
}
# The precision of providers whose products are narrower than their weights. Such a provider is compared with the
# baselines of the same products and with all that multiply the weights' dtype, any other with the latter alone.
NARROW = {
    variant.provider: variant.precision for variant in VARIANTS.values() if variant.precision and variant.products
}
NARROW |= {SCALED_MM: FP8}
OUR_GRAPHS = tuple(variant.provider for variant in VARIANTS.values() if variant.graphed)
# Those that replay CUDA graphs, whose memory outlives the call.
GRAPHED = (*OUR_GRAPHS, "compile-cudagraphs", "compile-max-autotune", SCALED_MM)

# What a profile is taken of: our variants under the names that --provider has for them, and timm's model.
PROFILED_VARIANTS = {PLAIN: VARIANTS["plain"]}
PROFILED_VARIANTS |= {precision.variant: VARIANTS[precision.variant] for precision in PRECISIONS.values()}
PROFILED = (*PROFILED_VARIANTS, "eager", "compile", "compile-max-autotune")
