"""Offsets beyond 2³¹ elements in every tensor of every kernel, on memory that is reserved and never used.

Inputs: each stride in turn steps over 2³¹ elements (the kernels' own test files do so for attention, LayerNorm and
linear; here patch embedding and the partials of rows). Outputs, residuals and statistics: a problem whose result has
more than 2³¹ elements, of which only the last programs run; what they leave is compared with the reference on the last
rows.
"""

import pytest
import torch
from support import sanitizer
from support.large_tensors import last_programs_alone, reserved
from vit_fast.kernels import configs, reference

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interp
LARGE = 2**31 + 64


@pytest.fixture
def large_outputs():
    with last_programs_alone():
        yield


@pytest.mark.parametrize("block", (64, 16), ids=("one block", "loop"))
def test_layer_norm_output(large_outputs, block):
    from vit_fast.kernels import layer_norm

    rows = LARGE // 64
    x = reserved(rows, 64, dtype=torch.float16)
    x[-1].copy_(torch.randn(64))
    tiles = configs.LayerNormConfig(rows=1, block=block, num_warps=4)
    y, mean, rstd = layer_norm.layer_norm_fwd(x, None, None, 1e-6, config=tiles)
    expected, expected_mean, expected_rstd = reference.layer_norm_fwd(x[-1:], None, None, 1e-6)
    assert y.numel() > 2**31 and not y[0].any()
    torch.testing.assert_close(y[-1:], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(mean[-1:], expected_mean)
    torch.testing.assert_close(rstd[-1:], expected_rstd)


@pytest.mark.parametrize("tma", (False, True), ids=("pointers", "tma"))
def test_linear_output_and_residual(large_outputs, tma):
    from vit_fast.kernels import linear

    rows = LARGE // 32
    x, weight = torch.randn(1, 32).half().expand(rows, 32), torch.randn(32, 32).half()
    residual = reserved(rows, 32, dtype=torch.float16)
    residual[-1].copy_(torch.randn(32))
    tiles = configs.LinearConfig(16, 32, 32, 2, 4, 2, tma)
    out = linear.linear_residual(x, weight, None, None, residual, config=tiles)
    expected = reference.linear_residual(x[-1:], weight, None, None, residual[-1:])
    assert out.numel() > 2**31 and not out[0].any()
    torch.testing.assert_close(out[-1:], expected, rtol=2e-3, atol=2e-3)


def test_row_partials(large_outputs):
    """More rows than an int32 counts, of one column; and rows that begin beyond it."""
    from vit_fast.kernels import layer_norm

    for rows, width in ((2**30 + 5, 1), (2**31 + 5, 1), (LARGE // 64, 64)):
        x = reserved(rows, width, dtype=torch.float16)
        x[-1].copy_(torch.randn(width))
        tiles = configs.LayerNormConfig(rows=4, block=64, num_warps=4)
        values, _ = layer_norm.row_partials(x, tiles)
        rest = x[-1].float() - x[-1].float().mean()
        assert values.shape == (2, 1, rows) and not values[0, 0, 0].any()
        torch.testing.assert_close(values[:, 0, -1], torch.stack([x[-1].float().mean(), rest.square().sum()]))
        del x, values


def test_linear_partials(large_outputs):
    """Two parts of 2³⁰ rows: partials of both sorts beyond 2³¹ elements, written and read."""
    from vit_fast.kernels import layer_norm, linear

    rows, width = 2**30 + 64, 33
    row, weight, bias = torch.randn(1, width).half(), torch.zeros(width, 16).half(), torch.randn(1)
    tiles = configs.LinearConfig(16, 32, 16, 2, 4, 2, False)
    x = torch.zeros(1, 16).half().expand(rows, 16)
    out, partials = linear.linear_with_partials(x, weight, None, row.expand(rows, width), config=tiles)
    values, part = partials
    assert values.shape == (2, 2, rows) and rows * 2 > 2**31 and not values[:, :, 0].any()
    assert torch.equal(out[-1:], row)
    (means, squares), wide = values[:, :, -1], row.float()
    torch.testing.assert_close(means, torch.stack([wide[0, :part].mean(), wide[0, part]]))
    torch.testing.assert_close(squares, torch.stack([(wide[0, :part] - means[0]).square().sum(), torch.tensor(0.0)]))
    del out
    weight = torch.randn(1, width).half()
    x, partials = row.expand(rows, width), layer_norm.RowPartials(values, part)
    out = linear.folded_linear(x, partials, 1e-6, weight, weight.float().sum(1), bias, config=tiles)
    expected = reference.layer_norm_linear(row, None, None, 1e-6, weight, bias.half())
    assert not out[0].any()
    torch.testing.assert_close(out[-1:], expected, rtol=2e-3, atol=2e-3)
    last = out[-1:].clone()
    del out
    statistics = layer_norm.row_statistics(partials, width, 1e-6)
    out = linear.folded_linear(x, statistics, 0.0, weight, weight.float().sum(1), bias, config=tiles)
    assert not out[0].any() and torch.equal(out[-1:], last)


def test_partial_sums(large_outputs):
    """Parts of split sums over K beyond 2³¹ elements: the eight programs of the last tile."""
    from vit_fast.kernels import linear

    rows, width = 16 * (2**19 + 2), 128
    x, weight = torch.randn(1, width).half().expand(rows, width), torch.randn(32, width).half() / 16
    residual = torch.zeros(1, 32).half().expand(rows, 32)
    tiles = configs.LinearConfig(16, 32, 16, 1, 4, 2, False, split_k=8)
    with sanitizer.only_programs(lambda count: range(count - 8, count)):
        out = linear.linear_residual(x, weight, None, None, residual, config=tiles)
    expected = reference.linear_residual(x[-16:], weight, None, None, residual[-16:])
    assert (2**19 + 2) * 8 * 16 * 32 > 2**31 and not out[0].any()
    torch.testing.assert_close(out[-16:], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("block_n", (0, 16), ids=("resident", "streaming"))
@pytest.mark.parametrize("tma", (False, True), ids=("pointers", "tma"))
def test_attention_output_and_lse(large_outputs, monkeypatch, block_n, tma):
    from vit_fast.kernels import attention

    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: 2**30)  # one block per resident program
    tiles = configs.AttentionConfig(block_m=16, block_n=block_n, num_warps=4, num_stages=2, tma=tma)
    batch, tokens, width = 4, 2**25 + 2, 16
    q = torch.randn(1, 1, width).half().expand(batch, tokens, width)
    k, v = torch.randn(2, batch, 5, width).half()
    out, _ = attention.attention_fwd(q, 1, 0.25, k=k, v=v, config=tiles)
    expected, _ = reference.attention_fwd(q[-1:, -1:], 1, 0.25, k=k[-1:], v=v[-1:])
    assert out.numel() > 2**31 and not out[0, 0].any()
    torch.testing.assert_close(out[-1:, -1:], expected, rtol=2e-3, atol=2e-3)
    q, k, v = (t[..., :1] for t in (q, k, v))
    batch, tokens = 33, 2**26
    q, k, v = q[:1, :1].expand(batch, tokens, 1), k[:1].expand(batch, 5, 1), v[:1].expand(batch, 5, 1)
    out, lse = attention.attention_fwd(q, 1, 0.25, k=k, v=v, config=tiles)
    expected, expected_lse = reference.attention_fwd(q[:1, :1], 1, 0.25, k=k[:1], v=v[:1])
    assert lse.numel() > 2**31 and not lse[0, 0, 0].any()
    torch.testing.assert_close(out[-1:, -1:], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse[-1:, :, -1:], expected_lse)


@pytest.mark.parametrize("prefix", (0, 2))
def test_patch_embed_output(large_outputs, prefix):
    from vit_fast.kernels import patch_embed

    batch = LARGE // ((4 + prefix) * 16) + 1
    images = torch.randn(1, 3, 8, 8).half().expand(batch, 3, 8, 8)
    weight, pos = torch.randn(16, 3, 4, 4).half(), torch.randn(1, 4, 16).half()
    tokens = torch.randn(1, prefix, 16).half() if prefix else None
    tiles = configs.PatchEmbedConfig(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
    patches = -(-batch * 4 // 16)  # programs; those of the prefix follow
    with sanitizer.only_programs(lambda count: {patches - 1, count - 1}):
        out = patch_embed.patch_embed(images, weight, None, pos, tokens, (4, 4), config=tiles)
    expected = reference.patch_embed(images[:1], weight, None, pos, tokens, (4, 4))
    assert out.numel() > 2**31 and not out[0].any()
    torch.testing.assert_close(out[-1:], expected, rtol=2e-2, atol=2e-2)


def test_patch_embed_strides():
    from vit_fast.kernels import patch_embed

    step = LARGE
    storage = reserved(4 * step, dtype=torch.float16)
    images, weight = torch.randn(2, 2, 4, 4).half(), torch.randn(4, 2, 2, 2).half()
    pos, prefix = torch.randn(1, 4, 4).half(), torch.randn(2, 2, 4).half()
    expected = patch_embed.patch_embed(images, weight, None, pos, prefix, (2, 2))
    for strides in ((step, 64, 8, 1), (64, step, 8, 1), (64, 32, step // 2, 1), (64, 32, 1, step // 2)):
        far = torch.as_strided(storage, images.shape, strides).copy_(images)
        assert torch.equal(patch_embed.patch_embed(far, weight, None, pos, prefix, (2, 2)), expected)
    for strides in ((0, step // 2, 1), (0, 1, step // 2)):
        far = torch.as_strided(storage, pos.shape, strides).copy_(pos)
        assert torch.equal(patch_embed.patch_embed(images, weight, None, far, prefix, (2, 2)), expected)
    for strides in ((step, 8, 1), (8, step, 1), (8, 1, step // 2)):
        far = torch.as_strided(storage, prefix.shape, strides).copy_(prefix)
        assert torch.equal(patch_embed.patch_embed(images, weight, None, pos, far, (2, 2)), expected)
