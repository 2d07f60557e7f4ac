"""vit_fast.check: what a certificate says of models that are right, and that it fails those that are not."""

import json

import pytest
import torch
import transformers
from support.graphs import OnCpu, Replays
from torch import nn

import vit_fast
from vit_fast import cli, parity
from vit_fast.block import PREPARED

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
TINY = ["check", "--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "depth=2", "--device", "cpu"]


def small(dtype=torch.bfloat16, **words):
    model = vit_fast.VisionTransformer(**SMALL | words)
    parity.perturb(model)
    return model.eval().to(dtype)


def names(layers):
    return [layer.name for layer in layers]


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in (*TINY, *arguments)])
    return end.value.code or 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_model_passes_and_its_layers_are_told(dtype):
    model = small(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = vit_fast.check(model)
    assert found.passed and names(found.outputs) == ["output"] and found.batch == 2
    assert names(found.layers) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert found.dtype == str(dtype).removeprefix("torch.") and found.model == "VisionTransformer"
    assert found.operations["torch attention"] == 3 and found.operations["torch patch_embed"] == 1
    its = found.outputs[0].parity
    assert 0 < its.error <= its.allowed and 0 < its.eager_error and its.cosine > 0.999
    text = str(found)
    assert "Every output has the very bits of plain PyTorch." in text
    assert "parity holds" in text and "blocks.1 " in text and "torch attention ×3" in text and "beyond" not in text
    told = json.loads(json.dumps(found.as_dict()))
    assert told["passed"] is True and told["layers"][1]["parity"]["error"] == found.layers[1].parity.error
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())
    assert not torch.nn.modules.module._global_forward_hooks


class Wrong(nn.Linear):
    """A linear layer whose fast form, and it alone, is off by a factor."""

    def __init__(self, linear, factor):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.factor = factor

    def forward(self, x):
        out = super().forward(x)
        return out if vit_fast.backends.requested() == "torch" else out * self.factor


@pytest.mark.parametrize("factor,passed", [(1.0, True), (1.05, False)])
def test_a_wrong_layer_is_found_where_it_is(factor, passed):
    model = small(torch.float32)
    model.blocks[1].mlp.fc2 = Wrong(model.blocks[1].mlp.fc2, factor)
    found = vit_fast.check(model)
    assert found.passed is passed
    well = [layer.name for layer in found.layers if layer.parity.passed]
    assert well == (names(found.layers) if passed else ["blocks.0"])
    assert ("parity FAILS" in str(found)) is not passed and str(found).count("beyond what") == (0 if passed else 4)


def test_float64_is_held_to_the_digits_that_sums_keep():
    """Eager is golden itself there, and the fused branches add in another order."""
    model = vit_fast.systems.clip.build("openai", patch_size=8, width=16, layers=2, heads=2, input_resolution=16)
    parity.perturb(model)
    found = vit_fast.check(model.eval().double())
    assert found.passed and found.outputs[0].parity.error > 0
    calls = []
    model.transformer.resblocks[1].mlp.register_forward_hook(
        lambda module, inputs, y: calls.append(y) or y * (1 + (len(calls) == 1) * 1e-9)
    )
    assert not vit_fast.check(model).passed and len(calls) > 1


def test_a_head_with_nan_fails():
    model = small(torch.float32)
    model.head = Wrong(model.head, float("nan"))
    assert not vit_fast.check(model).passed


def test_out_of_date_folded_weights_show():
    model = vit_fast.prepare(small())
    found = vit_fast.check(model)
    assert found.passed and found.operations["torch prepared_blocks"] == 1 and names(found.layers) == ["head"]
    assert "very bits" not in str(found)
    model.blocks[1].mlp.fc1.weight.data.mul_(2)  # which no version counts
    assert not vit_fast.check(model).passed
    assert vit_fast.check(vit_fast.refresh(model)).passed


def test_float8_is_held_to_its_plain_form():
    model = vit_fast.prepare(small(embed_dim=96), precision="fp8")
    found = vit_fast.check(model)
    its = found.outputs[0].parity
    assert found.passed and found.operations["torch fp8_blocks"] == 1
    assert its.reference_error == its.error and its.relative_error > 3 * its.eager_relative_error
    assert "Products are float8" in str(found)
    for weight in model.blocks.__dict__[PREPARED].weights:
        if weight.dtype == torch.float8_e4m3fn:
            weight.copy_((weight.float() * torch.rand(weight.shape).add(0.5)).to(weight.dtype))
    assert not vit_fast.check(model).passed


class WrongReplays(Replays):
    """Graphs that replay something else than they captured."""

    def capture(self, model, static_input):
        replay, output = super().capture(model, static_input)

        def wrong():
            replay()
            output.mul_(1.05)

        return wrong, output


@pytest.mark.parametrize("graphs,passed", [(Replays, True), (WrongReplays, False)])
def test_a_graph_is_checked_by_what_it_replays(graphs, passed, monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", graphs)
    found = vit_fast.check(OnCpu(small(torch.float32), (2,), None, True))
    assert found.passed is passed and found.model == "VisionTransformer" and found.operations["torch attention"] == 3
    assert all(layer.parity.passed for layer in found.layers) and names(found.layers)[0] == "blocks.0"


def test_outputs_of_other_libraries_and_other_calls():
    words = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**words, patch_size=8)).eval()
    images = torch.randn(2, 3, 32, 32)
    for example in (None, images, (images,), {"pixel_values": images, "output_hidden_states": True}):
        found = vit_fast.check(model, example)
        assert found.passed and not found.operations and "no operation of vit_fast" in str(found)
        wanted = ["output.logits"]
        if isinstance(example, dict):
            wanted += [f"output.hidden_states.{index}" for index in range(3)]
        assert names(found.outputs) == wanted
    assert names(found.layers) == ["vit.layers.0", "vit.layers.1", "vit.last_hidden_state", "classifier"]


class Another(nn.Linear):
    """Puts out another shape in plain PyTorch than fused."""

    def forward(self, x):
        out = super().forward(x)
        return out if vit_fast.backends.requested() == "torch" else out[:1]


def test_bad_input():
    images = torch.randn(2, 4)
    for model, example, error, words in (
        (3, None, TypeError, "vit_fast.check: model is int, expected an nn.Module"),
        (nn.Linear(4, 4), images, ValueError, "model is in training mode, expected model.eval()"),
        (nn.Linear(4, 4).eval(), None, ValueError, "example is None, expected an input, as the model does not tell"),
        (nn.Flatten(0).eval(), images, ValueError, "model is Flatten without a floating output of two or more axes"),
        (Another(4, 4).eval(), images, RuntimeError, r"puts out {'output': (1, 4)}, expected {'output': (2, 4)}"),
    ):
        with pytest.raises(error) as raised:
            vit_fast.check(model, example)
        assert words in str(raised.value)
    assert not torch.nn.modules.module._global_forward_hooks


def test_autocast_is_not_the_truths():
    model = small(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = vit_fast.check(model)
    assert found.passed and found.outputs[0].parity.eager_error > 1e-4


@pytest.mark.parametrize(
    "variant,operation", [("plain", "attention"), ("prepared", "prepared_blocks"), ("fp8", "fp8_")]
)
def test_command(variant, operation, tmp_path, capsys):
    path = tmp_path / "new" / "certificate.json"
    assert run("--variant", variant, "--precision", "bfloat16", "--results-file", path) == 0
    out = capsys.readouterr().out
    assert "parity holds" in out and f"torch {operation}" in out and f"variant {variant}, random weights" in out
    told = json.loads(path.read_text())
    assert told["passed"] and told["name"] == "vit_tiny_patch16_224" and told["images"] and told["batch"] == 2
    assert told["outputs"][0]["name"] == "output" and "commit" in told and told["variant"] == variant


def test_command_fails_where_parity_does(monkeypatch, capsys):
    monkeypatch.setattr(
        vit_fast.VisionTransformer, "forward_head", _wrong_head(vit_fast.VisionTransformer.forward_head)
    )
    assert run() == 1
    assert "parity FAILS" in capsys.readouterr().out


def _wrong_head(right):
    def forward_head(self, *args, **kwargs):
        out = right(self, *args, **kwargs)
        return out if vit_fast.backends.requested() == "torch" else out * 1.05

    return forward_head


@pytest.mark.parametrize(
    "words,told",
    [
        (("--variant", "quick"), "got 'quick', wanted plain"),
        (("--batch-size", "0"), "got 0, wanted a whole number of 1 or more"),
        (("--results-file", "x.csv"), "wanted a name that ends in .json"),
        (("--precision", "float32", "--variant", "prepared"), "folding is for all float16 or all bfloat16"),
        (("--variant", "graphed", "--precision", "bfloat16"), "CUDA"),
        (("--model", "vit_nothing"), "vit_fast cannot make the model 'vit_nothing'"),
        (("--backend", "triton"), "got 'triton', wanted a backend that runs on cpu"),
    ],
)
def test_command_refuses(words, told, capsys):
    assert run(*words) != 0
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.extension
@pytest.mark.parametrize("variant", ["prepared", "int8"])
def test_command_takes_float32_where_the_extension_prepares_it(variant, capsys):
    assert run("--variant", variant, "--precision", "float32") == 0
    assert f"cpu {'int8' if variant == 'int8' else 'packed'}_blocks" in " ".join(capsys.readouterr().out.split())


@pytest.mark.interp
@pytest.mark.parametrize("precision", ["plain", None, "fp8"])
def test_kernels_hold_what_the_certificate_asks(precision):
    model = small(embed_dim=96, depth=2)
    if precision != "plain":
        vit_fast.prepare(model, precision=precision)
    with vit_fast.backend("triton"):
        found = vit_fast.check(model)
    assert found.passed and all(name.startswith("triton") for name in found.operations)
    assert found.outputs[0].parity.error != found.outputs[0].parity.eager_error


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["plain", None])
def test_gpu(precision):
    model = small(embed_dim=192, depth=4).cuda()
    if precision != "plain":
        vit_fast.prepare(model, precision=precision)
    found = vit_fast.check(model)
    assert found.passed and all(name.startswith("triton") for name in found.operations)
    graphed = vit_fast.check(vit_fast.graphed(model, batch_sizes=[2]))
    assert graphed.passed and graphed.operations == found.operations
