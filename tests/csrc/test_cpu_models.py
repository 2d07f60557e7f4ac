"""Small models on the backend ``cpu``: prepared in every precision, checked against plain PyTorch, and what drops the
packed weights. All properties of prepared models, on every device, are in tests/model/test_prepare.py."""

import copy
import pickle

import pytest
import torch
from support import families, library_models, timm_models
from support.budget import assert_within_budget
from support.families import FAMILIES
from support.library_models import PREPARABLE
from torch import nn
from vit_fast.kernels import packing, reference
from vit_fast.kernels.prepared_layer import PreparedLayer

import vit_fast
from vit_fast.backends import cpu_choice
from vit_fast.backends.cpu import CPU
from vit_fast.block import PREPARED, run_blocks

pytestmark = [pytest.mark.extension, pytest.mark.usefixtures("cpu_extension")]

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10)
OPERATIONS = {None: "packed_blocks", "int8": "int8_blocks"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32}
# Images of a check. In int8 the rounding of a row may fall otherwise than in plain PyTorch, which few outputs show as a
# larger or smaller error by chance.
BATCH = {"float32": 2, "bfloat16": 16, "float16": 4, "int8": 32}


@pytest.fixture(autouse=True)
def on_any_processor(monkeypatch):
    """Packed on processors with AMX or AVX512-FP16 too, where 16-bit stacks are left to PyTorch."""
    monkeypatch.setattr(cpu_choice, "faster_in_torch", lambda dtype, capabilities: None)


def small(dtype=torch.float32, **words):
    return library_models.moved(vit_fast.VisionTransformer(**SMALL | words), dtype)


def images(dtype=torch.float32, batch=2):
    return torch.randn(batch, 3, 32, 32).to(dtype)


def chosen(model, x):
    """{operation: backend} of a call."""
    with vit_fast.backends.recording() as choices:
        model(x)
    return {operation: backend for operation, backend, _ in choices}


def prepared(model, kind):
    """The model, and the operation that runs its stack; (model, None) where its blocks cannot be prepared."""
    precision = "int8" if kind == "int8" else None
    try:
        return vit_fast.prepare(model, precision=precision), OPERATIONS[precision]
    except (ValueError, vit_fast.UnsupportedError):
        return model, None


def holds(model, operation, x):
    """A prepared model: on the extension, within the budget, and the same but for rounding in plain PyTorch."""
    with torch.inference_mode():
        assert chosen(model, x)[operation] == "cpu"
        certificate = vit_fast.check(model, x)
        assert certificate.passed, str(certificate)
        out = families.first(model(x))
        with vit_fast.backend("torch"):
            plain = families.first(model(x))
    assert not torch.equal(out, plain)
    limit = 0.02 if x.dtype == torch.float32 and operation == "packed_blocks" else 0.15
    assert (out.double() - plain.double()).norm() <= limit * plain.double().norm()


# Blocks that are not pre-norm of this library.
NOT_PREPARED = ("deit, literal", "scratch", "lanl", "lanl, t2t")


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, kind):
    model, two, _ = families.family(name)
    model, operation = prepared(model.to(DTYPES[kind]), kind)
    assert (operation is None) == (name in NOT_PREPARED)
    if operation is not None:
        holds(model, operation, torch.randn(BATCH[kind], *two.shape[1:]).to(DTYPES[kind]))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("library", PREPARABLE)
def test_models_of_libraries(library, kind, peer):
    if library == "open_clip":
        peer("open_clip")
    model = library_models.CASES[library].build().to(DTYPES[kind])
    model, operation = prepared(vit_fast.optimize(model), kind)
    assert operation is not None
    x = images(DTYPES[kind], BATCH[kind])
    with torch.inference_mode():
        assert chosen(model, x)[operation] == "cpu"
    certificate = vit_fast.check(model, x)
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize(
    "words",
    (
        dict(init_values=0.5),
        dict(mlp_layer="swiglu", act_layer="silu"),
        dict(qkv_bias=False, proj_bias=False),
        dict(pre_norm=True, act_layer="quick_gelu"),
        dict(global_pool="map", class_token=False, act_layer="gelu_tanh"),
        dict(embed_dim=45, mlp_ratio=2.6, depth=2),
    ),
    ids=lambda words: ", ".join(words),
)
@pytest.mark.parametrize("kind", DTYPES)
def test_variants_at_every_level(words, kind):
    model, operation = prepared(small(DTYPES[kind], **words), kind)
    before = CPU.version()
    try:
        for level in CPU.levels():
            CPU.use_level(level)
            holds(model, operation, images(DTYPES[kind], BATCH[kind]))
    finally:
        CPU.use_level(before)


# Rotary embedding in both layouts, norms of q and k, biases, masks, RMSNorm, norms inside the branches, SwiGLU in two.
TIMM_BLOCKS = (
    "AIMv2", "BEiT-3", "qk-norm with RMSNorm", "EVA-02", "DINOv3", "mixed RoPE", "BEiT", "RelPosBlock", "NaFlexVit",
    "NaFlexVit with RoPE",
)  # fmt: skip


@pytest.mark.parametrize("kind", ("float32", "float16", "int8"))
@pytest.mark.parametrize("name", TIMM_BLOCKS)
def test_blocks_of_timm_at_every_level(name, kind):
    torch.manual_seed(0)
    model = library_models.moved(timm_models.build(name), DTYPES[kind])
    model, operation = prepared(vit_fast.optimize(model), kind)
    before = CPU.version()
    try:
        for level in CPU.levels() if name in ("EVA-02", "BEiT") else (before,):
            CPU.use_level(level)
            holds(model, operation, images(DTYPES[kind], BATCH[kind]))
    finally:
        CPU.use_level(before)


def test_masked_keys_and_rows_without_keys():
    """−inf among the scores, as key lengths and masks have them; a row without any key gives zeros, as elsewhere."""
    block = library_models.moved(vit_fast.VisionTransformer(**SMALL)).blocks[0]
    x, mask = torch.randn(2, 40, 48), torch.rand(40, 40) < 0.7
    mask[3] = False
    with torch.inference_mode():
        plain = block(x, attn_mask=mask)
    stack = vit_fast.prepare(nn.Sequential(block).eval())
    with torch.inference_mode():
        with vit_fast.backends.recording() as choices:
            packed = stack[0](x, attn_mask=mask)
        assert [(operation, backend) for operation, backend, _ in choices] == [("packed_blocks", "cpu")]
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("float32", "int8"))
def test_explain_tells_the_backend(kind):
    model, operation = prepared(small(), kind)
    rows = {row.operation: row for row in vit_fast.explain(model)}
    assert rows[operation].backend == "cpu"
    with vit_fast.backend("torch"):
        assert {row.backend for row in vit_fast.explain(model)} == {"torch"}


@pytest.mark.parametrize("kind", ("bfloat16", "int8"))
def test_a_changed_weight_drops_them_and_refresh_folds_anew(kind):
    model, operation = prepared(small(DTYPES[kind]), kind)
    x = images(DTYPES[kind])
    with torch.no_grad():
        before = model(x)
        assert operation in chosen(model, x)
        model.blocks[2].mlp.fc2.weight.mul_(2)
        plain = copy.deepcopy(model)
        assert operation not in chosen(model, x) and torch.equal(model(x), plain(x))
        vit_fast.refresh(model)
        assert chosen(model, x)[operation] == "cpu"
        assert not torch.allclose(model(x), before, rtol=0.02, atol=0.02)
        assert (model(x).double() - plain(x).double()).norm() < 0.05 * plain(x).double().norm()


@pytest.mark.parametrize("kind", ("float32", "int8"))
def test_gradients_training_and_hooks_go_past_the_copies(kind):
    model, operation = prepared(small(), kind)
    x, plain = images(), copy.deepcopy(model)
    assert operation not in chosen(model, x) and torch.equal(model(x), plain(x))
    with torch.no_grad():
        handle = model.blocks[1].attn.register_forward_hook(lambda *_: None)
        assert operation not in chosen(model, x)
        handle.remove()
        assert operation in chosen(model, x)
        model.train()
        assert operation not in chosen(model, x)
        model.eval()
        assert operation in chosen(model, x)


@pytest.mark.parametrize("kind", ("float32", "int8"))
def test_unprepare_copies_and_pickles(kind):
    model = small()
    keys, parameters, x = list(model.state_dict()), [id(p) for p in model.parameters()], images()
    with torch.no_grad():
        plain = model(x)
        model, operation = prepared(model, kind)
        assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
        assert not list(model.buffers())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not hasattr(other.blocks.__dict__[PREPARED], "weights") and operation not in chosen(other, x)
            assert torch.equal(other(x), plain)
        vit_fast.unprepare(model)
        assert operation not in chosen(model, x) and torch.equal(model(x), plain)


def test_parts_of_a_stack_and_other_sizes():
    model, x = small(dynamic_img_size=True), images()
    with torch.no_grad():
        plain = model.forward_intermediates(x, [0, 2], norm=True)
        larger = model(torch.zeros(1, 3, 48, 40) + 0.5)
        vit_fast.prepare(model)
        out = model.forward_intermediates(x, [0, 2], norm=True)
        for one, other in zip((out[0], *out[1]), (plain[0], *plain[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(torch.zeros(1, 3, 48, 40) + 0.5), larger, rtol=1e-4, atol=1e-4)
        assert model(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("width", (45, 46, 47, 49, 96))
@pytest.mark.parametrize("kind", DTYPES)
def test_tokens_of_another_width_are_refused(kind, width):
    """A packed weight tells its width up to a padding: no other width may pass for it."""
    model, operation = prepared(small(DTYPES[kind]), kind)
    tokens = torch.randn(1, 5, width).to(DTYPES[kind])
    with torch.no_grad(), pytest.raises(ValueError, match=f"vit_fast.{operation}: x has width {width}, expected 48"):
        run_blocks(model.blocks, tokens)


def test_a_prepared_model_in_a_linear_probe():
    """Frozen and prepared, under a head that learns."""
    model = vit_fast.prepare(small(num_classes=0))
    head, x = nn.Linear(48, 3), images()
    with torch.no_grad():
        features = model(x)
        assert chosen(model, x)["packed_blocks"] == "cpu"
    head(features).sum().backward()
    assert head.weight.grad.isfinite().all() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "dtype,capability", ((torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16"), (torch.float16, "avx512_fp16"))
)
def test_stacks_are_left_to_instructions_that_only_pytorch_uses(dtype, capability, monkeypatch):
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(CPU, "_capabilities", {capability: True})
    model = vit_fast.prepare(small(dtype))
    with torch.no_grad():
        choices = chosen(model, images(dtype))
        assert "packed_blocks" not in choices and set(choices.values()) == {"torch"}
        assert choices["prepared_blocks"] == "torch"
        with vit_fast.backend("cpu"):
            other = vit_fast.prepare(small(dtype))
        assert chosen(other, images(dtype))["packed_blocks"] == "cpu"
        assert chosen(vit_fast.prepare(small()), images())["packed_blocks"] == "cpu"


# Blocks of forms that no stack has: each linear layer is prepared alone.
BY_PARTS = ("ViTamin", "differential", "ResPostBlock", "ParallelScalingBlock", "Sapiens2", "SAM", "Gemma4", "CaiT")


@pytest.mark.parametrize("kind", ("float32", "bfloat16", "int8"))
@pytest.mark.parametrize("name", BY_PARTS)
def test_blocks_by_parts(name, kind):
    torch.manual_seed(0)
    model = library_models.moved(timm_models.build(name), DTYPES[kind])
    x = images(DTYPES[kind])
    with torch.no_grad():
        golden = families.first(copy.deepcopy(model).double()(x.double()))
        before = families.first(vit_fast.optimize(model)(x))
        vit_fast.prepare(model, "int8" if kind == "int8" else None)
        assert chosen(model, x)["int8_linear" if kind == "int8" else "packed_linear"] == "cpu"
        out = families.first(model(x))
    if kind == "int8":
        assert (out.double() - golden).norm() < 0.05 * golden.norm()
    else:
        assert_within_budget(out, before, golden, kind="model", replicas=[])


@pytest.mark.parametrize("kind", DTYPES)
def test_packed_linear_layers_at_every_level(kind):
    """Odd widths, few and many rows, norms, activations, LayerScale and residual, against plain PyTorch."""
    torch.manual_seed(0)
    dtype, pack = DTYPES[kind], packing.int8_weight if kind == "int8" else packing.packed_weight
    before = CPU.version()
    try:
        for level in CPU.levels():
            CPU.use_level(level)
            for rows, width, features in ((1, 7, 5), (3, 33, 65), (130, 48, 96)):
                x, weight = torch.randn(rows, width).to(dtype), pack(torch.randn(features, width).to(dtype))
                bias, gamma, ends = (
                    torch.randn(features),
                    torch.randn(features),
                    torch.randn(rows, features).to(dtype),
                )
                ln = torch.randn(width), torch.randn(width), 1e-6
                for *rest, residual in (
                    (None, None, None, "layer", None, None, None),
                    (*ln, "layer", "gelu", None, None),
                    (*ln, "rms", "silu", gamma, ends),
                    (None, None, None, "layer", None, gamma, ends),
                ):
                    inputs = x[:, :], PreparedLayer(weight.tensors, weight.bias(bias), features, *rest), residual
                    out, wanted = CPU.forward["int8_linear"](*inputs), reference.packed_linear(*inputs)
                    scale = wanted.double().abs().amax()
                    limit = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2, "int8": 2e-2}[kind]
                    assert out.dtype == dtype and out.shape == wanted.shape
                    assert (out.double() - wanted.double()).abs().amax() <= limit * scale, (level, rows, rest[3:5])
    finally:
        CPU.use_level(before)


@pytest.mark.parametrize("kind", DTYPES)
def test_every_image_of_a_batch_as_alone(kind):
    """A stack takes a few images at a time; each image keeps its own rotary table and its own bias."""
    model, _ = prepared(small(DTYPES[kind]), kind)
    stack = vars(model.blocks)[PREPARED]
    tokens, head_size, images = 150, 16, 5  # two images and more fill the tasks of every thread
    x = torch.randn(images, tokens, 48).to(DTYPES[kind])
    rope = torch.rand(2, images, 1, tokens - 1, head_size)
    bias = torch.randn(images, 3, tokens, tokens)

    def run(chosen):
        stack.options = stack.options._replace(rope=tuple(rope[:, chosen]), num_prefix=1, bias=bias[chosen])
        with torch.inference_mode(), vit_fast.backend("cpu"):
            return stack.run(x[chosen])

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(run(slice(None)), torch.cat([run(slice(i, i + 1)) for i in range(images)]))
    finally:
        torch.set_num_threads(threads)
