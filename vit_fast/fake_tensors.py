"""A call of a model on fake tensors that leaves none of them behind."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """FakeTensorMode for a call of a model whose parameters are real or fake."""
    with without_shared_caches(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextlib.contextmanager
def without_shared_caches() -> Iterator[None]:
    """Inside, transformers neither reads nor fills what all its models of a process share (indices of relative
    positions, coordinates of patches), as while Dynamo compiles: a fake tensor there would reach later calls."""
    word = "is_torchdynamo_compiling"
    utils: Any = sys.modules.get("transformers.pytorch_utils")
    shipped = getattr(utils, word, None)
    if shipped is None:
        yield
        return
    setattr(utils, word, lambda: True)
    try:
        yield
    finally:
        setattr(utils, word, shipped)
