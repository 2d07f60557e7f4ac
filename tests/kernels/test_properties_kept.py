"""Cases that once failed, from kept_cases.txt, and the one that VIT_FAST_CASE holds."""

import os
from pathlib import Path

import pytest
from support import properties
from support.attention import AttentionCase
from support.attention_bwd import AttentionBwdCase
from support.attention_options import AttentionOptionsCase
from support.backward import (
    LayerNormBwdCase,
    LayerNormLinearBwdCase,
    LayerNormMlpBwdCase,
    LinearResidualBwdCase,
    PatchEmbedBwdCase,
)  # fmt: skip
from support.fp8_blocks import Fp8BlocksCase
from support.layer_norm import LayerNormCase
from support.layernorm_mlp import LayerNormMlpCase
from support.linear import FoldedCase, LinearCase
from support.patch_embed import PatchEmbedCase
from support.prepared_blocks import PreparedBlocksCase
from support.prepared_linear import PreparedLinearCase

CASES = (
    AttentionBwdCase, AttentionCase, AttentionOptionsCase, FoldedCase, Fp8BlocksCase, LayerNormBwdCase, LayerNormCase,
    LayerNormLinearBwdCase, LayerNormMlpBwdCase, LayerNormMlpCase, LinearCase, LinearResidualBwdCase,
    PatchEmbedBwdCase, PatchEmbedCase, PreparedBlocksCase, PreparedLinearCase,
)  # fmt: skip
LINES = Path(__file__).with_name("kept_cases.txt").read_text().splitlines()
TEXTS = [line for line in LINES if line and not line.startswith("#")]
if given := os.environ.get("VIT_FAST_CASE"):
    TEXTS = [given]


@pytest.mark.interp
@pytest.mark.parametrize("text", TEXTS)
def test_case(text, count):
    count("cases", 1)
    properties.run_case(eval(text, {case.__name__: case for case in CASES}))
