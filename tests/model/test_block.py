"""The fused branches of a block with every norm that a ``BlockParams`` may have, against the modules one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vit_fast.kernels.reference import activate

from vit_fast.block import attention_branch, attention_probabilities, mlp_branch
from vit_fast.block_params import BlockParams, Norm

WIDTH, HIDDEN, HEADS = 24, 40, 3


class VarianceNorm(nn.Module):
    """An RMSNorm as transformers has it."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-5


def test_the_norm_of_a_module():
    layer, rms, plain = nn.LayerNorm(8, eps=1e-3), nn.RMSNorm(8, eps=1e-4), nn.RMSNorm(8, elementwise_affine=False)
    assert Norm.of(layer) == (layer.weight, layer.bias, 1e-3)
    assert Norm.of(rms) == (rms.weight, None, 1e-4)
    assert Norm.of(nn.LayerNorm(8, elementwise_affine=False))[:2] == (None, None)
    assert Norm.of(plain) == (None, None, torch.finfo(torch.float32).eps)
    assert Norm.of(nn.Identity()) is None
    other = VarianceNorm(8)
    assert Norm.of(other) == (other.weight, None, 1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_an_rms_norm_without_eps_takes_that_of_torch(dtype):
    """x so small that the eps decides."""
    module = nn.RMSNorm(8).to(dtype)
    x = (1e-4 * torch.randn(5, 8)).to(dtype)
    torch.testing.assert_close(F.rms_norm(x, (8,), module.weight, Norm.of(module).eps), module(x), rtol=0, atol=0)


def test_the_norm_of_timm():
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    module = layers.RmsNorm(8, eps=1e-4)
    assert Norm.of(module) == (module.weight, None, 1e-4)


class Block(nn.Module):
    """Every module of a block, called one by one."""

    def __init__(self, norm, activation):
        super().__init__()
        make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.activation = activation
        self.norm1, self.norm2, self.out_norm = (make(WIDTH, eps=1e-5) for _ in range(3))
        self.q_norm, self.k_norm = (make(WIDTH // HEADS, eps=1e-5) for _ in range(2))
        self.inner_norm = make(HIDDEN, eps=1e-5)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        gates = 2 if activation in ("swiglu", "geglu") else 1
        self.fc1, self.fc2 = nn.Linear(WIDTH, gates * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=0.3)
        x = x + self.proj(self.out_norm(out.transpose(1, 2).flatten(2)))
        return x + self.fc2(self.inner_norm(activate(self.fc1(self.norm2(x)), self.activation)))

    def params(self, norm):
        names = ("norm1", "norm2", "q_norm", "k_norm", "inner_norm", "out_norm")
        return BlockParams(
            qkv_weight=self.qkv.weight, qkv_bias=self.qkv.bias, proj_weight=self.proj.weight, proj_bias=self.proj.bias,
            fc1_weight=self.fc1.weight, fc1_bias=self.fc1.bias, fc2_weight=self.fc2.weight, fc2_bias=self.fc2.bias,
            num_heads=HEADS, scale=0.3, activation=self.activation, norm=norm,
            **{name: Norm.of(getattr(self, name)) for name in names},
        )  # fmt: skip


@pytest.mark.parametrize("activation", ("gelu", "silu", "swiglu", "geglu"))
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_branches_are_the_modules(norm, activation):
    torch.manual_seed(0)
    block, x = Block(norm, activation).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    params, wanted = block.params(norm), block(x)
    out = mlp_branch(attention_branch(x, params), params)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *block.parameters()]
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (out, wanted)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    # Dropout splits the MLP; the norm acts on what it has left.
    torch.manual_seed(1)
    dropped = mlp_branch(x, params, hidden_drop=0.5, out_drop=0.5)
    torch.manual_seed(1)
    hidden = F.dropout(activate(block.fc1(block.norm2(x)), activation), 0.5)
    torch.testing.assert_close(dropped, x + F.dropout(block.fc2(block.inner_norm(hidden)), 0.5))
    q, k, _ = block.qkv(block.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = block.q_norm(q) @ block.k_norm(k).transpose(-2, -1) * 0.3
    probabilities = attention_probabilities(block.qkv(block.norm1(x)), params)
    torch.testing.assert_close(probabilities, scores.softmax(-1), rtol=1e-12, atol=1e-12)
    without = params._replace(norm2=None, norm1=None)
    torch.testing.assert_close(
        mlp_branch(x, without), x + block.fc2(block.inner_norm(activate(block.fc1(x), activation)))
    )
