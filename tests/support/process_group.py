"""One process of gloo, for tests of what PyTorch shards."""

import pytest
import torch


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def whole(tensor):
    """All of a tensor, where it is a shard of one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
