"""The baselines of other inference engines on a CPU: OpenVINO and ONNX Runtime, with timm's weights.

================  =================================================================================================
openvino          ``openvino.convert_model`` of the model, in the dtype of its weights where the processor has it
onnxruntime       ``torch.onnx.export`` of the model, in float32
openvino-int8     NNCF's post-training static quantisation of the first, for transformers, calibrated on images
onnxruntime-int8  dynamic quantisation of the second: a scale an output channel, activations quantised at each call
================  =================================================================================================

An engine takes the tensors that the other providers take, runs as many threads as torch and one stream, and compiles
for the shape of its input in the first call. Where it has no arithmetic in the dtype of 16-bit weights, it computes in
float32 with the same rounded weights, and its row tells that. int8 has a correctness limit of its own: the norm of the
errors of the logits against float64 is at most ``INT8_LIMIT`` times that of the logits. Unrelated logits are far above
it, and no quantisation that anybody would use comes near.
"""

import contextlib
import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit_fast.parity import Parity

from .errors import require
from .providers import INT8_ENGINES

INT8_LIMIT = 0.5
CALIBRATION_IMAGES = 300
_PRECISION_HINTS = {torch.bfloat16: ("BF16", "bf16"), torch.float16: ("FP16", "f16")}
_INLINE_BYTES = 1_500_000_000  # of an ONNX file, whose format ends at 2 GB


@dataclass
class OpenVino:
    """A model in OpenVINO's format, compiled for each shape of its input.

    Attributes:
        path: the file of the model.
        precision: hint for the arithmetic, "f32", "bf16" or "f16"; None leaves the choice to OpenVINO.
    """

    path: Path
    precision: str | None
    compiled: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        shape = tuple(pixels.shape)
        if shape not in self.compiled:
            self.compiled[shape] = self._compile(shape)
        (logits,) = self.compiled[shape](pixels.float().numpy(), share_inputs=True).values()
        return torch.from_numpy(logits)

    def _compile(self, shape):
        openvino = require("openvino", "openvino")
        core = openvino.Core()
        model = core.read_model(self.path)
        model.reshape(list(shape))
        # The other providers run on threads of their own, which may hold the cores that these would be pinned to.
        hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": False}
        hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if self.precision:
            hints["INFERENCE_PRECISION_HINT"] = self.precision
        return core.compile_model(model, "CPU", hints)


@dataclass
class OnnxRuntime:
    """An ONNX model, ``path``, in a session for each batch size; it has no hint of its ``precision``."""

    path: Path
    precision: str | None = None
    sessions: dict[int, Any] = field(default_factory=dict)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        batch = len(pixels)
        if batch not in self.sessions:
            self.sessions[batch] = self._session(batch)
        session = self.sessions[batch]
        (logits,) = session.run(None, {session.get_inputs()[0].name: pixels.float().numpy()})
        return torch.from_numpy(logits)

    def _session(self, batch):
        onnxruntime = require("onnxruntime", "onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.add_free_dimension_override_by_name("batch", batch)
        # Its idle threads would otherwise spin for a while, on the cores of the provider that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])


Engine = OpenVino | OnnxRuntime


def load(name: str, path: str, precision: str | None) -> Engine:
    """An engine of ``providers.ENGINES`` from its file."""
    return (OpenVino if name.startswith("openvino") else OnnxRuntime)(Path(path), precision)


def judge(verdict: Parity) -> Parity:
    """The verdict of an engine in int8, by ``INT8_LIMIT``; there is no limit on the largest error."""
    relative = verdict.relative_error
    return replace(verdict, passed=math.isfinite(relative) and relative <= INT8_LIMIT, allowed=math.inf)


def build(
    name: str, model: nn.Module, pixels: torch.Tensor, folder: Path, calibration: Callable[[], tuple[torch.Tensor, str]]
) -> tuple[Engine, dict[str, Any]]:
    """(engine, columns of its rows) of a timm model.

    Args:
        name: one of ``providers.ENGINES``.
        model: on the CPU, in ``eval``, with float32, bfloat16 or float16 weights.
        pixels: [B, channels, height, width], an example of the input.
        folder: for the files of the engine, which outlive this function.
        calibration: makes (images [count, channels, height, width], their source); called for static quantisation only.

    Raises:
        BenchError: a package is not installed; its extra is named.
    """
    dtype = next(model.parameters()).dtype
    with _silence():
        plain = copy.deepcopy(model).float()  # exact: the weights keep what they were rounded to
        build_one = _build_openvino if name.startswith("openvino") else _build_onnxruntime
        engine, computes, facts = build_one(name, plain, dtype, pixels[:1].float().contiguous(), folder, calibration)
    if name in INT8_ENGINES:
        facts |= {"matmul_peak_tflops": None, "matmul_peak_sustained_tflops": None}
        facts["parity_allowed_relative_error"] = INT8_LIMIT
        computes = torch.int8
    elif computes != dtype:
        facts |= {"matmul_peak_tflops": None, "matmul_peak_sustained_tflops": None}
        facts["engine_settings"] += f"; it has no {str(dtype).removeprefix('torch.')} here: float32, rounded weights"
    return engine, facts | {"product_dtype": str(computes).removeprefix("torch.")}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Converters warn of what they trace and print progress bars; the table of results needs the output for itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _build_openvino(name, model, dtype, example, folder, calibration):
    openvino = require("openvino", "openvino")
    nncf = require("nncf", "openvino") if name in INT8_ENGINES else None
    converted = openvino.convert_model(model, example_input=example)
    del model
    converted.reshape([-1, *example.shape[1:]])
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    capability, hint = _PRECISION_HINTS.get(dtype, ("FP32", "f32"))
    hint, computes = (hint, dtype) if capability in found else ("f32", torch.float32)
    facts = {"engine": f"OpenVINO {openvino.__version__.partition('-')[0]}"}
    told = f"inference precision {hint}"
    if nncf:
        images, source = calibration()
        batches = [image[None].float().contiguous().numpy() for image in images]
        converted = nncf.quantize(
            converted, nncf.Dataset(batches), subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER
        )
        facts["engine"] += f", NNCF {nncf.__version__}"
        facts["calibration"] = source
        hint, told = None, "static int8, the rest in OpenVINO's own choice"
    path = Path(folder, f"{name}.xml")
    openvino.save_model(converted, path, compress_to_fp16=False)
    told += f"; {torch.get_num_threads()} threads, latency hint, 1 stream, not pinned"
    return OpenVino(path, hint), computes, facts | {"engine_settings": told}


def _build_onnxruntime(name, model, dtype, example, folder, calibration):
    onnxruntime = require("onnxruntime", "onnxruntime")
    for module in ("onnx", "onnxscript"):
        require(module, "onnxruntime")
    path = Path(folder, "model.onnx")
    if not path.exists():
        _export(model, example, path)
    told = "float32"
    if name in INT8_ENGINES:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Without VNNI its products of 8 bits by 8 bits saturate.
        reduced = not (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
        large = sum(file.stat().st_size for file in path.parent.glob("model.onnx*")) > _INLINE_BYTES
        source, path = path, Path(folder, f"{name}.onnx")
        quantize_dynamic(
            source,
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduced,
            use_external_data_format=large,
        )
        told = f"dynamic int8, a scale an output channel{', 7-bit weights (no VNNI)' if reduced else ''}"
    told += f"; {torch.get_num_threads()} intra-op threads"
    facts = {"engine": f"ONNX Runtime {onnxruntime.__version__}", "engine_settings": told}
    return OnnxRuntime(path), torch.float32, facts


def _export(model, example, path):
    try:
        torch.onnx.export(
            model,
            (example.repeat(2, 1, 1, 1),),
            path,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
            external_data=sum(p.numel() * 4 for p in model.parameters()) > _INLINE_BYTES,
        )
    except BaseException:  # a deadline too: the next engine must not take a part of a file for the whole
        path.unlink(missing_ok=True)
        raise
