"""``prepare`` on the blocks of timm and transformers: rotary embedding, biases, masks, RMSNorm, norms inside branches.

Blocks whose models loop over them are prepared one by one. In bfloat16 on plain PyTorch here; on the C++ library in
``tests/csrc/test_cpu_models.py``.
"""

import copy
import pickle

import pytest
import timm.models.cait as cait
import torch
from support import library_models, timm_models, transformers_models
from support.budget import assert_within_budget
from support.graphs import OnCpu, Reruns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit_fast
from vit_fast import twin as twin_module
from vit_fast.block import PREPARED
from vit_fast.precisions import FOLDED, FP8, INT8, PACKED
from vit_fast.twin import packed_weights

# Blocks of branches side by side, post-norm, with attention in windows or of two kinds, with norms of q and k over the
# whole width, with packed sequences: their linear layers are prepared one by one.
NOT_FOLDED = {
    "ViTamin", "differential", "ResPostBlock", "ParallelScalingBlock", "DiffParallelScalingBlock", "Sapiens2",
    "EvaBlockPostNorm", "ResPostRelPosBlock", "SAM", "Gemma4", "CaiT", "SAM HQ", "InternVL", "InternVL with RMSNorm",
    "XCLIP", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL MoE", "Qwen3.5", "Qwen3.5 MoE", "Qwen3-Omni", "GLM-4V",
    "GLM-4V MoE",
}  # fmt: skip


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.2)
    return model.eval()


def first(output):
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def counts(model, call):
    """How many times the blocks run prepared, and how many times otherwise, in one call."""
    with vit_fast.backends.recording() as choices, torch.no_grad():
        call(model)
    operations = [operation for operation, *_ in choices]
    return operations.count("prepared_blocks"), operations.count("layernorm_mlp")


def is_prepared(model):
    return any(PREPARED in vars(module) for module in model.modules())


def run(model, call):
    """A call without gradients; not in inference mode, whose tensors transformers would keep for later calls."""
    with torch.no_grad():
        return call(model)


def holds(model, call):
    """A prepared model keeps the budget of a whole model, and ``unprepare`` brings back the same bits."""
    golden, before = run(copy.deepcopy(model).double(), call), run(vit_fast.optimize(model), call)
    vit_fast.prepare(model)
    assert counts(model, call)[0] > 0
    after = run(model, call)
    assert not torch.equal(after, before)
    assert_within_budget(after, before, golden, kind="model", replicas=[])
    copied = copy.deepcopy(model)
    assert counts(copied, call)[0] == 0 and torch.equal(run(copied, call), before)
    assert torch.equal(run(vit_fast.refresh(copied), call), after)
    assert torch.equal(run(vit_fast.unprepare(model), call), before) and not is_prepared(model)


def holds_by_parts(model, call):
    """Every linear layer runs prepared. Plain PyTorch then computes what it did, but for some casts in between."""
    golden, before = run(copy.deepcopy(model).double(), call), run(vit_fast.optimize(model), call)
    with vit_fast.backends.recording() as choices:
        after = run(vit_fast.prepare(model), call)
    operations = {operation for operation, *_ in choices}
    assert "prepared_linear" in operations
    assert not {"linear_residual", "layernorm_mlp", "layer_norm_linear"} & operations
    assert_within_budget(after, before, golden, kind="model", replicas=[])
    copied = copy.deepcopy(model)
    assert not is_prepared(copied) or counts(copied, call)[0] == 0
    assert torch.equal(run(copied, call), before)
    assert torch.equal(run(vit_fast.refresh(copied), call), after)
    assert torch.equal(run(vit_fast.unprepare(model), call), before) and not is_prepared(model)


@pytest.mark.parametrize("name", timm_models.MODELS)
def test_timm(name):
    torch.manual_seed(0)
    model = perturbed(timm_models.build(name)).bfloat16()
    x = torch.randn(2, 3, 32, 32)
    holding = holds_by_parts if name in NOT_FOLDED else holds
    holding(model, lambda m: first(m(x.to(next(m.parameters()).dtype))))


@pytest.mark.parametrize("name", transformers_models.CASES)
def test_transformers(name):
    torch.manual_seed(0)
    case = transformers_models.CASES[name]
    model = case.build().bfloat16()
    inputs = case.inputs(torch.bfloat16)

    def call(m):
        dtype = next(m.parameters()).dtype
        cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        return transformers_models.output(m, cast)

    holding = holds_by_parts if name in NOT_FOLDED else holds
    holding(model, call)


def test_hooks_and_training_pass_prepared_blocks_over(caplog):
    model = vit_fast.prepare(vit_fast.optimize(timm_models.build("EVA-02").eval().bfloat16()))
    x = torch.randn(1, 3, 32, 32).bfloat16()
    seen = []
    handle = model.blocks[1].mlp.register_forward_hook(lambda *args: seen.append(args))
    prepared = counts(model, lambda m: m(x))[0]
    assert (prepared, len(seen)) == (len(model.blocks) - 1, 1) and "carries a hook" in caplog.text
    handle.remove()
    assert counts(model, lambda m: m(x))[0] == len(model.blocks)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.mul_(2)
    assert counts(model, lambda m: m(x))[0] == len(model.blocks) - 1 and "proj.weight changed" in caplog.text


def test_released_blocks_need_their_weights():
    model = timm_models.build("EVA-02").eval().bfloat16()
    saved, x = copy.deepcopy(model.state_dict()), torch.randn(1, 3, 32, 32).bfloat16()
    vit_fast.prepare(vit_fast.optimize(model), release=True)
    with torch.no_grad():
        expected = model(x)
    assert all(block.attn.proj.weight.is_meta for block in model.blocks)
    with pytest.raises(RuntimeError, match="were released; load these again"):
        model(x)
    model.load_state_dict(saved, assign=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.05)


def test_pickles_hold_no_prepared_blocks():
    model = vit_fast.prepare(vit_fast.optimize(timm_models.build("DINOv3").eval().bfloat16()))
    before = len(pickle.dumps(vit_fast.unprepare(copy.deepcopy(model))))
    assert len(pickle.dumps(model)) < 1.1 * before


def built(name):
    """A model of NOT_FOLDED in float32, optimised, with a call of it in any dtype, and its output in float64."""
    torch.manual_seed(0)
    if name in timm_models.MODELS and name != "SAM":
        model, x = perturbed(timm_models.build(name)), torch.randn(2, 3, 32, 32)

        def call(m):
            return first(m(x.to(next(m.parameters()).dtype)))

    else:
        case = transformers_models.CASES[name]
        model, inputs = case.build(), case.inputs(torch.float32)

        def call(m):
            dtype = next(m.parameters()).dtype
            cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
            return transformers_models.output(m, cast)

    golden = run(copy.deepcopy(model).double(), call)
    return vit_fast.optimize(model), call, golden


OTHER_FORMS = (
    *("ViTamin", "differential", "EvaBlockPostNorm", "ParallelScalingBlock", "Gemma4", "CaiT"),
    *("SAM", "InternVL", "Qwen2-VL"),
)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", OTHER_FORMS)
def test_quantised_linear_layers_of_other_blocks(name, precision):
    model, call, golden = built(name)
    model = model.bfloat16() if precision == "fp8" else model
    before = run(model, call)
    vit_fast.prepare(model, precision)
    with vit_fast.backends.recording() as choices:
        out = run(model, call)
    assert {operation for operation, *_ in choices} >= {f"{precision}_linear"}
    assert not {"linear_residual", "layernorm_mlp", "layer_norm_linear"} & {operation for operation, *_ in choices}
    limit = 0.15 if precision == "fp8" else 0.05
    assert (before.double() - golden).norm() < (out.double() - golden).norm() < limit * golden.norm()
    assert torch.equal(run(vit_fast.refresh(model), call), out)
    copied = copy.deepcopy(model)
    assert torch.equal(run(copied, call), before)
    assert torch.equal(run(vit_fast.unprepare(model), call), before) and not is_prepared(model)


@pytest.mark.interp
@pytest.mark.parametrize("precision,dtype", ((None, torch.float32), (None, torch.bfloat16), ("fp8", torch.bfloat16)))
@pytest.mark.parametrize("name", ("differential", "EvaBlockPostNorm", "CaiT"))
def test_interpreted_linear_layers_of_other_blocks(name, precision, dtype):
    """Through the Triton kernels: what prepared models do on a GPU."""
    model, call, golden = built(name)
    model = model.to(dtype)
    with vit_fast.backend("torch"):
        eager = run(vit_fast.unprepare(model), call)
    vit_fast.prepare(model, precision)
    with vit_fast.backends.recording() as choices:
        out = run(model, call)
    operation = "fp8_linear" if precision else "prepared_linear"
    assert {backend for name, backend, _ in choices if name == operation} == {"triton"}
    if precision:
        assert 0 < (out.double() - golden).norm() < 0.15 * golden.norm()
    else:
        assert_within_budget(out, eager, golden, kind="model", replicas=[])


@pytest.mark.parametrize("precision", (None, "fp8"))
@pytest.mark.parametrize("name", (*OTHER_FORMS[:4], "CaiT", "ResPostBlock", "ResPostRelPosBlock", "Sapiens2"))
def test_other_blocks_can_be_captured(name, precision, monkeypatch):
    """``graphed`` looks at a model before it captures: no wait of the host, no copy between devices. A change of the
    weights is captured anew. That CUDA captures the launches is shown on a GPU alone. Not Gemma 4: timm's one_hot
    of positions waits for the host on a CPU, and not on a GPU."""
    monkeypatch.setattr(OnCpu, "graphs", Reruns)
    model, *_ = built(name)
    module = OnCpu(vit_fast.prepare(model.bfloat16(), precision), (1, 2), torch.zeros(1, 3, 32, 32).bfloat16(), True)
    twins = [vars(part)[PREPARED].twin for part in model.modules() if PREPARED in vars(part)]
    held = [tensor for twin in twins for _, weight in packed_weights(twin) for tensor in weight.tensors]
    kept = {storage.data_ptr() for storage in module._captured.kept}
    assert held and {t.untyped_storage().data_ptr() for t in held} <= kept
    x = torch.randn(2, 3, 32, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(first(module(x)), first(model(x)))
        vit_fast.unprepare(model)
        assert torch.equal(first(module(x)), first(model(x)))


JOINED = ("Sapiens2", "InternVL", "XCLIP", "ViTamin", "Qwen2.5-VL", "class attention")


def class_attention():
    """Two blocks of CaiT whose class token attends to all tokens, as one model of tokens."""
    torch.manual_seed(0)
    model = perturbed(nn.Sequential(*(cait.LayerScaleBlockClassAttn(48, 2, init_values=0.5) for _ in range(2))))
    x = torch.randn(2, 17, 48)

    def call(m):
        tokens = x.to(m[0].norm1.weight.dtype)
        cls = tokens[:, :1]
        for block in m:
            cls = block(tokens[:, 1:], cls)
        return cls

    golden = run(copy.deepcopy(model).double(), call)
    return vit_fast.optimize(model), call, golden


@pytest.mark.parametrize("precision", (None, "fp8", "int8"))
@pytest.mark.parametrize("name", JOINED)
def test_layers_of_one_input_are_one_product(name, precision, monkeypatch):
    """They err no more than one by one, and cost no more FLOP."""
    model, call, golden = class_attention() if name == "class attention" else built(name)
    model = model.bfloat16() if precision == "fp8" else model
    operation = f"{precision or 'prepared'}_linear"
    calls, flops, errors = [], [], []
    for joins in (True, False):
        if not joins:
            monkeypatch.setattr(twin_module, "_joined", lambda *_: {})
        vit_fast.prepare(model, precision)
        with vit_fast.backends.recording() as choices, FlopCounterMode(display=False) as counted:
            out = run(model, call)
        calls.append([operation for operation, *_ in choices].count(operation))
        flops.append(counted.get_total_flops())
        errors.append((out.double() - golden).norm().item())
    assert 0 < calls[0] < calls[1] and flops[0] == flops[1] > 0
    assert errors[0] <= 1.05 * errors[1] + 1e-6 * golden.norm().item()


@pytest.mark.parametrize("precision", (FOLDED, PACKED, FP8, INT8), ids=lambda p: p.linear)
def test_joined_layers_give_what_each_gives(precision):
    torch.manual_seed(0)
    layers = nn.Linear(48, 40), nn.Linear(48, 16, bias=False), nn.Linear(48, 33)
    x, linears = torch.randn(2, 5, 48), twin_module.linears
    with torch.no_grad():
        joined, *single = (twin_module.PackedLinear(of, precision) for of in (layers, *([layer] for layer in layers)))
        found, wanted = linears(x, [joined] * 3), linears(x, single)
    for one, other, exact in zip(found, wanted, (layer(x) for layer in layers), strict=True):
        if precision is INT8:  # one gain for the inputs of all, as for those of a block in a stack
            assert (one - exact).norm() <= 1.5 * (other - exact).norm()
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_bias_of_q_k_v_is_packed_once():
    model, call, _ = built("EvaBlockPostNorm")
    before, block = run(model, call), model.blocks[0]
    vit_fast.prepare(model)
    prepared = vars(block)[PREPARED].twin.attn
    assert prepared.q_bias is None and block.attn.q_bias is not None and block.attn.qkv.bias is None
    expected = torch.cat((block.attn.q_bias, block.attn.k_bias, block.attn.v_bias))
    assert torch.equal(prepared.qkv.bias, expected) and not prepared.qkv.bias.requires_grad
    torch.testing.assert_close(run(model, call), before, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        block.attn.q_bias.add_(1)
    run(model, call)
    assert not hasattr(vars(block)[PREPARED], "twin")


def test_changes_drop_packed_linear_layers(caplog):
    model, call, _ = built("EvaBlockPostNorm")
    vit_fast.prepare(model, "int8")
    out, block = run(model, call), model.blocks[0]
    handle = block.mlp.register_forward_hook(lambda *args: None)
    assert not torch.equal(run(model, call), out) and "carries a hook" in caplog.text
    handle.remove()
    assert torch.equal(run(model, call), out)
    with torch.no_grad():
        block.attn.proj.weight.mul_(2)
    changed = run(model, call)
    assert "proj.weight changed" in caplog.text and not torch.allclose(changed, out, rtol=0.1)
    saved = copy.deepcopy(model.state_dict())
    vit_fast.prepare(model, "int8", release=True)
    assert block.attn.proj.weight.is_meta and not block.norm1.weight.is_meta
    torch.testing.assert_close(run(model, call), changed, rtol=0.1, atol=0.1)
    with pytest.raises(RuntimeError, match="were released; load these again"):
        call(model)
    model.load_state_dict(saved, assign=True)
    assert torch.allclose(run(model, call), changed, rtol=0.1, atol=0.1)


def test_post_norm_layers_of_torch_in_int8():
    torch.manual_seed(0)
    model, x = library_models.encoder_vit(norm_first=False), torch.randn(2, 3, 32, 32)
    golden = run(copy.deepcopy(model).double(), lambda m: m(x.double()))
    vit_fast.prepare(vit_fast.optimize(model), "int8")
    with vit_fast.backends.recording() as choices:
        out = run(model, lambda m: m(x))
    assert [operation for operation, *_ in choices].count("int8_linear") == 8
    certificate = vit_fast.check(model, x)
    assert certificate.passed and certificate.operations["torch int8_linear"] == 8, str(certificate)
    assert (out.double() - golden).norm() < 0.05 * golden.norm()


def test_dtypes_that_linear_layers_are_prepared_in():
    """In the dtype of the weights any, in float8 those of 16 bits, as stacks of blocks."""
    model, call, _ = built("EvaBlockPostNorm")
    before = run(model, call)
    assert torch.equal(run(vit_fast.prepare(model), call), before) and is_prepared(model)
    with pytest.raises(vit_fast.UnsupportedError, match="the weights are float32, folding is for all float16 or all"):
        vit_fast.prepare(vit_fast.unprepare(model), "fp8")
    model.blocks[0].attn.proj.bfloat16()
    with pytest.raises(vit_fast.UnsupportedError, match="the weights are bfloat16, float32"):
        vit_fast.prepare(model.blocks[:1].eval())


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["EVA-02", "DINOv3", "BEiT", "AIMv2", "BEiT-3"])
def test_other_precisions(name, precision):
    torch.manual_seed(0)
    model = perturbed(timm_models.build(name)).bfloat16()
    x = torch.randn(2, 3, 32, 32).bfloat16()
    with torch.no_grad():
        golden = copy.deepcopy(model).double()(x.double())
    vit_fast.optimize(model)
    vit_fast.prepare(model, precision)
    with vit_fast.backends.recording() as choices, torch.no_grad():
        out = model(x).double()
    assert f"{precision}_blocks" in [operation for operation, *_ in choices]
    assert (out - golden).norm() < 0.15 * golden.norm()
