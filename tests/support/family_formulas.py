"""Formulas of the model families, from their papers and not from this library: loops and plain matrix products.

They run in the dtype of the weights that are passed: float64 is the truth of a test, float16 and bfloat16 are what
eager PyTorch would give (LayerNorm and softmax in float32 there, as PyTorch does).
"""

import copy
import math

import torch
from support.budget import assert_within_budget

import vit_fast


def perturb(model, scale=0.1):
    """Moves every parameter, frozen ones too, off its initial value: a bias of 0 could be missing unnoticed."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def weights(model, dtype=torch.float64):
    """The state_dict as separate leaves of a dtype."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state = {name: value.detach().to(dtype).clone() for name, value in model.state_dict().items()}
    return {name: value.requires_grad_(name not in frozen) for name, value in state.items()}


def under(state, prefix):
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def layer_norm(x, state, name, eps):
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    normal = (wide - mean) / torch.sqrt(variance + eps)
    return (normal * state[f"{name}.weight"] + state[f"{name}.bias"]).to(x.dtype)


def linear(x, state, name):
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def gelu(x):
    return (_wide(x) * 0.5 * (1 + torch.erf(_wide(x) / math.sqrt(2)))).to(x.dtype)


def attention(q, k, v, heads, scale):
    """Heads are contiguous slices of the channels."""
    size = q.shape[-1] // heads
    out = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = (q[..., part] * scale) @ k[..., part].transpose(-2, -1)
        out.append(_wide(scores).softmax(-1).to(v.dtype) @ v[..., part])
    return torch.cat(out, dim=-1)


def windows(images, kernel, stride, padding):
    """Zero-padded windows, row-major; inside one: channel, row, column."""
    batch, channels, height, width = images.shape
    padded = images.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = images
    tokens = [
        padded[:, :, top : top + kernel, left : left + kernel].reshape(batch, -1)
        for top in range(0, height + 2 * padding - kernel + 1, stride)
        for left in range(0, width + 2 * padding - kernel + 1, stride)
    ]
    return torch.stack(tokens, dim=1)


def to_image(tokens, rows):
    """[B, rows·columns, C] → [B, C, rows, columns]."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], rows, -1)


def sinusoid(tokens, width):
    """[1, tokens, width] float32 from Python's float64 numbers."""
    rows = [
        [(math.cos if j % 2 else math.sin)(position / math.pow(10000, 2 * (j // 2) / width)) for j in range(width)]
        for position in range(tokens)
    ]
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def assert_close(actual, golden, tolerance):
    """max|difference| ≤ tolerance·(1 + max|golden|), and golden is no constant."""
    assert actual.shape == golden.shape
    assert golden.detach().double().std() > 1e-3
    worst = (actual.detach().double() - golden.detach().double()).abs().max().item()
    allowed = tolerance * (1 + golden.detach().abs().max().item())
    assert worst <= allowed, f"{worst:.3g} > {allowed:.3g}"


def assert_model_matches(model, formula, *inputs, prepare=perturb):
    """Outputs in float32 and float64, in eval mode, against formula(weights, *inputs); gradients in float64."""
    prepare(model).eval()
    state = weights(model)
    golden = formula(state, *(x.double() for x in inputs))
    assert_close(model(*inputs), golden, 2e-6)
    model.double()
    actual = model(*(x.double() for x in inputs))
    assert_close(actual, golden, 1e-12)

    cotangent = torch.randn(golden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.zero_grad()
    (actual * cotangent).sum().backward()
    (golden * cotangent).sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None and name in model.state_dict()
            continue
        wanted = state[name].grad
        assert wanted is not None and parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        worst = (parameter.grad - wanted).abs().max().item()
        assert worst <= 1e-10 * (1 + wanted.abs().max().item()), f"{name}: {worst:.3g}"


def assert_batch_laws(model, images):
    """Permuting the batch permutes the output; a sample's output depends on its own image only."""
    with torch.no_grad():
        out = model(images)
        order = torch.arange(images.shape[0]).flip(0)
        assert_close(model(images[order]), out[order], 1e-6)
        assert_close(model(images[:1]), out[:1], 1e-6)
        assert (model(images + torch.randn_like(images)) - out).abs().min() > 1e-4


def _run(model, images, backend):
    model.zero_grad()
    with vit_fast.backend(backend):
        out = model(images)
        out.square().sum().backward()
    return [out.detach().double(), *(p.grad.double() for p in model.parameters() if p.requires_grad)]


def assert_backends_agree(model, images):
    """Output and gradients of the fused kernels in float32: as near to float64 as the backend "torch", within 4 ×."""
    exact = _run(copy.deepcopy(model).double(), images.double(), "torch")
    plain, fused = _run(model, images, "torch"), _run(model, images, "auto")
    for golden, wanted, actual in zip(exact, plain, fused):
        allowed = 4 * (wanted - golden).abs().max().item() + 5e-6 * golden.abs().max().item()
        assert (actual - golden).abs().max().item() <= allowed


def assert_kernels_agree(model, images):
    """Every operation ran on triton; outputs (a tuple too) keep the budget, gradients stay within 4 × eager's error."""

    def run(images):
        out = model(images)
        out = torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out
        return out, torch.autograd.grad(out.square().sum(), list(model.parameters()))

    actual, grads = run(images)
    with vit_fast.backend("torch"):
        eager, eager_grads = run(images)
        model.double()
        golden, golden_grads = run(images.double())
    assert_within_budget(actual, eager, golden, "model")
    for a, e, g in zip(grads, eager_grads, golden_grads):
        assert (a.double() - g).abs().max() <= 4 * (e.double() - g).abs().max() + 1e-5 * (1 + g.abs().max())
    assert {row.backend for row in vit_fast.explain(model.float())} == {"triton"}
