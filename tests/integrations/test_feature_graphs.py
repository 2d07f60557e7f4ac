"""Optimised models under torchvision's ``create_feature_extractor`` and timm's ``features_only``: the bits of the model
at its blocks and behind them, the library's own inside a block.
"""

import copy
import pickle

import pytest
import torch
from support.library_models import CASES, fused, timm_vit, torchvision_vit
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models import feature_extraction

import vit_fast

TRACED = {
    name: case
    for name, case in CASES.items()
    if name.split()[0] in ("timm", "torchvision", "open_clip", "torch_nn")
    # which PyTorch's tracer does not take
    and name not in ("torch_nn", "open_clip", "timm NaFlexVit", "timm NaFlexVit with RoPE", "timm Gemma4")
}


def images():
    return torch.randn(2, 3, 32, 32)


def tracer_options():
    """Those of timm."""
    return dict(
        tracer_kwargs=dict(
            leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
        )
    )


def extractor(model, nodes):
    return feature_extraction.create_feature_extractor(model, nodes, **tracer_options()).eval()


def seen(model, paths, x):
    """{path: the output of the module}, and of the model as ""."""
    found = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, out, path=path: found.__setitem__(path, out))
        for path in paths
    ]
    found[""] = model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(params=TRACED)
def case(request):
    return TRACED[request.param]


def test_features_are_what_the_model_computes(case):
    """In eval mode and in training mode; the graph calls each block, and holds nothing of the library's forward."""
    model, x = vit_fast.optimize(case.build()), images()
    blocks = [f"{case.blocks}.{name}" for name, _ in case.row(model).named_children()]
    last = feature_extraction.get_graph_node_names(model, **tracer_options())[1][-1]
    features = extractor(model, [*blocks, last])
    with torch.no_grad():
        expected = seen(model, blocks, x)
        expected[last] = expected.pop("")
        with vit_fast.backends.recording() as choices:
            actual = features(x)
    assert fused(choices) and not [choice for choice in choices if choice[1] == "library"]
    assert actual.keys() == expected.keys()
    for name, feature in actual.items():
        assert torch.equal(feature, expected[name]), name
    targets = [node.target for node in features.graph.nodes if node.op == "call_module"]
    inside = tuple(f"{block}." for block in blocks)
    assert [target for target in targets if target.startswith((*blocks, *inside))] == blocks
    again = pickle.loads(pickle.dumps(features))(x)
    assert all(torch.equal(again[name], feature) for name, feature in actual.items())
    assert features.train()(x)[last].shape == actual[last].shape


def test_features_inside_a_block():
    plain, x = timm_vit(), images()
    inside = ["blocks.0.attn.qkv", "blocks.1.mlp.act", "blocks.1.norm1"]
    model = vit_fast.optimize(copy.deepcopy(plain))
    actual, expected = extractor(model, [*inside, "blocks.0"])(x), seen(plain, [*inside, "blocks.0"], x)
    for name, feature in actual.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ("blocks.0", "blocks.0.mlp"))
def test_a_hook_acts_once(path):
    model, x = vit_fast.optimize(timm_vit()), images()
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)
    expected = model(x)
    torch.testing.assert_close(extractor(model, ["blocks.0", "head"])(x)["head"], expected, rtol=1e-5, atol=1e-5)


def test_layers_of_torchvision_have_the_names_that_they_have():
    """torchvision counts calls by a number at the end of a name, where its ViT has the number of a layer. The first
    layer has a hook, and is traced."""
    model, x = vit_fast.optimize(torchvision_vit()), images()
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    names = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    actual, expected = extractor(model, names)(x), seen(model, names, x)
    for name in names:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_a_block_that_runs_twice():
    model, x = timm_vit(), images()
    model.blocks[1] = model.blocks[0]
    vit_fast.optimize(model)
    features = extractor(model, ["blocks.0", "head"])
    assert torch.equal(features(x)["head"], model(x))
    assert [node.target for node in features.graph.nodes].count("blocks.0") == 2
    names = feature_extraction.get_graph_node_names(model, **tracer_options())[1]
    assert [name for name in names if name in ("blocks.0", "blocks.0_1")] == ["blocks.0", "blocks.0_1"]


def test_other_tracers_see_the_library():
    model = vit_fast.optimize(timm_vit())
    targets = [str(node.target) for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    assert "blocks.0.attn.qkv" in targets and "blocks.0" not in targets
