"""Models of transformers, open_clip, torchvision and torch.nn under ``vit_fast.optimize`` where the weights lie
elsewhere: accelerate's offload and device maps, FSDP2 around blocks.

``test_offload_and_shards.py`` has timm's models. Where accelerate shall load the weights of a block as a whole, it is
told the class of the library.
"""

import copy
from functools import partial

import pytest
import torch
from support import library_models
from support.library_models import moved, open_clip_tower
from support.optimised_models import blocks, case_of_images, case_of_transformers, close, run, swapped
from support.process_group import mesh, whole  # noqa: F401 a fixture
from torch.distributed.fsdp import fully_shard

import vit_fast

TRANSFORMERS = (
    "ViT", "DeiT", "Dinov2WithRegisters", "DINOv3", "Siglip", "Siglip2", "CLIP", "Beit", "Data2VecVision", "ViTMAE",
    "VideoMAE", "Aimv2", "Pixtral", "Qwen2-VL", "Qwen2.5-VL", "InternVL",
)  # fmt: skip


# The library's own forward reads weights of a module that it does not call: out_proj of PyTorch's attention.
READS_PARTS = (
    "open_clip",
    "torchvision",
    "torch.nn",
    "torch.nn, post-norm",
    "torch.nn, batch second",
    "Siglip",
    "Siglip2",
)
READ_BESIDE_BLOCKS = ("Siglip2VisionEmbeddings",)  # a class beside the blocks that does so


def _timm_tower():
    import open_clip

    return moved(
        open_clip.timm_model.TimmModel(
            "test_vit", embed_dim=16, image_size=32, pool="", proj="linear", pretrained=False
        )
    )


BUILDS = {
    "open_clip": open_clip_tower,
    "open_clip, custom blocks": partial(open_clip_tower, qk_norm=True, scale_heads=True),
    "open_clip, a tower of timm": _timm_tower,
    "torchvision": library_models.torchvision_vit,
    "torch.nn": library_models.encoder_vit,
    "torch.nn, post-norm": partial(library_models.encoder_vit, norm_first=False),
    "torch.nn, batch second": partial(library_models.encoder_vit, batch_first=False),
}
CASES = {name: case_of_images(build) for name, build in BUILDS.items()} | {
    name: case_of_transformers(name) for name in TRANSFORMERS
}


@pytest.fixture(params=CASES)
def case(request, peer):
    if request.param.startswith("open_clip"):
        peer("open_clip")
    return CASES[request.param]


def same(case, actual, expected):
    close(actual, expected, 1e-5 if case.float32 else 1e-9)


def pair(case):
    """(the library's model, the same optimised, the library's names of the classes to load as a whole, inputs)."""
    plain, inputs = case.build().double(), case.inputs(torch.float64)
    for module in plain.modules():
        if hasattr(module, "drop_prob"):  # which the libraries do not draw by Philox
            module.drop_prob = 0.0
    model = vit_fast.optimize(copy.deepcopy(plain))
    classes = {type(plain.get_submodule(name)).__name__ for name, _ in swapped(model)}
    return plain, model, [*classes, *READ_BESIDE_BLOCKS], inputs


def linears(block):
    return [module for module in block.modules() if isinstance(module, torch.nn.Linear)]


def device_map(model, paths, device):
    """A device map of accelerate's: these modules on the device, all that is neither of them nor around them in
    memory."""
    names = [name for name, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()] if name]
    around = tuple(f"{path}." for path in paths)
    names = [name for name in names if not any(one.startswith(f"{name}.") for one in around)]
    names = [name for name in names if name not in paths and not name.startswith(around)]
    rest = {n: "cpu" for n in names if not n.startswith(tuple(f"{other}." for other in names))}
    return dict.fromkeys(paths, device) | rest


@pytest.mark.parametrize("place", ("memory", "disk", "one block on disk", "device"))
def test_offloaded_weights(case, place, peer, tmp_path):
    """Weights are there while a block runs and no longer; a fused form that reads one at another time fails or errs."""
    accelerate = peer("accelerate")
    plain, model, names, inputs = pair(case)
    expected, last = case.output(plain, inputs), blocks(model)[-1]
    if place == "memory":
        accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=names)
    elif place == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu", preload_module_classes=names)
    else:
        devices = {"": "cpu"} if place == "device" else device_map(model, [last], "disk")
        accelerate.dispatch_model(model, devices, offload_dir=str(tmp_path), preload_module_classes=names)
    assert {each.is_meta for each in model.get_submodule(last).parameters()} == {place != "device"}
    with torch.no_grad():
        for _ in range(2):
            actual, ran = run(case, model, inputs)
            same(case, actual, expected)
            assert ran


@pytest.mark.parametrize("whole_blocks", (True, False))
def test_blocks_on_several_devices(case, whole_blocks, peer):
    """accelerate hooks each layer of a block, to move its input to where the block is. Where layers of a block may be
    on several devices, the library's own forward runs."""
    plain, model, _, inputs = pair(case)
    paths = [name for name, _ in swapped(model)]
    if not whole_blocks:
        paths = [f"{path}.{name}" for path in paths for name, _ in model.get_submodule(path).named_children()]
    with torch.no_grad():
        expected = case.output(plain, inputs)
        peer("accelerate").dispatch_model(model, device_map(model, paths, "cpu"), force_hooks=True)
        hooked = [hasattr(module, "_hf_hook") for module in linears(model.get_submodule(blocks(model)[0]))]
        assert hooked and all(hooked)
        actual, ran = run(case, model, inputs)
    same(case, actual, expected)
    assert ran is whole_blocks


@pytest.mark.parametrize("case", [name for name in CASES if name not in READS_PARTS], indirect=True)
def test_weights_offloaded_layer_by_layer(case, peer):
    """Without names of classes accelerate loads one layer at a time, and the library's own forward runs."""
    plain, model, _, inputs = pair(case)
    peer("accelerate").cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        actual, ran = run(case, model, inputs)
        same(case, actual, case.output(plain, inputs))
    assert not ran


@pytest.mark.parametrize("whole_blocks", (True, False))
def test_an_offloaded_model_stays_as_it_is(case, whole_blocks, peer):
    model, _, names, inputs = pair(case)
    expected = case.output(model, inputs)
    options = dict(preload_module_classes=names) if whole_blocks else {}
    peer("accelerate").cpu_offload(model, execution_device="cpu", **options)
    before = [type(module) for module in model.modules()]
    with pytest.raises(vit_fast.UnsupportedError, match=r"no block .* carries a hook of accelerate"):
        vit_fast.optimize(model)
    assert [type(module) for module in model.modules()] == before
    if whole_blocks:
        with torch.no_grad():
            same(case, case.output(model, inputs), expected)


def gradients(case, model, inputs):
    torch.manual_seed(4)
    result, ran = run(case, model, inputs)
    result.square().sum().backward()
    found = {key: whole(each.grad) for key, each in model.named_parameters() if each.grad is not None}
    return (result, found), ran


@pytest.mark.filterwarnings("error:FSDP2-wrapped module")  # told of outputs that are views
def test_shards(case, mesh):  # noqa: F811
    plain, model, _, inputs = pair(case)
    expected, _ = gradients(case, plain.train(), inputs)
    for name in blocks(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    actual, ran = gradients(case, model.train(), inputs)
    assert ran and actual[1].keys() == expected[1].keys()
    same(case, actual, expected)


def test_restore_refuses_what_fsdp_has_given_a_class(mesh):  # noqa: F811
    model = vit_fast.optimize(CASES["torchvision"].build())
    for name in blocks(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    before = [type(module) for module in model.modules()]
    with pytest.raises(vit_fast.UnsupportedError) as raised:
        vit_fast.restore(model)
    assert str(raised.value) == (
        "vit_fast.restore: encoder.layers.encoder_layer_0, encoder.layers.encoder_layer_1: it is a FSDPEncoderBlock "
        "made of an optimised class; restore before that"
    )
    assert [type(module) for module in model.modules()] == before
