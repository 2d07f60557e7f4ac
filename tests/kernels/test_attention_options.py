"""Options of attention: the reference twin against float64, the interpreted kernel, its edges, and what autograd gives.

Random cases and metamorphic properties are in ``test_properties_attention_options.py``.
"""

import math
import mmap

import pytest
import torch
from support import properties
from support.attention_options import formula, heads
from support.budget import assert_within_budget
from vit_fast.kernels import configs, reference

import vit_fast
from vit_fast import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.attention", reason="Triton is not installed")


def tensor(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, dtype=torch.float64, device=device).to(dtype)


def tables(*shape, dtype=torch.float64, device="cpu"):
    angle = 3 * torch.randn(*shape, dtype=torch.float64, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def options(tokens, heads, size, dtype=torch.float64, device="cpu"):
    """name → options for two images of a number of tokens, a multiple of 4."""
    wide = torch.promote_types(dtype, torch.float32)

    def t(*shape, dtype=dtype):
        return tensor(*shape, dtype=dtype, device=device)

    def rope(*shape):
        return tables(*shape, dtype=wide, device=device)

    grid = (t(2, heads, tokens, 4), t(2, heads, tokens, tokens // 4))
    norm = t(size, dtype=wide), t(size, dtype=wide), 1e-5
    masked = t(1, 1, tokens, tokens)
    masked[..., ::3] = -math.inf
    masked[:, :, 2] = -math.inf
    lengths = torch.tensor([tokens - 3, 0], device=device)
    return {
        "rope": dict(rope=rope(tokens - 1, size), num_prefix=1),
        "interleaved rope of images": dict(rope=rope(2, 1, tokens, size), rope_layout="interleaved"),
        "rope of heads, norms": dict(rope=rope(heads, tokens, size), q_norm=norm, k_norm=(norm[0], None, 1e-6)),
        "RMSNorm": dict(q_norm=norm, k_norm=(norm[0], None, 1e-6), norm="rms"),
        "norm of k alone, without weight": dict(k_norm=(None, None, 1e-6)),
        "bias": dict(bias=t(1, heads, tokens, tokens)),
        "masking bias": dict(bias=masked),
        "rel_pos": dict(rel_pos=grid),
        "key_lengths": dict(key_lengths=lengths),
        "all": dict(
            rope=rope(tokens - 2, size), rope_layout="interleaved", num_prefix=2, q_norm=norm, k_norm=norm, norm="rms",
            bias=t(2, 1, 1, tokens), rel_pos=grid, key_lengths=lengths.int() + 2,
        ),
    }  # fmt: skip


NAMES = tuple(options(4, 1, 2))
SEQUENCES = torch.tensor([0, 3, 3, 20, 36], dtype=torch.int32)


def check(actual, qkv, num_heads, scale, k=None, v=None, **given):
    """Within the budget; float32 results may differ by what another order of sums does to scores."""
    eager = reference.attention_fwd(qkv, num_heads, scale, k=k, v=v, **given)
    golden = formula(qkv, num_heads, scale, k, v, **given)
    q, keys, values = (t.abs() for t in heads(qkv, num_heads, k, v, **given))
    change = 2.0**-21 * (abs(scale) * (q @ keys.transpose(-2, -1)).max().item() + 8)
    orders = change * values.max().item(), change
    for came, of_eager, true, order in zip(actual, eager, golden, orders, strict=True):
        empty = true == -math.inf  # the LSE of a query without keys
        assert torch.equal(came == -math.inf, empty)
        came, of_eager, true = (t.masked_fill(empty, 0.0) for t in (came, of_eager, true))
        assert_within_budget(came, of_eager, true, expected_zeros=0.6, order=order)


# The reference


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_formula(name):
    given = options(12, 3, 8)[name]
    qkv = tensor(2, 12, 72)
    q, k, v = qkv.chunk(3, 2)
    for arguments in ((qkv, None, None), (q, k, torch.cat([v, v], 2))):
        out, lse = reference.attention_fwd(arguments[0], 3, 0.3, k=arguments[1], v=arguments[2], **given)
        golden, golden_lse = formula(arguments[0], 3, 0.3, *arguments[1:], **given)
        torch.testing.assert_close(out, golden, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, golden_lse, rtol=1e-12, atol=1e-12)


def test_reference_of_sequences_is_the_formula(monkeypatch):
    qkv, rope = tensor(1, 36, 72), tables(36, 8)
    golden, _ = formula(qkv, 3, 0.3, cu_seqlens=SEQUENCES, rope=rope)
    one_by_one = reference.attention(qkv, 3, 0.3, cu_seqlens=SEQUENCES, rope=rope)
    monkeypatch.setattr(reference, "known_values", lambda tensor: None)
    masked = reference.attention(qkv, 3, 0.3, cu_seqlens=SEQUENCES, rope=rope)
    for out in (one_by_one, masked):
        torch.testing.assert_close(out, golden, rtol=1e-12, atol=1e-12)
    some = torch.tensor([2, 20, 30], dtype=torch.int32)  # on a GPU nobody looks: tokens of no sequence give zeros
    out = reference.attention(qkv, 3, 0.3, cu_seqlens=some, rope=rope)
    assert not out[:, :2].any() and not out[:, 30:].any() and out[:, 2:30].all()


@pytest.mark.parametrize("layout", ("half", "interleaved"))
def test_rotary_embedding_is_that_of_timm(layout):
    """Bit for bit, with the tables that timm makes."""
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    rope = layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[3, 4], rotate_half=layout == "half")
    embed = rope.get_embed()
    sin, cos = embed.chunk(2, -1)
    x = torch.randn(2, 3, 13, 16)
    rest = layers.apply_rot_embed_cat(x[:, :, 1:], embed, half=layout == "half")
    assert torch.equal(reference.rotary(x, (cos, sin), layout, 1), torch.cat([x[:, :, :1], rest], 2))


def test_lengths_that_leave_out_no_key_cost_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(reference, "attention", lambda *arguments, **given: asked.append(given.get("key_lengths")))
    for lengths in ([5, 5], [6, 9], [5, 4]):
        ops.attention(torch.ones(2, 5, 24), 2, 0.5, key_lengths=torch.tensor(lengths))
    assert asked[:2] == [None, None] and asked[2].tolist() == [5, 4]


# The interpreted kernel


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs(kernels, monkeypatch, name, dtype):
    """Every option through what each architecture would run."""
    for arch, size in ((80, 64), (90, 72), (100, 32)):
        monkeypatch.setattr(configs, "arch_of", lambda device, arch=arch: arch)
        given = options(20, 1, size, dtype)[name]
        qkv = tensor(2, 20, 3 * size, dtype=dtype)
        check(kernels.attention_fwd(qkv, 1, 0.2, **given), qkv, 1, 0.2, **given)


@pytest.mark.interp
@pytest.mark.parametrize("layout", ("half", "interleaved"))
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
def test_head_sizes(kernels, layout, dtype):
    wide, tiles = torch.promote_types(dtype, torch.float32), configs.AttentionConfig(32, 32, 4, 1)
    every = dtype == torch.float32 or properties.FULL
    for size in (2, 6, 16, 40, 64, 72, 80, 88, 96, 104, 112, 128, 176, 240, 256) if every else (6, 72, 176):
        given = dict(rope=tables(33, size, dtype=wide), rope_layout=layout, norm="rms" if size % 16 else "layer")
        given |= dict(q_norm=(tensor(size, dtype=wide), None, 1e-6), k_norm=(None, tensor(size, dtype=wide), 1e-6))
        qkv = tensor(1, 33, 3 * size, dtype=dtype)
        out = kernels.attention_fwd(qkv, 1, size**-0.5, config=tiles, **given)
        check(out, qkv, 1, size**-0.5, **given)


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("count", (1, 2, 7, 64, 65))
def test_every_sequence_is_found(kernels, count):
    """Lengths of nothing, of one, of a block, of a block and one: each query block has one program."""
    lengths = [(0, 1, 16, 17, 3, 32, 0)[i % 7] for i in range(count)] or [5]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(bounds[-1]) or 4
    bounds[-1] = tokens
    qkv = tensor(1, tokens, 24, dtype=torch.float32)
    out, lse = kernels.attention_fwd(qkv, 1, 0.3, cu_seqlens=bounds, config=configs.AttentionConfig(16, 16, 4, 1))
    golden, golden_lse = formula(qkv, 1, 0.3, cu_seqlens=bounds)
    torch.testing.assert_close(out.double(), golden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), golden_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("bounds", ([5, 9], [0, -7, 99], [9, 9], [0, 3, 99]))
def test_wrong_sequences_stay_inside_the_tensors(kernels, bounds):
    """Nobody checks values on a GPU: the memory sanitizer sees no access outside, and the call ends."""
    qkv = tensor(1, 36, 24, dtype=torch.float32)
    out, _ = kernels.attention_fwd(qkv, 1, 0.3, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    assert out.isfinite().all()


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_batches_are_cut_with_their_tables(kernels, monkeypatch):
    given = options(20, 2, 16, torch.float32)["all"] | dict(bias=tensor(3, 1, 1, 20, dtype=torch.float32))
    given |= dict(
        rel_pos=(tensor(3, 2, 20, 4).float(), tensor(3, 2, 20, 5).float()), key_lengths=torch.tensor([9, 0, 20])
    )
    given |= dict(rope=tables(3, 1, 18, 16, dtype=torch.float32))
    qkv = tensor(3, 20, 96, dtype=torch.float32)
    whole = kernels.attention_fwd(qkv, 2, 0.3, **given)
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 2)
    for part, of_whole in zip(kernels.attention_fwd(qkv, 2, 0.3, **given), whole, strict=True):
        assert torch.equal(part, of_whole)


@pytest.mark.interp
def test_offsets_beyond_two_to_the_31(kernels):
    """The memory is reserved, not used: only the pages that are touched exist."""
    step, tiles = 2**31 + 64, configs.AttentionConfig(16, 16, 4, 1)
    qkv, bias = tensor(2, 5, 96, dtype=torch.float16), tensor(2, 2, 5, 5, dtype=torch.float16)
    rope = tables(2, 2, 5, 16, dtype=torch.float16)
    expected = kernels.attention_fwd(qkv, 2, 0.25, bias=bias, rope=rope, config=tiles)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, 2 * (4 * step + 4096), flags=flags) as memory:
        storage = torch.frombuffer(memory, dtype=torch.float16)
        for axis in range(4):
            strides = [4096, 1024, 32, 1]
            strides[axis] = step if axis < 2 else step // 4 * 3 if axis == 2 else step // 6
            far = torch.as_strided(storage, bias.shape, strides).copy_(bias)
            again = kernels.attention_fwd(qkv, 2, 0.25, bias=far, rope=rope, config=tiles)
            assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
            if axis == 3:
                strides[axis] = step // 15
            far = torch.as_strided(storage, rope[0].shape, strides).copy_(rope[0])
            again = kernels.attention_fwd(qkv, 2, 0.25, bias=bias, rope=(far, rope[1]), config=tiles)
            assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
        del storage, far


@pytest.mark.interp
def test_a_head_of_v_may_be_of_another_size(kernels):
    for value_size, dtype in ((8, torch.float32), (48, torch.bfloat16), (80, torch.float16), (256, torch.float32)):
        q, k = tensor(2, 2, 21, 48, dtype=dtype)
        v = tensor(2, 21, 2 * value_size, dtype=dtype)
        check(kernels.attention_fwd(q, 2, 0.2, k=k, v=v), q, 2, 0.2, k, v)
    assert kernels.not_supported_reasons(q, 2, k=k, v=tensor(2, 21, 520)) == ["head size 260 is above 256"]


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_gradients_through_the_kernel():
    """Of every tensor, with an image without keys, whose gradients are zero."""
    tokens = 12
    x = tensor(2, tokens, 48, dtype=torch.float32)
    given = options(tokens, 2, 8, torch.float32)["all"] | dict(key_lengths=torch.tensor([9, 0]))
    leaves = {}

    def leaf(name, t):
        leaves[name] = t.detach().clone().requires_grad_()
        return leaves[name]

    for name in ("rope", "rel_pos"):
        given[name] = tuple(leaf(f"{name} {i}", t) for i, t in enumerate(given[name]))
    for name in ("q_norm", "k_norm"):
        given[name] = (leaf(f"{name} weight", given[name][0]), leaf(f"{name} bias", given[name][1]), 1e-5)
    given["bias"], qkv = leaf("bias", given["bias"]), leaf("qkv", x)
    grads = {}
    for backend in ("triton", "torch"):
        with vit_fast.backend(backend):
            out = ops.attention(qkv, 2, 0.3, **given)
            weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
            grads[backend] = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    for name, came, wanted in zip(leaves, grads["triton"], grads["torch"], strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert not grads["triton"][list(leaves).index("qkv")][1].any()


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_autocast(dtype):
    qkv, rope = torch.randn(1, 8, 48), tables(8, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype), vit_fast.backend("triton"):
        out = ops.attention(qkv, 1, 0.25, rope=rope)
    assert out.dtype == dtype
    expected = reference.attention(qkv.to(dtype), 1, 0.25, rope=rope)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


# On the chip


@pytest.mark.gpu
@pytest.mark.parametrize("size", (64, 72, 80, 128))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", NAMES)
def test_gpu_options(kernels, name, dtype, size):
    given = options(260, 4, size, dtype, "cuda")[name]
    qkv = tensor(2, 260, 12 * size, dtype=dtype, device="cuda")
    out = kernels.attention_fwd(qkv, 4, size**-0.5, **given)
    check(out, qkv, 4, size**-0.5, **given)
    again = kernels.attention_fwd(qkv, 4, size**-0.5, **given)
    assert all(torch.equal(*pair) for pair in zip(out, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_gpu_sequences(kernels, dtype):
    lengths = [0, 1, 196, 128, 129, 1000, 64, 3]
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    tokens = sum(lengths)
    qkv, rope = (
        tensor(1, tokens, 768, dtype=dtype, device="cuda"),
        tables(tokens, 64, dtype=torch.float32, device="cuda"),
    )
    given = dict(cu_seqlens=bounds, rope=rope)
    out = kernels.attention_fwd(qkv, 4, 0.125, **given)
    check(out, qkv, 4, 0.125, **given)
    alone = kernels.attention_fwd(qkv[:, 1:197], 4, 0.125, rope=tuple(t[1:197] for t in rope))
    assert torch.equal(alone[0], out[0][:, 1:197])
