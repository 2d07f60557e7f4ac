"""Masks of padding: which masks they are, and that attention of NaFlexVit and SigLIP2 takes lengths in their place."""

import copy

import pytest
import torch
from support.budget import assert_within_budget
from support.library_models import moved
from support.timm_models import build, naflex_input
from support.transformers_models import CASES, output
from timm.models.naflexvit import create_attention_mask
from torch import nn

import vit_fast
from vit_fast.integrations.transformers.attention_interface import attention_forward
from vit_fast.key_masks import key_lengths

KEEP = torch.arange(6) < torch.tensor([[6], [4], [1]])  # [3, 6]
LOWEST = torch.finfo(torch.float32).min


def added(keep, value=-torch.inf):
    return torch.zeros(keep.shape).masked_fill(~keep, value)


PADDING = {
    "bools": KEEP[:, None, None],
    "bools of every query": KEEP[:, None, None].expand(3, 1, 6, 6),
    "added": added(KEEP[:, None, None]),
    "the lowest number": added(KEEP[:, None, None].expand(3, 1, 6, 6), LOWEST),
    "timm's": create_attention_mask(KEEP),
    "timm's, of keys": create_attention_mask(KEEP, symmetric=False, q_len=1),
    "timm's in float16": create_attention_mask(KEEP, dtype=torch.float16),
}
SQUARE = KEEP[:, None, None] & KEEP[:, None, :, None]
OTHER = {
    "causal": torch.ones(6, 6).tril().bool(),
    "not the first keys": KEEP.flip(1)[:, None, None],
    "a gap": torch.tensor([True, True, False, True, False, False]).expand(1, 1, 6, 6),
    "a bias": added(KEEP[:, None, None]) + 0.5,
    "a finite number": added(KEEP[:, None, None], -1e4),
    "of a head": torch.stack((KEEP, KEEP | True), 1)[:, :, None],
    "no key": (KEEP & torch.tensor([[True], [True], [False]]))[:, None, None],
    "queries without keys": SQUARE,
    "queries without keys, added": added(SQUARE),
    "NaN": added(KEEP[:, None, None], torch.nan),
    "with a gradient": added(KEEP[:, None, None]).requires_grad_(),
    "of integers": KEEP[:, None, None].long(),
    "of no image": KEEP[:0, None, None],
    "without memory": KEEP[:, None, None].to("meta"),
}


@pytest.mark.parametrize("name", PADDING)
def test_masks_of_padding(name):
    (lengths,) = key_lengths(nn.Identity(), PADDING[name], 3).values()
    assert lengths.tolist() == [6, 4, 1] and lengths.is_contiguous()


@pytest.mark.parametrize("name", OTHER)
def test_other_masks(name):
    assert key_lengths(nn.Identity(), OTHER[name], len(OTHER[name])) is None


def test_masks_that_leave_out_nothing_and_masks_of_all_images():
    block = nn.Identity()
    for mask in (torch.ones(1, 1, 1, 5).bool(), torch.zeros(5, 5), create_attention_mask(torch.ones(2, 5))):
        assert key_lengths(block, mask, 2) == {}
    of_all = key_lengths(block, KEEP[1], 4)["key_lengths"]
    assert of_all.tolist() == 4 * [4] and of_all.is_contiguous()


def test_a_mask_is_read_once_until_it_changes(monkeypatch):
    reads, read = [], vit_fast.key_masks._read
    monkeypatch.setattr(vit_fast.key_masks, "_read", lambda mask: reads.append(1) or read(mask))
    first, second, mask = nn.Identity(), nn.Identity(), KEEP[:, None, None].clone()
    for block in (first, second, first):
        assert key_lengths(block, mask, 3)["key_lengths"].tolist() == [6, 4, 1]
    assert len(reads) == 1
    mask[0, ..., 5] = False
    assert key_lengths(second, mask, 3)["key_lengths"].tolist() == [5, 4, 1]
    with torch.inference_mode():  # a mask that counts no changes
        mask = KEEP[:, None, None].clone()
        assert key_lengths(first, mask, 3)["key_lengths"].tolist() == [6, 4, 1]
        reads.clear()
        assert key_lengths(second, mask, 3)["key_lengths"].tolist() == [6, 4, 1] and not reads
        mask[0, ..., 5] = False
        for block in (first, second):
            assert key_lengths(block, mask, 3)["key_lengths"].tolist() == [5, 4, 1]
    kept = len(vit_fast.key_masks._READINGS)
    del mask
    assert len(vit_fast.key_masks._READINGS) == kept - 1


def test_nothing_is_read_while_a_call_is_recorded():
    mask, block = KEEP[:, None, None], nn.Identity()

    def told(x):
        return x if key_lengths(block, mask, 3) is None else x + 1

    x = torch.zeros(2)
    assert torch.jit.trace(told, x, check_trace=False)(x).sum() == 0
    assert torch.func.vmap(told)(x).sum() == 0
    assert torch.compile(told, backend="eager", fullgraph=True)(x).sum() == 0
    assert told(x).sum() == 2


@pytest.fixture
def options(monkeypatch):
    """The masks and lengths that the attention is given, call by call."""
    seen, attention = [], vit_fast.ops.attention

    def noted(*args, **kwargs):
        seen.append({name for name in ("bias", "key_lengths") if kwargs.get(name) is not None})
        return attention(*args, **kwargs)

    monkeypatch.setattr(vit_fast.ops, "attention", noted)
    return seen


def naflex(model, x, dtype=torch.float32):
    """(logits, tokens of the images) of NaFlexVit."""
    x = dict(x, patches=x["patches"].to(dtype))
    return model(x), model.forward_features(**x)["patches"][:, model.num_prefix_tokens :][x["patch_valid"]]


@pytest.mark.parametrize("name", ("NaFlexVit", "NaFlexVit with RoPE"))
@pytest.mark.parametrize("valid", ((12, 7), (12, 12)))
def test_naflex(name, valid, options):
    plain, x = moved(build(name)), naflex_input(valid=valid)
    model, expected = vit_fast.optimize(copy.deepcopy(plain)), naflex(plain, x)
    torch.testing.assert_close(naflex(model, x), expected, rtol=1e-5, atol=5e-6)
    assert options[:2] == 2 * [{"key_lengths"} if min(valid) < 12 else set()]
    del options[:]
    x["patch_valid"] = x["patch_valid"].flip(1)  # padding in front
    torch.testing.assert_close(naflex(model, x), naflex(plain, x), rtol=1e-5, atol=5e-6)
    assert options[:2] == 2 * [{"bias"} if min(valid) < 12 else set()]


def test_naflex_in_training():
    plain, x = moved(build("NaFlexVit")).double().train(), naflex_input()
    x["patches"] = x["patches"].double()
    model = vit_fast.optimize(copy.deepcopy(plain))
    for one in (plain, model):
        one(x).square().sum().backward()
    for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("prepared", (False, True))
def test_naflex_in_16_bits(dtype, prepared):
    model, x = moved(build("NaFlexVit with RoPE")).to(dtype), naflex_input(8, valid=(12, 7, 1, 12, 5, 9, 3, 11))
    x["patches"] = x["patches"].to(dtype)
    with torch.inference_mode():
        golden, eager = naflex(copy.deepcopy(model).double(), x, torch.float64), naflex(model, x, dtype)
        vit_fast.optimize(model)
        actual = naflex(vit_fast.prepare(model) if prepared else model, x, dtype)
    for part, its_eager, its_golden in zip(actual, eager, golden, strict=True):
        assert_within_budget(part, its_eager, its_golden, kind="model", replicas=[])


def test_siglip2(options):
    case = CASES["Siglip2"]  # two layers and a head that pools
    for attention in ("sdpa", "eager"):
        plain, inputs = case.build(attn_implementation=attention), case.inputs(torch.float32)
        model = vit_fast.optimize(copy.deepcopy(plain))
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)
        assert options == 3 * [{"key_lengths"}]
        del options[:]
        inputs["pixel_attention_mask"] |= 1
        torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-5, atol=1e-5)
        assert options == 3 * [set()]
        del options[:]


def test_our_attention_in_transformers(options):
    q, k, v = torch.randn(3, 3, 2, 6, 8).unbind()
    for mask, name in ((KEEP[:, None, None], "key_lengths"), (torch.ones(6, 6).tril().bool()[None, None], "bias")):
        actual, _ = attention_forward(nn.Identity(), q, k, v, mask)
        expected = nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        assert options.pop() == {name}


@pytest.mark.interp
def test_interpreted_kernels_take_the_lengths():
    plain, x = moved(build("NaFlexVit with RoPE")), naflex_input()
    model = vit_fast.optimize(copy.deepcopy(plain))
    with torch.no_grad(), vit_fast.backend("triton"):
        torch.testing.assert_close(naflex(model, x), naflex(plain, x), rtol=1e-4, atol=1e-5)
