"""Stand-ins for CUDA graphs on a CPU."""

import contextlib

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from vit_fast.cuda_graphs import Graphed

CAPTURES, REPLAYS = [], []


class Replays:
    """Stands in for ``CudaGraphs``; CAPTURES and REPLAYS list the batch sizes of captures and replays."""

    def __init__(self, device):
        self.device = device

    def capture(self, model, static_input):
        CAPTURES.append(len(static_input))
        held = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        output = model(static_input)

        def replay():
            REPLAYS.append(len(static_input))
            with torch.no_grad():
                fresh = functional_call(model, held, (static_input,))
            for old, new in zip(tree_leaves(output), tree_leaves(fresh)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        return replay, output

    @contextlib.contextmanager
    def turn(self):
        yield


class OnCpu(Graphed):
    graphs = Replays


class Reruns(Replays):
    """A replay runs the current model, with weights changed since the capture."""

    def capture(self, model, static_input):
        CAPTURES.append(len(static_input))
        output = model(static_input)
        return lambda: output.copy_(model(static_input)), output
