"""timm's ViT family under ``vit_fast.optimize`` where the weights lie elsewhere: accelerate's offload to memory and
disk, DDP, FSDP2 around blocks and around linear layers.

``test_optimize.py`` has DDP and FSDP2 for the plain ViT, ``test_offload_and_shards_of_libraries.py`` other libraries.
"""

import copy

import pytest
import torch
from support.library_models import fused, moved
from support.process_group import mesh, whole  # noqa: F401 a fixture
from support.timm_models import MODELS, build
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vit_fast

# timm's own forward fails: it reads qkv.weight and rope.freqs without a call of the module that holds them
SPLIT_BIAS, TABLE_OF_MODEL = ("DINOv3", "EvaBlockPostNorm", "BEiT"), "mixed RoPE"
SHARDS = [(name, around) for name in MODELS for around in ("model", "block", "linear")]


def images():
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def gradients(model, x):
    output = model(x)
    output.square().sum().backward()
    found = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    return output, {key.removeprefix("module."): whole(one) for key, one in found.items()}


@pytest.mark.parametrize("place", ("memory", "disk"))
@pytest.mark.parametrize("name", [name for name in MODELS if name != TABLE_OF_MODEL])
def test_offloaded_weights(name, place, peer, tmp_path):
    """Weights are there while a block runs and no longer; a fused form that reads one at another time fails or errs."""
    accelerate, x = peer("accelerate"), images()
    plain = moved(build(name)).double().eval()
    model = vit_fast.optimize(copy.deepcopy(plain))
    blocks = [type(block).__name__ for block in plain.blocks]
    options = dict(execution_device="cpu", preload_module_classes=blocks)
    if place == "memory":
        accelerate.cpu_offload(model, **options)
    else:
        accelerate.disk_offload(model, str(tmp_path), **options)
    assert all(each.is_meta for each in model.blocks.parameters())
    with torch.no_grad():
        for _ in range(2):
            with vit_fast.backends.recording() as choices:
                actual = model(x)
            assert fused(choices)
            torch.testing.assert_close(actual, plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "around"), [each for each in SHARDS if each[1] != "linear" or each[0] not in SPLIT_BIAS]
)
def test_shards(name, around, mesh):  # noqa: F811
    plain, x = moved(build(name)).double().train(), images()
    expected = gradients(plain, x)
    model = vit_fast.optimize(copy.deepcopy(plain))
    if around == "model":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for module in [*model.blocks.modules()]:
            if isinstance(module, torch.nn.Linear) if around == "linear" else module in [*model.blocks]:
                fully_shard(module, mesh=mesh)
    with vit_fast.backends.recording() as choices:
        actual = gradients(model, x)
    assert around == "linear" or fused(choices)
    assert actual[1].keys() == expected[1].keys()
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
