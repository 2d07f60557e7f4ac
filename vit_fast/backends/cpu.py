"""The backend ``cpu``: the compiled extension for CPU tensors. It does not exist yet, so its tables are empty."""

from .base import Backend


class Cpu(Backend):
    name = "cpu"

    def load(self) -> tuple[str, ...]:
        return ("the cpu extension is not built",)


CPU = Cpu()
