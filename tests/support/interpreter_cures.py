"""Fixes of Triton's interpreter, so that it computes the same numbers as the hardware and runs with any numpy.

The interpreter holds bf16 as raw uint16 bits; as shipped it truncates fp32 → bf16 and reads the bits as an integer in
all other casts. It holds e4m3 as uint8 bits, loses the carry of a rounded mantissa and has no NaN of it; on a GPU the
cast saturates. Fixed: casts round to nearest even, and casts to any other type keep the value.
It multiplies matrices by numpy's BLAS, whose order of sums depends on the processor, on the memory layout and on the
number of threads. Fixed: an element of a product depends on its row and its column alone (``fixed_order_product``).
Triton 3.6 makes the bounds of loops by a conversion that numpy 2.4 no longer has (``loops_fail``).
"""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # The interpreter calls numpy on small blocks, where threads only cost time. numpy reads these when first imported.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402


def loops_fail():
    """Whether every loop fails in the interpreter as shipped."""
    import triton

    numpy_version, triton_version = (
        tuple(int(part) for part in library.__version__.split(".")[:2]) for library in (np, triton)
    )
    return numpy_version >= (2, 4) and triton_version <= (3, 6)


def fixed_order_product(a, b, dtype):
    """a @ b, each element the sum of its rounded products in the order of K: the same bits on every processor, in every
    layout, wherever the element lies in the tile.

    einsum has no BLAS; over contiguous tiles it adds one row of b after the other to a row of the result.
    """
    a, b = (np.ascontiguousarray(tile, dtype=dtype) for tile in (a, b))
    return np.einsum("...mk,...kn->...mn", a, b, optimize=False)


def install():
    """Applies the fixes to the interpreter of this process."""
    from triton.runtime import interpreter

    tl, handle, builder = interpreter.tl, interpreter.TensorHandle, interpreter.InterpreterBuilder
    shipped_convert, shipped_cast = interpreter._convert_float, builder.cast_impl
    shipped_patch = interpreter._patch_lang_tensor

    def to_bits(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), ((bits >> 16) | 0x0040).astype(np.uint16), rounded)

    def to_float32(bits):
        return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    e4m3_values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def to_e4m3(values):
        values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-448, 448)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    def convert_float(data, source, target, rounding_mode):
        if target == tl.float8e4nv and source in (tl.float16, tl.float32):
            return to_e4m3(data)
        if source == tl.float8e4nv and target in (tl.float16, tl.float32):
            target_type = interpreter._get_np_dtype(target)
            return e4m3_values[data].astype(target_type).view(f"uint{target.primitive_bitwidth}")
        toward_zero = rounding_mode is not None and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if target == tl.bfloat16 and not toward_zero and source in (tl.float16, tl.float32, tl.float64):
            with np.errstate(over="ignore"):
                return to_bits(data.astype(np.float32))
        if source == tl.bfloat16 and target in (tl.float16, tl.float32, tl.float64):
            target_type = interpreter._get_np_dtype(target)
            with np.errstate(over="ignore"):
                return to_float32(data).astype(target_type).view(f"uint{target.primitive_bitwidth}")
        return shipped_convert(data, source, target, rounding_mode)

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            with np.errstate(over="ignore", invalid="ignore"):
                return shipped_cast(self, handle(to_float32(src.data), tl.float32), dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            with np.errstate(over="ignore"):
                return handle(to_bits(src.data.astype(np.float32)), target)
        return shipped_cast(self, src, dst_type)

    def dot(self, a, b, accumulator, *_):
        a, b = (e4m3_values[tile.data] if tile.dtype.scalar == tl.float8e4nv else tile.data for tile in (a, b))
        product = fixed_order_product(a, b, accumulator.data.dtype)
        return handle(product + accumulator.data, accumulator.dtype.scalar)

    def patch_tensor(tensor, scope):
        shipped_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._convert_float = convert_float
    builder.cast_impl = cast
    builder.create_dot = dot
    interpreter._patch_lang_tensor = patch_tensor
