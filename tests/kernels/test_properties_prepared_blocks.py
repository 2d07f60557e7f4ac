"""Random stacks of prepared blocks: the error budget against float64, and metamorphic properties of a stack.

A rounding of the stream that falls the other way (the sums of an image depend a little on its place in a tile) moves
what follows by some ulps: ``order``.
"""

import pytest
from support import properties
from support.prepared_blocks import cases


@pytest.mark.interp
@pytest.mark.parametrize("shard", properties.SHARDS)
def test_prepared_blocks(shard, count):
    properties.explore(cases(), quick=24, full=400, shard=shard, count=count)
