"""vit_fast.optimize on every vision family of transformers that it knows; ``test_optimize.py`` has the edges.

Classes under one form are equal but for their names: their source says so. Each family then has a small random model,
whose outputs, hidden states, gradients, copies and layers with hooks and adapters are compared with transformers' own.
"""

import ast
import copy
import importlib
import inspect
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from support.budget import assert_within_budget
from support.library_models import TRANSFORMERS, Version, fused
from support.transformers_models import CASES, output
from torch import nn
from transformers.models.beit import modeling_beit
from transformers.models.dinov3_vit import modeling_dinov3_vit

import vit_fast
from vit_fast.integrations.transformers import families, register_attention

pytestmark = pytest.mark.skipif(
    TRANSFORMERS < Version("5.23"), reason="transformers before 5.23 makes DINOv2 of other parts"
)


@pytest.fixture
def case(request):
    return CASES[request.param]


def each(names=tuple(CASES)):
    return pytest.mark.parametrize("case", names, indirect=True)


ONE_EACH = (  # one of each form
    "ViTMAE", "Pixio", "Dinov2 giant", "DINOv3", "AltCLIP", "XCLIP", "Siglip2", "VideoMAE", "Beit", "Data2VecVision",
    "InternVL with RMSNorm", "Aimv2", "Pixtral", "Qwen3-VL", "Qwen2.5-VL", "SAM",
)  # fmt: skip


def run(model, inputs, **options):
    """(output, operations that ran fused, reasons of the layers that did not)."""
    with vit_fast.backends.recording() as choices:
        result = output(model, inputs, **options)
    return result, fused(choices), [reasons for _, backend, reasons in choices if backend == "library"]


def layers(model):
    fused = [module for module in model.modules() if isinstance(module, vit_fast.integrations.Fused)]
    return [module for module in fused if module.OPERATION == "block"]


def same(actual, expected, case=None):
    tolerance = 1e-5 if actual.dtype == torch.float32 or (case and case.float32) else 1e-11
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@each(("Beit", "DINOv3"))
def test_calls_on_fake_tensors_leave_none_behind(case):
    """These keep tensors that all models of their class share."""
    for function in (
        modeling_beit.BeitRelativePositionBias.generate_relative_position_index,
        modeling_dinov3_vit.get_patches_center_coordinates,
    ):
        for cell in function.__closure__:
            getattr(cell.cell_contents, "cache_clear", lambda: None)()
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    vit_fast.explain(model, inputs)
    vit_fast.coverage(model, inputs)
    assert type(output(model, inputs)) is torch.Tensor


@each()
def test_a_family_runs_fused(case):
    model, inputs = case.build(), case.inputs(torch.float32)
    expected = output(model, inputs)
    classes = [type(module) for module in model.modules()]
    vit_fast.optimize(model, strict=True)
    assert len(layers(model)) == case.blocks
    actual, ran, reasons = run(model, inputs)
    same(actual, expected)
    assert not reasons and ran.count("attention") == case.attentions
    vit_fast.restore(model)
    assert [type(module) for module in model.modules()] == classes
    again, ran, _ = run(model, inputs)
    assert torch.equal(again, expected) and not ran


@each(ONE_EACH)
def test_bfloat16_is_within_the_budget_of_a_model(case):
    model, inputs = case.build().bfloat16(), case.inputs(torch.bfloat16)
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():  # transformers caches indices, which may not be inference tensors
        golden, eager = output(copy.deepcopy(model).double(), exact), output(model, inputs)
        actual, ran, _ = run(vit_fast.optimize(model), inputs)
    assert ran
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


@each(("Eomt",))
def test_a_float32_mask_beside_float64(case):
    """PyTorch's attention on a CPU reads such a mask wrongly; transformers' eager attention does not."""
    plain, inputs = case.build(attn_implementation="eager").double(), case.inputs(torch.float64)
    expected = output(plain, inputs)
    plain.set_attn_implementation("sdpa")
    torch.testing.assert_close(output(vit_fast.optimize(plain), inputs), expected, rtol=1e-6, atol=1e-6)


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(4)
    result = output(model, inputs)
    (result.square() / 2 + result).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance):
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * (gradient.norm() + 0.01), name


@each(ONE_EACH)
def test_gradients_of_a_checkpointed_model_in_training(case):
    plain, inputs = case.build().double().train(), case.inputs(torch.float64)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    model = vit_fast.optimize(copy.deepcopy(plain))
    expected, actual = gradients(plain, inputs), gradients(model, inputs)
    assert_same_gradients(actual, expected, 1e-5 if case.float32 else 1e-9)
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
        assert_same_gradients(gradients(model, inputs), actual, 1e-12)


@each(("Pixio", "VideoMAE", "Beit", "Data2VecVision", "InternVL", "Blip"))
def test_dropout_behind_the_branches_draws_as_without(case):
    """The same seed gives what the library gives, at the rates of its modules."""
    plain, inputs = case.build().double().train(), case.inputs(torch.float64)
    dropouts = [module for module in plain.modules() if isinstance(module, nn.Dropout)]
    for index, module in enumerate(dropouts):
        module.p = 0.2 + 0.1 * (index % 4)
    for module in plain.modules():
        if hasattr(module, "drop_prob"):  # which transformers does not draw by Philox
            module.drop_prob = 0.0
    model = vit_fast.optimize(copy.deepcopy(plain))
    torch.manual_seed(5)
    expected = output(plain, inputs)
    torch.manual_seed(5)
    actual, ran, reasons = run(model, inputs)
    assert dropouts and ran.count("attention") == case.blocks and not reasons
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.manual_seed(6)
    assert not torch.allclose(output(model, inputs), actual)


@each(ONE_EACH)
def test_hidden_states_and_attentions(case):
    plain, inputs = case.build(attn_implementation="eager"), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    for option in ("output_hidden_states", "output_attentions"):
        expected, actual = plain(**inputs, **{option: True}), model(**inputs, **{option: True})
        assert len(actual) == len(expected)
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)
    assert run(model, inputs)[1] and not run(model, inputs)[2]


@each(("ViT", "Dinov2 giant", "Siglip2", "Beit"))
def test_hidden_states_and_attentions_keep_gradients(case):
    plain, inputs, gradients = case.build(attn_implementation="eager"), case.inputs(torch.float32), []
    for model in (plain, vit_fast.optimize(copy.deepcopy(plain))):
        result = model(**inputs, output_hidden_states=True, output_attentions=True)
        kept = [*result.hidden_states, *result.attentions]
        for tensor in kept:
            tensor.retain_grad()
        result[0].square().sum().backward()
        gradients.append([tensor.grad for tensor in kept])
    assert [grad is None for grad in gradients[0]] == [grad is None for grad in gradients[1]]
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@each(("ViT", "DINOv3", "AltCLIP", "Aimv2"))
def test_saved_loaded_and_called_as_a_user_may(case, tmp_path):
    """Files of an optimised model, outputs as a tuple, another attention chosen, as transformers' own suite does it."""
    plain, inputs = case.build(), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and not layers(loaded)
    expected = output(plain, inputs)
    for one in (loaded, vit_fast.optimize(loaded)):
        same(output(one, inputs), expected)
    with_names, without = model(**inputs), model(**inputs, return_dict=False)
    assert torch.equal(without[0], with_names[0])
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        actual, ran, reasons = run(model, inputs)
        same(actual, expected)
        assert ran.count("attention") == case.attentions and not reasons


@each()
def test_a_changed_part_of_a_layer_counts(case):
    plain, inputs = case.build(), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    unchanged = output(plain, inputs)
    index = next(i for i, module in enumerate(model.modules()) if module is layers(model)[-1])
    linear = [name for name, part in list(model.modules())[index].named_modules() if type(part) is nn.Linear][-1]
    for one in (plain, model):
        part = list(one.modules())[index].get_submodule(linear)
        part.register_forward_hook(lambda module, args, result: 2 * result)
    actual, ran, reasons = run(model, inputs)
    same(actual, output(plain, inputs))
    assert not torch.allclose(actual, unchanged)
    assert ran.count("attention") == case.attentions - 1 and reasons == [(f"{linear} carries a hook",)]


@each(("ViT", "XCLIP", "Beit", "Data2VecVision"))
def test_autocast_and_half(case):
    plain, inputs = case.build(), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, ran, _ = run(model, inputs)
        expected = output(plain, inputs)
    assert ran and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        half = case.inputs(torch.float16)
        actual, ran, _ = run(model.half(), half)
        torch.testing.assert_close(actual, output(plain.half(), half), rtol=0.02, atol=0.02)
    assert ran


@each(ONE_EACH)
def test_copies_and_pickles(case):
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    expected = output(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        actual, ran, _ = run(other, inputs)
        assert torch.equal(actual, expected) and ran


def test_a_pickle_of_an_optimised_model_in_a_new_process(tmp_path):
    for name in ("ViTMAE", "CLIP"):
        torch.save(vit_fast.optimize(CASES[name].build()), tmp_path / name)
        code = f"""
            import torch
            model = torch.load({str(tmp_path / name)!r}, weights_only=False)
            print(sorted(type(m).__qualname__ for m in model.modules() if "vit_fast" in type(m).__module__)[-1])
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
        )
        assert result.stdout in ("FastViTMAELayer\n", "FastCLIPEncoderLayer\n"), result.stderr


@each(("Dinov2 giant", "AltCLIP", "Beit", "DINOv3", "VideoMAE"))
def test_compiles_in_one_graph(case):
    model, inputs = case.build(), case.inputs(torch.float32)
    with torch.no_grad():
        expected = output(model, inputs)
        vit_fast.optimize(model)
        same(output(torch.compile(model, fullgraph=True, backend="eager"), inputs), expected)


@each(("ViTMAE", "DINOv3", "Beit", "SAM", "Qwen2-VL"))
def test_traces_and_exports(case):
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    with torch.no_grad():
        expected = output(model, inputs)
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        torch.testing.assert_close(next(iter(traced(**inputs).values())), expected, rtol=1e-5, atol=1e-5)
        if "grid_thw" not in inputs:  # transformers reads the grid of each image
            exported = torch.export.export(model, (), kwargs=inputs).module()
            torch.testing.assert_close(output(exported, inputs), expected, rtol=1e-5, atol=1e-5)


def test_adapters(peer):
    peft = peer("peft")
    for name in ("ViTMAE", "Beit", "AltCLIP"):
        case = CASES[name]
        plain, inputs = case.build(), case.inputs(torch.float32)
        model = vit_fast.optimize(copy.deepcopy(plain))
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        expected = peft.get_peft_model(plain, config)
        torch.manual_seed(1)
        actual = peft.get_peft_model(model, config)
        result, ran, reasons = run(actual, inputs)
        same(result, output(expected, inputs))
        assert not ran and len(reasons) == case.blocks
        merged, ran, reasons = run(actual.merge_and_unload(), inputs)
        same(merged, result)
        assert ran and not reasons


SMALL = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96)
IMAGE = dict(SMALL, image_size=32, patch_size=8)


@pytest.mark.parametrize("name", ("CLIP", "AltCLIP", "MetaClip2", "OwlViT", "Siglip", "Siglip2", "Aimv2"))
def test_text_towers_are_not_touched(name):
    vision = IMAGE if name != "Siglip2" else dict(SMALL, num_patches=16)
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=SMALL)
    model = getattr(transformers, f"{name}Model")(config)
    vit_fast.optimize(model, strict=True)
    assert len(layers(model)) == 1 and layers(model)[0] in set(model.vision_model.modules())


def test_a_decoder_on_top_of_a_vision_tower():
    config = transformers.CLIPSegConfig(vision_config=IMAGE, text_config=SMALL, reduce_dim=16, extract_layers=[0])
    model = transformers.CLIPSegForImageSegmentation(config).eval()
    inputs = dict(pixel_values=torch.randn(2, 3, 32, 32), conditional_embeddings=torch.randn(2, 512))
    expected = model(**inputs).logits
    vit_fast.optimize(model, strict=True)
    with vit_fast.backends.recording() as choices:
        actual = model(**inputs).logits
    same(actual, expected)
    assert fused(choices).count("attention") == 2


@each(("AltCLIP", "MetaClip2", "OwlViT", "Git", "Idefics3"))
def test_stacks_are_prepared(case):
    model, inputs = case.build().bfloat16(), case.inputs(torch.bfloat16)
    exact = {name: x.double() for name, x in inputs.items()}
    with torch.no_grad():
        golden, eager = output(copy.deepcopy(model).double(), exact), output(model, inputs)
        vit_fast.prepare(vit_fast.optimize(model))
        actual, ran, _ = run(model, inputs)
    assert ran == ["prepared_blocks"]
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


def test_masked_keys_do_not_count():
    case = CASES["Siglip2"]
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    expected = output(model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][1, 12:] = 7.0
    actual, ran, _ = run(model, inputs)
    assert ran.count("attention") == 3
    same(actual[1, :12], expected[1, :12])
    inputs["pixel_values"][1, 11] = 7.0
    assert not torch.allclose(output(model, inputs)[1, :11], expected[1, :11])


def test_images_of_another_size():
    for name, options in (("Beit", {}), ("Data2VecVision", dict(interpolate_pos_encoding=True)), ("ViT", {})):
        model = CASES[name].build(use_absolute_position_embeddings=False)
        options = options or dict(interpolate_pos_encoding=True)
        inputs = {"pixel_values": torch.randn(1, 3, 48, 48)}
        if name != "ViT":
            inputs, options = {"pixel_values": torch.randn(1, 3, 32, 32)}, {}
        expected = output(model, inputs, **options)
        actual, ran, _ = run(vit_fast.optimize(model), inputs, **options)
        same(actual, expected)
        assert ran


def _classes(row, family):
    """{placeholder: class} of the classes of transformers that a fast class reads."""
    module = importlib.import_module(f"transformers.models.{row}")
    names = {family.layer: "Layer"}
    for classes in family.form.MODULES.values():
        for wanted in classes:
            if isinstance(wanted, str):
                name = wanted.format(family.prefix)
                names[family.names.get(name, name)] = wanted
    return {wanted: getattr(module, name) for name, wanted in names.items()}


class _Plain(ast.NodeTransformer):
    """Forwards without annotations, docstrings and decorators."""

    def visit_FunctionDef(self, node):
        node.returns, node.decorator_list = None, []
        for argument in (*node.args.args, node.args.kwarg, node.args.vararg):
            if argument is not None:
                argument.annotation = None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            node.body = node.body[1:]
        return node


def _forward(cls):
    return ast.unparse(_Plain().visit(ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))))


def test_every_row_of_the_table_finds_its_classes():
    for row, found in families.FAMILIES.items():
        for family in found:
            assert all(issubclass(cls, nn.Module) for cls in _classes(row, family).values()), family


# How many texts the forwards of a form's classes have: what differs was read, and is the same arithmetic.
TEXTS = {
    ("Dinov2Form", "{}Attention"): 2,  # RADIO's takes cu_seqlens
    ("CLIPStackForm", "{}Attention"): 5,  # views in another line; is_causal, which is False, is passed or not
    ("BlipForm", "{}Attention"): 2,  # BLIP's has no other implementation
    ("VideoMAEForm", "{}SelfAttention"): 2,
    ("QwenForm", "{}VisionMLP"): 2,  # the names of its layers
    ("PoolingHead", "Layer"): 2,  # SigLIP2's takes a mask
}


def test_classes_of_one_form_have_one_forward():
    forwards = {}
    for row, found in families.FAMILIES.items():
        for family in found:
            for place, cls in _classes(row, family).items():
                forwards.setdefault((family.form.__name__, place), set()).add(_forward(cls))
    assert {place: len(texts) for place, texts in forwards.items() if len(texts) > 1} == TEXTS


def test_our_attention_on_request():
    with pytest.raises(TypeError, match=r"vit_fast\.register_attention: name is int, expected a str"):
        register_attention(3)
    with pytest.raises(ValueError, match="name is 'sdpa', which is another implementation's"):
        register_attention("sdpa")
    assert register_attention() == register_attention() == "vit_fast"
    small = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    config = transformers.CLIPConfig(vision_config=dict(image_size=32, patch_size=8, **small), text_config=small)
    model = transformers.CLIPModel(config).eval()
    ids, mask = torch.randint(1, 40, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 32, 32))
    for given in (inputs, dict(inputs, attention_mask=None)):
        model.set_attn_implementation("sdpa")
        expected = model(**given).logits_per_image
        model.set_attn_implementation("vit_fast")
        with vit_fast.backends.recording() as choices:
            actual = model(**given).logits_per_image
        same(actual, expected)
        assert fused(choices) == 4 * ["attention"]


def test_our_attention_with_grouped_heads_and_what_it_lacks():
    from vit_fast.integrations.transformers.attention_interface import attention_forward

    q, kv = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 5, 8)
    module = nn.Module()
    actual, weights = attention_forward(module, q, kv, kv, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, kv, kv, scale=0.3, enable_gqa=True)
    same(actual, expected.transpose(1, 2))
    assert weights is None
    with pytest.raises(vit_fast.UnsupportedError, match="Module asks for softcap, which vit_fast does not compute"):
        attention_forward(module, q, q, q, None, softcap=3.0)


def check_kernels(case, device):
    """The kernels keep the budget that transformers' own model sets."""
    model, inputs = case.build().bfloat16().to(device), case.inputs(torch.bfloat16)
    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.items()}
    exact = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():  # transformers caches indices, which may not be inference tensors
        golden, eager = output(copy.deepcopy(model).double(), exact), output(model, inputs)
        vit_fast.optimize(model)
        with vit_fast.backend("triton"):
            actual, ran, reasons = run(model, inputs)
    assert ran.count("attention") == case.attentions and not reasons
    assert not torch.equal(actual, eager)
    assert_within_budget(actual, eager, golden, kind="model", replicas=[])


@pytest.mark.interp
@each(ONE_EACH)
def test_interpreted_kernels_are_within_the_budget_of_a_model(case):
    check_kernels(case, "cpu")


@pytest.mark.gpu
@each()
def test_gpu_kernels_are_within_the_budget_of_a_model(case):
    check_kernels(case, "cuda")


@pytest.mark.interp
@each(("Dinov2 giant", "DINOv3", "Beit", "Aimv2", "Qwen2.5-VL", "SAM"))
def test_interpreted_kernels_have_the_gradients_of_transformers(case):
    plain, inputs = case.build(), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    golden = gradients(plain, inputs)
    with vit_fast.backend("triton"):
        actual = gradients(model, inputs)
    assert_same_gradients(actual, golden, 1e-4)
