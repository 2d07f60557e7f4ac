"""Dropout on the backend ``cpu``, at every instruction-set level: the masks are the reference's bit for bit, and
forward, backward and recomputation draw the same."""

import pytest
import torch
from hypothesis import strategies as st
from support import cpu_cases, properties, seeded
from support.cpu_cases import EPSILON, CpuAttentionBwdCase
from torch.utils.checkpoint import checkpoint_sequential
from vit_fast.kernels import reference

import vit_fast
from vit_fast import ops
from vit_fast.backends import select
from vit_fast.backends.cpu import CPU, keep_mask
from vit_fast.vit import VisionTransformer

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension")]

DEVICE = torch.device("cpu")
SEEDS = (0, 1, -5, 2**33 + 7, -(2**63), 2**63 - 1)
RATES = (0.1, 0.5, 0.9, 1e-6, 0.3, 0.7)
COUNTS = (0, 1, 3, 4, 5, 15, 16, 17, 33, 16384, 16385)


@pytest.fixture(params=cpu_cases.LEVELS)
def level(request):
    with cpu_cases.at_level(request.param) as level:
        yield level


def test_the_mask_is_the_reference_s(level):
    for seed, p in zip(SEEDS, RATES, strict=True):
        seed = torch.tensor([seed])
        wanted = reference.keep_mask(seed, COUNTS[-1], p, DEVICE)
        for count in COUNTS:
            assert torch.equal(keep_mask(seed, count, p, DEVICE), wanted[:count])
    assert select.drawing(DEVICE) == "cpu"
    assert torch.equal(ops.keep_samples(torch.zeros(9, 2), 0.4, seed), reference.keep_mask(seed, 9, 0.4, DEVICE))


def problems(dtype):
    """name → (call of an operation that drops, its leaves)."""
    seed, other = torch.tensor([2**40 + 3]), torch.tensor([-7])
    drop = dict(dropout_p=0.3, seed=seed)

    def t(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).requires_grad_()

    branch = [t(2, 5, 40), t(33, 40, scale=0.2), t(33), t(33), t(2, 5, 33), t(2)]
    mlp = [t(2, 5, 40), t(40), t(40), t(66, 40, scale=0.2), t(66), t(40, 33, scale=0.2), t(40), t(40)]
    return {
        "attention": (lambda m, qkv: m.attention(qkv, 3, 0.3, **drop), [t(2, 17, 72)]),
        "attention of many keys": (
            lambda m, q, k, v: m.attention(q, 2, 0.3, k=k, v=v, **drop), [t(1, 19, 10), t(1, 530, 10), t(1, 530, 10)],
        ),
        "attention, strided": (
            lambda m, x: m.attention(x.transpose(0, 1), 2, 0.3, **drop), [t(9, 2, 48)],
        ),
        "linear_residual": (
            lambda m, x, w, b, gamma, r, scale: m.linear_residual(x, w, b, gamma, r, row_scale=scale, **drop), branch,
        ),
        "layernorm_mlp": (
            lambda m, x, w, b, w1, b1, w2, b2, gamma: m.layernorm_mlp(
                x, w, b, 1e-6, w1, b1, w2, b2, "swiglu", gamma, **drop, out_dropout_p=0.5, out_seed=other
            ), mlp,
        ),
        "layernorm_mlp with an inner norm": (
            lambda m, x, w, b, w1, b1, w2, b2, gamma: m.layernorm_mlp(
                x, w, b, 1e-6, w1, b1, w2, b2, "geglu", gamma, **drop, inner_norm=(None, None, 1e-5)
            ), mlp,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", EPSILON, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", problems(torch.float32))
def test_outputs_and_gradients(level, dtype, name):
    """Against float64 and the same seeds; a wrong bit of a mask is an error as large as the result."""
    call, leaves = problems(dtype)[name]
    with vit_fast.backend("cpu"), vit_fast.backends.recording() as choices:
        out = call(ops, *leaves)
        with torch.no_grad():
            inference = call(ops, *leaves)
    assert {chosen for _, chosen, _ in choices} == {"cpu"}
    grad = torch.randn_like(out)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    golden = call(reference, *wide)
    actual = out, inference, *torch.autograd.grad(out, leaves, grad)
    wanted = golden, golden, *torch.autograd.grad(golden, wide, grad.double())
    for one, other in zip(actual, wanted, strict=True):
        assert one.isfinite().all() and other.any()
        assert (one.double() - other).norm() <= 2 * EPSILON[dtype] * other.norm()


@st.composite
def attention_bwd_cases(draw, level):
    packed, keys = draw(st.booleans()), draw(st.one_of(st.integers(1, 40), st.sampled_from((65, 511, 513))))
    head_size = draw(st.one_of(st.integers(1, 64), st.sampled_from((16, 32, 64, 72, 80))))
    return CpuAttentionBwdCase(
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        batch=draw(st.integers(1, 3)) if keys <= 40 else 1,
        queries=keys if packed else draw(st.integers(1, 33)),
        keys=keys,
        num_heads=draw(st.integers(1, 3)) if keys <= 40 else 1,
        head_size=head_size,
        value_size=0 if packed else head_size,
        block_m=0,
        block_n=0,
        tma=False,
        lengths=False,
        dropout=draw(st.booleans()),
        scale=draw(st.sampled_from((0.125, 0.25, 0.1, 1.0, -0.3))),
        values=draw(st.sampled_from(("normal", "small", "one-sided", "sparse"))),
        layout=draw(properties.layouts),
        relation=draw(properties.relations(CpuAttentionBwdCase)),
        seed=draw(properties.seeds),
        level=level,
    )


def test_random_gradients_of_attention(count):
    for shard, name in enumerate(CPU.levels()):
        properties.explore(attention_bwd_cases(name), quick=15, full=400, shard=shard, count=count)


def small_model():
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=5, init_values=0.5)
    return VisionTransformer(**sizes, proj_drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3).train()


def step(model, checkpointed=None):
    """Output and gradients of the blocks of a model, whose seeds are drawn from 7 on."""
    blocks = model.blocks
    blocks.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    tokens = torch.randn(2, 17, 48, dtype=next(blocks.parameters()).dtype, requires_grad=True)
    if checkpointed is None:
        out = blocks(tokens)
    else:
        out = checkpoint_sequential(blocks, 2, tokens, use_reentrant=checkpointed)
    out.sin().sum().backward()
    return [out, tokens.grad, *(parameter.grad for parameter in blocks.parameters())]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_checkpoints_give_the_same_bits(dtype):
    """Under ``use_reentrant`` the first forward keeps nothing for a backward, and so runs another operator."""
    model = small_model().to(dtype)
    with vit_fast.backend("cpu"):
        kept = step(model)
        for reentrant in (False, True):
            assert all(map(torch.equal, step(model, reentrant), kept))


def test_a_step_has_the_reference_s_masks(monkeypatch):
    model = small_model()
    with vit_fast.backend("cpu"), vit_fast.backends.recording() as choices:
        actual = step(model)
        assert {chosen for _, chosen, _ in choices} == {"cpu"}
    monkeypatch.setattr(select, "BACKENDS", seeded.BACKENDS)
    for one, other in zip(actual, step(model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
