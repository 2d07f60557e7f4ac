"""timm's drop path with the masks of ``vit_fast.ops.keep_samples``, so that a seed drops the same samples in both."""

import pytest
import torch
from timm.layers import drop
from vit_fast.kernels import reference


def _drop_path(x, drop_prob=0.0, training=False, scale_by_keep=True):
    if drop_prob == 0.0 or not training:
        return x
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = reference.keep_mask(seed, x.shape[0], drop_prob, x.device).to(x.dtype)
    keep = keep / (1 - drop_prob) if scale_by_keep else keep
    return x * keep.view(-1, *[1] * (x.dim() - 1))


@pytest.fixture
def philox_drop_path(monkeypatch):
    monkeypatch.setattr(drop, "drop_path", _drop_path)
