"""The memory sanitizer finds each kind of fault in small faulty kernels, and nothing in correct ones."""

import numpy as np
import pytest
import torch
from support import sanitizer
from support.sanitizer import MemoryFault

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.interp


@triton.jit
def copy_kernel(y_ptr, x_ptr, length, count, step, BLOCK: tl.constexpr):
    """Program p copies elements p·step … p·step + BLOCK, while below ``length`` (load) and ``count`` (store)."""
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < length, other=0.0), mask=at < count)


@triton.jit
def scalar_mask_kernel(y_ptr, x_ptr, wanted, BLOCK: tl.constexpr):
    """A condition on a scalar, which is a mask of integers in the interpreter."""
    at = tl.arange(0, BLOCK)
    mask = (at < 1000) & (wanted > 0)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def matrix_kernel(y_ptr, x_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(y_ptr + row * COLUMNS + column, tl.load(x_ptr + row * stride + column))


@triton.jit
def count_kernel(total_ptr, plain_ptr, at):
    tl.atomic_add(total_ptr + at, 1)
    if plain_ptr is not None:
        tl.store(plain_ptr, tl.load(plain_ptr) + 1)


@triton.jit
def hand_over_kernel(out_ptr, part_ptr, count_ptr, parts, SEM: tl.constexpr, LATE: tl.constexpr):
    """Each program stores its part and counts; the last to count adds them up."""
    me = tl.program_id(0)
    if not LATE:
        tl.store(part_ptr + me, 1.0)
    last = tl.atomic_add(count_ptr, 1, sem=SEM) == parts - 1
    if LATE:
        tl.store(part_ptr + me, 1.0)
    if last:
        total = 0.0
        for i in range(parts):
            total += tl.load(part_ptr + i)
        tl.store(out_ptr, total)


@triton.jit
def exchange_kernel(lock_ptr, at):
    tl.atomic_cas(lock_ptr + at, 0, 1)


@triton.jit
def first_kernel(y_ptr, x_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(x_ptr))


@triton.jit
def descriptor_kernel(y, x, row, BLOCK: tl.constexpr):
    y.store([row, 0], x.load([row, 0]))


@triton.jit
def twice_kernel(y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at.to(tl.float32))
    tl.store(y_ptr + at, at.to(tl.float32))


@triton.jit
def same_place_kernel(y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at // 2, at.to(tl.float32))


@triton.jit
def order_kernel(seen_ptr, next_ptr):
    """Notes the order of programs; atomics may meet."""
    place = tl.atomic_add(next_ptr, 1)
    tl.atomic_xchg(seen_ptr + tl.program_id(0), place)


def by_hand(**tensors):
    """A launch whose accesses a test makes by itself."""
    launch = sanitizer._Launch("by hand", tensors)
    launch.grid = (2, 1, 1)
    return launch


def pointer(launch, tensor, byte=0):
    """(address, mask) of one byte of a tensor."""
    tag = launch.tags[sanitizer._key(tensor)] << sanitizer._TAG_BITS
    return np.array([tensor.data_ptr() + byte + tag], np.uint64), np.array([True])


def copy(y, x, length, count, programs=2, step=16):
    copy_kernel[(programs,)](y, x, length, count, step, BLOCK=16)


def test_a_clean_kernel_passes_and_is_counted():
    x, y = torch.randn(27), torch.empty(27)
    before = dict(sanitizer.COUNTS)
    copy(y, x, 27, 27)
    assert torch.equal(x, y)
    assert sanitizer.COUNTS["launches"] == before["launches"] + 1
    assert sanitizer.COUNTS["accesses"] == before["accesses"] + 4


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_out_of_view_load(dtype):
    storage = torch.randn(40).to(dtype)
    with pytest.raises(MemoryFault, match=r"load of 1 elements: .*program \(1, 0, 0\), argument x_ptr \[27\]"):
        copy(torch.empty(27, dtype=dtype), storage[:27], 28, 27)


def test_out_of_view_store():
    storage = torch.zeros(40)
    with pytest.raises(MemoryFault, match=r"out-of-view store of 1 elements: .*argument y_ptr \[27\].*27 elements"):
        copy(storage[:27], torch.randn(40), 28, 28)
    assert (storage == 0)[27:].all()


def test_the_gap_between_rows_is_out_of_view():
    storage = torch.randn(8, 20)
    y = torch.empty(8, 16)
    matrix_kernel[(1,)](y, storage[:, :16], 20, ROWS=8, COLUMNS=16)
    assert torch.equal(y, storage[:, :16])
    with pytest.raises(MemoryFault, match=r"out-of-view load of 24 elements.* 16 elements from its start"):
        matrix_kernel[(1,)](torch.empty(8, 16), storage[:, :16], 16, ROWS=8, COLUMNS=16)


def test_one_view_of_a_storage_is_not_the_other():
    """The key half of a packed tensor is out of view for the query half."""
    packed = torch.randn(2, 16)
    with pytest.raises(MemoryFault, match=r"out-of-view load of 16 elements.*argument x_ptr \[16\]"):
        copy(packed[1], packed[0], 32, 0)


def test_an_address_from_nowhere():
    with pytest.raises(MemoryFault, match=r"comes from no argument|out-of-view"):
        copy(torch.zeros(16), torch.zeros(16), 2**40, 0, step=2**30)


def test_half_an_element_is_out_of_view():
    memory = torch.zeros(64, dtype=torch.uint8)
    x = memory[:32].view(torch.float32)
    launch = by_hand(x=x)
    launch.load(*pointer(launch, x, byte=4))
    with pytest.raises(MemoryFault, match="out-of-view load"):
        launch.load(*pointer(launch, x, byte=2))


def test_uninitialised_load():
    x = torch.empty(27)
    x[:20] = 1.0
    with pytest.raises(MemoryFault, match=r"uninitialised load.*argument x_ptr.* 20 elements from its start"):
        copy(torch.empty(27), x, 27, 27)
    x[20:] = float("nan")  # a computed NaN is a value like any other
    copy(torch.empty(27), x, 27, 27)


def test_unwritten_output():
    with pytest.raises(MemoryFault, match=r"unwritten, 2 elements, the first at \[25\].*argument y_ptr \[27\]"):
        copy(torch.empty(27), torch.randn(27), 27, 25)
    with pytest.raises(MemoryFault, match=r"unwritten, 11 elements, the first at \[16\]"):
        copy(torch.empty(27), torch.randn(27), 27, 27, programs=1)


def test_two_programs_that_write_one_element():
    with pytest.raises(MemoryFault, match=r"store to what another program writes.*program \(1, 0, 0\).* 15 el"):
        copy(torch.empty(27), torch.randn(27), 27, 27, step=15)


def test_a_program_that_writes_what_another_reads():
    x = torch.randn(2)
    with pytest.raises(MemoryFault, match="conflict, load of what another program writes"):
        first_kernel[(2,)](x, x)
    with sanitizer.program_order(-1), pytest.raises(MemoryFault, match="conflict, store to what another program reads"):
        first_kernel[(2,)](x, x)
    first_kernel[(2,)](torch.empty(2), x)


def test_writing_in_place_is_no_conflict():
    x = torch.arange(27.0)
    copy(x, x, 27, 27)
    assert torch.equal(x, torch.arange(27.0))


def test_writing_twice():
    with pytest.raises(MemoryFault, match="written twice by one program"):
        twice_kernel[(1,)](torch.empty(16), BLOCK=16)
    with pytest.raises(MemoryFault, match="written twice by one store"):
        same_place_kernel[(1,)](torch.empty(8), BLOCK=16)


def test_atomics():
    total = torch.zeros(3, dtype=torch.int32)
    count_kernel[(5,)](total, None, 1)
    assert total.tolist() == [0, 5, 0]
    with pytest.raises(MemoryFault, match=r"out-of-view atomic.*argument total_ptr"):
        count_kernel[(1,)](total[:2], None, 2)
    with pytest.raises(MemoryFault, match="conflict, load of what another program writes"):
        count_kernel[(1,)](total, total, 0)
    lock = torch.zeros(2, dtype=torch.int32)
    exchange_kernel[(2,)](lock, 1)
    assert lock.tolist() == [0, 1]
    with pytest.raises(MemoryFault, match=r"out-of-view atomic.*argument lock_ptr"):
        exchange_kernel[(1,)](lock[:1], 1)


def test_a_plain_access_beside_an_atomic():
    total = torch.zeros(1, dtype=torch.int32)
    launch = by_hand(total=total)
    launch.load(*pointer(launch, total))
    launch.program = 2
    with pytest.raises(MemoryFault, match="conflict, atomic on what a plain access touches"):
        launch.atomic(*pointer(launch, total))


def test_tensor_descriptors():
    x, y = torch.randn(3, 16), torch.empty(3, 16)
    rows = [TensorDescriptor(t, [3, 16], [16, 1], [1, 16]) for t in (y, x)]
    with pytest.raises(MemoryFault, match=r"unwritten, 32 elements, the first at \[0, 0\].*argument y "):
        descriptor_kernel[(1,)](*rows, 2, BLOCK=16)
    far = TensorDescriptor(x[:2], [3, 16], [16, 1], [1, 16])  # describes a row that the view does not have
    with pytest.raises(MemoryFault, match=r"out-of-view load of 16 elements.*argument x \[2, 16\]"):
        descriptor_kernel[(1,)](rows[0], far, 2, BLOCK=16)


def test_views_of_different_widths_share_their_memory():
    memory = torch.zeros(64)
    y, x = memory[:16].view(torch.float16), memory[16:32].view(torch.float16)
    copy(y[:16], x[:16], 16, 16, programs=1)
    with pytest.raises(MemoryFault, match=r"conflict, load of what another program writes.*argument x_ptr \[1\]"):
        first_kernel[(2,)](memory.view(torch.float16)[2:4], memory[1:2])


def test_views_that_span_more_than_can_be_kept():
    storage = torch.zeros(0, dtype=torch.float16)
    storage.set_(torch.UntypedStorage(2 * (sanitizer._DENSE + 64)), 0, (sanitizer._DENSE + 64,), (1,))
    x = storage.as_strided((2, 16), (sanitizer._DENSE, 1)).zero_()
    y = torch.zeros(2, 16, dtype=torch.float16)
    matrix_kernel[(1,)](y, x, sanitizer._DENSE, ROWS=2, COLUMNS=16)
    with pytest.raises(MemoryFault, match=f"out-of-view load of 16 elements.* {sanitizer._DENSE // 2} elements"):
        matrix_kernel[(1,)](torch.zeros(2, 16, dtype=torch.float16), x, sanitizer._DENSE // 2, ROWS=2, COLUMNS=16)


def test_program_order():
    def seen():
        order = torch.zeros(6, dtype=torch.int32)
        order_kernel[(6,)](order, torch.zeros(1, dtype=torch.int32))
        return order.tolist()

    assert seen() == [0, 1, 2, 3, 4, 5]
    with sanitizer.program_order(-1):
        assert seen() == [5, 4, 3, 2, 1, 0]
    with sanitizer.program_order(3):
        shuffled = seen()
        assert shuffled == seen() != [0, 1, 2, 3, 4, 5] and sorted(shuffled) == [0, 1, 2, 3, 4, 5]
    assert seen() == [0, 1, 2, 3, 4, 5]


def test_a_fault_of_the_kernel_itself_is_not_hidden():
    from triton.runtime.interpreter import InterpreterError

    with pytest.raises(InterpreterError):
        copy(torch.empty(27), torch.randn(27), "27", 27)
    copy(torch.empty(27), torch.randn(27), 27, 27)


def test_a_mask_of_a_scalar_condition():
    x, y = torch.randn(16), torch.empty(16)
    scalar_mask_kernel[(1,)](y, x, 1, BLOCK=16)
    assert torch.equal(y, x)
    y = torch.zeros(16)
    scalar_mask_kernel[(1,)](y, x, 0, BLOCK=16)
    assert not y.any()
    with pytest.raises(Exception, match="out-of-view load of 6 elements"):
        scalar_mask_kernel[(1,)](y, x[:10], 1, BLOCK=16)


@pytest.mark.parametrize("order", (None, -1, 3))
def test_what_was_written_before_a_release_may_be_read_after_an_acquire(order):
    def run(semantics, late=False, parts=4):
        out, part, count = torch.empty(1), torch.empty(parts), torch.zeros(1, dtype=torch.int32)
        with sanitizer.program_order(order):
            hand_over_kernel[(parts,)](out, part, count, parts, SEM=semantics, LATE=late)
        assert out == parts

    run("acq_rel")
    for semantics, late in (("relaxed", False), ("acquire", False), ("release", False), ("acq_rel", True)):
        with pytest.raises(MemoryFault, match="conflict, load of what another program writes"):
            run(semantics, late)


def test_atomics_of_only_some_programs():
    total, lock = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitizer.only_programs(lambda count: [0, count - 1]):
        count_kernel[(5,)](total, None, 0)
        exchange_kernel[(5,)](lock, 0)
    assert total.item() == 2 and lock.item() == 1
