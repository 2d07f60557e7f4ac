"""Attention forward: the reference twin, the interpreted kernels, the kernels on a GPU.

Truth is the textbook formula in float64 on the same rounded inputs; tolerances are those of ``budget.py``, eager being
``reference.attention``. Tokens and head sizes are ViT's ugly ones: one past a power of two (17, 257, 577), below it
(50, 197), head sizes that are no power of two. The interpreter's cost goes with programs × key steps, hence few heads.
"""

import math
import mmap

import pytest
import torch
from support import properties
from support.attention import formula
from support.budget import assert_within_budget
from vit_fast.kernels import configs, reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPE_IDS = ("float16", "bfloat16", "float32")


@pytest.fixture
def kernels():
    return pytest.importorskip("vit_fast.kernels.attention", reason="Triton is not installed")


def random_qkv(batch, tokens, num_heads, head_size, dtype, spread=1.0, device="cpu"):
    x = torch.randn(batch, tokens, 3 * num_heads * head_size, device=device)
    return (x * spread).to(dtype)


def check(kernels, qkv, num_heads, scale, k=None, v=None, config=None, expected_zeros=0.1):
    out, lse = kernels.attention_fwd(qkv, num_heads, scale, k=k, v=v, config=config)
    golden, golden_lse = formula(qkv, num_heads, scale, k, v)
    eager, eager_lse = reference.attention_fwd(qkv, num_heads, scale, k=k, v=v)
    assert out.is_contiguous() and lse.is_contiguous()
    assert out.dtype == qkv.dtype and lse.dtype == eager_lse.dtype
    assert_within_budget(out, eager, golden.to(out.device), expected_zeros=expected_zeros)
    assert_within_budget(lse, eager_lse, golden_lse.to(out.device), expected_zeros=expected_zeros)
    return out, lse


def config(block_m, block_n, tma=False):
    return configs.AttentionConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2, tma=tma)


RESIDENT, STREAMING = config(32, 0), config(32, 32)
BOTH = pytest.mark.parametrize("tiles", (RESIDENT, STREAMING), ids=("resident", "streaming"))


# The reference


@pytest.mark.parametrize("scale", (0.125, -0.3, 0.0))
def test_reference_is_the_formula(scale):
    qkv = random_qkv(2, 17, 3, 24, torch.float64)
    q, k, v = (
        random_qkv(2, 5, 3, 24, torch.float64)[..., :72],
        *random_qkv(2, 9, 3, 24, torch.float64)[..., 72:].chunk(2, 2),
    )
    for args in ((qkv, None, None), (q, k, v)):
        out, lse = reference.attention_fwd(args[0], 3, scale, k=args[1], v=args[2])
        golden, golden_lse = formula(args[0], 3, scale, *args[1:])
        torch.testing.assert_close(out, golden, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, golden_lse, rtol=1e-12, atol=1e-12)


# The tiling


def test_key_chunks_cover_the_keys(kernels):
    for keys in range(1, 273):
        chunks = kernels._key_chunks(keys)
        widths = [width for _, width in chunks]
        assert [first for first, _ in chunks] == [sum(widths[:i]) for i in range(len(widths))]
        assert all(width in (16, 32, 64, 128) for width in widths) and len(widths) <= 3
        assert sum(widths) - widths[-1] < keys <= sum(widths) < keys + 32
    assert [width for _, width in kernels._key_chunks(197)] == [128, 64, 16]
    assert [width for _, width in kernels._key_chunks(257)] == [128, 128, 16]


def test_head_slices_pad_to_the_next_16_only(kernels):
    for head_size in range(1, 257):
        parts = kernels._head_slices(head_size)
        widths = [width for _, width in parts]
        assert [first for first, _ in parts] == [sum(widths[:i]) for i in range(len(widths))]
        assert all(width in (16, 32, 64, 128, 256) for width in widths) and len(widths) <= 3
        assert sum(widths) == (256 if 224 < head_size <= 240 else -(-head_size // 16) * 16)
    assert [width for _, width in kernels._head_slices(80)] == [64, 16]
    assert [width for _, width in kernels._head_slices(104)] == [64, 32, 16]


@pytest.mark.parametrize("arch", (80, 86, 90, 100, 120))
def test_every_shape_has_a_config_whose_keys_fit(kernels, arch):
    """Resident keys stay within the chunks that exist, and two dots never see a K below 16."""
    limit = 227 * 1024 if arch in (90, 100) else 99 * 1024
    for head_size in range(1, 257):
        width = sum(part for _, part in kernels._head_slices(head_size))
        for queries, keys in ((1, 300), (1, 1), (17, 17), (50, 50), (197, 197), (257, 257), (577, 577), (4000, 4000)):
            for dtype in DTYPES:
                tiles = configs.pick_attention_config(queries, keys, head_size, dtype, False, arch)
                on_chip = tiles.block_n * tiles.num_stages
                if tiles.block_n == 0:
                    assert keys <= 272
                    on_chip = sum(chunk for _, chunk in kernels._key_chunks(keys))
                else:
                    assert tiles.block_n >= 16
                assert tiles.block_m >= 16
                assert (2 * on_chip + tiles.block_m) * width * dtype.itemsize <= limit


def test_256_tokens_of_72_channels_stay_on_chip_without_lse():
    def pick(*size, arch=90, **words):
        return configs.pick_attention_config(*size, torch.bfloat16, False, arch, **words).block_n == 0

    assert pick(256, 256, 72, lse=False) and pick(256, 209, 72, lse=False)
    assert not pick(256, 256, 72) and not pick(256, 256, 80, lse=False) and not pick(256, 257, 72, lse=False)
    assert not pick(256, 256, 72, lse=False, arch=100) and not pick(256, 256, 72, lse=False, fp8_out=True)
    assert pick(197, 197, 72)


# The interpreted kernels


@pytest.mark.interp
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_256_tokens_of_72_channels_on_chip(kernels, dtype):
    tiles = configs.pick_attention_config(256, 256, 72, dtype, False, 90, lse=False)
    check(kernels, random_qkv(1, 256, 1, 72, dtype), 1, 72**-0.5, config=tiles)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("tokens", "num_heads", "head_size"),
    ((2, 3, 16), (17, 3, 64), (50, 2, 64), (197, 1, 64), (50, 7, 12), (257, 1, 80), (129, 1, 96), (65, 1, 88)),
)
def test_vit_shapes(kernels, tokens, num_heads, head_size, dtype):
    check(kernels, random_qkv(1 if tokens > 60 else 2, tokens, num_heads, head_size, dtype), num_heads, head_size**-0.5)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_shipped_configs(kernels, monkeypatch, arch, dtype):
    """What each architecture would run, on both sides of each switch of kernel or tile."""
    monkeypatch.setattr(configs, "arch_of", lambda device: arch)
    for tokens, head_size in ((197, 64), (273, 64), (209, 80), (33, 192)):
        check(kernels, random_qkv(1, tokens, 1, head_size, dtype), 1, head_size**-0.5)


@pytest.mark.interp
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_many_queries_take_the_tall_tile(kernels, monkeypatch, dtype):
    monkeypatch.setattr(configs, "arch_of", lambda device: 90)
    check(kernels, random_qkv(1, 577, 1, 64, dtype), 1, 0.125)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=(*DTYPE_IDS, "float64"))
def test_head_sizes(kernels, tiles, dtype):
    sizes = 3, 8, 16, 24, 40, 48, 64, 72, 80, 88, 96, 104, 112, 128, 176, 240, 256
    for head_size in sizes if dtype == torch.float32 or properties.FULL else (3, 72, 176):
        check(kernels, random_qkv(1, 33, 1, head_size, dtype), 1, head_size**-0.5, config=tiles)


@pytest.mark.interp
def test_head_size_one(kernels):
    check(kernels, random_qkv(2, 37, 5, 1, torch.float32), 5, 1.0)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_one_token_is_its_value(kernels, tiles, dtype):
    qkv = random_qkv(2, 1, 3, 24, dtype)
    out, lse = kernels.attention_fwd(qkv, 3, 0.2, config=tiles)
    assert torch.equal(out, qkv[..., 144:])
    torch.testing.assert_close(lse.double(), formula(qkv, 3, 0.2)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_queries_and_keys_may_differ_in_number(kernels, tiles, dtype):
    for queries, keys in ((1, 197), (3, 40), (70, 9), (33, 1)):
        q = random_qkv(2, queries, 2, 24, dtype)[..., :48]
        k, v = random_qkv(2, keys, 2, 24, dtype)[..., 48:].chunk(2, dim=2)
        if keys == 1:
            out, _ = kernels.attention_fwd(q, 2, 0.2, k=k, v=v, config=tiles)
            assert torch.equal(out, v.expand_as(q))
        else:
            check(kernels, q, 2, 0.2, k, v, config=tiles)
    check(kernels, q[:, :1], 2, 0.2, *random_qkv(2, 300, 2, 24, dtype)[..., 48:].chunk(2, dim=2))


@pytest.mark.interp
@BOTH
@pytest.mark.parametrize("scale", (-0.5, 0.0, 1e-30, 3.0))
def test_any_scale(kernels, tiles, scale):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        check(kernels, random_qkv(2, 35, 1, 40, dtype), 1, scale, config=tiles)


@pytest.mark.interp
def test_without_lse_the_output_is_the_same(kernels):
    qkv = random_qkv(1, 50, 2, 64, torch.float16)
    assert torch.equal(kernels.attention(qkv, 2, 0.125), kernels.attention_fwd(qkv, 2, 0.125)[0])


def _layouts(qkv):
    batch, tokens, width = qkv.shape
    wide = torch.full((batch, tokens, 2 * width + 5), math.nan, dtype=qkv.dtype)
    wide[..., 5::2] = qkv
    yield "every other channel, odd offset", wide[..., 5::2]
    aligned = torch.full((batch, tokens, 2 * width + 8), math.nan, dtype=qkv.dtype)
    aligned[..., :-8:2] = qkv
    yield "every other channel, 16-byte rows", aligned[..., :-8:2]
    yield "tokens first", qkv.transpose(0, 1).contiguous().transpose(0, 1)
    yield "channels first", qkv.transpose(1, 2).contiguous().transpose(1, 2)
    padded = torch.full((batch, tokens + 3, width + 8), math.nan, dtype=qkv.dtype)
    padded[:, 2:-1, 8:] = qkv
    yield "view of a larger tensor", padded[:, 2:-1, 8:]
    yield "reversed batch", qkv.flip(0).contiguous().flip(0)


@pytest.mark.interp
@pytest.mark.parametrize(
    "tiles",
    (RESIDENT, STREAMING, config(32, 0, True), config(32, 32, True)),
    ids=("resident", "streaming", "resident tma", "streaming tma"),
)
def test_layouts_do_not_change_a_bit(kernels, tiles):
    qkv = random_qkv(2, 43, 2, 64, torch.float16)
    out, lse = check(kernels, qkv, 2, 0.125, config=tiles)
    for name, view in _layouts(qkv):
        assert torch.equal(view, qkv)
        again = kernels.attention_fwd(view, 2, 0.125, config=tiles)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse), name
    shared = qkv[:1].expand(2, -1, -1)
    again = kernels.attention_fwd(shared, 2, 0.125, config=tiles)
    assert torch.equal(again[0], out[:1].expand(2, -1, -1)) and torch.equal(again[1][1], lse[0])


@pytest.mark.interp
@BOTH
def test_separate_tensors_in_three_layouts_equal_the_packed_one(kernels, tiles):
    qkv = random_qkv(2, 43, 3, 24, torch.float32)
    q, k, v = qkv.chunk(3, dim=2)
    expected = kernels.attention_fwd(qkv, 3, 0.2, config=tiles)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    for actual, wanted in zip(kernels.attention_fwd(q, 3, 0.2, k=k, v=v, config=tiles), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.interp
@pytest.mark.parametrize("block_n", (0, 32), ids=("resident", "streaming"))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_descriptors_do_not_change_a_bit(kernels, monkeypatch, block_n, dtype):
    made = []
    shipped = kernels._descriptor
    monkeypatch.setattr(kernels, "_descriptor", lambda *args: made.append(args) or shipped(*args))
    for head_size in (64, 128):
        qkv = random_qkv(1, 43, 2, head_size, dtype)
        pointers = kernels.attention_fwd(qkv, 2, 0.1, config=config(32, block_n))
        assert not made
        descriptors = kernels.attention_fwd(qkv, 2, 0.1, config=config(32, block_n, True))
        assert len(made) == (4 if block_n else 2)
        made.clear()
        assert all(torch.equal(a, b) for a, b in zip(pointers, descriptors, strict=True))
    fits = random_qkv(2, 43, 2, 64, dtype)
    shifted = torch.empty(fits.numel() + 1, dtype=dtype)[1:].view(fits.shape).copy_(fits)
    for unfit in (random_qkv(2, 43, 2, 80, dtype), random_qkv(2, 43, 2, 8, dtype), fits[:1].expand(2, -1, -1), shifted):
        kernels.attention_fwd(unfit, 2, 0.1, config=config(32, block_n, True))
        assert not made


@pytest.mark.interp
@BOTH
def test_batch_mates_and_program_counts_do_not_change_a_bit(kernels, monkeypatch, tiles):
    qkv = random_qkv(3, 65, 1, 32, torch.bfloat16)
    out, lse = kernels.attention_fwd(qkv, 1, 0.2, config=tiles)
    for i in range(3):
        alone = kernels.attention_fwd(qkv[i : i + 1], 1, 0.2, config=tiles)
        assert torch.equal(alone[0][0], out[i]) and torch.equal(alone[1][0], lse[i])
    for processors in (5, 1000):
        monkeypatch.setattr(configs, "multiprocessors_of", lambda device, n=processors: n)
        again = kernels.attention_fwd(qkv, 1, 0.2, config=tiles)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 7)
    again = kernels.attention_fwd(qkv, 1, 0.2, config=tiles)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@BOTH
@pytest.mark.parametrize("part", range(3), ids=("q", "k", "v"))
def test_nan_stays_in_its_image_and_head(kernels, tiles, part):
    qkv = random_qkv(2, 43, 3, 24, torch.float32)
    out, lse = kernels.attention_fwd(qkv, 3, 0.2, config=tiles)
    sick = qkv.clone()
    sick.view(2, 43, 3, 3, 24)[1, 20, part, 1] = math.nan
    sick_out, sick_lse = kernels.attention_fwd(sick, 3, 0.2, config=tiles)
    reached = torch.zeros(2, 43, 3, 24, dtype=torch.bool)
    reached[1, slice(20, 21) if part == 0 else slice(None), 1] = True
    assert torch.equal(sick_out.isnan(), reached.flatten(2))
    assert torch.equal(sick_out[~reached.flatten(2)], out[~reached.flatten(2)])
    reached_lse = reached[..., 0].transpose(1, 2) & (part != 2)
    assert torch.equal(sick_lse.isnan(), reached_lse)
    assert torch.equal(sick_lse[~reached_lse], lse[~reached_lse])


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@BOTH
def test_infinite_scores_give_what_eager_gives(kernels, tiles):
    qkv = random_qkv(1, 43, 1, 16, torch.float32)
    rows = qkv.view(43, 3, 16)
    rows[7:30, 1, 0] = -math.inf
    rows[:, 0, 0] = rows[:, 0, 0].abs() + 0.1
    out, lse = kernels.attention_fwd(qkv, 1, 0.25, config=tiles)
    torch.testing.assert_close(out, formula(qkv, 1, 0.25)[0].float(), rtol=1e-5, atol=1e-5)
    rows[:, 1, 0] = -math.inf
    out, lse = kernels.attention_fwd(qkv, 1, 0.25, config=tiles)
    assert out.isnan().all() and (lse == -math.inf).all()


@pytest.mark.interp
@BOTH
def test_extreme_values(kernels, tiles):
    check(kernels, random_qkv(1, 43, 1, 64, torch.float32, spread=400.0), 1, 0.125, config=tiles)
    check(kernels, random_qkv(1, 43, 1, 64, torch.float32, spread=1e-20), 1, 0.125, config=tiles)
    for dtype in (torch.float16, torch.bfloat16):
        qkv = random_qkv(1, 43, 1, 64, dtype)
        qkv[..., 3], qkv[..., 64 + 3] = 448.0, 300.0
        check(kernels, qkv, 1, 0.125, config=tiles)
        qkv[:, 5, 64 + 3] = 1880.0
        out, lse = kernels.attention_fwd(qkv, 1, 0.125, config=tiles)
        assert torch.equal(out, qkv[:, 5:6, 128:].expand_as(out))
        torch.testing.assert_close(lse.double(), formula(qkv, 1, 0.125)[1], rtol=1e-6, atol=0)
    one_sided = random_qkv(1, 43, 1, 64, torch.float32).abs()
    one_sided[..., :64] *= -3000.0
    _, lse = check(kernels, one_sided, 1, 1.0, config=tiles)
    assert (lse < -6e4).all()
    equal = torch.ones(1, 43, 192, dtype=torch.float16)
    out, lse = kernels.attention_fwd(equal, 1, 0.125, config=tiles)
    assert torch.equal(out, equal[..., :64])
    torch.testing.assert_close(lse, torch.full_like(lse, 8.0 + math.log(43)))


@pytest.mark.interp
@BOTH
def test_powers_of_two_pass_through(kernels, tiles):
    qkv = random_qkv(1, 43, 2, 24, torch.float16)
    q, k, v = qkv.chunk(3, dim=2)
    out, lse = kernels.attention_fwd(qkv, 2, 0.2, config=tiles)
    moved = kernels.attention_fwd(q * 4, 2, 0.2, k=k / 4, v=v * 2, config=tiles)
    assert torch.equal(moved[0], out * 2) and torch.equal(moved[1], lse)


@pytest.mark.interp
@BOTH
def test_large_scores_keep_their_digits(kernels, tiles):
    """Head size 1 and short numbers: the scores, 5e4, are exact, so that what errs is the softmax."""
    q, k = 1000.0 + torch.arange(5.0), 100.0 + torch.arange(40.0) / 64
    v = torch.randn(40)
    out, lse = kernels.attention_fwd(q.view(1, 5, 1), 1, 0.5, k=k.view(1, 40, 1), v=v.view(1, 40, 1), config=tiles)
    golden, golden_lse = formula(q.view(1, 5, 1), 1, 0.5, k.view(1, 40, 1), v.view(1, 40, 1))
    torch.testing.assert_close(out.double(), golden, rtol=0, atol=3e-7)
    torch.testing.assert_close(lse.double(), golden_lse, rtol=1.2e-7, atol=0)


@pytest.mark.interp
def test_nothing_to_do_launches_nothing(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_launch", None)
    out, lse = kernels.attention_fwd(random_qkv(0, 17, 3, 16, torch.float32), 3, 0.25)
    assert out.shape == (0, 17, 48) and lse.shape == (0, 3, 17)
    k = torch.zeros(2, 5, 48)
    out, lse = kernels.attention_fwd(torch.zeros(2, 0, 48), 3, 0.25, k=k, v=k)
    assert out.shape == (2, 0, 48) and lse.shape == (2, 3, 0)


@pytest.mark.interp
@BOTH
def test_offsets_beyond_two_to_the_31(kernels, tiles):
    """The memory is reserved, not used: only the pages that are touched exist."""
    step = 2**31 + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    with mmap.mmap(-1, (2 * step + 4096) * 2, flags=flags) as memory:
        storage = torch.frombuffer(memory, dtype=torch.float16)
        small = random_qkv(2, 5, 1, 16, torch.float16)
        expected = kernels.attention_fwd(small, 1, 0.25, config=tiles)
        for strides in ((step, 48, 1), (64, step // 2 // 4 * 2, 1), (64, 1, step // 96)):
            far = torch.as_strided(storage, small.shape, strides).copy_(small)
            for actual, wanted in zip(kernels.attention_fwd(far, 1, 0.25, config=tiles), expected, strict=True):
                assert torch.equal(actual, wanted)
        del storage, far


def test_reasons(kernels):
    qkv = torch.zeros(2, 5, 3 * 2 * 300)
    assert any("head size 300" in reason for reason in kernels.not_supported_reasons(qkv, 2))
    q = torch.zeros(2, 5, 512)
    fits = kernels.not_supported_reasons(q, 2, k=q, v=q)
    assert kernels.launch.INTERPRETED or any("cpu" in reason for reason in fits)
    assert not kernels.launch.INTERPRETED or not fits
    double = kernels.not_supported_reasons(q.double(), 2, k=q.double(), v=q.double())
    assert any("float64" in reason for reason in double) != kernels.launch.INTERPRETED
    meta = torch.zeros(2, 5, 96, device="meta", dtype=torch.int32)
    assert any("int32" in reason for reason in kernels.not_supported_reasons(meta, 2))


# On the chip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("batch", "tokens", "num_heads", "head_size"),
    (
        (1, 197, 12, 64), (64, 197, 12, 64), (8, 257, 16, 64), (8, 577, 16, 64), (8, 50, 12, 64), (4, 729, 16, 72),
        (4, 257, 16, 80), (4, 257, 16, 88), (4, 261, 16, 96), (4, 197, 8, 104), (4, 196, 8, 128), (2, 1025, 4, 160),
        (2, 300, 4, 208), (2, 300, 4, 256), (4, 197, 6, 32), (4, 197, 7, 12), (2, 1, 12, 64), (2, 17, 3, 16),
    ),
)  # fmt: skip
def test_gpu_vit_shapes(kernels, batch, tokens, num_heads, head_size, dtype):
    qkv = random_qkv(batch, tokens, num_heads, head_size, dtype, device="cuda")
    if tokens == 1:
        out = kernels.attention(qkv, num_heads, head_size**-0.5)
        assert torch.equal(out, qkv.chunk(3, dim=2)[2])
    else:
        check(kernels, qkv, num_heads, head_size**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("tokens", "head_size"), ((197, 64), (577, 64), (196, 128), (257, 80)))
def test_gpu_bits(kernels, tokens, head_size, dtype):
    """The same bits twice, alone and in a batch, without LSE, and out of a layout that TMA cannot read."""
    qkv = random_qkv(40, tokens, 8, head_size, dtype, device="cuda")
    out, lse = kernels.attention_fwd(qkv, 8, head_size**-0.5)
    for _ in range(20):
        again = kernels.attention_fwd(qkv, 8, head_size**-0.5)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    assert torch.equal(kernels.attention(qkv, 8, head_size**-0.5), out)
    alone = kernels.attention_fwd(qkv[7:8], 8, head_size**-0.5)
    assert torch.equal(alone[0][0], out[7]) and torch.equal(alone[1][0], lse[7])
    shifted = torch.empty(40, tokens, qkv.shape[2] + 1, dtype=dtype, device="cuda")[..., 1:].copy_(qkv)
    again = kernels.attention_fwd(shifted, 8, head_size**-0.5)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_gpu_map_pooling(kernels, dtype):
    for head_size in (64, 72, 128):
        q = random_qkv(16, 1, 12, head_size, dtype, device="cuda")[..., : 12 * head_size]
        k, v = random_qkv(16, 196, 12, head_size, dtype, device="cuda")[..., 12 * head_size :].chunk(2, dim=2)
        check(kernels, q, 12, head_size**-0.5, k, v)
