"""vit_fast.warmup: after it, calls at its batch sizes compile nothing, and others do.

Without a GPU this is tried in processes where a stand-in for Triton's driver counts compilations and launches
(``support/stand_in_driver.py``); Triton's own caches and its compilation in threads are the real ones.
"""

import threading
from pathlib import Path

import pytest
import torch
from support.graphs import CAPTURES, OnCpu
from support.library_models import encoder_vit
from support.stand_in_driver import COMPILED, FAILS, LAUNCHED, in_child, pretend
from torch import nn

import vit_fast

pytest.importorskip("triton", reason="Triton is not installed")


def vit(**words):
    words = dict(embed_dim=64, depth=2, num_heads=2, num_classes=5) | words
    return vit_fast.VisionTransformer(32, 8, **words).eval().bfloat16()


def run(model, batch, size=32, dtype=torch.bfloat16):
    """The kernels that a call compiles, and how many it launches."""
    COMPILED.clear()
    LAUNCHED.clear()
    with torch.inference_mode():
        model(torch.zeros(batch, 3, size, size, dtype=dtype))
    return list(COMPILED), len(LAUNCHED)


# in a process of their own


def child_calls_compile_nothing_more():
    pretend()
    for prepared in (False, True):
        model = vit()
        if prepared:
            vit_fast.prepare(model)
        COMPILED.clear()
        LAUNCHED.clear()
        record = vit_fast.warmup(model, (1, 4), threads=2)
        assert not LAUNCHED, "warmup launched a kernel"
        assert sorted(COMPILED) == list(record.kernels) and not record.failed and record.reason is None
        assert record.kernels and record.thresholds == {(3, 32, 32): ()}
        for batch in (1, 4):
            compiled, launched = run(model, batch)
            assert not compiled and launched > 10
        again = vit_fast.warmup(model, (1, 4))
        assert not again.kernels and again.ready == len(record.kernels) + record.ready and not COMPILED
        compiled, _ = run(model, 1024)  # 17,408 rows: other tiles, no PDL
        assert "_linear_fwd_kernel" in compiled
        COMPILED.clear()


def child_blocks_by_parts():
    """Post-norm blocks, whose linear layers are prepared one by one: all that a call launches was compiled."""
    pretend()
    for precision in (None, "fp8"):
        model = vit_fast.optimize(encoder_vit(norm_first=False).bfloat16().eval())
        record = vit_fast.warmup(vit_fast.prepare(model, precision), (2,), [32])
        assert ("_quantise_tokens_fwd_kernel" in record.kernels) == (precision == "fp8")
        compiled, launched = run(model, 2)
        assert not compiled and launched >= 2 * (8 if precision else 4)


def child_thresholds_are_found():
    pretend()
    model = vit_fast.prepare(vit())
    record = vit_fast.warmup(model, [1, 2, 256, 512, 1024, 1025])
    # Rows are 17 an image. From 8192 rows on there is no PDL, which all kernels of the stack are compiled for.
    (changes,) = record.thresholds.values()
    assert 512 in changes and 2 not in changes and 1025 not in changes
    assert f"batch size {', '.join(map(str, changes))} on" in str(record)
    for batch in record.batch_sizes:
        assert not run(model, batch)[0]


def child_image_sizes():
    pretend()
    model = vit(dynamic_img_size=True)
    record = vit_fast.warmup(model, (2,), [32, (64, 32)])
    assert record.shapes == ((3, 32, 32), (3, 64, 32))
    COMPILED.clear()
    with torch.inference_mode():
        for size in ((32, 32), (64, 32)):
            model(torch.zeros(2, 3, *size).bfloat16())
        assert not COMPILED
        model(torch.zeros(2, 3, 256, 256).bfloat16())
    assert COMPILED, "1,025 tokens need other chunks of keys"


def child_failures_are_told_and_the_rest_is_compiled():
    pretend()
    FAILS.add("_attention_fwd_resident_kernel")
    model = vit()
    record = vit_fast.warmup(model, (1,))
    assert record.failed == (
        "_attention_fwd_resident_kernel: RuntimeError: ptxas died of _attention_fwd_resident_kernel",
    )
    assert set(record.kernels) > FAILS and "failed: _attention_fwd_resident_kernel" in str(record)
    COMPILED.clear()
    with pytest.raises(RuntimeError, match="ptxas died"):
        from vit_fast.kernels.attention import attention

        attention(torch.zeros(1, 17, 192).bfloat16(), 2, 1.0)
    assert vit_fast.warmup(model, (1,)).failed == record.failed


def child_other_threads_launch_as_ever():
    pretend()
    model, other, counts = vit(), vit(depth=1), []
    run(model, 2)
    waiting, ended = threading.Event(), threading.Event()

    class Hook(nn.Module):
        def forward(self, images):
            waiting.set()
            assert ended.wait(60)
            return model(images)

    def work():
        assert waiting.wait(60)
        with torch.inference_mode():
            counts.append(len(LAUNCHED))
            other(torch.zeros(2, 3, 32, 32).bfloat16())
            counts.append(len(LAUNCHED))
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    hook = Hook()
    hook.model, hook.image_size = model, 32
    vit_fast.warmup(hook.eval(), (4,))
    thread.join()
    before, after = counts
    assert after > before and len(LAUNCHED) == after
    kernel = __import__("vit_fast.kernels.gemm", fromlist=["gemm"])._linear_fwd_kernel
    assert "run" not in vars(kernel), "kernels are as they were"


def child_an_error_leaves_kernels_as_they_were():
    pretend()

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.image_size = vit(), 32

        def forward(self, images):
            self.model(images)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vit_fast.warmup(Fails().eval(), (1,))
    assert run(vit(), 1)[1] > 10
    import triton

    with triton.AsyncCompileMode(None):  # raises where another is active
        pass


@pytest.mark.parametrize("name", [name for name in list(globals()) if name.startswith("child_")])
def test_without_a_gpu(name):
    in_child(Path(__file__), name)


# in this one


def test_a_model_on_a_cpu_has_nothing_to_compile():
    record = vit_fast.warmup(vit(), (1, 8))
    assert not record.kernels and record.thresholds == {} and record.batch_sizes == (1, 8)
    assert str(record).startswith("nothing to compile on cpu: a model on a CPU compiles nothing in its calls")
    if not torch.cuda.is_available():
        assert "this machine has no CUDA device" in record.reason


def test_graphs_are_captured():
    CAPTURES.clear()
    model = OnCpu(vit().float(), (1, 2, 4, 8), None, True)
    assert CAPTURES == [1]
    record = vit_fast.warmup(model, (3, 9))
    assert CAPTURES == [1, 8, 4] and record.batch_sizes == (1, 4, 8) and record.shapes == ((3, 32, 32),)
    with torch.no_grad():
        model(torch.zeros(9, 3, 32, 32))
    assert CAPTURES == [1, 8, 4]
    model.model.double()
    vit_fast.warmup(model, (3,))
    assert CAPTURES == [1, 8, 4, 4, 1]
    with pytest.raises(ValueError, match=r"image_sizes is \[32\], expected None: graphs have one size"):
        vit_fast.warmup(model, (3,), [32])


WRONG = (
    (dict(model=abs), TypeError, "model is builtin_function_or_method, expected an nn.Module"),
    (dict(model=vit().train()), vit_fast.UnsupportedError, "the model is in training mode, expected eval mode"),
    (dict(model=vit().to("meta")), vit_fast.UnsupportedError, "the model is on meta, expected a CUDA device or a CPU"),
    (dict(model=nn.Identity().eval(), image_sizes=[8]), ValueError, "model has no floating-point parameters"),
    (dict(model=nn.Linear(2, 2).eval()), ValueError, "image_sizes is None, expected some, as the model does not tell"),
    (dict(batch_sizes=8), TypeError, "batch_sizes is 8, expected a tuple of ints"),
    (dict(batch_sizes=()), ValueError, "batch_sizes is empty, expected one size or more"),
    (dict(batch_sizes=(0,)), ValueError, "batch_sizes has 0, expected 1 or more"),
    (dict(image_sizes=224), TypeError, "image_sizes is 224, expected a list of ints or \\(height, width\\)"),
    (dict(image_sizes=()), ValueError, "image_sizes is empty, expected one size or more"),
    (dict(image_sizes=[(1, 2, 3)]), TypeError, r"image_sizes has \(1, 2, 3\), expected an int or \(height, width\)"),
    (dict(image_sizes=[True]), TypeError, "image_sizes has True, expected an int or"),
    (dict(image_sizes=[(8, 0)]), ValueError, r"image_sizes has \(8, 0\), expected 1 or more"),
    (dict(threads=0), ValueError, "threads is 0, expected an int of 1 or more"),
)


@pytest.mark.parametrize("words,error,text", WRONG, ids=[text for *_, text in WRONG])
def test_bad_arguments_are_named(words, error, text):
    with pytest.raises(error, match=f"^vit_fast.warmup: {text}"):
        vit_fast.warmup(**dict(model=vit()) | words)


@pytest.mark.gpu
def test_gpu_a_capture_of_ones_own_after_warmup():
    torch.manual_seed(0)
    model = (
        vit_fast.VisionTransformer(32, 8, embed_dim=96, depth=2, num_heads=2, num_classes=5).eval().bfloat16().cuda()
    )
    vit_fast.prepare(model)
    record = vit_fast.warmup(model, (1, 3))
    assert record.kernels and not record.failed
    x, graph = torch.randn(3, 3, 32, 32, device="cuda").bfloat16(), torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = model(x)
    graph.replay()
    torch.cuda.synchronize()
    with torch.inference_mode():
        assert torch.equal(out, model(x))
    assert not vit_fast.warmup(model, (1, 3)).kernels
