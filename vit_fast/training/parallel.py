"""The processes of a run, as torchrun starts them, and the model in them: alone, as DDP or as FSDP2."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from vit_fast.structure import transformer_blocks

from .errors import TrainingError


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank, count: its number, and how many there are.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def summed(self, numbers: list[float]) -> list[float]:
        """The sums of numbers over all processes."""
        if self.count == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, own: Any) -> list[Any]:
        """An object of every process, in the order of their ranks."""
        if self.count == 1:
            return [own]
        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, own)
        return every

    def together(self, work: Any) -> None:
        """Does work in the first process; a TrainingError or OSError there is raised in all of them."""
        error: str | None = None
        if self.first:
            try:
                work()
            except (TrainingError, OSError) as caught:
                if self.count == 1:
                    raise
                error = str(caught)
        if found := next(filter(None, self.gathered(error)), None):
            raise TrainingError(found)


# Groups of runs that are over, until the process ends. Where DDP's reducer holds the last reference, it deletes the
# group with the GIL held and joins gloo's threads, one of which may wait for the GIL to drop a tensor: a deadlock.
_left: list[Any] = []


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun (or Slurm, as timm reads its variables) has started; one without them."""
    from timm.utils.distributed import init_distributed_device_so, is_distributed_env

    known = init_distributed_device_so(device.type if is_distributed_env() else str(device))
    ended = False
    try:
        yield Processes(torch.device(known["device"]), known["global_rank"], known["world_size"])
        ended = True
    finally:
        if known["distributed"]:
            _left.append(dist.group.WORLD)
            if not ended or known["device"] != "cpu":  # else ``end`` ends the process
                dist.destroy_process_group()


def end(processes: Processes) -> None:
    """Ends one of several processes on a CPU here and now, after all that it had to write: the end of a process with
    gloo's threads sometimes aborts it ("terminate called without an active exception")."""
    if processes.count > 1 and processes.device.type == "cpu":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wrapped(model: nn.Module, processes: Processes, fsdp: bool) -> nn.Module:
    """The model as it is called in training: in DDP where there are several processes, or sharded by FSDP2."""
    if fsdp:
        if processes.count == 1:
            raise TrainingError("--fsdp is given in a single process, expected several: torchrun starts them")
        mesh = init_device_mesh(processes.device.type, (processes.count,))
        for block in transformer_blocks(model).values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)  # gives the same module another class
        return model
    if processes.count == 1:
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


@contextlib.contextmanager
def synchronised(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether the backward passes in its block share gradients between processes; the last of an update has to."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    yield
