"""vit_fast.graphed: buckets, copies, layouts of outputs, and what makes graphs stale.

On a CPU ``Replays`` stands in for CUDA graphs. A replay of it runs the model anew on the static input, with the
storages that the weights had at the capture, and writes into the output of the capture: so it goes stale as a graph
does, and overwrites as a graph does. The GPU tests hold real graphs against the eager model, bit for bit.
"""

import contextlib
import copy
import gc
import inspect
import io
import pickle
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from support.graphs import CAPTURES, REPLAYS, OnCpu, Replays, Reruns
from support.matmul_precision import matmul_precision
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import vit_fast
from vit_fast import UnsupportedError
from vit_fast.cuda_graphs import CudaGraphs, graphed


@pytest.fixture(autouse=True)
def counts():
    CAPTURES.clear()
    REPLAYS.clear()


class Tiny(nn.Module):
    """[B, 3, 4, 4] → [B, 5]; ``shape`` makes something else of the logits."""

    def __init__(self, shape=lambda self, images, logits: logits, **buffers):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.GELU())
        self.head = nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shape = shape
        self.image_size = 4
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, images):
        return self.shape(self, images, self.head(self.body(images)))


def tiny(*args, **buffers):
    return Tiny(*args, **buffers).eval()


def on_cpu(model, batch_sizes=(1, 2, 4), example=None, clone=True, lazy=False):
    return OnCpu(model, batch_sizes, example, clone, lazy)


def images(count, seed=0):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def check(module, model, count=3, seed=0):
    """The module says what the model says."""
    with torch.no_grad():
        got, wanted = module(images(count, seed)), model(images(count, seed))
    assert tree_leaves(got) and len(tree_leaves(got)) == len(tree_leaves(wanted))
    for a, b in zip(tree_leaves(got), tree_leaves(wanted)):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert type(a) is type(b) and a == b
    return got


# buckets, rows, copies


@pytest.mark.parametrize(
    "count,replays",
    ((1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [4, 1]), (7, [4, 4]), (8, [4, 4]), (10, [4, 4, 2]), (0, [])),
)
def test_each_batch_runs_in_the_smallest_buckets(count, replays):
    model = tiny()
    module = on_cpu(model, (4, 1, 2, 2))
    assert CAPTURES == [4, 2, 1] and module.batch_sizes == (1, 2, 4)
    got = check(module, model, count)
    assert got.shape == (count, 5) and not got.requires_grad
    assert REPLAYS == replays and CAPTURES == [4, 2, 1]


def test_the_graph_of_a_batch_size_is_captured_when_it_is_needed():
    model = tiny()
    module = on_cpu(model, (1, 2, 4, 8), lazy=True)
    assert CAPTURES == [1]
    for count, captured in ((1, [1]), (3, [1, 4]), (4, [1, 4]), (11, [1, 4, 8]), (9, [1, 4, 8]), (2, [1, 4, 8, 2])):
        check(module, model, count)
        assert CAPTURES == captured
    assert REPLAYS == [1, 4, 4, 8, 4, 8, 1, 2]


def test_a_call_that_needs_several_graphs_captures_the_largest_first():
    module = on_cpu(tiny(), (1, 2, 4, 8), lazy=True)
    check(module, module.model, 11)
    assert CAPTURES == [1, 8, 4]


def test_by_default_33_images_are_padded_to_64():
    model = tiny()
    module = OnCpu(model, inspect.signature(graphed).parameters["batch_sizes"].default, None, True, lazy=True)
    assert module.batch_sizes == (1, 2, 4, 8, 16, 32, 64)
    for count, replays in ((33, [64]), (17, [32]), (64, [64]), (65, [64, 1]), (100, [64, 64])):
        REPLAYS.clear()
        check(module, model, count)
        assert REPLAYS == replays


def test_rows_that_are_not_asked_for_play_no_part():
    model = tiny()
    module = on_cpu(model)
    with torch.no_grad():
        module(torch.full((4, 3, 4, 4), float("nan")))
    check(module, model, 3)


def test_a_result_outlives_the_next_call():
    model = tiny()
    module = on_cpu(model)
    for count in (1, 3, 4, 6):
        first = check(module, model, count, seed=1)
        kept = first.clone()
        check(module, model, 4, seed=2)
        assert torch.equal(first, kept)


def test_without_clone_the_result_is_the_memory_of_the_graph():
    model = tiny()
    module = on_cpu(model, clone=False)
    first = check(module, model, 3, seed=1)
    kept = first.clone()
    second = check(module, model, 3, seed=2)
    assert first.data_ptr() == second.data_ptr() and not torch.equal(first, kept)
    check(module, model, 9)


def test_images_of_any_strides():
    model = tiny()
    module = on_cpu(model)
    with torch.no_grad():
        for x in (images(3).to(memory_format=torch.channels_last), images(6)[::2], images(1).expand(3, 3, 4, 4)):
            torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize("inside,outside", ((True, False), (False, True)))
def test_inference_mode_may_come_and_go(inside, outside):
    model = tiny()
    with torch.inference_mode(inside):
        module = on_cpu(model)
    with torch.inference_mode(outside):
        check(module, model)


# outputs


@dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor | None


@dataclass
class Unknown:
    logits: torch.Tensor


torch.export.register_dataclass(Answer)

STRUCTURES = {
    "tuple": lambda model, x, y: (y, x.flatten(1)),
    "list": lambda model, x, y: [y, (y + 1, [y + 2])],
    "dict": lambda model, x, y: {"logits": y, "rows": y.unflatten(1, (5, 1))},
    "ordered": lambda model, x, y: OrderedDict(a=y, b={"c": y * 2}),
    "dataclass": lambda model, x, y: Answer(y, None),
    "constants": lambda model, x, y: (y, None, 3, "words", torch.float32, 0.5, True),
    "parameter": lambda model, x, y: (y, model.scale, model.scale.exp()),
    "images": lambda model, x, y: (x, y.view_as(y)),
}


@pytest.mark.parametrize("clone", (True, False))
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_keep_their_structure(name, clone):
    model = tiny(STRUCTURES[name])
    module = on_cpu(model, clone=clone)
    with torch.no_grad():
        wanted = model(images(3))
    for count in (3, 4, 11):
        assert type(check(module, model, count)) is type(wanted)
    if clone:
        buckets = module._captured.buckets.values()
        held = [*model.parameters(), *(leaf for bucket in buckets for leaf in (*bucket.leaves, bucket.input))]
        static = {leaf.data_ptr() for leaf in held if isinstance(leaf, torch.Tensor)}
        got = tree_leaves(check(module, model, 4))
        assert static.isdisjoint(leaf.data_ptr() for leaf in got if isinstance(leaf, torch.Tensor))


def test_a_model_output_of_transformers():
    from transformers import ViTConfig, ViTForImageClassification

    words = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8)
    model = ViTForImageClassification(ViTConfig(image_size=16, output_hidden_states=True, **words)).eval()
    module = on_cpu(model, (1, 2))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        got, wanted = module(x), model(x)
    assert type(got) is type(wanted) and got.keys() == wanted.keys() and len(got.hidden_states) == 2
    torch.testing.assert_close(tuple(got.values()), tuple(wanted.values()))


BATCH = "expected the batch as its first axis, or no dependence on the images"
REFUSED = {
    "batch last": (lambda model, x, y: y.t(), rf"tensor 0 of the output is \[5, 2\] of 2 .* \[5, 3\] of 3 .*{BATCH}"),
    "batch folded": (lambda model, x, y: (y, y.flatten()), rf"tensor 1 .* is \[10\] of 2 .* \[15\] of 3 .*{BATCH}"),
    "mean": (lambda model, x, y: y.mean(0), rf"tensor 0 of the output is \[5\] of 2 .* \[5\] of 3 .*{BATCH}"),
    "number": (lambda model, x, y: (y, len(x)), "value 1 of the output is 2 of 2 images and 3 of 3"),
    "unknown class": (lambda model, x, y: Unknown(y), "holds a Unknown, expected .*torch.export.register_dataclass"),
    "length": (lambda model, x, y: list(y), "the output of 2 images has another structure than that of 3$"),
    "squeezed": (lambda model, x, y: y.squeeze(0), "batch size 1 makes an output of another structure than 2 and 3"),
    "item": (lambda model, x, y: y * y.sum().item(), "calls aten._local_scalar_dense.default, for whose result the"),
    "nonzero": (lambda model, x, y: y + x.nonzero().shape[0], "calls aten.nonzero.default, for whose result the host"),
    "mask": (lambda model, x, y: y + x[x > 0].sum(), "calls aten.index.Tensor, for whose result the host must wait"),
    "meta": (lambda model, x, y: (y, y.to("meta")), "the model copies between (cpu and meta|meta and cpu)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_give_is_refused(name):
    shape, words = REFUSED[name]
    model = tiny(shape)
    with pytest.raises(UnsupportedError, match=f"^vit_fast.graphed: .*{words}"):
        on_cpu(model)
    with torch.no_grad():
        model(images(2))


def test_integers_may_index():
    model = tiny(lambda model, x, y: y[:, model.order], order=torch.tensor([4, 3, 2, 1, 0]))
    check(on_cpu(model), model)


# arguments

WRONG = (
    (dict(model=abs), TypeError, "model is builtin_function_or_method, expected an nn.Module"),
    (dict(batch_sizes=8), TypeError, "batch_sizes is 8, expected a tuple of ints"),
    (dict(batch_sizes=()), ValueError, "batch_sizes is empty, expected one size or more"),
    (dict(batch_sizes=(1, 2.0)), TypeError, "batch_sizes has 2.0, expected an int"),
    (dict(batch_sizes=(True,)), TypeError, "batch_sizes has True, expected an int"),
    (dict(batch_sizes=[0]), ValueError, "batch_sizes has 0, expected 1 or more"),
    (dict(example=[1]), TypeError, "example is list, expected a torch.Tensor"),
    (dict(example=torch.zeros(3)), ValueError, "example has 1 dimensions, expected a batch of images"),
    (
        dict(model=nn.Linear(2, 2).eval()),
        ValueError,
        "example is None, expected images, as the model does not tell its input size",
    ),
    (
        dict(model=nn.Identity().eval(), example=torch.zeros(1, 3)),
        ValueError,
        "model has no floating-point parameters, expected some to tell its device",
    ),
    (dict(model=Tiny()), UnsupportedError, "the model is in training mode, expected eval mode (model.eval())"),
    (
        dict(model=Tiny().train().requires_grad_(False)),
        UnsupportedError,
        "the model is in training mode, expected eval mode (model.eval())",
    ),
)


@pytest.mark.parametrize("words,error,text", WRONG, ids=[text for *_, text in WRONG])
def test_bad_arguments_are_named(words, error, text):
    with pytest.raises(error) as caught:
        OnCpu(**dict(model=tiny(), batch_sizes=(1,), example=None, clone=True, lazy=True) | words)
    assert str(caught.value) == f"vit_fast.graphed: {text}"


def test_a_cpu_has_no_graphs():
    with pytest.raises(
        UnsupportedError, match=r"^vit_fast.graphed: the model is on cpu, CUDA graphs need a CUDA device$"
    ):
        graphed(tiny())


def test_one_part_in_training_mode_is_named():
    model = tiny()
    model.body[1].train()
    with pytest.raises(UnsupportedError, match=r"^vit_fast.graphed: body.1 is in training mode, expected eval mode"):
        on_cpu(model)


def test_parameters_on_two_devices_are_named():
    model = tiny()
    model.head.to("meta")
    with pytest.raises(UnsupportedError, match=r"parameters are on cpu and meta, expected one device$"):
        on_cpu(model)


def test_weights_without_memory_of_their_own_are_named():
    model = tiny()
    model.head.weight = nn.Parameter(TwoTensor(torch.zeros(5, 8), torch.zeros(5, 8)))
    with pytest.raises(
        UnsupportedError, match=r"^vit_fast.graphed: head.weight is a TwoTensor, expected a plain tensor"
    ):
        on_cpu(model)


WRONG_IMAGES = (
    (torch.zeros(2, 3, 4, 5), "[2, 3, 4, 5] float32 on cpu"),
    (torch.zeros(2, 3, 4), "[2, 3, 4] float32 on cpu"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.float16), "[2, 3, 4, 4] float16 on cpu"),
    (torch.zeros(2, 3, 4, 4, device="meta"), "[2, 3, 4, 4] float32 on meta"),
    (torch.zeros(0, 3, 8, 8), "[0, 3, 8, 8] float32 on cpu"),
)


@pytest.mark.parametrize("wrong,text", WRONG_IMAGES, ids=[text for _, text in WRONG_IMAGES])
def test_other_images_than_captured_are_named(wrong, text):
    module = on_cpu(tiny())
    with torch.no_grad(), pytest.raises(ValueError) as caught:
        module(wrong)
    assert str(caught.value) == f"vit_fast.graphed: images are {text}, captured were [B, 3, 4, 4] float32 on cpu"
    with pytest.raises(TypeError, match=r"^vit_fast.graphed: images are list, expected a torch.Tensor$"):
        module([wrong])
    assert not REPLAYS and len(CAPTURES) == 3


def test_training_and_gradients_are_refused():
    model = tiny()
    module = on_cpu(model)
    words = "^vit_fast.graphed: gradients are enabled, which graphs do not give; call it under torch.inference_mode"
    with pytest.raises(UnsupportedError, match=words):
        module(images(2))
    model.requires_grad_(False)
    torch.testing.assert_close(module(images(2)), model(images(2)))
    with pytest.raises(UnsupportedError, match=words):
        module(images(2).requires_grad_())
    model.train()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="the model is in training mode, expected eval mode"):
        module(images(2))
    model.eval()
    check(module, model)
    assert len(CAPTURES) == 3


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float64))
def test_sizes_and_dtype_are_those_of_the_example(dtype):
    model = tiny(lambda model, x, y: y)
    forward = model.forward
    model.forward = lambda x: forward(x.float() / 255)
    example = torch.zeros(1, 3, 4, 4, dtype=dtype)
    module = on_cpu(model, example=example)
    with torch.no_grad():
        torch.testing.assert_close(module(example + 7), model(example + 7))
        with pytest.raises(
            ValueError, match=r"images are \[2, 3, 4, 4\] float32 on cpu, captured were \[B, 3, 4, 4\] "
        ):
            module(images(2))


# what makes graphs stale


def _replace_data(model, module):
    model.head.weight.data = torch.randn(5, 8)


def _replace_parameter(model, module):
    model.head.weight = nn.Parameter(torch.randn(5, 8))


def _replace_buffer(model, module):
    model.shift = torch.randn(5)


def _replace_module(model, module):
    model.head = nn.Linear(8, 5).eval()


def _replace_deep_module(model, module):
    model.body[1] = nn.Linear(48, 8).eval()


def _assign(model, module):
    module.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()}, assign=True)


def _parametrize(model, module):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

        def right_inverse(self, weight):
            return weight

    nn.utils.parametrize.register_parametrization(model.head, "weight", Twice())
    model.eval()


def _to(model, module):
    module.double()
    module.float()


def _to_inside(model, module):
    model.double()
    model.float()


REPLACED = (
    _replace_data, _replace_parameter, _replace_buffer, _replace_module, _replace_deep_module, _assign, _parametrize,
    _to, _to_inside,
)  # fmt: skip


@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
def test_replaced_weights_are_captured_anew(change):
    model = tiny(lambda model, x, y: y + model.shift, shift=torch.randn(5))
    module = on_cpu(model)
    before = check(module, model)
    check(module, model)
    assert len(CAPTURES) == 3
    change(model, module)
    after = check(module, model)
    assert len(CAPTURES) == 6
    if change not in (_to, _to_inside):
        assert not torch.allclose(before, after)
    check(module, model)
    assert len(CAPTURES) == 6


def test_after_a_change_only_the_graphs_of_the_call_are_captured_anew():
    model = tiny()
    module = on_cpu(model, lazy=True)
    check(module, model, 4)
    _replace_module(model, module)
    check(module, model, 2)
    assert CAPTURES == [1, 4, 2, 1]
    _replace_data(model, module)
    check(module, model, 4)
    assert CAPTURES == [1, 4, 2, 1, 4, 1]


def test_a_missing_graph_is_not_captured_of_a_part_in_training_mode():
    model = tiny()
    model.body.append(nn.BatchNorm1d(8).eval())
    module = on_cpu(model, lazy=True)
    model.body[3].train()
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"^vit_fast.graphed: body.3 is in training mode"):
        module(images(2))
    assert CAPTURES == [1] and model.body[3].num_batches_tracked == 0
    model.body[3].eval()
    check(module, model, 2)


def test_weights_that_change_in_place_are_seen_by_the_same_graphs():
    model = tiny()
    module = on_cpu(model)
    before = check(module, model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    middle = check(module, model)
    module.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})
    after = check(module, model)
    model.head.bias.data.add_(1)
    check(module, model)
    assert not torch.allclose(before, middle) and not torch.allclose(middle, after) and len(CAPTURES) == 3


class Cached(Tiny):
    """Computes with a table made of a parameter, kept for as long as the parameter has its version."""

    table = (None, None)

    def forward(self, images):
        key = (self.head.weight.data_ptr(), self.head.weight._version)
        if self.table[0] != key:
            self.table = (key, self.head.weight.detach().t().contiguous())
        return self.body(images) @ self.table[1]


def test_what_is_made_of_weights_is_captured_anew_and_stays_alive():
    model = Cached().eval()
    module = on_cpu(model)
    check(module, model)
    kept = {storage.data_ptr() for storage in module._captured.kept}
    assert model.table[1].data_ptr() in kept and {p.data_ptr() for p in model.parameters()} <= kept
    with torch.no_grad():
        model.head.weight.mul_(2)
    check(module, model)
    assert len(CAPTURES) == 6
    check(module, model)
    assert len(CAPTURES) == 6


def test_prepared_weights_are_captured_anew(monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Reruns)
    model = _vit().eval().bfloat16()
    module = on_cpu(model, (2,))
    x = torch.randn(2, 3, 16, 16).bfloat16()
    steps = (
        lambda: None,
        lambda: vit_fast.prepare(model),
        lambda: model.blocks[0].mlp.fc1.weight.data.mul_(2),
        lambda: vit_fast.refresh(model),
        lambda: model.blocks[0].mlp.fc1.weight.mul_(2),
    )
    with torch.no_grad():
        for step, captures in zip(steps, (1, 2, 2, 3, 4), strict=True):
            step()
            assert torch.equal(module(x), model(x)) and len(CAPTURES) == captures


def test_activations_of_the_look_at_the_model_are_not_kept():
    model = tiny()
    module = on_cpu(model)
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}
    assert {storage.data_ptr() for storage in module._captured.kept} == weights


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "backend": lambda: vit_fast.backend("torch"),
    "precision": lambda: matmul_precision("high"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_captured_anew(name):
    model = tiny()
    module = on_cpu(model)
    with SETTINGS[name]():
        check(module, model)
        check(module, model)
        assert len(CAPTURES) == 6
    check(module, model)
    assert len(CAPTURES) == 9


def test_autocast_keeps_no_weights_during_a_capture():
    cached = []
    model = tiny(lambda model, x, y: (cached.append(torch.is_autocast_cache_enabled()), y)[1])
    with torch.autocast("cpu", torch.bfloat16):
        module = on_cpu(model)
        assert cached and not any(cached) and torch.is_autocast_cache_enabled()
        with torch.no_grad():
            assert module(images(3)).dtype == torch.bfloat16


def test_wrong_images_after_a_change_are_held_against_the_new_graphs():
    model = tiny()
    module = on_cpu(model)
    model.double()
    with torch.no_grad():
        assert module(images(3).double()).dtype == torch.float64
        with pytest.raises(ValueError, match=r"images are \[3, 3, 4, 4\] float32 on cpu, captured were .* float64 on"):
            module(images(3))
    model.float()
    with torch.no_grad(), pytest.raises(ValueError, match=r"images are .* float64 on cpu, captured were .* float32 on"):
        module(images(3).double())


def test_moving_frees_the_graphs_at_once():
    module = on_cpu(tiny())
    module.double()
    assert module._captured is None


# failures


class Fails(Replays):
    """Refuses a batch size, as a CUDA graph does: with an error on top of that of the model."""

    size = None

    def capture(self, model, static_input):
        if len(static_input) == self.size:
            try:
                raise ValueError("operation not permitted\nwhen a stream is capturing")
            except ValueError:
                raise RuntimeError("capture invalidated")  # noqa: B904
        return super().capture(model, static_input)


def test_a_failing_capture_names_its_bucket_and_leaves_the_model(monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Fails)
    monkeypatch.setattr(Fails, "size", 2)
    model = tiny()
    words = (
        "batch size 2 cannot be captured: ValueError: operation not permitted; then RuntimeError: capture invalidated"
    )
    for _ in range(2):
        try:
            raise KeyError("an error that is being handled")
        except KeyError:
            with pytest.raises(UnsupportedError, match=f"^vit_fast.graphed: {words}$") as caught:
                on_cpu(model)
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setattr(Fails, "size", None)
    module = on_cpu(model)
    monkeypatch.setattr(Fails, "size", 1)
    model.head = nn.Linear(8, 5).eval()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="batch size 1 cannot be captured"):
        module(images(1))
    assert module._captured is None and not module._lock.locked() and torch.is_autocast_cache_enabled()
    monkeypatch.setattr(Fails, "size", None)
    check(module, model)


def test_a_batch_size_that_cannot_be_captured_leaves_the_others(monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Fails)
    model = tiny()
    module = on_cpu(model, lazy=True)
    monkeypatch.setattr(Fails, "size", 4)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="batch size 4 cannot be captured: ValueError"):
        module(images(4))
    assert CAPTURES == [1] and not module._lock.locked() and torch.is_autocast_cache_enabled()
    check(module, model, 2)
    check(module, model, 1)
    assert CAPTURES == [1, 2]


def test_a_capture_moves_no_random_numbers():
    model = tiny()
    before = torch.get_rng_state()
    on_cpu(model)
    assert torch.equal(before, torch.get_rng_state())


# copies, threads, names


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "torch.save"))
def test_copies_capture_anew(way):
    module = on_cpu(vit_fast.VisionTransformer(16, 8, embed_dim=32, depth=1, num_heads=2, num_classes=5).eval(), (1, 2))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = module(x)
    if way == "deepcopy":
        other = copy.deepcopy(module)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        torch.save(module, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other._captured is None and other._lock is not module._lock and len(CAPTURES) == 2
    with torch.no_grad():
        other.model.head.weight.mul_(2)
        assert not torch.allclose(other(x), wanted) and len(CAPTURES) == 4
        torch.testing.assert_close(module(x), wanted)


class Slow(Replays):
    """Leaves other threads time between copy, replay and clone."""

    def capture(self, model, static_input):
        replay, output = super().capture(model, static_input)

        def slow():
            time.sleep(0.002)
            replay()
            time.sleep(0.002)

        return slow, output


def test_threads_take_turns(monkeypatch):
    monkeypatch.setattr(OnCpu, "graphs", Slow)
    model = tiny()
    module, wrong = on_cpu(model), []

    def work(seed):
        for turn in range(5):
            x = images(1 + seed % 3, 100 * seed + turn)
            with torch.no_grad():
                if not torch.allclose(module(x), model(x), atol=1e-6):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(REPLAYS) == 30 and len(CAPTURES) == 3


def test_names_are_those_of_the_model():
    model = tiny()
    module = on_cpu(model)
    assert list(module.state_dict()) == list(model.state_dict())
    assert module.state_dict()._metadata == model.state_dict()._metadata
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    assert module.model is model and not module.training
    outer = nn.Sequential(module)
    assert outer.load_state_dict(outer.state_dict()) and not set(outer.state_dict()) & set(model.state_dict())
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        module.load_state_dict({})


def test_memory_does_not_grow():
    model = tiny()
    module = on_cpu(model)

    def tensors():
        gc.collect()
        return sum(type(thing) in (torch.Tensor, nn.Parameter) for thing in gc.get_objects())

    check(module, model, 7)
    before = tensors()
    for seed in range(20):
        check(module, model, 1 + seed % 7, seed)
    assert tensors() == before


# models of other libraries, whose own sizes are found


def _torchvision():
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 1, 2, 32, 64, num_classes=5)


def _timm(**words):
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, **words)


def _vit(**words):
    return vit_fast.VisionTransformer(16, 8, embed_dim=32, depth=1, num_heads=2, num_classes=5, **words)


MODELS = {
    "vit_fast": (_vit, (3, 16, 16)),
    "vit_fast, one channel": (lambda: _vit(in_chans=1), (1, 16, 16)),
    "timm": (_timm, (3, 32, 32)),
    "timm, four channels": (lambda: _timm(in_chans=4), (4, 32, 32)),
    "torchvision": (_torchvision, (3, 16, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_libraries(name):
    make, sizes = MODELS[name]
    model = make().eval()
    module = on_cpu(model, (1, 2))
    assert tuple(module._captured.like.shape) == (0, *sizes)
    x = torch.randn(3, *sizes)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), model(x))


def test_a_resized_position_table_is_part_of_the_graphs():
    model = _vit(dynamic_img_size=True).eval()
    module = on_cpu(model, (1, 2), example=torch.zeros(1, 3, 24, 24))
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        before = module(x)
        for write in (model.pos_embed.mul_, model.pos_embed.data.mul_):
            write(2)
            torch.testing.assert_close(module(x), model(x))
        assert not torch.allclose(module(x), before) and len(CAPTURES) == 2


def test_a_compiled_model():
    model = tiny()
    module = on_cpu(torch.compile(model, backend="eager", fullgraph=True), (1, 2), example=images(1))
    check(module, model)


# the calls to torch.cuda, in their order


class FakeCuda:
    """Stands in for what ``CudaGraphs`` calls of torch.cuda, and writes the calls down; streams are names."""

    def __init__(self, monkeypatch, refuses=False):
        self.log, self.refuses, self.current, self.streams = [], refuses, ["default"], 0
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self.named("event"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.named("graph"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.named(self.current[-1]))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: self.note("clear"), raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: self.note(f"zeros on {device}"))
        self.capturing = False

    def note(self, *words):
        self.log.append(" ".join(map(str, words)))

    def named(self, name):
        class Named:
            def __getattr__(thing, method):
                return lambda *others: self.note(name, method, *(other.name for other in others))

        thing = Named()
        thing.name = name
        return thing

    def new_stream(self):
        self.streams += 1
        return self.named(f"side{self.streams}")

    @contextlib.contextmanager
    def device(self, device):
        self.note("enter", device)
        yield
        self.note("leave", device)

    @contextlib.contextmanager
    def stream(self, stream):
        before = list(self.current)
        self.current.append(stream.name)
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        self.note("begin", pool, stream.name, capture_error_mode)
        self.current.append(stream.name)
        yield
        if self.refuses and pool is not None:  # and leaves its stream current, as torch does
            raise RuntimeError("capture invalidated")
        self.current.pop()
        self.note("end")

    def end_allocate(self, index, pool):
        self.note("end allocation", index, pool)
        raise RuntimeError("not currently recording")


def _call(cuda):
    def call(static_input):
        cuda.note("call", static_input, "on", cuda.current[-1])
        return "output"

    return call


WARM = ["enter cuda:3", "leave cuda:3", "enter cuda:3", "side1 wait_stream default"] + 3 * ["call input on side1"]
CAPTURE = ["clear", "begin pool side1 thread_local", "call input on side1"]


def test_a_capture_warms_up_on_its_stream_and_then_captures(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda", 3))
    replay, output = graphs.capture(_call(cuda), "input")
    assert cuda.log == [*WARM, *CAPTURE, "end", "clear", "leave cuda:3"]
    assert output == "output" and cuda.current == ["default"]
    cuda.log.clear()
    replay()
    assert cuda.log == ["graph replay"]


def test_after_a_refused_capture_torch_is_set_right(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuses=True)
    with pytest.raises(RuntimeError, match="capture invalidated"):
        CudaGraphs(torch.device("cuda", 3)).capture(_call(cuda), "input")
    healed = ["end allocation 3 pool", "begin None side1 global", "zeros on cuda:3", "end"]
    assert cuda.log == [*WARM, *CAPTURE, *healed, "clear"] and cuda.current == ["default"]


def test_turns_wait_for_one_another(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda", 3))
    cuda.log.clear()
    with graphs.turn():
        cuda.note("replay")
    assert cuda.log == ["enter cuda:3", "default wait_event event", "replay", "event record default", "leave cuda:3"]
    cuda.log.clear()
    with contextlib.suppress(KeyError), graphs.turn():
        raise KeyError
    assert "event record default" in cuda.log
    cuda.log.clear()
    cuda.capturing = True
    with pytest.raises(UnsupportedError, match="called while a CUDA graph is captured"), graphs.turn():
        cuda.note("replay")
    assert cuda.log == ["enter cuda:3"]


# on a GPU

gpu = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _on_gpu(dtype=torch.bfloat16, **words):
    torch.manual_seed(0)
    return _vit(**words).to("cuda", dtype).eval()


def _random(model, count, seed=0):
    like = next(model.parameters())
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator, device="cuda").to(like)


def _eager(model, x, batch_sizes):
    """What the model says of the same images in batches of the sizes that graphs run, padded by zeros."""
    parts = []
    with torch.no_grad():
        for part in x.split(batch_sizes[-1]):
            size = next(size for size in batch_sizes if size >= len(part))
            padded = torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=x.device)
            padded[: len(part)] = part
            parts.append(model(padded)[: len(part)])
    return torch.cat(parts)


def _same(module, x):
    """Calls the module, and holds the result against the eager model, bit for bit."""
    with torch.no_grad():
        got = module(x)
    wanted = _eager(module.model, x, module.batch_sizes)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    return got


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_graphed_bits_of_each_batch(dtype):
    module = graphed(_on_gpu(dtype), (1, 2, 4))
    for seed, count in enumerate((1, 2, 3, 4, 5, 9, 3, 1)):
        _same(module, _random(module.model, count, seed))
    with torch.no_grad():
        assert module(_random(module.model, 0)).shape == (0, 5)


@gpu
@pytest.mark.parametrize("make", (_timm, _torchvision), ids=("timm", "torchvision"))
def test_gpu_graphed_models_of_other_libraries(make):
    model = make().cuda().eval()
    module = graphed(model, (1, 2))
    x = torch.randn(3, *module._captured.like.shape[1:], device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), atol=1e-3, rtol=1e-3)


@gpu
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gpu_graphed_autocast(dtype):
    model = _on_gpu(torch.float32)
    with torch.autocast("cuda", dtype):
        module = graphed(model, (2,))
        assert _same(module, _random(model, 2)).dtype == dtype
    torch.cuda.empty_cache()
    assert _same(module, _random(model, 2)).dtype == torch.float32


@gpu
def test_gpu_graphed_results_outlive_the_next_call():
    module = graphed(_on_gpu(), (1, 4))
    for count in (1, 3, 4, 6):
        first = _same(module, _random(module.model, count, 1))
        kept = first.clone()
        _same(module, _random(module.model, 4, 2))
        _same(module, _random(module.model, 1, 3))
        assert torch.equal(first, kept)


@gpu
def test_gpu_graphed_views_without_clone():
    module = graphed(_on_gpu(), (4,), clone=False)
    first = _same(module, _random(module.model, 3, 1))
    second = _same(module, _random(module.model, 3, 2))
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, second)
    _same(module, _random(module.model, 9))


@gpu
def test_gpu_graphed_on_side_streams():
    module = graphed(_on_gpu(), (1, 4))
    batches = [_random(module.model, 1 + seed % 4, seed) for seed in range(8)]
    wanted = [_eager(module.model, x, (1, 4)) for x in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for turn in range(40):
        with torch.no_grad(), torch.cuda.stream(streams[turn % 3]):
            results.append(module(batches[turn % 8]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, wanted[turn % 8]) for turn, result in enumerate(results))


@gpu
def test_gpu_graphed_threads_on_streams_of_their_own():
    module, wrong = graphed(_on_gpu(), (1, 4)), []
    batches = [_random(module.model, 1 + seed % 4, seed) for seed in range(8)]
    wanted = [_eager(module.model, x, (1, 4)) for x in batches]
    torch.cuda.synchronize()

    def work(first):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(40):
                i = (first + turn) % 8
                if not torch.equal(module(batches[i]), wanted[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_gpu_graphed_errors():
    model = _on_gpu()
    module = graphed(model, (2,))
    captured = r"captured were \[B, 3, 16, 16\] bfloat16 on cuda:0$"
    with torch.no_grad():
        with pytest.raises(ValueError, match=rf"images are \[2, 3, 16, 16\] bfloat16 on cpu, {captured}"):
            module(_random(model, 2).cpu())
        with pytest.raises(ValueError, match=rf"images are \[2, 3, 16, 16\] float32 on cuda:0, {captured}"):
            module(_random(model, 2).float())
        with pytest.raises(ValueError, match=rf"images are \[2, 3, 16, 8\] bfloat16 on cuda:0, {captured}"):
            module(_random(model, 2)[..., :8])
    with pytest.raises(UnsupportedError, match="gradients are enabled"):
        module(_random(model, 2))
    module.to("cpu")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="the model is on cpu, CUDA graphs need a CUDA device"):
        module(torch.zeros(2, 3, 16, 16, dtype=torch.bfloat16))
    module.to("cuda")
    _same(module, _random(model, 2))


@gpu
def test_gpu_graphed_captures_anew():
    model = _on_gpu(torch.float32)
    module = graphed(model, (1, 2))
    first = module._captured
    with torch.no_grad():
        model.head.weight.mul_(2)
    _same(module, _random(model, 2))
    assert module._captured is first
    changes = (
        lambda: module.half(),
        lambda: model.float(),
        lambda: setattr(model.head.weight, "data", model.head.weight.data * 2),
        lambda: model.reset_classifier(7),
    )
    for change in changes:
        change()
        model.eval()
        _same(module, _random(model, 2))
        _same(module, _random(model, 1))
        assert module._captured is not first
        first = module._captured


@gpu
def test_gpu_graphed_resized_table():
    model = _on_gpu(dynamic_img_size=True)
    x = torch.randn(2, 3, 24, 24, device="cuda", dtype=torch.bfloat16)
    module = graphed(model, (2,), example=x)
    first = _same(module, x)
    with torch.no_grad():
        model.pos_embed.mul_(2)
    assert not torch.equal(_same(module, x), first)
    model.train()
    model.eval()
    gc.collect()
    torch.cuda.empty_cache()
    _same(module, x)


@gpu
def test_gpu_graphed_copies():
    module = graphed(_on_gpu(), (2,))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        _same(other, _random(module.model, 2))


@gpu
def test_gpu_graphed_memory_does_not_grow():
    module = graphed(_on_gpu(), (1, 4))
    x = _random(module.model, 7)

    def used():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    with torch.no_grad():
        module(x)
        before = used()
        for _ in range(50):
            module(x)
        assert used() == before
        for _ in range(3):
            module.model.head.weight.data = module.model.head.weight.data.clone()
            module(x)
        middle = used()
        for _ in range(5):
            module.model.head.weight.data = module.model.head.weight.data.clone()
            module(x)
    assert used()[0] == middle[0]


class Waits(nn.Module):
    """Waits for the device, which no look at its operations shows and no capture allows."""

    def __init__(self, model):
        super().__init__()
        self.model, self.waits = model, True

    def forward(self, images):
        if self.waits:
            torch.cuda.synchronize()
        return self.model(images)


@gpu
def test_gpu_graphed_failing_capture_leaves_torch_usable():
    model = Waits(_on_gpu()).eval()
    stream = torch.cuda.current_stream()
    with pytest.raises(UnsupportedError, match=r"batch size 2 cannot be captured: .*captur"):
        graphed(model, (1, 2), example=_random(model, 1))
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
    torch.randn(8, device="cuda")
    torch.cuda.empty_cache()
    with torch.no_grad():
        assert model(_random(model, 2)).isfinite().all()
    model.waits = False
    _same(graphed(model, (1, 2), example=_random(model, 1)), _random(model, 2))


@gpu
def test_gpu_graphed_inside_another_capture():
    module = graphed(_on_gpu(), (2,))
    x = _random(module.model, 2)
    with pytest.raises(UnsupportedError, match="called while a CUDA graph is captured; capture its model"):
        with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(x)
    _same(module, x)


@gpu
def test_gpu_graphed_item_is_refused_before_a_capture():
    model = tiny(lambda model, x, y: y * y.sum().item()).cuda()
    with pytest.raises(UnsupportedError, match=re.escape("calls aten._local_scalar_dense.default, for whose result")):
        graphed(model)


@gpu
def test_gpu_graphed_on_the_last_device():
    device, current = torch.device("cuda", torch.cuda.device_count() - 1), torch.cuda.current_device()
    model = _on_gpu().to(device)
    _same(graphed(model, (2,)), _random(model, 2))
    assert torch.cuda.current_device() == current
