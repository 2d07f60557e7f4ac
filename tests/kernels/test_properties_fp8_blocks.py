"""Random stacks of blocks in float8: the error against float64 of the same weights, and metamorphic properties.

Where a sum falls on the other side of a rounding to e4m3, what follows moves by a step of it: ``order``.
"""

import pytest
from support import properties
from support.fp8_blocks import Fp8BlocksCase
from support.prepared_blocks import cases


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_fp8_blocks(shard, count):
    properties.explore(cases(Fp8BlocksCase, ("bfloat16", "float16")), quick=24, full=400, shard=shard, count=count)
