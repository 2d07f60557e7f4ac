"""Attention backward, the interpreted kernels: dq, dk and dv against float64, within the error budget of gradients.

Truth is autograd of the textbook formula in float64, eager autograd of the reference at the dtype. The output and the
LSE are those of the interpreted forward kernels.
"""

import math

import pytest
import torch
from support import properties
from support.attention_bwd import eager, exact, kernel_gradients, tiles
from support.budget import assert_within_budget
from vit_fast.kernels import configs, reference

import vit_fast
from vit_fast import ops

pytestmark = pytest.mark.interp
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")
WHOLE, LOOPED = tiles(16, 64), tiles(16, 16, queries=32)
BOTH = pytest.mark.parametrize("config", (WHOLE, LOOPED), ids=("whole", "looped"))


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.attention_bwd", reason="Triton is not installed")


def problem(batch, tokens, num_heads, head_size, dtype, keys=None, value_size=None, spread=1.0):
    """(grad, (qkv, None, None)), or with ``keys`` (grad, (q, k, v))."""

    def random(count, size, spread=1.0):
        return (torch.randn(batch, count, num_heads * size) * spread).to(dtype)

    if keys is None:
        return random(tokens, head_size), (random(tokens, 3 * head_size, spread), None, None)
    value_size = value_size or head_size
    tensors = random(tokens, head_size, spread), random(keys, head_size, spread), random(keys, value_size)
    return random(tokens, value_size), tensors


def check(grad, tensors, num_heads, scale, config=None, expected_zeros=0.1, **options):
    _, actual = kernel_gradients(grad, tensors, num_heads, scale, config, **options)
    golden = exact(grad, tensors, num_heads, scale, **options)
    eagers = eager(grad, tensors, num_heads, scale, **options)
    for one, other, truth, of in zip(actual, eagers, golden, (t for t in tensors if t is not None), strict=True):
        assert one.is_contiguous() and one.dtype == of.dtype and one.shape == of.shape
        assert_within_budget(one, other, truth, kind="gradient", expected_zeros=expected_zeros)
    return actual


def backward_of(kernels, tensors, num_heads, scale, config):
    """The gradients as a function of grad and, where given, other tensors of the same values; the forward runs once."""
    from vit_fast.kernels import attention

    forward = configs.AttentionConfig(16, 16, 4, 1)
    out, lse = attention.attention_fwd(tensors[0], num_heads, scale, k=tensors[1], v=tensors[2], config=forward)

    def run(grad, tensors=tensors):
        grads = kernels.attention_bwd(grad, tensors[0], num_heads, scale, *tensors[1:], out, lse, config=config)
        return list(grads[: 1 if tensors[1] is None else 3])

    return run


def same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_size"), ((2, 3, 16), (17, 2, 64), (50, 1, 12), (50, 1, 80), (65, 1, 32))
)
def test_vit_shapes(kernels, tokens, num_heads, head_size, dtype):
    check(*problem(1, tokens, num_heads, head_size, dtype), num_heads, head_size**-0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("arch", (80, 90))
def test_shipped_configs(kernels, monkeypatch, arch, dtype):
    """What an architecture would run, on both sides of each switch of tiles."""
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    for tokens, head_size in ((33, 64), (130, 16), (20, 72), (20, 96), (20, 144)):
        check(*problem(1, tokens, 1, head_size, dtype), 1, head_size**-0.5)


def test_every_shape_has_a_config_that_fits():
    for arch, limit in ((80, 99), (86, 99), (90, 227), (100, 227), (120, 99)):
        for head_size in range(1, 257):
            width = -(-head_size // 16) * 16
            for keys in (1, 50, 64, 65, 128, 129, 197, 256, 257, 4096):
                for dtype in DTYPES:
                    for special in (False, True):
                        picked = configs.pick_attention_bwd_config(keys, head_size, dtype, arch, special)
                        for part in (picked.by_keys, picked.by_queries):
                            assert min(part.block_m, part.block_n) >= 16 and part.num_warps in (4, 8)
                            steps = 2 * part.block_m * part.num_stages if part is picked.by_keys else 2 * part.block_m
                            on_chip = (steps + 2 * part.block_n) * width * dtype.itemsize
                            assert on_chip <= limit * 1024
                        if picked.by_keys.tma:
                            assert 128 < keys <= picked.by_keys.block_n == 256 and head_size in (16, 32, 64)
                            assert arch in (90, 100) and not special and dtype != torch.float32


@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
def test_head_sizes(kernels, config, dtype):
    every = dtype == torch.float32 or properties.FULL
    for head_size in (1, 8, 24, 64, 72, 88, 104, 112, 176, 256) if every else (8, 72, 176):
        check(*problem(1, 19, 1, head_size, dtype), 1, head_size**-0.5, config)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_queries_keys_and_values_may_differ_in_size(kernels, config, dtype):
    for queries, keys, value_size in ((1, 50, 24), (3, 40, 40), (37, 9, 16)):
        check(*problem(2, queries, 2, 24, dtype, keys, value_size), 2, 0.2, config, expected_zeros=0.7)


@BOTH
def test_one_key_has_all_the_weight(kernels, config):
    grad, (q, k, v) = problem(2, 20, 2, 24, torch.float32, 1)
    dq, dk, dv = kernel_gradients(grad, (q, k, v), 2, 0.2, config)[1]
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-4
    torch.testing.assert_close(dv, grad.sum(1, keepdim=True))


@BOTH
@pytest.mark.parametrize("scale", (-0.5, 1e-30, 3.0))
def test_any_scale(kernels, config, scale):
    for dtype in (torch.bfloat16, torch.float32):
        check(*problem(2, 20, 1, 40, dtype), 1, scale, config, expected_zeros=0.7)


@BOTH
def test_scale_zero(kernels, config):
    grad, (qkv, _, _) = problem(2, 20, 1, 40, torch.float32)
    (dqkv,) = check(grad, (qkv, None, None), 1, 0.0, config, expected_zeros=0.7)
    assert not dqkv[..., :80].any()


@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
def test_lengths_of_keys(kernels, config, dtype):
    """An image without keys, or of a length below zero, gives zeros; keys behind a length get zeros."""
    lengths = torch.tensor([20, 0, 17, -3, 99])
    for tensors in (problem(5, 35, 1, 16, dtype), problem(5, 5, 1, 16, dtype, 35, 24)):
        grads = check(*tensors, 1, 0.3, config, expected_zeros=0.7, key_lengths=lengths)
        for grad in grads:
            assert grad.isfinite().all() and not grad[1].any() and not grad[3].any()
    _, dk, dv = grads
    assert not dk[0, 20:].any() and not dv[2, 17:].any() and dk[0, :20].any()


@BOTH
def test_what_lies_behind_the_keys_is_not_read(kernels, config):
    grad, (q, k, v) = problem(2, 20, 1, 16, torch.float32, 35)
    lengths = torch.tensor([20, 3])
    expected = kernel_gradients(grad, (q, k, v), 1, 0.3, config, key_lengths=lengths)[1]
    k, v = k.clone(), v.clone()
    for image, length in enumerate(lengths.tolist()):
        k[image, length:], v[image, length:] = math.nan, math.nan
    same(kernel_gradients(grad, (q, k, v), 1, 0.3, config, key_lengths=lengths)[1], expected)


# Dropout


@pytest.mark.parametrize("seed", (0, 7, -1, 2**40 + 3, -(2**63)))
def test_the_mask_of_dropout_is_the_reference_s(kernels, monkeypatch, seed):
    """Uniform probabilities and values of one: the output is the mask, in the forward and in dv, however it is cut."""
    from vit_fast.kernels import attention

    batch, heads, queries, keys, p = 3, 2, 5, 16, 0.3
    seed = torch.tensor([seed])
    q, k = torch.zeros(batch, queries, heads * 16), torch.zeros(batch, keys, heads * 16)
    v = torch.eye(keys).repeat(1, heads).expand(batch, -1, -1)
    kept = reference.dropout_mask(seed, (batch, heads, queries, keys), p, q.device) > 0
    grad = torch.nn.functional.pad(torch.eye(queries), (0, 16 - queries)).repeat(1, heads).expand(batch, -1, -1)
    for limit in (2**31 - 1, 4):
        monkeypatch.setattr(attention, "_MAX_PROGRAMS", limit)
        monkeypatch.setattr(kernels, "_MAX_PROGRAMS", limit)
        options = dict(dropout_p=p, seed=seed)
        for config in (tiles(16, 16), tiles(32, 32)):
            out, grads = kernel_gradients(grad, (q, k, v), heads, 1.0, config, **options)
            assert torch.equal(out.unflatten(2, (heads, keys)).transpose(1, 2) != 0, kept)
            torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / keys / (1 - p)))
            dv = grads[2].unflatten(2, (heads, 16)).transpose(1, 2)
            assert torch.equal(dv[..., :queries].transpose(2, 3) != 0, kept)


@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
def test_dropout(kernels, config, dtype):
    options = dict(dropout_p=0.25, seed=torch.tensor([123456789012]))
    check(*problem(2, 35, 2, 16, dtype), 2, 0.3, config, **options)
    options |= dict(key_lengths=torch.tensor([35, 4]), expected_zeros=0.6)
    check(*problem(2, 5, 2, 16, dtype, 35, 24), 2, 0.3, config, **options)


def test_dropout_of_packed_sequences():
    """The mask of packed sequences is that of one image of all tokens."""
    from vit_fast.kernels import attention

    seed, p, tokens = torch.tensor([5]), 0.4, 32
    q = torch.zeros(1, tokens, 16)
    v = torch.eye(tokens).unsqueeze(0)
    bounds = torch.tensor([0, 5, 21, 32], dtype=torch.int32)
    config = configs.AttentionConfig(16, 16, 4, 1)
    out, _ = attention.attention_fwd(q, 1, 1.0, k=q, v=v, config=config, cu_seqlens=bounds, dropout_p=p, seed=seed)
    expected = reference.attention(q, 1, 1.0, k=q, v=v, cu_seqlens=bounds, dropout_p=p, seed=seed)
    torch.testing.assert_close(out, expected)


# Layouts, cuts, and what is wanted


def _layouts_of_a_gradient(grad):
    width = grad.shape[2]
    for layout in properties.LAYOUTS[1:]:
        yield layout, properties.laid_out(grad, layout)
    yield "slice of a concatenation", torch.cat([grad, grad], 2)[..., width:]
    yield "flipped copy", grad.flip(1).contiguous().flip(1)
    yield "offset by one element", torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view(grad.shape).copy_(grad)


@pytest.mark.parametrize("config", (WHOLE, LOOPED, tiles(16, 64, True)), ids=("whole", "looped", "tma"))
def test_layouts_of_the_incoming_gradient_do_not_change_a_bit(kernels, config):
    grad, tensors = problem(2, 18, 2, 16, torch.float16)
    run = backward_of(kernels, tensors, 2, 0.25, config)
    (expected,) = run(grad)
    for name, view in _layouts_of_a_gradient(grad):
        assert torch.equal(view, grad)
        assert torch.equal(run(view)[0], expected), name
    for view in (torch.ones(()).half().expand(grad.shape), grad[:1, :1].expand(grad.shape)):
        same(run(view), run(view.contiguous()))
    assert not run(torch.zeros_like(grad))[0].any()


@pytest.mark.parametrize("config", (WHOLE, LOOPED, tiles(16, 64, True)), ids=("whole", "looped", "tma"))
def test_layouts_of_the_inputs_do_not_change_a_bit(kernels, config):
    grad, (qkv, _, _) = problem(2, 18, 2, 16, torch.float32)
    run = backward_of(kernels, (qkv, None, None), 2, 0.25, config)
    expected = run(grad)
    for layout in properties.LAYOUTS[1:]:
        same(run(grad, (properties.laid_out(qkv, layout), None, None)), expected)
    separate = run(grad, properties.all_laid_out("axes swapped", *qkv.chunk(3, 2)))
    same([torch.cat(separate, 2)], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_descriptors_do_not_change_a_bit(kernels, monkeypatch, dtype):
    made = []
    shipped = kernels._descriptor
    monkeypatch.setattr(kernels, "_descriptor", lambda *args: made.append(args) or shipped(*args))
    grad, tensors = problem(2, 35, 2, 32, dtype)
    pointers = kernel_gradients(grad, tensors, 2, 0.1, tiles(16, 64))[1]
    assert not made
    same(kernel_gradients(grad, tensors, 2, 0.1, tiles(16, 64, True))[1], pointers)
    assert len(made) == 3


@BOTH
def test_batch_mates_and_program_counts_do_not_change_a_bit(kernels, monkeypatch, config):
    grad, (qkv, _, _) = problem(3, 35, 2, 16, torch.bfloat16)
    (expected,) = kernel_gradients(grad, (qkv, None, None), 2, 0.2, config)[1]
    for i in range(3):
        (alone,) = kernel_gradients(grad[i : i + 1], (qkv[i : i + 1], None, None), 2, 0.2, config)[1]
        assert torch.equal(alone[0], expected[i])
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 7)
    (again,) = kernel_gradients(grad, (qkv, None, None), 2, 0.2, config)[1]
    assert torch.equal(again, expected)


@BOTH
@pytest.mark.parametrize("packed", (True, False), ids=("packed", "separate"))
def test_only_what_is_wanted_is_computed(kernels, monkeypatch, config, packed):
    grad, tensors = problem(2, 35, 1, 16, torch.float32, None if packed else 35)
    from vit_fast.kernels import attention

    qkv, k, v = tensors
    out, lse = attention.attention_fwd(qkv, 1, 0.3, k=k, v=v)
    launched = []
    for name in ("_attention_bwd_kernel", "_attention_bwd_dq_kernel"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, _Counted(kernel, launched))
    call = lambda needs: kernels.attention_bwd(grad, qkv, 1, 0.3, k, v, out, lse, needs=needs, config=config)  # noqa: E731
    every = call(None)
    both = len(launched)
    assert both == (1 if config is WHOLE else 2)
    for q_wanted in (False, True):
        for k_wanted in (False, True):
            for v_wanted in (False, True):
                launched.clear()
                needs = [q_wanted, False, False] if packed else [q_wanted, k_wanted, v_wanted]
                grads = call(needs)
                same([g for g, need in zip(grads, needs) if need], [g for g, need in zip(every, needs) if need])
                assert all(g is None for g, need in zip(grads, needs) if not need)
                by_keys = (
                    (config is WHOLE and any(needs)) or (packed and q_wanted) or (not packed and (k_wanted or v_wanted))
                )
                assert len(launched) == by_keys + (q_wanted and config is LOOPED)


class _Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


def test_nothing_to_do_launches_nothing(kernels, monkeypatch):
    for name in ("_attention_bwd_kernel", "_attention_bwd_dq_kernel"):
        monkeypatch.setattr(kernels, name, None)
    for batch, queries, keys in ((0, 5, 5), (2, 0, 5)):
        q, k, lse = torch.ones(batch, queries, 32), torch.ones(batch, keys, 32), torch.ones(batch, 2, queries)
        dq, dk, dv = kernels.attention_bwd(q, q, 2, 0.3, k, k, q, lse)
        assert dq.shape == q.shape and dk.shape == dv.shape == k.shape and not dk.any() and not dv.any()
        dq, dk, dv = kernels.attention_bwd(q, q, 2, 0.3, k, k, q, lse, needs=[False, True, False])
        assert dq is dv is None and dk.shape == k.shape and not dk.any()


# Values


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@BOTH
@pytest.mark.parametrize("part", range(4), ids=("q", "k", "v", "grad"))
def test_nan_stays_in_its_image_and_head(kernels, config, part):
    grad, (qkv, _, _) = problem(2, 35, 3, 16, torch.float32)
    (expected,) = kernel_gradients(grad, (qkv, None, None), 3, 0.2, config)[1]
    sick = [qkv.clone(), grad.clone()]
    if part == 3:
        sick[1].view(2, 35, 3, 16)[1, 20, 1] = math.nan
    else:
        sick[0].view(2, 35, 3, 3, 16)[1, 20, part, 1] = math.nan
    (actual,) = kernel_gradients(sick[1], (sick[0], None, None), 3, 0.2, config)[1]
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 1] = False
    actual, expected = (t.view(2, 35, 3, 3, 16).permute(0, 3, 1, 2, 4) for t in (actual, expected))
    assert torch.equal(actual[others], expected[others])
    assert actual[1, 1].isnan().any()


@BOTH
def test_scores_far_below_zero(kernels, config):
    """A key that is not there would have a score of 0, whose probability is beyond float32 beside these. The LSE, about
    −150, has steps of 1.5e-5."""
    grad, (q, k, v) = problem(1, 18, 1, 16, torch.float32, 19)
    tensors = 3 + q.abs() / 9, -3 - k.abs() / 9, v
    actual = kernel_gradients(grad, tensors, 1, 1.0, config)[1]
    for one, golden in zip(actual, exact(grad, tensors, 1, 1.0), strict=True):
        torch.testing.assert_close(one.double(), golden, rtol=1e-2, atol=1e-2)


@BOTH
def test_extreme_values(kernels, config):
    for spread in (20.0, 1e-20):
        check(*problem(1, 35, 1, 64, torch.float32, spread=spread), 1, 0.125, config, expected_zeros=0.9)
    for dtype in (torch.float16, torch.bfloat16):  # a few channels far above the rest
        grad, (qkv, _, _) = problem(1, 35, 1, 64, dtype)
        qkv[..., 3], qkv[..., 64 + 3] = 64.0, 50.0
        check(grad, (qkv, None, None), 1, 0.125, config)
    for dtype in DTYPES:  # one key takes all the weight: dq and dk vanish, dv is the sum of the gradients
        grad, (qkv, _, _) = problem(1, 35, 1, 64, dtype)
        qkv[..., 3], qkv[..., 64 + 3], qkv[:, 5, 64 + 3] = 448.0, 30.0, 1880.0
        dq, dk, dv = kernel_gradients(grad, (qkv, None, None), 1, 0.125, config)[1][0].chunk(3, 2)
        assert dq.abs().max() <= 1880 * 0.125 * 1e-5 * 64 and dk.isfinite().all()
        assert not dv[:, torch.arange(35) != 5].any()
        torch.testing.assert_close(dv[:, 5].double(), grad.double().sum(1), rtol=1e-2, atol=0.2)
    grad, equal = torch.ones(1, 35, 64), torch.ones(1, 35, 192)
    dq, dk, dv = kernel_gradients(grad, (equal, None, None), 1, 0.125, config)[1][0].chunk(3, 2)
    assert dq.abs().max() < 1e-4 and dk.abs().max() < 1e-4
    torch.testing.assert_close(dv, torch.ones_like(dv))


# Through the operator


def test_options_before_the_scores(kernels):
    """Norms of heads and rotary embedding, with lengths and dropout, against the closed formulas of the reference."""
    from vit_fast.kernels import attention

    w, b, angle = torch.randn(24).double(), torch.randn(24).double(), torch.randn(16, 24).double()
    rope = dict(rope=(angle.cos(), angle.sin()), num_prefix=1)
    norms = dict(q_norm=(w, b, 1e-5), k_norm=(w, None, 1e-6))
    grad, packed = problem(2, 17, 2, 24, torch.float64)
    for tensors in (packed, (*packed[0].chunk(3, 2),)):
        for options in (
            rope | dict(rope_layout="interleaved"),
            rope | norms | dict(key_lengths=torch.tensor([5, 17])),
            norms | dict(norm="rms"),
            dict(k_norm=norms["k_norm"]),
        ):
            qkv, k, v = tensors
            out, lse = attention.attention_fwd(qkv, 2, 0.2, k=k, v=v, **options)
            actual = kernels.attention_bwd(grad, qkv, 2, 0.2, k, v, out, lse, config=LOOPED, **options)
            expected = reference.attention_bwd(grad, qkv, 2, 0.2, k, v, out, lse, **options)
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_reasons(kernels):
    reasons = kernels.backward_not_supported_reasons
    qkv, table = torch.ones(1, 4, 48), torch.ones(1)
    assert reasons(qkv, 1) == [] == reasons(qkv, 1, key_lengths=table, rope=(table, table), dropout_p=0.1, seed=table)
    for name in ("bias", "rel_pos", "cu_seqlens"):
        assert reasons(qkv, 1, **{name: table}) == [f"the backward of attention has no {name}"]


@pytest.mark.parametrize("tokens", (5, 130), ids=("whole", "looped"))
def test_gradcheck_through_both_kernels(kernels, tokens):
    tensors = [torch.randn(1, n, 2 * 3, dtype=torch.float64, requires_grad=True) for n in (2, tokens, tokens)]
    with vit_fast.backend("triton"):
        assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, 2, 0.4, k=k, v=v), tensors, fast_mode=True)
        if tokens == 5:
            qkv = torch.randn(1, tokens, 18, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(lambda qkv: ops.attention(qkv, 2, -0.4), [qkv], fast_mode=True)
