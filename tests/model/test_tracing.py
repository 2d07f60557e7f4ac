"""What turns a model into a graph: torch.jit.trace, torch.onnx.export (both exporters), torch.fx, of every family.

A graph must give what the model gives at another batch size than the one it was made at.
"""

import copy
import pickle
import warnings

import pytest
import torch
from support.families import FAMILIES, SMALL, family, first, perturb, vit

import vit_fast


def timm_vit(peer):
    timm = peer("timm.models.vision_transformer")
    return timm.VisionTransformer(**SMALL, qkv_bias=True, init_values=0.1)


def torchvision_vit(peer):
    words = dict(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)
    return peer("torchvision.models.vision_transformer").VisionTransformer(**words)


def open_clip_vit(peer):
    words = dict(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=6)
    return peer("open_clip.transformer").VisionTransformer(**words)


class Embeddings(torch.nn.Module):
    """The tensor that a model of transformers returns among others."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, x):
        return self.tower(x).image_embeds


def transformers_vit(peer):
    transformers = peer("transformers")
    words = dict(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**words, intermediate_size=32, projection_dim=6)
    return Embeddings(transformers.CLIPVisionModelWithProjection(config))


OPTIMISED = {build.__name__: build for build in (timm_vit, torchvision_vit, open_clip_vit, transformers_vit)}


def assert_traces(model, x, more, close):
    assert torch.is_grad_enabled() and next(model.parameters()).requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(model, x)  # makes the graph again without gradients and compares
    for images in (x, more):
        torch.testing.assert_close(first(traced(images)), first(model(images)), **close)


@pytest.mark.parametrize("name", FAMILIES)
def test_jit_trace(name):
    assert_traces(*family(name), dict(rtol=0, atol=0))


@pytest.mark.interp
def test_jit_trace_of_what_runs_on_kernels():
    model, x, more = family("vit")
    with vit_fast.backends.recording() as choices:
        assert_traces(model, x, more, dict(rtol=1e-4, atol=1e-5))
    reasons = {reason for _, backend, reasons in choices if backend == "torch" for reason in reasons}
    assert reasons == {"torch.jit.trace records plain PyTorch operations only"}
    with (
        vit_fast.backend("triton"),
        pytest.raises(vit_fast.UnsupportedError, match=r"jit\.trace .*backend\(\"torch\"\)"),
    ):
        torch.jit.trace(model, x)


@pytest.mark.parametrize("name", OPTIMISED)
def test_jit_trace_of_optimised_models(name, peer):
    model = vit_fast.optimize(perturb(OPTIMISED[name](peer)))
    assert_traces(model, torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16), dict(rtol=1e-4, atol=1e-5))


def test_jit_trace_of_a_prepared_model():
    """The graph holds the model's own parameters, with and without gradients."""
    model = vit_fast.prepare(perturb(vit()).bfloat16())
    x = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    assert_traces(model, x, x, dict(rtol=0.02, atol=0.02))


def test_a_trace_asks_nothing_of_the_user():
    """No check of sizes becomes part of the graph, so there is nothing that torch would warn of."""
    model, x, _ = family("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(model, x)
    with pytest.raises(ValueError, match="images are 24×16, expected 16×16"):
        torch.jit.trace(model, torch.randn(2, 3, 24, 16))


def assert_onnx(peer, path, model, x, more, **words):
    runtime = peer("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, input_names=["x"], **words)
    (out, *_) = runtime.InferenceSession(path).run(None, {"x": more.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), first(model(more)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx(name, peer, tmp_path):
    peer("onnx")
    axes = {"x": {0: "batch"}}
    assert_onnx(peer, str(tmp_path / "x.onnx"), *family(name), dynamo=False, dynamic_axes=axes)


@pytest.mark.parametrize("name", ("torchvision_vit", "open_clip_vit"))
def test_onnx_of_optimised_models(name, peer, tmp_path):
    peer("onnx")
    model, axes = vit_fast.optimize(perturb(OPTIMISED[name](peer))), {"x": {0: "batch"}}
    x, more = torch.randn(2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert_onnx(peer, str(tmp_path / "x.onnx"), model, x, more, dynamo=False, dynamic_axes=axes)


@pytest.mark.parametrize("backend", ("torch", pytest.param("auto", marks=pytest.mark.interp)))
def test_onnx_by_torch_export(backend, peer, tmp_path):
    peer("onnxscript")
    shapes = ({0: torch.export.Dim("batch")},)
    with vit_fast.backend(backend):
        assert_onnx(peer, str(tmp_path / "x.onnx"), *family("vit"), dynamo=True, dynamic_shapes=shapes)


@pytest.mark.interp
def test_export_keeps_the_kernels():
    """A program of torch.export runs where vit_fast is: it has the fused operators, and says so under a transform."""
    model, x, more = family("vit")
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    operators = {str(node.target) for node in program.graph.nodes}
    assert {"vit_fast.patch_embed_fwd.default", "vit_fast.attention_options_fwd.default"} <= operators  # qk-norm
    loaded = program.module()
    torch.testing.assert_close(loaded(more), model(more), rtol=1e-5, atol=1e-6)
    with pytest.raises(vit_fast.UnsupportedError, match=r"patch_embed: a recorded graph of the triton backend"):
        torch.func.jvp(loaded, (x,), (x,))


TRACED_BY_FX = ("vit", "vit, MAP pooling, SwiGLU", "deit")


@pytest.mark.parametrize("name", TRACED_BY_FX)
def test_fx(name):
    model, x, more = family(name)
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    for images in (x, more):
        torch.testing.assert_close(first(graph(images)), first(model(images)), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="expected 16 pixels"):
        graph(torch.randn(1, 3, 8, 32))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("vit") and name not in TRACED_BY_FX])
def test_what_fx_cannot_trace_says_what_to_use(name):
    model, _, _ = family(name)
    with pytest.raises(vit_fast.UnsupportedError, match=r"torch\.fx cannot trace.*forward hooks.*torch\.export"):
        torch.fx.symbolic_trace(model)


def test_features_by_torchvision(peer):
    extraction = peer("torchvision.models.feature_extraction")
    model, x, _ = family("vit")
    nodes = ["blocks.0.norm1", "blocks.0.attn", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.0", "norm", "head"]
    features = extraction.create_feature_extractor(model, nodes)(x)
    assert sorted(features) == sorted(nodes)
    torch.testing.assert_close(features["norm"], model.forward_features(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features["head"], model(x), rtol=1e-5, atol=1e-6)
    (block,) = model.get_intermediate_layers(x, return_prefix_tokens=False)
    torch.testing.assert_close(features["blocks.0"][:, 2:], block, rtol=1e-5, atol=1e-6)
    qkv = model.blocks[0].attn.qkv(features["blocks.0.norm1"])
    torch.testing.assert_close(features["blocks.0.attn.qkv"], qkv)


def test_features_by_timm(peer):
    """timm's own graph extractor takes our model as it takes timm's, and finds the same nodes."""
    extractor = peer("timm.models._features_fx").FeatureGraphNet
    ours, theirs = perturb(vit(init_values=0.1)), timm_vit(peer).eval()
    theirs.load_state_dict(ours.state_dict())
    x, chosen = torch.randn(2, 3, 16, 16), (0,)
    for model in (ours, vit_fast.optimize(copy.deepcopy(theirs))):
        features = extractor(model, chosen)(x)
        for feature, wanted in zip(features, extractor(theirs, chosen)(x), strict=True):
            torch.testing.assert_close(feature, wanted, rtol=1e-4, atol=1e-5)
