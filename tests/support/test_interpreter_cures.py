"""The interpreter's products have one order of sums, whatever the processor, the layout, and the place in the tile."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import interpreter_cures

pytestmark = pytest.mark.interp

# OpenBLAS's name of a processor, and the instructions that its routines need
CORE_TYPES = {"Nehalem": "sse4_2", "Haswell": "avx2", "SkylakeX": "avx512f"}
LAYOUTS = {
    "contiguous": lambda tile: tile,
    "columns first": lambda tile: np.asfortranarray(tile),
    "every other": lambda tile: np.repeat(tile, 2, axis=1)[:, ::2],
    "backwards": lambda tile: np.ascontiguousarray(tile[:, ::-1])[:, ::-1],
    "from a longer row": lambda tile: np.pad(tile, ((0, 0), (1, 4)))[:, 1:-4],
}


def in_order(a, b, dtype):
    """The product summed in the order of k, one k after the other."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for k in range(a.shape[1]):
        total = total + a[:, k, None].astype(dtype) * b[None, k, :].astype(dtype)
    return total


def tiles(rows, columns, depth, dtype):
    rng = np.random.default_rng(rows * columns + depth)
    return rng.standard_normal((rows, depth)).astype(dtype), rng.standard_normal((depth, columns)).astype(dtype)


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_products_are_summed_in_the_order_of_k(dtype):
    accumulated = np.float64 if dtype == np.float64 else np.float32
    sizes = (16, 32, 64, 128)
    for rows, columns, depth in itertools.product(sizes, sizes, (16, 32, 64, 256)):
        a, b = tiles(rows, columns, depth, dtype)
        product = interpreter_cures.fixed_order_product(a, b, accumulated)
        assert product.dtype == accumulated
        assert np.array_equal(product, in_order(a, b, accumulated)), (rows, columns, depth)


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_products_do_not_depend_on_the_layout(dtype):
    a, b = tiles(32, 64, 64, dtype)
    wanted = in_order(a, b, dtype)
    for first, second in itertools.product(LAYOUTS.values(), repeat=2):
        assert np.array_equal(interpreter_cures.fixed_order_product(first(a), second(b), dtype), wanted)
    batch = interpreter_cures.fixed_order_product(np.stack([a, 2 * a]), np.stack([b, b]), dtype)
    assert np.array_equal(batch, np.stack([wanted, 2 * wanted]))


def test_products_do_not_depend_on_the_place_in_the_tile():
    a, b = tiles(64, 128, 64, np.float32)
    product = interpreter_cures.fixed_order_product(a, b, np.float32)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(64), rng.permutation(128)
    moved = interpreter_cures.fixed_order_product(a[rows], b[:, columns], np.float32)
    assert np.array_equal(moved, product[rows][:, columns])
    part = interpreter_cures.fixed_order_product(a[16:32], b[:, 64:96], np.float32)
    assert np.array_equal(part, product[16:32, 64:96])


def test_the_interpreter_multiplies_so(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    import torch
    import triton.language as tl

    @triton.jit
    def product_kernel(out_ptr, a_ptr, b_ptr, SIZE: tl.constexpr):
        row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        a, b = tl.load(a_ptr + row * SIZE + column), tl.load(b_ptr + row * SIZE + column)
        tl.store(out_ptr + row * SIZE + column, tl.dot(a, b, input_precision="ieee"))

    monkeypatch.setattr(np, "matmul", None)
    a, b = tiles(32, 32, 32, np.float32)
    out = torch.empty(32, 32)
    product_kernel[(1,)](out, torch.from_numpy(a), torch.from_numpy(b), SIZE=32)
    assert np.array_equal(out.numpy(), in_order(a, b, np.float32))


def test_kept_cases_under_every_core_type():
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else ()
    core_types = [name for name, needed in CORE_TYPES.items() if needed in flags] or [""]  # "": what OpenBLAS chooses
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "interp", "tests/kernels/test_properties_kept.py"]
    for core_type in core_types:
        environment = os.environ | {"OPENBLAS_CORETYPE": core_type}
        environment.pop("VIT_FAST_CASE", None)
        run = subprocess.run(
            command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, f"{core_type}: {run.stdout[-3000:]}{run.stderr[-1000:]}"
