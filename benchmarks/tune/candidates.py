"""The candidate configs: the one that the shipped rule picks, and similar ones that fit the chip."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from vit_fast.kernels import configs

from .problems import PLANNED, PREPARED, VITS, WORKS, Problem, Work, linear_sizes

KINDS = ("all", "few", "hopper")  # candidates: all; the most telling; those of linear_hopper beside the rule's


class Chip(NamedTuple):
    """Properties of a GPU that configs depend on: 10·major + minor of the capability, bytes of shared memory per
    program, multiprocessors."""

    arch: int
    shared: int
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> "Chip":
        """The chip of a device."""
        properties = torch.cuda.get_device_properties(device)
        return cls(configs.arch_of(device), properties.shared_memory_per_block_optin, properties.multi_processor_count)

    @classmethod
    def named(cls, arch: int) -> "Chip":
        """The figures of A100, H200 or B200; of any other arch, those of consumer cards."""
        known = {80: (166_912, 108), 90: (232_448, 132), 100: (232_448, 148)}
        return cls(arch, *known.get(arch, (101_376, 128)))


class _Picked(Exception):
    """Ends a dry call as soon as the rule has picked a config."""


@contextlib.contextmanager
def rule(operation: str, pick: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """Replaces a rule of kernels/configs.py; ``pick`` gets the shipped rule with its arguments bound."""
    name = f"pick_{operation}_config"
    shipped = getattr(configs, name)
    setattr(configs, name, lambda *args, **kwargs: pick(functools.partial(shipped, *args, **kwargs)))
    try:
        yield
    finally:
        setattr(configs, name, shipped)


@contextlib.contextmanager
def pretending(chip: Chip) -> Iterator[None]:
    """Makes the rules of kernels/configs.py choose for a chip that this machine lacks."""
    shipped = configs.arch_of, configs.multiprocessors_of
    configs.arch_of, configs.multiprocessors_of = lambda device: chip.arch, lambda device: chip.multiprocessors
    try:
        yield
    finally:
        configs.arch_of, configs.multiprocessors_of = shipped


def picked(operation: str, call: Callable[[], Any]) -> Any:
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
    for num_stages in (2, 5, 7):  # with 7, 12 steps of K are two round trips to memory instead of four
        yield replace(pick, num_stages=num_stages)
    # Two programs of 8 warps a multiprocessor: half the epilogue for each warp.
    yield replace(pick, block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, maxnreg=128)
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


def fits(problem: Problem, config: Any, chip: Chip, itemsize: int = 2) -> bool:
    """Whether a config can work: tiles within the shared memory, accumulators within 128 registers a thread; split-K
    only where there are few tiles and many steps."""
    vit, threads = VITS[problem.model], 32 * getattr(config, "num_warps", 1)
    if problem.operation == "layer_norm":
        return True
    if problem.operation == "attention":
        width = -(-vit.width // vit.heads // 16) * 16
        keys = config.block_n or -(-vit.tokens // 16) * 16
        shared = (config.block_m + 2 * keys * config.num_stages) * width * itemsize
        return shared <= chip.shared and config.block_m * (keys + width) <= 192 * threads
    if problem.operation == "linear" and config.split_k > 1:
        size, features, *_ = linear_sizes(problem.name, vit)
        tiles = -(-problem.batch * vit.tokens // config.block_m) * -(-features // config.block_n)
        if tiles * config.split_k > 4 * chip.multiprocessors or size < config.split_k * 2 * config.block_k:
            return False
    shared = (config.block_m + config.block_n) * config.block_k * config.num_stages * itemsize
    return shared <= chip.shared and config.block_m * config.block_n <= 128 * threads


def _few(operation, pick):
    """The most telling neighbours, for a first look: larger tiles and more stages; the other form of attention."""
    if operation == "attention":
        form = dict(block_n=64, num_stages=2) if pick.block_n == 0 else dict(block_n=0, num_stages=1)
        yield replace(pick, block_m=64, num_warps=4, **form)
    if operation == "linear":
        if pick.block_m == 128:
            yield replace(pick, num_warps=8)
            yield replace(pick, block_n=256, num_warps=8)
        else:
            yield replace(pick, num_stages=7)


def candidates(problem: Problem, pick: Any, chip: Chip, kind: str = "all") -> list[Any]:
    """The config that the rule picks and the similar ones that fit, without repetition; of a ``kind`` of ``KINDS``."""
    near = {"all": NEIGHBOURS[problem.operation](pick), "few": _few(problem.operation, pick), "hopper": ()}[kind]
    return list(dict.fromkeys([pick, *(c for c in near if fits(problem, c, chip))]))


def own_candidates(problem: Problem, work: Work, chip: Chip, kind: str = "all") -> list[Any]:
    """Configs of the kernels beside the operation's own."""
    found = [] if kind == "few" else hopper_candidates(work, chip)
    return found + (cutlass_candidates(problem, work, chip) if kind == "all" else [])


def hopper_candidates(work: Work, chip: Chip) -> list[Any]:
    """Configs of ``linear_hopper``, which is for sm_90 alone."""
    if chip.arch != 90 or work.hopper is None:
        return []
    from vit_fast.kernels import launch, linear_hopper

    shipped, residual = linear_hopper.LinearHopperConfig(), work.batched == 2
    together = dict(cooperative=True, num_stages=3 if residual else 4)
    changes = (
        {}, dict(block_n=256, **together), dict(block_m=256, **together), dict(group_m=4), dict(group_m=16),
        dict(num_stages=6), dict(block_n=64, num_stages=6),
    )  # fmt: skip
    found = [] if launch.INTERPRETED else [replace(shipped, **change) for change in changes]
    return [config for config in found if config.shared_bytes(residual) <= chip.shared]


def cutlass_candidates(problem: Problem, work: Work, chip: Chip) -> list[Any]:
    """Configs of ``vit_fast.backends.cutlass``, where its library can be loaded."""
    from vit_fast.backends import cutlass

    if work.cutlass is None or cutlass.load():
        return []
    *_, ends = linear_sizes(problem.name, VITS[problem.model])
    folded = problem.name in PREPARED and not ends
    found = cutlass.configs(work.tensors[0].dtype, chip.arch)
    return [config for config in found if not folded or config.family != "multistage"]


_OWN_KERNEL = {"LinearHopperConfig": "linear_hopper", "CutlassConfig": "cutlass"}


def own_kernel(config: object) -> str | None:
    """The kernel of a config that has one beside the operation's: "linear_hopper" or "cutlass"; None of others."""
    return _OWN_KERNEL.get(type(config).__name__)


def may_hang(config: object) -> bool:
    """Whether a config is of a kernel whose warps wait for each other, and so can hang."""
    return own_kernel(config) is not None


@contextlib.contextmanager
def calling(problem: Problem, work: Work, config: Any) -> Iterator[Callable[[], torch.Tensor]]:
    """The call that runs a candidate."""
    if kernel := own_kernel(config):
        yield functools.partial(work.cutlass if kernel == "cutlass" else work.hopper, config)
    else:
        with rule(problem.operation, lambda shipped: config):
            yield work.kernel


def plan(problem: Problem, chip: Chip, kind: str = "all") -> list[Any]:
    """The candidates of a problem for a chip that this machine may lack; the first is the one that the rule picks."""
    with pretending(chip):
        work = WORKS[problem.operation](problem, VITS[problem.model], PLANNED)
        found = candidates(problem, picked(problem.operation, work.kernel), chip, kind)
        return found + own_candidates(problem, work, chip, kind)
