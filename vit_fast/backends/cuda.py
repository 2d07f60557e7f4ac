"""The backend ``cuda``: the compiled extension for CUDA tensors. It does not exist yet, so its tables are empty."""

from .base import Backend


class Cuda(Backend):
    name = "cuda"

    def load(self) -> tuple[str, ...]:
        return ("the cuda extension is not built",)


CUDA = Cuda()
