"""torch.func's transforms and forward-mode differentiation: every operation and whole models, on both backends.

Truth is a finite difference, or a backward of the backend torch, in float64. Where Triton runs (interp), "auto" must
give the same numbers and a forced Triton a clear error. A tangent must never be zero in silence.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwad
from support.families import family, first
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from vit_fast.kernels.block_options import PLAIN

import vit_fast
from vit_fast import ops

BACKENDS = ["torch", pytest.param("auto", marks=pytest.mark.interp)]
REASON = "torch.func's transforms and forward-mode differentiation need plain PyTorch operations"


def operations():
    """name → (function of tensors, the tensors, all of them differentiable), float64."""
    generator = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, ln, w1, w2 = t(2, 3, 8), (t(8), t(8)), (t(6, 8), t(6)), (t(8, 6), t(8))
    return {
        "layer_norm": (ops.layer_norm, (x, *ln)),
        "layer_norm_linear": (
            lambda x, a, b, w, c: ops.layer_norm_linear(x, a, b, 1e-6, w, c, "gelu"),
            (x, *ln, *w1),
        ),
        "linear_residual": (
            lambda x, w, b, gamma, residual, scale: ops.linear_residual(x, w, b, gamma, residual, row_scale=scale),
            (t(2, 3, 6), *w2, t(8), x, t(2)),
        ),
        "layernorm_mlp": (
            lambda x, a, b, w, c, v, d, gamma: ops.layernorm_mlp(x, a, b, 1e-6, w, c, v, d, "quick_gelu", gamma),
            (x, *ln, *w1, *w2, t(8)),
        ),
        "attention": (lambda qkv: ops.attention(qkv, 2, 0.5), (t(2, 3, 24),)),
        "attention, q, k, v": (lambda q, k, v: ops.attention(q, 2, 0.5, k=k, v=v), (t(2, 1, 8), x, t(2, 3, 8))),
        "patch_embed": (
            lambda *tensors: ops.patch_embed(*tensors, 4),
            (t(2, 3, 8, 8), t(8, 3, 4, 4), t(8), t(1, 4, 8), t(1, 1, 8)),
        ),
    }  # fmt: skip


NAMES = list(operations())


def directions(tensors):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def slope(function, tensors, tangents, step=1e-5):
    """The derivative along a direction by central differences."""
    ahead, behind = (
        function(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


def close(actual, wanted, tolerance=1e-6):
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_tangents(name, backend):
    """Of every argument alone, by torch.func and by dual tensors, and of all together; with gradients on and off."""
    function, tensors = operations()[name]
    tangents = directions(tensors)
    with vit_fast.backend(backend):
        for i in range(len(tensors)):
            alone = tuple(t if i == j else torch.zeros_like(t) for j, t in enumerate(tangents))
            wanted = slope(function, tensors, alone)
            assert wanted.abs().max() > 1e-2
            with fwad.dual_level(), torch.set_grad_enabled(i % 2 == 0):
                duals = [fwad.make_dual(x, tangents[j]) if i == j else x for j, x in enumerate(tensors)]
                close(fwad.unpack_dual(function(*duals)).tangent, wanted)
        close(jvp(function, tensors, tangents)[1], slope(function, tensors, tangents))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name, backend):
    function, tensors = operations()[name]
    positions = tuple(range(len(tensors)))

    def loss(*tensors):
        return function(*tensors).square().sum()

    leaves = [t.clone().requires_grad_() for t in tensors]
    with vit_fast.backend("torch"):
        wanted = torch.autograd.grad(loss(*leaves), leaves)
    with vit_fast.backend(backend):
        with vit_fast.backends.recording() as choices:
            gradients = grad(loss, argnums=positions)(*tensors)
        if backend == "auto":
            assert {row[1:] for row in choices} == {("torch", (REASON,))}
        out, pull = vjp(function, *tensors)
        for actual, pulled, expected in zip(gradients, pull(2 * out), wanted, strict=True):
            close(actual, expected)
            close(pulled, expected)
        along = slope(lambda x: grad(loss)(x, *tensors[1:]), tensors[:1], tensors[:1])
        for second in (hessian(loss), jacrev(jacrev(loss)), jacfwd(jacfwd(loss))):
            matrix = second(*tensors).reshape(tensors[0].numel(), -1)
            close((matrix @ tensors[0].flatten()).view_as(along), along, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gradients", [True, False])
def test_vmap_over_each_argument(name, backend, gradients):
    """Without gradients the reference writes in place, which vmap refuses where the target has no batch."""
    function, tensors = operations()[name]
    with vit_fast.backend(backend), torch.set_grad_enabled(gradients):
        for i in range(len(tensors)):
            both = torch.stack([tensors[i], 2 * tensors[i]])
            arguments = [both if i == j else t for j, t in enumerate(tensors)]
            out = vmap(function, in_dims=tuple(0 if i == j else None for j in range(len(tensors))))(*arguments)
            for row, factor in zip(out, (1, 2), strict=True):
                close(row, function(*(factor * t if i == j else t for j, t in enumerate(tensors))))


MODELS = ["vit, MAP pooling, SwiGLU", "clip", "t2t", "lanl"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, backend):
    """Per-sample gradients are those of single images, tangents those of finite differences."""
    model, x, _ = family(name)
    model, x = model.double(), x.double()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, image):
        return first_output(functional_call(model, parameters, (image[None],))).square().sum()

    with vit_fast.backend(backend):
        samples = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(len(x)):
            model.zero_grad()
            first_output(model(x[i : i + 1])).square().sum().backward()
            for n, parameter in model.named_parameters():
                if n in samples and parameter.grad is not None:
                    close(samples[n][i], parameter.grad)
        (tangent,) = directions((x,))
        forward = lambda x: first_output(model(x))  # noqa: E731
        wanted = slope(lambda x: first(model(x)), (x,), (tangent,))
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(jvp(forward, (x,), (tangent,))[1].detach(), wanted, rtol=1e-4, atol=1e-8)


def first_output(out):
    """The first tensor of what a model returns, with its graph."""
    return out if isinstance(out, torch.Tensor) else first_output(out[0])


@pytest.mark.interp
@pytest.mark.parametrize("name", NAMES)
def test_forced_triton_is_refused(name):
    function, tensors = operations()[name]
    op = name.split(",")[0]
    wanted = rf"{op}: backend 'triton' was forced and cannot run: torch\.func.*with vit_fast\.backend\(\"torch\"\)"
    with vit_fast.backend("triton"):
        for transformed in (
            lambda: jvp(function, tensors, tensors),
            lambda: grad(lambda *t: function(*t).sum())(*tensors),
            lambda: vmap(function)(*(t[None] for t in tensors)),
        ):
            with pytest.raises(vit_fast.UnsupportedError, match=wanted):
                transformed()
        with fwad.dual_level(), pytest.raises(vit_fast.UnsupportedError, match=wanted):
            function(*(fwad.make_dual(t, t) for t in tensors))


@pytest.mark.interp
def test_graphs_made_outside_of_a_transform():
    """A compiled function is compiled anew for dual tensors; an operator that is reached all the same refuses."""
    function, (x, weight, bias) = operations()["layer_norm"]
    call = lambda x: function(x, weight, bias)  # noqa: E731
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    close(compiled(x), call(x))
    tangent = slope(call, (x,), (x + 1,))
    with fwad.dual_level():
        close(fwad.unpack_dual(compiled(fwad.make_dual(x, x + 1))).tangent, tangent)
    close(compiled(x), call(x))
    per_sample = torch.compile(vmap(grad(lambda x: call(x).square().sum())), backend="eager", fullgraph=True)
    close(per_sample(x), vmap(grad(lambda x: call(x).square().sum()))(x))

    def operator(x):
        return torch.ops.vit_fast.layer_norm_fwd(x, weight, bias, 1e-6, "layer", True, "triton")[0]

    with pytest.raises(vit_fast.UnsupportedError, match=r"layer_norm: a recorded graph .*with vit_fast\.backend"):
        jvp(operator, (x,), (x,))
    weights = [torch.ones(1)] * 10
    with fwad.dual_level(), pytest.raises(vit_fast.UnsupportedError, match="prepared_blocks: a recorded graph"):
        torch.ops.vit_fast.prepared_blocks(x, weights, 2, 1.0, "gelu", 0.0, 0.0, *PLAIN.flatten(), "triton")


@pytest.mark.interp
def test_second_backward_of_kernels_is_that_of_pytorch():
    model, x, _ = family("vit")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * x.detach()).sum(), x)
    expected = jvp(grad(lambda x: model(x).square().sum()), (x.detach(),), (x.detach(),))[1]
    assert expected.abs().max() > 0
    torch.testing.assert_close(second, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
