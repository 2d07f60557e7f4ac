"""Published facts of GPUs, as data for predictions (``instruction_model``): nothing here was measured by this project.

Dense tensor-core rates with float32 sums (sparsity doubles the figures of some datasheets), the clock at which they are
stated, memory, and the limits of a multiprocessor. Sources:

h200, h100   NVIDIA H200 and H100 datasheets (SXM); H100 architecture whitepaper, tables of SM and full chip
a100         NVIDIA A100 80GB datasheet (SXM); A100 architecture whitepaper
b200         NVIDIA HGX B200 datasheet, one GPU of eight; CUDA programming guide, capability 10.0
l4           NVIDIA L4 datasheet; Ada architecture whitepaper
rtx4090      Ada architecture whitepaper, appendix A
All: CUDA programming guide, table of technical specifications by compute capability.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        pattern: what torch calls the device, as a regular expression for the whole name.
        arch: 10·major + minor of the compute capability.
        clock_ghz: at which the rates are stated; ``sustained_ghz``: assumed under load.
        tflops: dense, by the dtype that is multiplied; a dtype that is missing has no such products.
        tb_per_s: memory; ``l2_mib``: L2 cache.
        shared_kib: shared memory of a multiprocessor; ``block_kib``: of one program, at most.
        registers, threads: of a multiprocessor.
    """

    name: str
    title: str
    pattern: str
    arch: int
    multiprocessors: int
    clock_ghz: float
    sustained_ghz: float
    tflops: dict[str, float]
    tb_per_s: float
    l2_mib: int
    shared_kib: int
    block_kib: int
    registers: int = 65536
    threads: int = 2048

    def flop_per_clock(self, dtype: str) -> float:
        """FLOP that one multiprocessor does in a clock, of products in ``dtype``."""
        return self.tflops[dtype] * 1e3 / self.multiprocessors / self.clock_ghz


_HOPPER = {"bfloat16": 989.4, "float16": 989.4, "float8": 1978.9, "tf32": 494.7, "float32": 66.9}
_GPUS = (
    # 1.7 GHz: h200_review's model; of the others 93 % of the stated clock, as there.
    Gpu("h200", "H200 SXM", "NVIDIA H200", 90, 132, 1.83, 1.70, _HOPPER, 4.8, 50, 228, 227),
    Gpu("h100", "H100 SXM 80 GB", "NVIDIA H100 80GB HBM3", 90, 132, 1.83, 1.70, _HOPPER, 3.35, 50, 228, 227),
    Gpu(
        "a100", "A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB", 80, 108, 1.41, 1.31,
        {"bfloat16": 312.0, "float16": 312.0, "tf32": 156.0, "float32": 19.5}, 2.039, 40, 164, 163,
    ),
    Gpu(
        "b200", "B200 SXM", "NVIDIA B200", 100, 148, 1.856, 1.73,
        {"bfloat16": 2250.0, "float16": 2250.0, "float8": 4500.0, "tf32": 1125.0, "float32": 75.0}, 8.0, 126, 228, 227,
    ),
    Gpu(
        "l4", "L4", "NVIDIA L4", 89, 58, 2.04, 1.90,
        {"bfloat16": 121.0, "float16": 121.0, "float8": 242.0, "tf32": 60.5, "float32": 30.3}, 0.3, 48, 100, 99,
        threads=1536,
    ),
    Gpu(
        "rtx4090", "GeForce RTX 4090", "NVIDIA GeForce RTX 4090", 89, 128, 2.52, 2.34,
        {"bfloat16": 165.2, "float16": 165.2, "float8": 330.3, "tf32": 82.6, "float32": 82.6}, 1.008, 72, 100, 99,
        threads=1536,
    ),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _GPUS}


def named(device_name: str) -> Gpu | None:
    """The GPU that torch calls by this name; None for any other, such as another form of the same chip."""
    return next((gpu for gpu in _GPUS if re.fullmatch(gpu.pattern, device_name)), None)
