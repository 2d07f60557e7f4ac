"""Threads, forks and processes that start at once, share a compile cache, or are killed.

Each test runs one scenario of this file in a fresh process,

    python test_concurrency.py SCENARIO ARGUMENT...

which fails by an exception, or by its clock: after SECONDS it prints the stacks of its threads and exits, a bit later
the test kills it with all its children. So nothing here can hang. Scenarios import what they use themselves, because
the first import is part of what is tested.
"""

import contextlib
import faulthandler
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

SECONDS = 40


def run(scenario, *arguments, backend="torch"):
    """Runs a scenario with a forced backend; "triton" interprets the kernels, by the interpreter as shipped, "compiler"
    leaves the interpreter off."""
    from support.interpreter_cures import loops_fail  # imports torch, which a scenario must not find imported

    if backend == "triton" and loops_fail():
        pytest.skip("numpy 2.4 breaks the interpreter of Triton 3.6")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.update(CUDA_VISIBLE_DEVICES="", VIT_FAST_BACKEND="torch" if backend == "torch" else "triton")
    environment["OMP_NUM_THREADS"] = "1"  # a fork after OpenMP has had threads hangs in torch's own operations
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", __file__, scenario, *arguments]
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = child.communicate(timeout=SECONDS + 10)[0]
    except subprocess.TimeoutExpired:
        output = "killed by the test"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == 0, f"{scenario} {arguments}: exit status {child.returncode}\n{output[-6000:]}"
    return output


def operations():
    """All seven operations on fixed inputs."""
    import torch
    from vit_fast.kernels import folding

    from vit_fast import ops

    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, qkv, images = randn(2, 5, 32), randn(2, 5, 96), randn(2, 3, 16, 16)
    w1, b1, w2, b2, norm = randn(64, 32), randn(64), randn(32, 64), randn(32), randn(32)
    branches = ((randn(96, 32), randn(96)), (randn(32, 32), b2), norm), ((w1, b1), (w2, b2), norm)
    parts = ((norm, b2), *branches[0], (norm, b2), *branches[1])
    weights, quantised = folding.prepare_block(*parts), folding.fp8_block(*parts, "gelu")
    return [
        ops.patch_embed(images, randn(32, 3, 8, 8), norm, randn(1, 4, 32), randn(1, 1, 32), 8),
        ops.attention(qkv, 2, 0.25),
        ops.layer_norm(x, norm, b2, 1e-6),
        ops.layer_norm_linear(x, norm, b2, 1e-6, w1, b1, "gelu"),
        ops.linear_residual(randn(2, 5, 64), w2, b2, norm, x),
        ops.layernorm_mlp(x, norm, b2, 1e-6, w1, b1, w2, b2, "gelu", norm),
        ops.prepared_blocks(x, weights, 2, 0.25, "gelu", 1e-6, 1e-6),
        ops.fp8_blocks(x.half(), quantised, 2, 0.25, "gelu", 1e-6, 1e-6),
    ]


def digest():
    return hashlib.sha256(b"".join(out.numpy().tobytes() for out in operations())).hexdigest()


def send_digest(connection):
    connection.send(digest())


def forked(function, *arguments):
    """(process id, connection) of a fork that sends what a function returns."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        signal.alarm(SECONDS // 2)  # the parent's watchdog thread is not here, and its lock would wait for it
        theirs.send(function(*arguments))
        status = 0
    finally:
        os._exit(status)


def answer(pid, connection):
    """What a fork sent; an EOFError where it died."""
    assert connection.poll(SECONDS / 2), "a child does not answer"
    try:
        return connection.recv()
    finally:
        os.waitpid(pid, 0)


# Scenarios


def threads_start_cold():
    """Eight threads import vit_fast and run all operations at once, as the first in their process."""
    results, errors, barrier = {}, [], threading.Barrier(8)

    def work(index):
        try:
            barrier.wait()
            import vit_fast  # noqa: F401

            barrier.wait()
            results[index] = digest()
        except BaseException as error:
            errors.append(repr(error))
            raise

    sys.setswitchinterval(1e-4)
    assert "torch" not in sys.modules and "vit_fast" not in sys.modules
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert len(results) == 8 and set(results.values()) == {digest()}


def children(*methods):
    """A child computes what its parent does, forked before and after the parent's first use and by every method."""
    import vit_fast  # noqa: F401

    before_use = answer(*forked(digest))
    here = digest()
    assert before_use == here
    assert answer(*forked(digest)) == here
    for method in methods:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=send_digest, args=(theirs,))
        process.start()
        assert answer_of(ours) == here, method
        process.join(SECONDS)
        assert process.exitcode == 0


def answer_of(connection):
    assert connection.poll(SECONDS / 2), "a child does not answer"
    return connection.recv()


def killed_in_an_operation():
    """A child killed between and inside operations leaves parent and next child as they were."""
    here = digest()

    def for_ever():
        while True:
            digest()

    for delay in (0.03, 0.2):
        pid, connection = forked(for_ever)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(EOFError):
            answer(pid, connection)
        assert digest() == here and answer(*forked(digest)) == here


class Images:
    """A dataset whose items are made by a model and by an operation."""

    def __init__(self):
        import torch

        import vit_fast

        torch.manual_seed(0)
        self.model = vit_fast.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, num_classes=3
        ).eval()

    def __len__(self):
        return 8

    def __getitem__(self, index):
        import torch

        from vit_fast import ops

        with torch.no_grad():
            logits = self.model(torch.full((1, 3, 32, 32), float(index)))[0]
        return torch.cat([logits, ops.layer_norm(logits + index, None, None, 1e-6)])


def data_loader():
    """Two workers of a DataLoader yield what the dataset yields here."""
    import torch

    images = Images()
    wanted = torch.stack([images[index] for index in range(len(images))])
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=2, timeout=SECONDS / 2)
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), wanted)


def planned():
    """One small compile for sm_90, as the launch function of layer_norm asks for it."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "aot"))
    import cases
    import harness

    torch.set_num_threads(1)
    cases.OPERATIONS = (cases.layer_norm_cases,)
    requests, problems = harness.plan([90])
    assert not problems, problems
    return next(request for request in requests.values() if request.dtype == "bfloat16")


def binary(request, barrier=None, compiling=True, killed_at=None):
    """The digest of what a request compiles to, through Triton's cache; ``compiling`` False: out of it alone.

    ``killed_at``: the process kills itself as it puts its n-th file into the cache, once that is written aside.
    """
    import triton
    from triton.backends.nvidia import compiler

    def never(*_, **__):
        raise AssertionError("not in the cache")

    if not compiling:
        compiler.CUDABackend.add_stages = never
    replace, files = os.replace, []

    def counted_replace(*paths):
        files.append(paths)
        if len(files) == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counted_replace
    if barrier is not None:
        barrier.wait(SECONDS / 2)
    function = request.function
    function.create_binder()
    source = function.ASTSource(function, request.signature, request.constexprs, request.attrs)
    target = triton.runtime.driver.active.get_current_target()
    kernel = function.compile(source, target=target, options=request.options.__dict__)
    return hashlib.sha256(kernel.asm["cubin"]).hexdigest(), kernel.asm["ptx"].count("\n"), len(files)


@contextlib.contextmanager
def cache_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        yield Path(folder)


def shared_cache(rounds):
    """Four processes compile the same kernel at once into an empty cache; a fifth finds it there."""
    request, seen = planned(), set()
    for _ in range(int(rounds)):
        with cache_folder() as folder:
            barrier = multiprocessing.get_context("fork").Barrier(4)
            forks = [forked(binary, request, barrier) for _ in range(4)]
            answers = [answer(*fork) for fork in forks]
            assert sum(files > 0 for _, _, files in answers) > 1, "no two processes compiled at once"
            seen |= {(cubin, lines) for cubin, lines, _ in answers}
            cubin, lines, files = answer(*forked(binary, request, None, False))
            assert files == 0
            seen.add((cubin, lines))
            assert not [path for path in folder.rglob("tmp.*") if path.is_dir()]
    assert len(seen) == 1, seen


def killed_in_the_cache():
    """A compile killed while it fills the cache does not block or spoil the next one in the same cache."""
    request = planned()
    with cache_folder():
        whole, lines, files = answer(*forked(binary, request))
    for killed_at in (1, files):
        with cache_folder() as folder:
            pid, connection = forked(binary, request, None, True, killed_at)
            with contextlib.suppress(EOFError):
                raise AssertionError(f"survived: {answer(pid, connection)}")
            assert list(folder.rglob("tmp.*")), "nothing was left half done"
            assert answer(*forked(binary, request))[:2] == (whole, lines)
            assert answer(*forked(binary, request, None, False)) == (whole, lines, 0)


SCENARIOS = {
    function.__name__: function
    for function in (
        threads_start_cold, children, killed_in_an_operation, data_loader, shared_cache, killed_in_the_cache
    )
}  # fmt: skip


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_threads_start_cold(backend):
    run("threads_start_cold", backend=backend)


@pytest.mark.parametrize("backend,methods", (("torch", ("fork", "spawn", "forkserver")), ("triton", ("fork",))))
def test_children_compute_the_same(backend, methods):
    run("children", *methods, backend=backend)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_a_killed_child_leaves_nothing(backend):
    run("killed_in_an_operation", backend=backend)


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_data_loader_workers(backend):
    run("data_loader", backend=backend)


def test_processes_share_a_compile_cache():
    run("shared_cache", "2", backend="compiler")


def test_a_killed_compile_leaves_the_cache_usable():
    run("killed_in_the_cache", backend="compiler")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    SCENARIOS[sys.argv[1]](*sys.argv[2:])
