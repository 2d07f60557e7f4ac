"""Stand-ins for kernels and devices that kill suites use, and small helpers of theirs."""

from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from vit_fast.kernels import configs


class Recorder:
    """Stands in for a kernel: records grid, arguments and keywords of each launch, and launches nothing."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(SimpleNamespace(grid=grid, args=args, **options))


def device_is_made_current(kernels, kernel, call):
    """Checks on fake CUDA tensors, with a stand-in for the kernel, that the call makes their device current. Returns
    the only launch."""
    made, recorder = mock.MagicMock(), Recorder()
    with (
        FakeTensorMode(), mock.patch.object(torch.cuda, "device", made), mock.patch.object(kernels, kernel, recorder),
        mock.patch.multiple(configs, arch_of=lambda device: 80, multiprocessors_of=lambda device: 1),
    ):  # fmt: skip
        call()
    assert made.call_count == 1
    return recorder.launches[0]


def equal(actual, wanted):
    assert len(actual) == len(wanted)
    for one, other in zip(actual, wanted):
        assert one.dtype == other.dtype and torch.equal(one, other)
