"""The backend ``cuda``: the compiled extension for CUDA tensors. It does not exist yet, so its tables are empty."""

from .base import Backend


class Cuda(Backend):
    name = "cuda"
    remedy = "Run `vit-fast build --cuda --force`, or update the GPU's driver."

    def load(self) -> tuple[str, ...]:
        return ("the cuda extension is not built",)


CUDA = Cuda()
