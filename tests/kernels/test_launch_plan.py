"""kernels/launch_plan.py: a plan launches what the function launches, on memory of its own call.

Interpreted, plans are repeated on other inputs and held to the function bit for bit. With a stand-in for Triton's
driver (``support/stand_in_driver.py``) the launches themselves are compared, argument by argument, and what makes a
new plan.
"""

import threading
from pathlib import Path

import pytest
import torch
from support import sanitizer
from support.fp8_blocks import quantised
from support.prepared_blocks import EPS, HEADS, SCALE, block, prepared
from support.stand_in_driver import LAUNCHED, in_child, pretend
from vit_fast.kernels.block_options import PLAIN, BlockOptions

pytest.importorskip("triton", reason="Triton is not installed")

WORDS = (HEADS, SCALE, "gelu", *EPS)
CHOSEN = (True, False, "partials")  # PDL, tiles in reverse, row statistics: what capability 9.0 takes for few rows
BF16 = torch.bfloat16
LAYOUTS = {
    "contiguous": lambda shape: torch.randn(shape),
    "tail": lambda shape: torch.randn(shape[0], shape[1] + 2, shape[2])[:, 2:],
    "swapped": lambda shape: torch.randn(shape[1], shape[0], shape[2]).transpose(0, 1),
}


def weights_of(width=48, hidden=96, depth=2, dtype=BF16):
    return prepared([block(width, hidden, "gelu", dtype) for _ in range(depth)])


def recorded(function, x, *arguments):
    """The plan; fresh memory is not poisoned meanwhile, which would be more than an allocation."""
    from vit_fast.kernels import launch_plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanitizer, "poison", lambda tensor: tensor)
        out, plan = launch_plan.record(function, x, *arguments)
    assert out.shape == x.shape
    return plan


@pytest.mark.interp
@pytest.mark.parametrize("layout,form", (*((layout, "partials") for layout in LAYOUTS), ("tail", "finalised")))
def test_a_plan_gives_the_bits_of_the_function(layout, form, monkeypatch):
    """Of plain blocks, whose statistics are partials, and of blocks with inner norms."""
    from vit_fast.kernels import configs, prepared_blocks

    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: 132)  # split-K, whose semaphores must be zeros
    # Two programs share a K loop from 12 steps on, that of fc2.
    weights, shape = weights_of(hidden=768), (2, 9, 48)
    options = PLAIN if form == "partials" else BlockOptions(out_eps=1e-6, hidden_eps=1e-5)
    arguments = (weights, *WORDS, options, False, True, form)
    plan = recorded(prepared_blocks._run, LAYOUTS[layout](shape).to(BF16), *arguments)
    assert any(dict(zip(kernel._kernel.arg_names, args)).get("SPLIT_K", 1) > 1 for kernel, _, args in plan._launches)
    kept = [LAYOUTS[layout](shape).to(BF16) for _ in range(2)]
    got = [plan(x) for x in kept]
    for x, y in zip(kept, got):
        assert torch.equal(y, prepared_blocks._run(x, *arguments))


@pytest.mark.interp
def test_a_plan_in_float8():
    from vit_fast.kernels import fp8_blocks

    weights = quantised([block(48, 64, "gelu", BF16) for _ in range(2)], "gelu")
    x, other = torch.randn(2, 2, 5, 48).to(BF16).unbind()
    plan = recorded(fp8_blocks._run, x, weights, *WORDS, PLAIN, False)
    assert torch.equal(plan(other), fp8_blocks._run(other, weights, *WORDS, PLAIN, False))


# in a process of their own


def launches(call):
    """What a call launches: (kernel, arguments), with the grid and the arguments of descriptors among them."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr()
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        if hasattr(value, "block_shape"):
            return value.base.data_ptr(), list(value.shape), list(value.strides), value.block_shape
        return value

    LAUNCHED.clear()
    out = call()
    found = []
    for kernel, (*grid_and_stream, first) in ((kernel, (*launch[:4], launch[4:])) for kernel, launch in LAUNCHED):
        args = first[5:] if first[:1] == (kernel.function,) and first[1:2] == (kernel.packed_metadata,) else first
        found.append((kernel, tuple(grid_and_stream), [plain(value) for value in args]))
    return out, found


def fixed(found, weights):
    """Launches with every address but those of weights left out: which memory it is, the interpreted tests show."""
    held = {weight.data_ptr() for weight in weights}

    def name(value):
        if isinstance(value, (tuple, list)):
            return tuple(map(name, value))
        if isinstance(value, int) and value > 2**32 and value not in held:
            return "memory"
        return value

    return [(kernel, grid, name(args)) for kernel, grid, args in found]


def calls(weights, x, options=PLAIN):
    from vit_fast.kernels import prepared_blocks

    return launches(lambda: prepared_blocks.prepared_blocks(x, weights, *WORDS, options))


def child_what_configs_decide_makes_a_plan_of_its_own():
    pretend()
    from vit_fast.kernels import configs, launch_plan

    weights, x = weights_of(64, 256, depth=1), torch.randn(2, 17, 64).to(BF16)
    changes = (
        {},
        {"use_pdl": lambda rows, arch: False},
        {"alternate_tile_order": lambda rows: True},
        {"pick_stack_config": lambda rows, width, arch: configs.StackConfig("finalised")},
    )
    for plans, change in enumerate(changes, 1):
        for name, rule in change.items():
            setattr(configs, name, rule)
        for _ in range(2):
            calls(weights, x)
            assert len(launch_plan._plans) == plans


def test_what_configs_decide_makes_a_plan_of_its_own():
    in_child(Path(__file__), "child_what_configs_decide_makes_a_plan_of_its_own")


def child_a_plan_launches_the_same():
    pretend()
    from vit_fast.kernels import launch_plan, prepared_blocks

    weights, x = weights_of(64, 256, depth=1), torch.randn(2, 17, 64).to(BF16)
    _, wanted = launches(lambda: prepared_blocks._run(x, weights, *WORDS, PLAIN, *CHOSEN))
    _, first = calls(weights, x)
    assert len(launch_plan._plans) == 1 and fixed(first, weights) == fixed(wanted, weights)
    for _ in range(6):
        y = torch.randn(2, 17, 64).to(BF16)
        out, again = calls(weights, y)
        assert fixed(again, weights) == fixed(wanted, weights)
        assert again[0][2][1] == y.data_ptr(), "the first launch reads x"
        assert any(out.data_ptr() in args for _, _, args in again[-1:]), "the last launch writes the result"
        del y
    (plan,) = launch_plan._plans.values()
    assert 1 <= len(plan._bound) <= launch_plan.MAX_ADDRESSES


def child_places_that_are_needed_at_once_do_not_overlap():
    pretend()
    from vit_fast.kernels import launch_plan

    weights, x = weights_of(64, 256, depth=6), torch.randn(3, 50, 64).to(BF16)
    calls(weights, x)
    (plan,) = launch_plan._plans.values()
    storages = {}
    for number, (_, _, args) in enumerate(plan._launches):
        stack = list(args)
        while stack:
            value = stack.pop()
            if isinstance(value, launch_plan._Argument) and value.storage.base == launch_plan._ARENA:
                storages.setdefault(value.storage, []).append(number)
            elif isinstance(value, tuple):
                stack += [part for part in value if part is not None]
    assert len(storages) > 20
    for a, uses in storages.items():
        assert a.offset % 512 == 0 and a.offset + a.size <= plan.arena_bytes
        for b, others in storages.items():
            together = a is not b and uses[0] <= others[-1] and others[0] <= uses[-1]
            if together:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
    # Blocks share their places: no more than of two blocks in all.
    assert plan.arena_bytes <= sum(s.size + 512 for s in storages) / 3


def child_changes_make_a_new_plan():
    pretend()
    from vit_fast.kernels import configs, launch_plan, prepared_blocks

    weights, x = weights_of(64, 256), torch.randn(2, 17, 64).to(BF16)

    def plans(*arguments):
        calls(*arguments)
        return len(launch_plan._plans)

    assert plans(weights, x) == plans(weights, x.clone()) == 1
    assert plans(weights, x[:1]) == 2
    assert plans(weights, torch.randn(2, 19, 64).to(BF16)[:, 2:]) == 3  # strides
    unaligned = torch.randn(2 * 17 * 64 + 1).to(BF16)[1:].view(2, 17, 64)
    assert plans(weights, unaligned) == 4
    other = list(weights)
    other[3] = other[3].clone()
    assert plans(other, x) == 5
    weights[3].data = weights[3].t().contiguous().t()  # same object, other strides
    assert plans(weights, x) == 6
    with_options = BlockOptions(hidden_eps=1e-6)
    assert plans(weights, x, with_options) == 7
    bias = torch.zeros(1, 1, 17, 17, dtype=BF16)
    assert plans(weights, x, BlockOptions(bias=bias)) == 7, "options with tensors are not planned"
    prepared_blocks.prepared_blocks(x, weights, HEADS, 2 * SCALE, *WORDS[2:])
    assert len(launch_plan._plans) == 8
    shipped = configs.pick_stack_config
    configs.pick_stack_config = lambda *args: configs.StackConfig("finalised")
    assert plans(weights, x) == 9
    configs.pick_stack_config = shipped
    launch_plan.MAX_PLANS = 3
    assert plans(weights, x[:1, :5]) == 3
    assert plans(weights, x[:0]) == 3


def child_what_is_more_than_launches_is_not_planned():
    pretend()
    from vit_fast.kernels import launch_plan, prepared_blocks

    weights = weights_of(64, 256, depth=1)
    x = torch.randn(4, 34, 64).to(BF16)[::2, ::2]  # two strides
    assert x.stride() != x.contiguous().stride()
    calls(weights, x)
    assert None not in launch_plan._plans.values()
    odd = torch.randn(2, 17, 128).to(BF16)[..., ::2]

    def copies(x, weights, *arguments):
        return prepared_blocks._run(x + 1, weights, *arguments)

    for _ in range(2):
        found = launches(lambda: launch_plan.planned(copies, x, weights, *WORDS, PLAIN, *CHOSEN))[1]
        assert len(found) == 6
    assert list(launch_plan._plans.values())[-1] is None
    for _ in range(2):
        assert launches(lambda: launch_plan.planned(lambda x, weights: x, x, weights))[1] == []
    calls(weights, odd)


def child_threads_do_not_meet():
    pretend()
    from vit_fast.kernels import prepared_blocks

    weights, x = weights_of(64, 256), torch.randn(2, 17, 64).to(BF16)
    calls(weights, x)
    failed = []

    def work():
        try:
            for _ in range(50):
                prepared_blocks.prepared_blocks(x, weights, *WORDS)
                prepared_blocks.prepared_blocks(x[:1], weights, *WORDS)
        except Exception as error:  # shown below
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert len(LAUNCHED) == 11 + 4 * 50 * 22


def child_warmup_finds_the_kernels_of_a_plan():
    pretend()
    import vit_fast

    model = vit_fast.VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2, num_classes=5).eval().bfloat16()
    vit_fast.prepare(model)
    with torch.inference_mode():
        for _ in range(2):
            model(torch.zeros(1, 3, 32, 32).bfloat16())
    LAUNCHED.clear()
    record = vit_fast.warmup(model, (1,))
    assert not LAUNCHED and not record.kernels and record.ready > 5


@pytest.mark.parametrize("name", [name for name in list(globals()) if name.startswith("child_")])
def test_launches(name):
    in_child(Path(__file__), name)
