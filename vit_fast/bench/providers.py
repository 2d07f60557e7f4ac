"""Whom a benchmark times, by name: the variants of our model and the baselines. Needs no torch.

A provider is one of either; its name stands in the column ``provider``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """A way to run our model.

    Attributes:
        provider: its name in the rows of a result.
        prepared: whether ``vit_fast.prepare`` folds its weights, and with which ``precision``.
        graphed: whether ``vit_fast.graphed`` captures it in CUDA graphs.
    """

    provider: str
    prepared: bool = True
    precision: str | None = None
    graphed: bool = False

    @property
    def float8(self) -> bool:
        """Whether its linear layers multiply in float8."""
        return self.precision == "fp8"


PLAIN = "vit_fast"
VARIANTS = {
    "plain": Variant(PLAIN, prepared=False),
    "prepared": Variant("vit_fast-prepared"),
    "graphed": Variant("vit_fast-graphed", graphed=True),
    "fp8": Variant("vit_fast-fp8", precision="fp8"),
    "fp8-graphed": Variant("vit_fast-fp8-graphed", precision="fp8", graphed=True),
}
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
# A provider that multiplies in float8 is compared with all baselines, any other with the 16- and 32-bit ones alone.
FLOAT8_PROVIDERS = (*(variant.provider for variant in VARIANTS.values() if variant.float8), SCALED_MM)
OUR_GRAPHS = tuple(variant.provider for variant in VARIANTS.values() if variant.graphed)
# Those that replay CUDA graphs, whose memory outlives the call.
GRAPHED = (*OUR_GRAPHS, "compile-cudagraphs", "compile-max-autotune", SCALED_MM)

# What a profile is taken of: our variants under the names that --provider has for them, and timm's model.
PROFILED_VARIANTS = {"vit_fast": VARIANTS["plain"], "prepared": VARIANTS["prepared"], "fp8": VARIANTS["fp8"]}
PROFILED = (*PROFILED_VARIANTS, "eager", "compile", "compile-max-autotune")
