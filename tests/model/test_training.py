"""Training of whole models in plain PyTorch loops: what a step keeps, computes and composes with.

``seeded`` is a backend that runs the reference inside the registered operators, dropout included, as a kernel would;
without it, a call of the backend ``torch`` that drops is left to PyTorch's own dropout.
"""

import copy
import functools
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import SMALL, images_for
from support.properties import LAYOUTS, laid_out
from support.seeded import BACKENDS
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from vit_fast.kernels import reference

import vit_fast
from vit_fast import ops
from vit_fast.backends import select
from vit_fast.backends.torch import TORCH
from vit_fast.vit import VisionTransformer

LABELS = torch.tensor([1, 3])
DROPS = dict(proj_drop_rate=0.2, attn_drop_rate=0.1, drop_path_rate=0.3, init_values=0.5)


@pytest.fixture
def seeded(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", BACKENDS)


def model(**options):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **options}).train()


def step(net, images=None, run=None):
    """The loss of a step and its gradients by name."""
    net.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = F.cross_entropy((net if run is None else run)(images_for(net) if images is None else images), LABELS)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same_step(actual, wanted, **tolerance):
    torch.testing.assert_close(actual[0], wanted[0], **tolerance)
    assert actual[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(actual[1][name], grad, **tolerance, msg=lambda told, name=name: f"{name}: {told}")


def saved_bytes(net, images):
    """Bytes of the tensors that a forward keeps for its backward, each storage once, without the parameters."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), storage  # alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(images)
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}, {"init_values": 0.1, "drop_path_rate": 0.1}])
def test_a_layer_keeps_no_more_than_it_says(options):
    """x, qkv, attention's output, x₂ and z: 10 C a token for an MLP of ratio 4 (docs), and the statistics."""
    images = torch.randn(2, 3, 48, 48)
    size = dict(img_size=48, patch_size=8, embed_dim=48, num_heads=4, num_classes=7, **options)
    ours = [saved_bytes(VisionTransformer(**size, depth=depth).train(), images) for depth in (1, 3)]
    theirs = [saved_bytes(timm.models.VisionTransformer(**size, depth=depth).train(), images) for depth in (1, 3)]
    layer, timms = ((deep - shallow) // 2 for shallow, deep in (ours, theirs))
    tokens = 2 * 37
    assert layer <= 4 * tokens * (10 * 48 + 4 + 4) + 64
    assert layer <= 0.65 * timms, (layer, timms)


def test_recompute_keeps_no_pre_activation():
    x, w1, w2 = torch.randn(2, 9, 16, requires_grad=True), torch.randn(64, 16), torch.randn(16, 64)

    def run(recompute):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = ops.layernorm_mlp(x, None, None, 1e-6, w1, None, w2, None, "gelu", None, recompute=recompute)
        return kept, torch.autograd.grad(out.square().sum(), x)[0]

    (kept, grad), (fewer, again) = run(False), run(True)
    assert torch.Size([2, 9, 64]) in kept and torch.Size([2, 9, 64]) not in fewer
    assert torch.equal(grad, again)


def test_a_step_is_timms():
    ours, theirs = model(init_values=0.5), timm.models.VisionTransformer(**SMALL, init_values=0.5).train()
    theirs.load_state_dict(ours.state_dict())
    assert_same_step(step(ours), step(theirs, images_for(ours)), rtol=1e-4, atol=1e-6)


def by_hand(block, x, seeds):
    """A block whose masks come from ``seeds``, in the order in which its operations draw them."""
    p = block.params()
    mask = lambda seed, like, rate: reference.dropout_mask(seed, like.shape, rate, like.device)  # noqa: E731
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], *p.norm1), p.qkv_weight, p.qkv_bias)
    q, k, v = reference.split_heads(qkv, None, None, p.num_heads)
    weights = (q @ k.mT * p.scale).softmax(-1)
    out = (weights * mask(seeds[0], weights, 0.1) @ v).transpose(1, 2).flatten(2)
    branch = F.linear(out, p.proj_weight, p.proj_bias)
    x = x + branch * mask(seeds[1], branch, 0.2)
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], *p.norm2), p.fc1_weight, p.fc1_bias))
    branch = F.linear(hidden * mask(seeds[2], hidden, 0.2), p.fc2_weight, p.fc2_bias)
    return x + branch * mask(seeds[3], branch, 0.2)


def noted_seeds(monkeypatch):
    """The seeds that operators draw from here on."""
    seeds, draw = [], ops._seeded

    def noted(x, p, seed):
        drawn = draw(x, p, seed)
        seeds.extend([drawn[1]] if p else [])
        return drawn

    monkeypatch.setattr(ops, "_seeded", noted)
    return seeds


def test_dropout_of_a_block_is_the_operators(seeded, monkeypatch):
    """Attention, projection, hidden activations and fc2 drop by the seeds that the operators draw."""
    block = model(proj_drop_rate=0.2, attn_drop_rate=0.1).blocks[0].double()
    seeds = noted_seeds(monkeypatch)
    x = torch.randn(2, 17, 48, dtype=torch.float64, requires_grad=True)
    out = block(x)
    assert len(seeds) == 4 and len({seed.item() for seed in seeds}) == 4
    wanted = by_hand(block, x, seeds)
    torch.testing.assert_close(out, wanted)
    leaves = [x, *block.parameters()]
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (out, wanted)]
    for actual, right in zip(*grads, strict=True):
        torch.testing.assert_close(actual, right)


def test_drop_path_of_a_block_is_the_mask_of_its_seeds(monkeypatch):
    block, seeds = model(drop_path_rate=0.5).blocks[-1].double(), noted_seeds(monkeypatch)
    x = torch.randn(16, 17, 48, dtype=torch.float64, requires_grad=True)
    out = block(x)
    first, second = (reference.keep_mask(seed, 16, 0.5, x.device).double()[:, None, None] * 2 for seed in seeds)
    assert not torch.equal(first, second)
    wanted = x + first * block.attn(block.norm1(x))
    wanted = wanted + second * block.mlp(block.norm2(wanted))
    torch.testing.assert_close(out, wanted)
    grads = [torch.autograd.grad(y.sin().sum(), [x, *block.parameters()]) for y in (out, wanted)]
    for actual, right in zip(*grads, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("backend", ["torch", "seeded"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_bit_equal(backend, reentrant, request):
    if backend == "seeded":
        request.getfixturevalue("seeded")
    net = model(**DROPS)
    blocks, results = net.blocks, []
    for run in (functools.partial(checkpoint_sequential, blocks, 2, use_reentrant=reentrant), blocks):
        blocks.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        tokens = torch.randn(2, 17, 48, requires_grad=True)
        out = run(input=tokens)
        out.sin().sum().backward()
        results.append([out, tokens.grad, *(parameter.grad for parameter in blocks.parameters())])
    assert all(torch.equal(again, kept) for again, kept in zip(*results, strict=True))


def test_selective_checkpointing_by_the_published_names(seeded):
    """What a policy keeps is not computed again; the gradients are the same bits."""
    net, runs = model(**DROPS), []

    def policy(ctx, operator, *args, **kwargs):
        if operator is ops.OPERATORS["attention"]:
            runs.append(ctx.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(images, block=lambda block, x: block(x)):
        x = net.patch_embed(images)
        for one in net.blocks:
            x = block(one, x)
        return net.head(net.norm(x).mean(1))

    selective = functools.partial(
        run, block=lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    )
    assert_same_step(step(net, run=selective), step(net, run=run), rtol=0, atol=0)
    assert runs.count(False) == len(net.blocks)
    assert set(ops.OPERATORS) == {*TORCH.backward, "attention_options"}


def test_autocast_keeps_eagers_dtypes():
    ours, theirs = model(), timm.models.VisionTransformer(**SMALL).train()
    theirs.load_state_dict(ours.state_dict())
    images = images_for(ours)

    def autocast(net):
        def run(images):
            with torch.autocast("cpu", torch.bfloat16):
                return net(images)

        return run

    actual, wanted = step(ours, images, autocast(ours)), step(theirs, images, autocast(theirs))
    assert {name: grad.dtype for name, grad in actual[1].items()} == {n: g.dtype for n, g in wanted[1].items()}
    exact = step(ours.double(), images.double())[1]
    for name, grad in wanted[1].items():
        error, eagers = ((g.double() - exact[name]).norm() for g in (actual[1][name], grad))
        assert error <= 1.5 * eagers + 1e-3 * exact[name].norm(), name


def test_an_overflow_of_float16_skips_the_step():
    net, images = model(), images_for(model())
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(net.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(images), LABELS)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def _products(net):
    """How many matrix products a step takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(net)
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::bmm"))


@pytest.mark.parametrize("trained", ["head", "norm", "bias", "gamma", "blocks.1"])
def test_frozen_parameters_cost_no_products(trained):
    ours, theirs = model(init_values=0.5), timm.models.VisionTransformer(**SMALL, init_values=0.5).train()
    for net in (ours, theirs):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(trained in name or name.startswith("head"))
    wanted = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert step(ours)[1].keys() == wanted
    scaled = 2 * 2 if trained == "gamma" else 0  # dgamma without the branch takes the product of dweight
    assert _products(ours) <= _products(theirs) + scaled


@pytest.mark.parametrize("options", [{}, DROPS], ids=["plain", "dropping"])
def test_a_whole_step_compiles_without_a_break(options):
    """Forward, loss and backward in one graph; the gradients are those of eager mode where nothing is random."""
    net, images = model(**options), images_for(model())
    compiled = torch.compile(
        lambda images: F.cross_entropy(net(images), LABELS), backend="aot_eager", fullgraph=True, dynamic=False
    )
    compiled(images).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    assert all(grad.isfinite().all() for grad in grads.values())
    if not options:
        assert_same_step((torch.zeros(()), grads), (torch.zeros(()), step(net)[1]), rtol=1e-4, atol=1e-6)


def test_a_compiled_step_through_the_operators(seeded):
    """The operators' seeds are drawn inside the graph, and its backward draws the same masks."""
    net = model(**DROPS)
    run = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False)
    loss, grads = step(net, run=run)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    first = step(net, run=run)
    assert torch.equal(first[0], loss) and all(torch.equal(first[1][name], grad) for name, grad in grads.items())


def test_an_averaged_copy_follows():
    net = model()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(2):
        step(net)
        optimizer.step()
        average.update_parameters(net)
    images = images_for(net)
    assert average.eval()(images).isfinite().all() and not torch.equal(average(images), net.eval()(images))


def test_a_gradient_that_does_not_fit():
    """Another shape is an error; autograd brings another dtype to that of the output, as for eager PyTorch."""
    block, x = model().blocks[0], torch.randn(2, 17, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"[sS]hape"):
        block(x).backward(torch.ones(2, 17, 47))
    grad = torch.randn(2, 17, 48)
    (wide,), (same,) = (torch.autograd.grad(block(x), x, g) for g in (grad.double(), grad))
    assert torch.equal(wide, same)


@pytest.mark.parametrize("place", ["input", "weight"])
def test_a_tensor_changed_in_place(place):
    block, x = model().blocks[0], torch.randn(2, 17, 48, requires_grad=True)
    taken = x * 1
    out = block(taken)
    with torch.no_grad():
        (taken if place == "input" else block.mlp.fc1.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


ODD_GRADIENTS = {
    "expanded": lambda grad: grad[:1].expand_as(grad),
    "zeros": torch.zeros_like,
    "transposed twice": lambda grad: grad.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "one element repeated": lambda grad: grad[:1, :1, :1].expand_as(grad),
}


@pytest.mark.parametrize("library", ["vit_fast", "timm"])
def test_layouts_of_the_incoming_gradient(library, seeded):
    """A whole model takes a gradient in any layout as it takes the same values in rows."""
    net = model(init_values=0.5).double()
    if library == "timm":
        weights, net = net.state_dict(), timm.models.VisionTransformer(**SMALL, init_values=0.5).double().train()
        net.load_state_dict(weights)
        vit_fast.optimize(net, strict=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def gradients(grad):
        leaf = images.clone().requires_grad_()
        leaves = [leaf, *net.blocks.parameters()]
        return torch.autograd.grad(net.forward_features(leaf), leaves, grad)

    grad = torch.randn(2, 17, 48, dtype=torch.float64)
    views = [laid_out(grad, layout) for layout in LAYOUTS[1:]] + [odd(grad) for odd in ODD_GRADIENTS.values()]
    assert not any(view.is_contiguous() for view in views[:5])
    plain = gradients(grad)
    for number, view in enumerate(views):
        wanted = plain if number < len(LAYOUTS) - 1 else gradients(view.contiguous())
        for actual, right in zip(gradients(view), wanted, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-10, atol=1e-10)


_TWO = """
import sys, torch
from vit_fast.vit import VisionTransformer
rank, store, grads = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
net = VisionTransformer(**SIZE).train()
images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))[rank : rank + 1]
ddp = torch.nn.parallel.DistributedDataParallel(net)
torch.nn.functional.cross_entropy(ddp(images), torch.tensor([1, 3])[rank : rank + 1]).backward()
if rank == 0:
    torch.save({name: p.grad for name, p in net.named_parameters()}, grads)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    """DistributedDataParallel over gloo averages to the gradients of one process with both images."""
    size = {**SMALL, "init_values": 0.5}
    code, paths = _TWO.replace("SIZE", repr(size)), [str(tmp_path / "store"), str(tmp_path / "grads.pt")]
    ranks = [subprocess.Popen([sys.executable, "-P", "-c", code, str(rank), *paths]) for rank in (0, 1)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    grads = torch.load(paths[1])
    for name, grad in step(model(init_values=0.5))[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("each", ["block", "linear"])
def test_fully_sharded(each, tmp_path):
    plain = step(model(init_values=0.5))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = model(init_values=0.5)
        kinds = torch.nn.Linear if each == "linear" else type(net.blocks[0])
        for module in list(net.modules()):
            if isinstance(module, kinds):
                torch.distributed.fsdp.fully_shard(module)
        torch.distributed.fsdp.fully_shard(net)
        loss = F.cross_entropy(net(images_for(net)), LABELS)
        loss.backward()
        grads = {name: p.grad.full_tensor() for name, p in net.named_parameters()}
    finally:
        torch.distributed.destroy_process_group()
    assert_same_step((loss.detach(), grads), plain, rtol=1e-4, atol=1e-6)


def test_masks_drop_at_their_rate_and_on_their_own():
    """Rates, and no dependence between heads, rows, images and seeds, to five standard deviations."""
    shape, p = (4, 3, 32, 32), 0.3
    seeds = [torch.tensor([seed]) for seed in (0, 1, 2**33, -5)]
    masks = torch.stack([reference.dropout_mask(seed, shape, p, torch.device("cpu")) for seed in seeds])
    assert masks.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    keep = (masks > 0).double()
    for rates in (keep.mean((1, 2, 3, 4)), keep.mean((0, 1, 3, 4)), keep.mean((0, 1, 2, 4))):
        count = keep.numel() / rates.numel()
        assert (rates - (1 - p)).abs().max() < 5 * (p * (1 - p) / count) ** 0.5
    centred = (keep - (1 - p)) / (p * (1 - p)) ** 0.5
    for axis in range(5):
        pairs = centred * centred.roll(1, axis)
        assert abs(pairs.mean().item()) < 5 * pairs.numel() ** -0.5, axis


def test_a_mask_is_drawn_in_pieces_of_one_sequence(monkeypatch):
    """A CPU draws a mask in chunks: the same numbers as at once."""
    whole = reference.dropout_mask(torch.tensor([3]), (5, 41), 0.5, torch.device("cpu"))
    monkeypatch.setattr(reference, "_CHUNK", 7)
    assert torch.equal(reference.dropout_mask(torch.tensor([3]), (5, 41), 0.5, torch.device("cpu")), whole)
