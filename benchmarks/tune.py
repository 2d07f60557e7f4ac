"""Launch configurations on this GPU: those that the shipped rules pick, their neighbours, and the libraries.

    python -P benchmarks/tune.py --out FILE.json [--seconds 240 --only linear,attention --models base --batches 1,256]

A problem is one kernel at one shape of a ViT, in bfloat16. Its candidates are the config that the rule of
kernels/configs.py picks there and neighbours of it, without those that cannot fit the chip. Processes without a GPU
compile them ahead, in the order of the timing, into Triton's cache. A candidate must first keep the error budget
against float64 (vit_fast.parity); one that fails to launch, or is wrong, is written down with the reason. Times are
medians of event-timed steps with a cold L2 cache, queued while the device pauses, so that the host's time to launch is
not in them; the best, the rule's and the libraries' are taken again together.
On sm_90 the linear problems have the configs of kernels/linear_hopper.py beside those of kernels/linear.py. A kernel
whose partitions wait for each other can hang: they are checked and timed by a process of its own, which is ended when
an answer is late; none of them is run after that, and the others go on.
The most telling shapes come first and the file is written after each, so that the budget may end anywhere.
Winners are put into kernels/configs.py by hand, with machine, date and commit.

--dry-run lists problems and candidates, --compile-only compiles them for --arch; both work without a GPU.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from vit_fast.kernels import configs

from vit_fast import parity
from vit_fast.cli import machine, measure

OPERATIONS = ("linear", "attention", "patch_embed", "layer_norm")
BATCHES = (256, 1, 64, 8)  # the most telling first
COMPILE_SECONDS = 60
START_SECONDS, RUN_SECONDS = 60, 20  # of the process for kernels that may hang: until it is ready, until it answers
CHECKED_IMAGES = 8  # compared with float64: the first and the last of a batch, because float64 takes memory
STEPS, FINAL_STEPS = 15, 40
PAUSE = 600_000  # clock cycles, some 300 µs: longer than the host takes to queue a step
NO_TIME, NOT_COMPILED = "no time left", "not compiled in time"


class Vit(NamedTuple):
    tokens: int
    width: int
    heads: int
    hidden: int
    patch: int
    prefix: int


VITS = {
    "base": Vit(197, 768, 12, 3072, 16, 1),
    "large": Vit(197, 1024, 16, 4096, 16, 1),
    "small": Vit(197, 384, 6, 1536, 16, 1),
    "huge": Vit(257, 1280, 16, 5120, 14, 1),
    "so400m": Vit(256, 1152, 16, 4304, 14, 0),
}
SIDE = 224


class Chip(NamedTuple):
    """What decides on configurations: 10·major + minor of the capability, bytes of shared memory a program may have,
    multiprocessors."""

    arch: int
    shared: int
    multiprocessors: int

    @classmethod
    def of(cls, device):
        properties = torch.cuda.get_device_properties(device)
        return cls(configs.arch_of(device), properties.shared_memory_per_block_optin, properties.multi_processor_count)

    @classmethod
    def named(cls, arch):
        """As A100, H200 and B200 have it; else as consumer cards."""
        known = {80: (166_912, 108), 90: (232_448, 132), 100: (232_448, 148)}
        return cls(arch, *known.get(arch, (101_376, 128)))


class Work(NamedTuple):
    """A problem with its tensors."""

    kernel: Callable[[], torch.Tensor]
    eager: Callable[..., torch.Tensor]  # of the tensors below, in whatever dtype they have
    tensors: tuple  # those with a row an image come first
    batched: int  # how many these are
    libraries: dict[str, Callable[[], torch.Tensor]]
    hopper: Callable[..., torch.Tensor] | None = None  # of a config: the same by linear_hopper, where it can


@dataclass(frozen=True)
class Problem:
    operation: str
    name: str
    model: str
    batch: int

    def __str__(self):
        return f"{self.name} {self.model}-b{self.batch}"


@dataclass(frozen=True)
class Maker:
    """Makes tensors; in a plan they are not filled, and their memory is never touched."""

    device: torch.device
    dtype: torch.dtype
    filled: bool

    def __call__(self, *shape, scale=1.0):
        if not self.filled:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype)


PLANNED = Maker(torch.device("cpu"), torch.bfloat16, filled=False)


# What is computed.

LINEARS = ("qkv", "proj", "fc1", "fc2")
PREPARED = {f"prepared {name}": name for name in LINEARS}  # as vit_fast.prepare runs them
PARTIAL_WIDTH = 64


def _linear_sizes(name, vit):
    """(in, out, activation, whether it ends a branch)."""
    return {
        "qkv": (vit.width, 3 * vit.width, None, False),
        "proj": (vit.width, vit.width, None, True),
        "fc1": (vit.width, vit.hidden, "gelu", False),
        "fc2": (vit.hidden, vit.width, None, True),
    }[PREPARED.get(name, name)]


def _partials(x, filled):
    """The partials of the rows of x as a GEMM with tiles 2·PARTIAL_WIDTH wide emits them: [2, partials, rows]."""
    values = torch.empty(2, x.shape[-1] // PARTIAL_WIDTH, x.numel() // x.shape[-1], device=x.device)
    if filled:
        parts = x.float().flatten(0, -2).unflatten(1, (-1, PARTIAL_WIDTH))
        values[0] = parts.mean(2).t()
        values[1] = (parts.var(2, correction=0) * PARTIAL_WIDTH).t()
    return values


def _by_hopper(*arguments, **options):
    """The call of ``linear_hopper``, which is imported where it is called."""

    def call(config):
        from vit_fast.kernels.linear_hopper import linear_hopper

        return linear_hopper(*arguments, config=config, **options)[0]

    return call


def linear_work(problem, vit, new):
    from vit_fast.kernels import layer_norm, linear

    size, features, activation, ends = _linear_sizes(problem.name, vit)
    x, weight, bias = new(problem.batch, vit.tokens, size), new(features, size, scale=size**-0.5), new(features)
    residual = new(problem.batch, vit.tokens, features) if ends else None
    libraries = {"F.linear, bias alone": lambda: F.linear(x, weight, bias)}
    if problem.name in PREPARED and not ends:
        partials = layer_norm.RowPartials(_partials(x, new.filled), PARTIAL_WIDTH)
        sums = torch.empty(features, device=new.device)
        if new.filled:
            weight -= weight.float().mean(1, keepdim=True).to(weight.dtype)
            sums = weight.float().sum(1)
        wide_bias = bias.float()

        def eager(x, weight, bias):
            out = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6), weight, bias)
            return F.gelu(out) if activation else out

        def kernel():
            return linear.folded_linear(x, partials, 1e-6, weight, sums, wide_bias, activation)

        libraries["eager"] = lambda: eager(x, weight, bias)
        hopper = _by_hopper(x, weight, wide_bias, activation, norm=(partials, 1e-6, sums))
        return Work(kernel, eager, (x, weight, bias), 1, libraries, hopper)
    if ends:
        gamma, wide_bias = None if problem.name in PREPARED else new(features), bias.float()

        def eager(x, residual, weight, bias):
            out = F.linear(x, weight, bias)
            return residual + (out if gamma is None else out * gamma.to(out.dtype))

        def kernel():
            if gamma is None:
                return linear.linear_with_partials(x, weight, wide_bias, residual)[0]
            return linear.linear(x, weight, bias, gamma=gamma, residual=residual)

        tensors = (x, residual, weight, bias)
        hopper = _by_hopper(x, weight, wide_bias, residual=residual, with_partials=True) if gamma is None else None
        return Work(kernel, eager, tensors, 2, libraries | {"eager": lambda: eager(*tensors)}, hopper)

    def eager(x, weight, bias):
        out = F.linear(x, weight, bias)
        return F.gelu(out) if activation else out

    if activation:
        libraries["cuBLASLt, GELU of tanh"] = lambda: torch._addmm_activation(
            bias, x.flatten(0, 1), weight.t(), use_gelu=True
        )
        libraries["eager"] = lambda: eager(x, weight, bias)
    hopper = _by_hopper(x, weight, bias, activation)
    return Work(lambda: linear.linear(x, weight, bias, activation), eager, (x, weight, bias), 1, libraries, hopper)


def attention_work(problem, vit, new):
    from vit_fast.kernels import attention

    qkv, scale = new(problem.batch, vit.tokens, 3 * vit.width), (vit.width // vit.heads) ** -0.5

    def heads(qkv):
        return qkv.unflatten(2, (3, vit.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def eager(qkv):
        q, k, v = heads(qkv)
        return ((q * scale) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2).flatten(2)

    def sdpa(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads(qkv), scale=scale).transpose(1, 2).flatten(2)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    backends["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    libraries = {f"SDPA {name}": functools.partial(sdpa, backend) for name, backend in backends.items()}
    return Work(lambda: attention.attention(qkv, vit.heads, scale), eager, (qkv,), 1, libraries)


def layer_norm_work(problem, vit, new):
    from vit_fast.kernels import layer_norm

    x, weight, bias = new(problem.batch, vit.tokens, vit.width), new(vit.width), new(vit.width)

    def eager(x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    libraries = {"F.layer_norm": lambda: eager(x, weight, bias)}
    return Work(lambda: layer_norm.layer_norm(x, weight, bias, 1e-6), eager, (x, weight, bias), 1, libraries)


def patch_embed_work(problem, vit, new):
    from vit_fast.kernels import patch_embed

    step, patches = (vit.patch, vit.patch), vit.tokens - vit.prefix
    images, pos_embed = new(problem.batch, 3, SIDE, SIDE), new(1, patches, vit.width)
    weight = new(vit.width, 3, *step, scale=(3 * vit.patch**2) ** -0.5)
    tensors = (images, weight, new(vit.width), pos_embed, new(1, vit.prefix, vit.width) if vit.prefix else None)

    def eager(images, weight, bias, pos_embed, prefix):
        tokens = F.conv2d(images, weight, bias, step).flatten(2).transpose(1, 2) + pos_embed
        return tokens if prefix is None else torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1)

    libraries = {"eager, a convolution": lambda: eager(*tensors)}
    return Work(lambda: patch_embed.patch_embed(*tensors, step), eager, tensors, 1, libraries)


WORKS = {
    "linear": linear_work, "attention": attention_work, "layer_norm": layer_norm_work, "patch_embed": patch_embed_work,
}  # fmt: skip


def problems(only=OPERATIONS, models=tuple(VITS), batches=BATCHES):
    """All problems, the most telling first: by model, batch size and operation."""
    found = []
    for model, batch, operation in itertools.product(models, batches, OPERATIONS):
        if operation in only:
            names = (*PREPARED, *LINEARS) if operation == "linear" else (operation,)
            found += [Problem(operation, name, model, batch) for name in names]
    return found


# Candidates


class _Picked(Exception):
    """Ends a planned call as soon as the rule has picked."""


@contextlib.contextmanager
def rule(operation, pick):
    """Puts ``pick(shipped rule, its arguments)`` in the place of a rule of kernels/configs.py."""
    name = f"pick_{operation}_config"
    shipped = getattr(configs, name)
    setattr(configs, name, lambda *args, **kwargs: pick(functools.partial(shipped, *args, **kwargs)))
    try:
        yield
    finally:
        setattr(configs, name, shipped)


@contextlib.contextmanager
def pretending(chip):
    """Makes the rules see a chip where there is none."""
    shipped = configs.arch_of, configs.multiprocessors_of
    configs.arch_of, configs.multiprocessors_of = lambda device: chip.arch, lambda device: chip.multiprocessors
    try:
        yield
    finally:
        configs.arch_of, configs.multiprocessors_of = shipped


def picked(operation, call):
    """The config that the shipped rule picks in a call; nothing is launched."""
    found = []

    def stop(shipped):
        found.append(shipped())
        raise _Picked

    with rule(operation, stop), contextlib.suppress(_Picked):
        call()
    return found[0]


def _linear_candidates(pick):
    tiles = (
        (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (128, 64, 64, 4, 3),
        (128, 64, 64, 4, 4), (128, 128, 32, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4), (128, 128, 128, 8, 2), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 64, 64, 8, 3),
        (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    )  # fmt: skip
    for tma in (pick.tma, not pick.tma):
        for block_m, block_n, block_k, num_warps, num_stages in tiles:
            if tma == pick.tma or block_m * block_n >= 128 * 128:
                yield replace(
                    pick, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps,
                    num_stages=num_stages, tma=tma,
                )  # fmt: skip
    for group_m in (1, 4, 16):
        yield replace(pick, group_m=group_m)
    for num_stages in (2, 5):
        yield replace(pick, num_stages=num_stages)
    for splits in (1, 2, 4, 8):
        yield replace(pick, split_k=splits)
        yield replace(pick, block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4, split_k=splits)


def _attention_candidates(pick):
    for tma in (pick.tma, not pick.tma):
        for block_m, num_warps in ((64, 4), (128, 8), (128, 4), (32, 4)):
            yield replace(pick, block_m=block_m, block_n=0, num_warps=num_warps, num_stages=1, tma=tma)
        for block_m, num_warps in ((64, 4), (128, 8), (128, 4)):
            for block_n, num_stages in ((64, 2), (64, 3), (128, 2), (32, 3)):
                yield replace(
                    pick, block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, tma=tma
                )


def _layer_norm_candidates(pick):
    for rows, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if 32 <= rows * pick.block // (32 * num_warps) <= 128 or rows == 1:
            yield replace(pick, rows=rows, num_warps=num_warps)


def _patch_embed_candidates(pick):
    for block_m, block_n, num_warps in ((64, 64, 4), (64, 64, 8), (64, 128, 4), (128, 64, 4), (128, 64, 8),
                                        (128, 128, 4), (128, 128, 8), (128, 256, 8)):  # fmt: skip
        for block_k, num_stages in ((32, 4), (64, 2), (64, 3), (64, 4)):
            yield replace(
                pick, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages
            )


NEIGHBOURS = {
    "linear": _linear_candidates, "attention": _attention_candidates, "layer_norm": _layer_norm_candidates,
    "patch_embed": _patch_embed_candidates,
}  # fmt: skip


def fits(problem, config, chip, itemsize=2):
    """Whether a config can work: tiles within the shared memory, accumulators within 128 registers a thread; a sum is
    split only where there are few tiles and many steps."""
    vit, threads = VITS[problem.model], 32 * getattr(config, "num_warps", 1)
    if problem.operation == "layer_norm":
        return True
    if problem.operation == "attention":
        width = -(-vit.width // vit.heads // 16) * 16
        keys = config.block_n or -(-vit.tokens // 16) * 16
        shared = (config.block_m + 2 * keys * config.num_stages) * width * itemsize
        return shared <= chip.shared and config.block_m * (keys + width) <= 192 * threads
    if problem.operation == "linear" and config.split_k > 1:
        size, features, *_ = _linear_sizes(problem.name, vit)
        tiles = -(-problem.batch * vit.tokens // config.block_m) * -(-features // config.block_n)
        if tiles * config.split_k > 4 * chip.multiprocessors or size < config.split_k * 2 * config.block_k:
            return False
    shared = (config.block_m + config.block_n) * config.block_k * config.num_stages * itemsize
    return shared <= chip.shared and config.block_m * config.block_n <= 128 * threads


def candidates(problem, pick, chip):
    """The pick and the neighbours of it that fit, each once."""
    return list(dict.fromkeys([pick, *(c for c in NEIGHBOURS[problem.operation](pick) if fits(problem, c, chip))]))


def hopper_candidates(work, chip):
    """Configs of ``linear_hopper``, on the one architecture that it has."""
    if chip.arch != 90 or work.hopper is None:
        return []
    from vit_fast.kernels import launch, linear_hopper

    shipped = linear_hopper.LinearHopperConfig()
    changes = ({}, dict(group_m=4), dict(group_m=16), dict(num_stages=6), dict(block_n=64, num_stages=6))
    return [] if launch.INTERPRETED else [replace(shipped, **change) for change in changes]


def may_hang(config):
    return type(config).__name__ == "LinearHopperConfig"


@contextlib.contextmanager
def calling(problem, work, config):
    """The call that runs a candidate."""
    if may_hang(config):
        yield functools.partial(work.hopper, config)
    else:
        with rule(problem.operation, lambda shipped: config):
            yield work.kernel


def plan(problem, chip):
    """The candidates of a problem on a chip that need not be there; the first is the rule's."""
    with pretending(chip):
        work = WORKS[problem.operation](problem, VITS[problem.model], PLANNED)
        found = candidates(problem, picked(problem.operation, work.kernel), chip)
        return found + hopper_candidates(work, chip)


# Compiling ahead


class _Target:
    """Stands in for Triton's driver: names the target and has no device."""

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def become_compiler(chip):
    """Makes every launch of this process a compile for ``chip``, into Triton's cache; nothing runs."""
    import triton

    def compile_only(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs)
        self.compile(source, target=triton.runtime.driver.active.get_current_target(), options=options.__dict__)

    os.nice(5)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_Target(chip.arch))
    triton.JITFunction._do_compile = compile_only


def compile_ahead(problem, config, chip):
    """Compiles a candidate; None, or what went wrong."""
    try:
        with pretending(chip):
            work = WORKS[problem.operation](problem, VITS[problem.model], PLANNED)
            with calling(problem, work, config) as call:
                call()
    except Exception as error:
        return _words(error)
    return None


def _words(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Compilers:
    """Processes that compile candidates in the order in which they are timed; none where ``jobs`` is 0.

    What is compiled does not depend on the batch size, so each (shape, config) is compiled once.
    """

    def __init__(self, jobs, chip):
        self.chip, self.results = chip, {}
        spawn = multiprocessing.get_context("spawn")  # not fork: this process may hold a GPU
        self.pool = spawn.Pool(jobs, become_compiler, (chip,)) if jobs else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pool is not None:
            self.pool.terminate()
            self.pool.join()

    def _key(self, problem, config):
        return problem.operation, problem.name, problem.model, config

    def submit(self, problem, configs):
        for config in configs:
            key = self._key(problem, config)
            if self.pool is not None and key not in self.results:
                self.results[key] = self.pool.apply_async(compile_ahead, (problem, config, self.chip))

    def result(self, problem, config, seconds):
        """What ``compile_ahead`` said of a candidate, once it is there."""
        result = self.results.get(self._key(problem, config))
        if result is None:
            return None
        try:
            return result.get(max(0.0, min(seconds, COMPILE_SECONDS)))
        except multiprocessing.TimeoutError:
            return NOT_COMPILED


# Timing


@functools.cache
def _flusher(device):
    size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device=device)


def step_times(call, count, device):
    """``count`` step times in seconds: ``measure.step_times``, but with a pause of the device before each step."""
    if device.type != "cuda":
        return measure.step_times(call, count, device)
    flusher = _flusher(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    with torch.cuda.device(device):
        for start, end in events:
            flusher.zero_()
            torch.cuda._sleep(PAUSE)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in events]


def _few(tensors, batched):
    """The tensors with the first and last images of the batch alone, and which images these are."""
    batch = len(tensors[0])
    images = sorted({*range(min(batch, CHECKED_IMAGES // 2)), *range(max(0, batch - CHECKED_IMAGES // 2), batch)})
    return tuple(t[images] if i < batched else t for i, t in enumerate(tensors)), images


def _time(call, steps, device, timer):
    """Median microseconds."""
    return 1e6 * statistics.median(timer(call, steps, device))


class Reference(NamedTuple):
    """What a result is compared with: some images of it, by eager in the kernel's dtype and in float64."""

    images: list[int]
    eager: torch.Tensor
    golden: torch.Tensor

    @classmethod
    def of(cls, work):
        few, images = _few(work.tensors, work.batched)
        return cls(images, work.eager(*few), work.eager(*(t if t is None else t.double() for t in few)))


def check_and_time(problem, work, reference, config, steps, device, dtype, timer):
    """(µs, None), or (None, why not)."""
    with calling(problem, work, config) as call:
        out = call()
        measure.synchronize(device)
        verdict = parity.compare(out[reference.images], reference.eager, reference.golden, dtype)
        del out
        if not verdict.passed:
            return None, f"error {verdict.error:.3g}, allowed {verdict.allowed:.3g}"
        return _time(call, steps, device, timer), None


def _serve(connection, device, dtype):
    """The process of ``Guarded``: answers (problem, config, steps) with (µs, why not) until nobody asks."""
    make, known = Maker(device, dtype, filled=True), None
    make(1)
    connection.send("ready")
    while True:
        try:
            problem, config, steps = connection.recv()
        except EOFError:
            return
        try:
            with torch.inference_mode():
                if known is None or known[0] != problem:
                    torch.manual_seed(0)
                    work = WORKS[problem.operation](problem, VITS[problem.model], make)
                    known = problem, work, Reference.of(work)
                answer = check_and_time(*known, config, steps, device, dtype, step_times)
        except Exception as error:
            answer = None, _words(error)
        connection.send(answer)


class Guarded:
    """A process that checks and times kernels that may hang; after one that did, none."""

    def __init__(self, device, dtype, serve=_serve):
        self.arguments, self.serve, self.process, self.hung = (device, dtype), serve, None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None

    def _ask(self, question, seconds):
        """The answer; None where there is none in time."""
        if question is not None:
            self.connection.send(question)
        return self.connection.recv() if self.connection.poll(max(0.0, seconds)) else None

    def time(self, problem, config, steps, seconds):
        """(µs, why not)."""
        if self.hung:
            return None, self.hung
        try:
            if self.process is None:
                spawn = multiprocessing.get_context("spawn")  # not fork: this process may hold a GPU
                self.connection, theirs = spawn.Pipe()
                self.process = spawn.Process(target=self.serve, args=(theirs, *self.arguments), daemon=True)
                self.process.start()
                theirs.close()
                if self._ask(None, min(seconds, START_SECONDS)) is None:
                    self.close()
                    return None, NO_TIME if seconds < START_SECONDS else "the process of its own does not start"
            answer = self._ask((problem, config, steps), min(seconds, RUN_SECONDS))
        except (EOFError, OSError) as error:
            answer = None, f"the process of its own ended: {_words(error)}"
        if answer is None:
            self.close()
            if seconds < RUN_SECONDS:
                return None, NO_TIME
            self.hung = f"not run: {config} of {problem} did not end"
            return None, f"did not end in {RUN_SECONDS} s"
        if answer[0] is None:
            self.close()  # its device may be lost
        return answer


def _time_candidates(problem, work, configs, compilers, timer, end, device, dtype, guarded):
    """({config: µs}, [(config, why not)])."""
    reference = Reference.of(work)
    times, failures = {}, []
    for config in configs:
        left = end - time.monotonic()
        said = NO_TIME if left <= 0 else compilers.result(problem, config, left)
        if said in (NO_TIME, NOT_COMPILED):
            failures.append((config, said))
            continue  # whatever else a compiler said, the device will say it too
        try:
            if may_hang(config):
                took, why = guarded.time(problem, config, STEPS, end - time.monotonic())
            else:
                took, why = check_and_time(problem, work, reference, config, STEPS, device, dtype, timer)
        except Exception as error:
            failures.append((config, _words(error)))
            measure.synchronize(device)  # raises where the device is lost
            continue
        if took is None:
            failures.append((config, why))
        else:
            times[config] = took
    return times, failures


def tune(problem, chip, make, compilers, timer, end, guarded=None):
    """The row of a problem: times of its candidates and of the libraries, where the rule's config stands."""
    torch.manual_seed(0)
    device, dtype = make.device, make.dtype
    work = WORKS[problem.operation](problem, VITS[problem.model], make)
    pick = picked(problem.operation, work.kernel)
    configs_ = candidates(problem, pick, chip) + (hopper_candidates(work, chip) if guarded else [])
    times, failures = _time_candidates(problem, work, configs_, compilers, timer, end, device, dtype, guarded)
    ranking = sorted(times, key=times.get)
    for config in ranking[:3] if pick not in times else dict.fromkeys([*ranking[:3], pick]):
        if may_hang(config):
            times[config], why = guarded.time(problem, config, FINAL_STEPS, RUN_SECONDS)
            if why is not None:
                del times[config]
                failures.append((config, why))
        else:
            with calling(problem, work, config) as call:
                times[config] = _time(call, FINAL_STEPS, device, timer)
    ranking = sorted(times, key=times.get)
    libraries = {}
    for name, call in work.libraries.items():
        try:
            call()
            libraries[name] = _time(call, FINAL_STEPS, device, timer)
        except Exception as error:
            failures.append((name, _words(error)))
    best, own = times[ranking[0]] if ranking else None, times.get(pick)
    return asdict(problem) | {
        "problem": str(problem),
        "picked": asdict(pick),
        "picked_us": own,
        "rank": ranking.index(pick) + 1 if own else None,
        "of": len(configs_),
        "best": _words_of(ranking[0]) if ranking else None,
        "best_us": best,
        "loss": own / best - 1 if own else None,
        "libraries_us": libraries,
        "ranking": [{"us": times[config], "config": _words_of(config)} for config in ranking],
        "failures": [{"config": c if isinstance(c, str) else _words_of(c), "why": why} for c, why in failures],
    }


def _words_of(config):
    return ({"kernel": "linear_hopper"} if may_hang(config) else {}) | asdict(config)


def _difference(row):
    """What the best config has that the rule's has not."""
    if row["best"] is None:
        return "none ran"
    if "kernel" in row["best"]:
        return " ".join(f"{word}={value}" for word, value in row["best"].items())
    changed = [f"{word} {old}→{row['best'][word]}" for word, old in row["picked"].items() if row["best"][word] != old]
    return ", ".join(changed) or "the rule's"


def table(rows, title):
    """The rows as a table, the most to be won first; where the rule's own config does not run, before all others."""
    result = Table("problem", "rule µs", "best µs", "loss", "rank", "best library µs", "best config", title=title)
    for row in sorted(rows, key=lambda row: float("inf") if row["loss"] is None else row["loss"], reverse=True):
        name = min(row["libraries_us"], key=row["libraries_us"].get, default=None)
        result.add_row(
            row["problem"],
            "does not run" if row["picked_us"] is None else f"{row['picked_us']:.1f}",
            "" if row["best_us"] is None else f"{row['best_us']:.1f}",
            "" if row["loss"] is None else f"{row['loss']:.1%}",
            f"{row['rank'] or '-'}/{row['of']}",
            "" if name is None else f"{row['libraries_us'][name]:.1f} ({name})",
            _difference(row),
        )
    return result


def _listed(option, text, known):
    words = tuple(text.split(","))
    if unknown := [word for word in words if word not in known]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted any of {', '.join(known)}", param_hint=option)
    return words


def save(path, content):
    """Writes a file of JSON so that no reader and no kill finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run(wanted, chip, make, compilers, timer, end, keep, guarded=None):
    """Tunes problem by problem while there is time; ``keep(rows, errors, problems not reached)`` after each."""
    rows, errors = [], []
    for done, problem in enumerate(wanted):
        if time.monotonic() >= end:
            break
        try:
            with torch.inference_mode():
                row = tune(problem, chip, make, compilers, timer, end, guarded)
        except Exception as error:
            errors.append({"problem": str(problem), "why": _words(error)})
            print(f"{problem}: {errors[-1]['why']}", flush=True)
            keep(rows, errors, wanted[done + 1 :])
            measure.synchronize(make.device)  # raises where the device is lost
            continue
        rows.append(row)
        keep(rows, errors, wanted[done + 1 :])
        own, best = (f"{row[us]:.1f}" if row[us] else "-" for us in ("picked_us", "best_us"))
        print(f"{problem}: rule {own} µs, best of {len(row['ranking'])} {best} µs: {_difference(row)}", flush=True)


def compile_only(wanted, chip, compilers, end):
    """What the compiler said of each candidate that it refused, and how many it took."""
    refused, taken = [], 0
    for problem in wanted:
        for config in plan(problem, chip):
            left = end - time.monotonic()
            said = NO_TIME if left <= 0 else compilers.result(problem, config, left)
            taken += said is None
            if said is not None:
                refused.append({"problem": str(problem), "config": _words_of(config), "why": said})
    return refused, taken


def main(
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("out/tune.json"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for all together.")] = 240.0,
    only: Annotated[str, typer.Option(help="Operations.")] = ",".join(OPERATIONS),
    models: Annotated[str, typer.Option(help="ViTs, the first first.")] = ",".join(VITS),
    batches: Annotated[str, typer.Option(help="Batch sizes, the first first.")] = ",".join(map(str, BATCHES)),
    jobs: Annotated[
        int, typer.Option(min=0, help="Processes that compile ahead; 0 for none.", show_default="processors − 2")
    ] = max(1, (os.cpu_count() or 1) - 2),
    arch: Annotated[int, typer.Option(help="10·major + minor of the GPU, for --dry-run and --compile-only.")] = 90,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List problems and candidates.")] = False,
    compile_: Annotated[bool, typer.Option("--compile-only", help="Compile the candidates, time nothing.")] = False,
):
    """Time launch configurations on this GPU; see the head of benchmarks/tune.py."""
    end = time.monotonic() + seconds
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("got 1, wanted a process that compiles: unset it", param_hint="TRITON_INTERPRET")
    sizes = batches.split(",")
    if unknown := [size for size in sizes if not size.isdecimal() or int(size) == 0]:
        raise typer.BadParameter(f"got {unknown[0]!r}, wanted positive ints", param_hint="--batches")
    wanted = problems(
        _listed("--only", only, OPERATIONS), _listed("--models", models, tuple(VITS)), tuple(map(int, sizes))
    )
    if dry_run:
        for problem in wanted:
            configs_ = plan(problem, Chip.named(arch))
            print(f"{problem}: {len(configs_)} candidates, the rule's first")
            for config in configs_:
                print(f"  {config}")
        return
    if compile_:
        chip = Chip.named(arch)
        with Compilers(max(jobs, 1), chip) as compilers:
            for problem in wanted:
                compilers.submit(problem, plan(problem, chip))
            refused, taken = compile_only(wanted, chip, compilers, end)
        save(out, {"arch": arch, "torch": torch.__version__, "compiled": taken, "refused": refused})
        print(f"{taken} candidates compile for sm_{arch}, {len(refused)} do not; {out} names these")
        return
    known = machine.gpu_facts()
    if "missing" in known:
        save(out, known | {"rows": []})
        print(f"not measured: {known['missing']}; {out} says so")
        raise typer.Exit(1)
    device = torch.device("cuda", torch.cuda.current_device())
    chip, make = Chip.of(device), Maker(device, torch.bfloat16, filled=True)
    content = known | {"dtype": "bfloat16", "rows": [], "errors": [], "not_reached": list(map(str, wanted))}

    def keep(rows, errors, not_reached):
        content.update(rows=list(rows), errors=list(errors), not_reached=list(map(str, not_reached)))
        save(out, content)

    with Compilers(jobs, chip) as compilers, Guarded(device, make.dtype) as guarded:
        for problem in wanted:
            with contextlib.suppress(Exception):  # tuning it will say the same
                compilers.submit(problem, plan(problem, chip))
        try:
            run(wanted, chip, make, compilers, step_times, end, keep, guarded)
        except Exception as error:  # the device is lost; what was timed stays
            content["lost"] = _words(error)
            save(out, content)
    rows = content["rows"]
    title = f"{known['gpu']}, bfloat16, {len(rows)} of {len(wanted)} problems, in {out}"
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows, title))
    if "lost" in content:
        print(f"the device is lost: {content['lost']}")
    raise typer.Exit(int("lost" in content or bool(content["errors"]) or not rows))


if __name__ == "__main__":
    typer.run(main)
