"""torch's setting of float32 matrix products, for a while."""

import contextlib

import torch


@contextlib.contextmanager
def matmul_precision(word):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(word)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
