"""vit_fast/precisions: what the objects say, and a third precision that no other file knows.

The third folds like the first and multiplies weights that keep three bits of their mantissa, so its numbers show that
its own fold and its own operation ran.
"""

import copy
import pickle

import pytest
import torch
from vit_fast.kernels import arguments, folding, packing, reference

import vit_fast
from vit_fast.block import PREPARED
from vit_fast.parity import Budget
from vit_fast.precisions import FOLDED, FP8, PRECISIONS, Precision, forms, of_operation
from vit_fast.precisions.base import folding_arguments

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)


class ThreeBits(Precision):
    name = "three-bits"
    operation = "three_bit_blocks"
    record = folding.FoldedBlock
    products = "numbers of three bits"
    budget = Budget(largest=2.0, norm=1.25, roundoff=2.0**-4)
    variant, graphed_variant = "three-bits", "three-bits-graphed"
    check = staticmethod(arguments.check_prepared_blocks)
    reference = staticmethod(reference.prepared_blocks)

    def fold(self, params):
        block = folding.prepare_block(*folding_arguments(params))
        return block._make((t.to(folding.E4M3).to(t.dtype) if t.dim() == 2 else t) for t in block)

    def device_reasons(self, device):
        return ["the device is meta"] if device.type == "meta" else []


@pytest.fixture
def third(monkeypatch):
    monkeypatch.setitem(PRECISIONS, ThreeBits.name, ThreeBits())
    return PRECISIONS[ThreeBits.name]


def small(**words):
    model = vit_fast.VisionTransformer(**SMALL | words)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 if parameter.dim() > 1 else 0.1)
    return model.eval().bfloat16()


def ran(model, x):
    with vit_fast.backends.recording() as choices, torch.inference_mode():
        out = model(x)
    return out, {operation for operation, *_ in choices}


@pytest.fixture
def x():
    return torch.randn(2, 3, 32, 32).bfloat16()


def test_every_precision_says_what_it_is():
    operations, variants = set(), set()
    assert all(precision.name == name for name, precision in PRECISIONS.items())
    for precision in forms():
        assert of_operation(precision.operation) is precision
        assert getattr(torch.ops.vit_fast, precision.operation)
        if precision.linear is not None:
            assert of_operation(precision.linear) is precision and getattr(torch.ops.vit_fast, precision.linear)
        operations.add(precision.operation)
        variants |= {precision.variant, precision.graphed_variant}
        block = small().blocks[0]
        record = precision.fold(block.params())
        assert type(record) is precision.record and all(isinstance(t, torch.Tensor) for t in record)
        assert len(precision.modules()) == len(record)
        for field, module in zip(record._fields, precision.modules(), strict=True):
            assert module == "" or block.get_submodule(module) is not None
            if field.endswith("_weight"):
                weight, rows = getattr(record, field), block.get_submodule(module).weight.shape[0]
                weight = packing.unpack(weight)[:rows] if weight.dim() == 4 else weight  # padded to whole panels
                assert block.get_submodule(module).weight.shape == weight.shape
    assert len(operations) == len(forms()) and len(variants - {None}) == 2 * len(PRECISIONS) - 1
    assert of_operation("layer_norm") is None


def test_what_products_multiply_and_where(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert FOLDED.product_dtype(torch.bfloat16) == torch.bfloat16 and FP8.product_dtype(torch.float16) == folding.E4M3
    assert FOLDED.why_emulated(cuda) is None and "capability 8.9" in FP8.why_emulated(cpu)
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert (FP8.why_emulated(cuda) is None) == able == (FP8.device_reasons(cuda) == [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert FP8.device_reasons(cuda) == ["float8 needs capability 8.9, cuda:0 has 8.0"]
    assert FP8.device_reasons(cpu) == FOLDED.device_reasons(cuda) == []


def test_records_survive_the_flat_list():
    for precision in PRECISIONS.values():
        records = [precision.fold(block.params()) for block in small().blocks]
        tensors = folding.flatten(records)
        again = folding.unflatten(precision.record, tensors)
        assert [[*map(id, record)] for record in again] == [[*map(id, record)] for record in records]
        assert [*map(id, folding.first_block(precision.record, tensors))] == [*map(id, records[0])]
        assert folding.unflatten(precision.record, []) == []


def test_a_third_precision_is_one_object(third, x):
    model = small()
    with torch.inference_mode():
        eager = model(x)
    assert vit_fast.prepare(model, precision="three-bits") is model
    out, operations = ran(model, x)
    assert "three_bit_blocks" in operations and not operations & {"prepared_blocks", "fp8_blocks"}
    assert not torch.equal(out, eager)
    prepared = vars(model.blocks)[PREPARED]
    assert prepared.precision == "three-bits" and all(type(block) is folding.FoldedBlock for block in prepared.records)
    with torch.inference_mode():
        halves = prepared.run(prepared.run(torch.ones(1, 5, 48).bfloat16(), 0, 1), 1, None)
        assert torch.equal(halves, prepared.run(torch.ones(1, 5, 48).bfloat16(), 0, None))

    rows = {row.operation: row for row in vit_fast.explain(model)}
    assert "in eval mode under torch.inference_mode()" in rows["three_bit_blocks"].reasons[-1]
    certificate = vit_fast.check(model, x)
    assert certificate.operations["torch three_bit_blocks"] == 1 and certificate.passed
    assert "Products are numbers of three bits: eager is here the plain PyTorch form" in str(certificate)
    third.products = None  # of a precision that rounds its weights alone
    assert "Prepared for three-bits: eager is here the plain PyTorch form" in str(certificate)


def test_a_third_precision_is_refreshed(third, x):
    model = vit_fast.prepare(small(), precision="three-bits")
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(0.1)
    assert "three_bit_blocks" not in ran(model, x)[1]
    vit_fast.refresh(model)
    out, operations = ran(model, x)
    assert "three_bit_blocks" in operations
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "three_bit_blocks" not in ran(other, x)[1]
        assert torch.equal(ran(vit_fast.refresh(other), x)[0], out)


def test_a_third_precision_tells_where_it_cannot(third):
    with pytest.raises(vit_fast.UnsupportedError, match="the weights are on the device meta, the device is meta"):
        vit_fast.prepare(small().to("meta"), precision="three-bits")
    with pytest.raises(vit_fast.UnsupportedError, match="folding is for all float16 or all bfloat16"):
        vit_fast.prepare(small().float(), precision="three-bits")
    with pytest.raises(ValueError, match=r"precision is 'fp4', expected None, .* or 'three-bits'$"):
        vit_fast.prepare(small(), precision="fp4")


def test_a_precision_that_is_not_known_here(third, x, monkeypatch):
    """As in the pickle of a model that a newer version has prepared."""
    model = vit_fast.prepare(small(), precision="three-bits")
    monkeypatch.delitem(PRECISIONS, "three-bits")
    other = pickle.loads(pickle.dumps(model))
    with pytest.raises(
        ValueError, match=r"vit_fast\.refresh: precision is 'three-bits', expected None(?!.*three-bits)"
    ):
        vit_fast.refresh(other)
    assert torch.equal(ran(other, x)[0], ran(vit_fast.unprepare(other), x)[0])
