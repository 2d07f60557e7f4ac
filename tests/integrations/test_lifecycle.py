"""An optimised model through a user's training run, in every library: some weights frozen, some tied, two steps of an
optimizer, an EMA, ``optimize`` once more, a restored model; and ``half``, blocks compiled one by one, export, LoRA.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import library_models
from support.optimised_models import blocks, case_of_images, case_of_transformers, close, run
from torch.optim import swa_utils

import vit_fast

TRANSFORMERS = (
    "ViTMAE", "Pixio", "Dinov2 giant", "DINOv3", "AltCLIP", "XCLIP", "Siglip2", "VideoMAE", "Beit", "Data2VecVision",
    "InternVL with RMSNorm", "Aimv2", "Pixtral", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "SAM", "Idefics2", "Radio",
)  # fmt: skip


# One of each form that test_optimize.py and test_transformers.py do not compile with the model.
COMPILED = (
    "open_clip", "torch_nn", "timm differential", "timm EvaBlockPostNorm", "timm BEiT", "timm SAM", "timm Gemma4",
    "timm CaiT", "timm Sapiens2", "Siglip2", "Aimv2", "Pixtral", "Qwen2.5-VL", "XCLIP", "SAM",
)  # fmt: skip


CASES = {name: case_of_images(case.build) for name, case in library_models.CASES.items()} | {
    name: case_of_transformers(name) for name in TRANSFORMERS
}


@pytest.fixture(params=CASES)
def case(request, peer):
    if request.param == "open_clip":
        peer("open_clip")
    return CASES[request.param]


def linears(block):
    return [module for module in block.modules() if type(module) is torch.nn.Linear]


def freeze_and_tie(first, last):
    """The first block's norms get no gradients; the last linear layer of both blocks has one weight."""
    for module in first.modules():
        if "Norm" in type(module).__name__:
            module.requires_grad_(False)
    linears(last)[-1].weight = linears(first)[-1].weight


def trained(case, model, inputs):
    """The EMA of two steps; the model has taken them."""
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-3, momentum=0.9)
    for seed in range(2):
        torch.manual_seed(seed)
        case.output(model.train(), inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return average.eval()


def test_training_with_frozen_and_tied_weights_and_an_average(case):
    plain, inputs = case.build().double(), case.inputs(torch.float64)
    for module in plain.modules():
        for rate in ("drop_prob", "p"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    model = vit_fast.optimize(copy.deepcopy(plain))
    names = blocks(model)
    for one in (plain, model):
        freeze_and_tie(one.get_submodule(names[0]), one.get_submodule(names[-1]))
    before = case.output(plain, inputs).detach()
    expected_average, average = trained(case, plain, inputs), trained(case, model, inputs)
    tolerance = 1e-5 if case.float32 else 1e-9
    expected = case.output(plain.eval(), inputs)
    assert not torch.allclose(expected, before, rtol=1e-4)
    vit_fast.optimize(model.eval(), strict=True)
    for one, wanted in ((model, expected), (average, case.output(expected_average, inputs))):
        actual, ran = run(case, one, inputs)
        assert ran
        close(actual, wanted, tolerance)
    for (name, actual), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        close(actual, wanted, tolerance)
        assert actual.requires_grad is wanted.requires_grad, name
    actual, ran = run(case, vit_fast.restore(model), inputs)
    assert not ran
    close(actual, expected, tolerance)


def test_half(case):
    plain, inputs = case.build().half(), case.inputs(torch.float16)
    model = vit_fast.optimize(copy.deepcopy(plain))
    with torch.no_grad():
        actual, ran = run(case, model, inputs)
        expected = case.output(plain, inputs)
    assert ran and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)


LOADS = """
import sys
import torch  # and nothing of vit_fast, or of the library of a model
for path in sys.argv[1:]:
    model, case, inputs, expected = torch.load(path, weights_only=False)
    from support.optimised_models import close, run, swapped
    import vit_fast
    with torch.no_grad():
        actual, ran = run(case, model, inputs)
        close(actual, expected, 1e-5)
        assert ran, path
        vit_fast.restore(model)
        assert not swapped(model), path
        actual, ran = run(case, model, inputs)
        close(actual, expected, 1e-5)
        assert not ran, path
"""


def test_saved_and_loaded_by_a_new_process(peer, tmp_path):
    peer("open_clip")
    for name, case in CASES.items():
        model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
        with torch.no_grad():
            expected = case.output(model, inputs)
        torch.save((model, case._replace(build=None, inputs=None), inputs, expected), tmp_path / f"{name}.pt")
    tests = str(Path(__file__).parents[1])
    loads = [sys.executable, "-c", LOADS, *map(str, sorted(tmp_path.iterdir()))]
    child = subprocess.run(loads, env=os.environ | {"PYTHONPATH": tests}, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("case", COMPILED, indirect=True)
def test_blocks_compiled_one_by_one(case):
    torch.compiler.reset()
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    with torch.no_grad():
        expected = case.output(model, inputs)
        for name in blocks(model):
            model.get_submodule(name).compile(fullgraph=True, backend="eager")
        actual = case.output(model, inputs)
    close(actual, expected, 1e-5)


# transformers reads the grid of each image of Qwen's.
@pytest.mark.parametrize("case", [name for name in COMPILED if not name.startswith("Qwen")], indirect=True)
def test_export(case):
    model, inputs = vit_fast.optimize(case.build()), case.inputs(torch.float32)
    with torch.no_grad():
        expected = case.output(model, inputs)
        args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        program = torch.export.export(model, args, named)
        actual = case.output(program.module(), inputs)
    close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    "case,optimized_first",
    [*((name, True) for name in CASES), *((name, False) for name in COMPILED)],
    indirect=["case"],
)
def test_an_adapter_in_one_block(case, optimized_first, peer):
    peft = peer("peft")
    plain, inputs = case.build(), case.inputs(torch.float32)
    model = vit_fast.optimize(copy.deepcopy(plain))
    adapted = linears(model.get_submodule(blocks(model)[0]))[0]
    target = next(name for name, module in model.named_modules() if module is adapted)
    model = model if optimized_first else copy.deepcopy(plain)
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    adapters = []
    for one in (plain, model):
        torch.manual_seed(3)
        adapters.append(peft.get_peft_model(one, config).eval())
    vit_fast.optimize(adapters[1])
    # In the second turn without adapters. timm's EVA and BEiT pass over one of qkv, whose weight they read themselves.
    for merge in (False, True):
        expected, actual = (one.merge_and_unload() if merge else one.get_base_model() for one in adapters)
        if merge:
            vit_fast.optimize(actual, strict=True)
        with torch.no_grad():
            result, ran = run(case, actual, inputs)
            close(result, case.output(expected, inputs), 1e-5)
        assert ran
