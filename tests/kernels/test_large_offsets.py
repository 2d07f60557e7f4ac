"""Offsets beyond 2³¹ elements in every tensor of every kernel, on memory that is reserved and never used.

Inputs: each stride in turn steps over 2³¹ elements (the kernels' own test files do so for attention, LayerNorm with its
backward and linear; here patch embedding, the partials of rows and the other backwards). Outputs, residuals and
statistics: a problem whose result has more than 2³¹ elements, of which only the last programs run; what they leave is
compared with the reference on the last rows.
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


def test_quantised_tokens(large_outputs):
    from vit_fast.kernels import prepared_linear

    x = reserved(LARGE // 64, 64, dtype=torch.float16)
    x[-1].copy_(torch.randn(64))
    tokens, statistics = prepared_linear.quantise_tokens(x, config=configs.LayerNormConfig(1, 64, 4))
    expected, step = reference.quantise_tokens(x[-1:].float())
    assert tokens.numel() > 2**31
    assert torch.equal(tokens[-1:].float(), expected.float()) and torch.equal(statistics.values[1, -1:], step[0])


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

    rows, width = 2**30 + 64, 17
    row, weight, bias = torch.randn(1, width).half(), torch.zeros(width, 16).half(), torch.randn(1)
    tiles = configs.LinearConfig(16, 16, 16, 2, 4, 2, False)
    x = torch.zeros(1, 16).half().expand(rows, 16)
    with sanitizer.only_programs(lambda count: range(count - 4, count)):  # both tiles of the last rows
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


@pytest.mark.parametrize("tma", (False, True), ids=("pointers", "tma"))
@pytest.mark.parametrize("activation", ("relu", "swiglu"))
def test_linear_train_outputs(large_outputs, tma, activation):
    """out and z of the forward, with dropout, whose index is beyond it too."""
    from vit_fast.kernels import gemm_train

    rows, features = LARGE // 32, 32 if activation == "relu" else 64
    x, weight, seed = (
        torch.randn(1, 32).half().expand(rows, 32),
        torch.randn(features, 32).half() / 8,
        torch.tensor([5]),
    )
    tiles = configs.LinearConfig(16, 32, 32, 2, 4, 2, tma)
    out, z = gemm_train.linear_train(x, weight, None, activation, dropout_p=0.5, seed=seed, with_z=True, config=tiles)
    expected_z = torch.nn.functional.linear(x[-1:], weight)
    expected = reference.activate(expected_z, activation) * last_mask(rows, 32, seed)
    assert min(out.numel(), z.numel()) > 2**31 and not out[0].any() and not z[0].any()
    torch.testing.assert_close(z[-1:], expected_z, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(out[-1:], expected.half(), rtol=4e-3, atol=4e-3)


def last_mask(rows, width, seed, p=0.5):
    """The mask of dropout, divided by 1 − p, of the last row of [rows, width]."""
    index = torch.arange((rows - 1) * width, rows * width)
    return (reference._uniform(seed.reshape(()), index) > p).float()[None] / (1 - p)


@pytest.mark.parametrize("tma", (False, True), ids=("pointers", "tma"))
@pytest.mark.parametrize("activation", ("relu", "swiglu"))
def test_pre_activation_gradient(large_outputs, tma, activation):
    """dz, h and z, and the index of dropout."""
    from vit_fast.kernels import gemm_train

    rows, wide, seed = LARGE // 32, 32 if activation == "relu" else 64, torch.tensor([5])
    grad, weight = torch.randn(1, 32).half().expand(rows, 32), torch.randn(32, 32).half() / 8
    z = reserved(rows, wide, dtype=torch.float16)
    z[-1].copy_(torch.randn(wide))
    tiles = configs.LinearConfig(16, 32, 32, 2, 4, 2, tma)
    dz, hidden = gemm_train.pre_activation_gradient(grad, weight, z, activation, dropout_p=0.5, seed=seed, config=tiles)
    mask, last = last_mask(rows, 32, seed), z[-1:].float().requires_grad_()
    expected = reference.activate(last, activation) * mask
    expected.backward(grad[-1:].float() @ weight.float())
    assert min(dz.numel(), hidden.numel()) > 2**31 and not dz[0].any() and not hidden[0].any()
    torch.testing.assert_close(dz[-1:].float(), last.grad, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(hidden[-1:].float(), expected, rtol=4e-3, atol=4e-3)


def test_branch_gradient(large_outputs):
    """What column sums read at far strides and store, the index of dropout, and partials of more than 2³¹ elements."""
    from vit_fast.kernels import column_sums

    rows, width, seed = LARGE // 4096 + 1, 4096, torch.tensor([7])
    grad = reserved(rows, width, dtype=torch.float16)
    grad[-1].copy_(torch.randn(width))
    gamma = torch.rand(width) + 0.5
    g, sums = column_sums.branch_gradient(grad, torch.float32, None, 0.5, seed, True, gamma)
    expected = (grad[-1:].float() * last_mask(rows, width, seed) * gamma)[:, -64:]  # the columns of the last program
    assert g.numel() > 2**31 and not g[0].any()
    torch.testing.assert_close(g[-1:, -64:], expected)
    torch.testing.assert_close(sums[-32:], expected[0, -32:])
    wide = torch.randn(1, 1).half().expand(1, LARGE)
    sums = column_sums.column_sums(wide)
    assert sums.numel() > 2**31 and not sums[0].any()
    torch.testing.assert_close(sums[-1:], wide[0, -1:].float())


def test_column_sums_strides():
    from vit_fast.kernels import column_sums

    storage, x = reserved(3 * LARGE, dtype=torch.float16), torch.randn(2, 3, 5).half()
    expected = column_sums.column_sums(x)
    wanted, _ = column_sums.branch_gradient(x, torch.float32, torch.ones(2), 0.0, None, False)
    for strides in ((LARGE, 16, 1), (16, LARGE, 1), (64, 16, LARGE // 2)):
        far = torch.as_strided(storage, x.shape, strides).copy_(x)
        assert torch.equal(column_sums.column_sums(far), expected)
        assert torch.equal(column_sums.branch_gradient(far, torch.float32, torch.ones(2), 0.0, None, False)[0], wanted)


def test_layer_scale_bwd(large_outputs):
    """A weight of more than 2³¹ elements."""
    from vit_fast.kernels import linear_bwd

    features = LARGE // 64
    product = reserved(features, 64, dtype=torch.float32)
    gamma, sums, bias = (reserved(features, dtype=torch.float32) for _ in range(3))
    product[-1].copy_(torch.randn(64))
    gamma[-1], sums[-1], bias[-1] = 0.5, 3.0, 2.0
    weight = torch.randn(1, 64).half().expand(features, 64)
    dweight, dbias, dgamma = linear_bwd.layer_scale_bwd(product, weight, bias, gamma, sums)
    assert dweight.numel() > 2**31 and not dweight[0].any()
    torch.testing.assert_close(dweight[-1], (0.5 * product[-1]).half())
    expected = (product[-1] * weight[-1].float()).sum() + 6.0
    torch.testing.assert_close(torch.stack([dbias[-1], dgamma[-1]]), torch.stack([torch.tensor(1.5), expected]))
    far = reserved(3 * LARGE, dtype=torch.float16)
    one, two = torch.randn(2, 8), torch.randn(2, 8).half()
    for strides in ((LARGE, 1), (1, LARGE // 4)):
        with sanitizer.only_programs(range):
            wanted = linear_bwd.layer_scale_bwd(one, two, None, gamma[-2:], None, (True, False, True))
            strided = torch.as_strided(far, two.shape, strides).copy_(two)
            found = linear_bwd.layer_scale_bwd(one, strided, None, gamma[-2:], None, (True, False, True))
        assert all(torch.equal(found[i], wanted[i]) for i in (0, 2))


@pytest.mark.parametrize("each", (False, True), ids=("one prefix", "a prefix an image"))
def test_patch_embed_bwd_strides(each):
    """Of the incoming gradient and the images; outputs are sums, whose kernels are tried above."""
    from vit_fast.kernels import patch_embed_bwd

    storage = reserved(4 * LARGE, dtype=torch.float16)
    images, weight = torch.randn(2, 2, 4, 4).half(), torch.randn(4, 2, 2, 2).half()
    tensors = weight, torch.randn(4).half(), torch.randn(1, 4, 4).half(), torch.randn(2 if each else 1, 2, 4).half()
    grad, needs = torch.randn(2, 6, 4).half(), (False, True, True, True, True)
    expected = patch_embed_bwd.patch_embed_bwd(grad, images, *tensors, (2, 2), needs=needs)
    for strides in ((LARGE, 8, 1), (64, LARGE // 4, 1), (64, 8, LARGE // 2)):
        far = torch.as_strided(storage, grad.shape, strides).copy_(grad)
        found = patch_embed_bwd.patch_embed_bwd(far, images, *tensors, (2, 2), needs=needs)
        for one, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    for strides in ((LARGE, 64, 8, 1), (64, 32, 1, LARGE // 2)):
        far = torch.as_strided(storage, images.shape, strides).copy_(images)
        found = patch_embed_bwd.patch_embed_bwd(grad, far, *tensors, (2, 2), needs=needs)
        torch.testing.assert_close(found[1], expected[1], rtol=2e-3, atol=2e-3)
