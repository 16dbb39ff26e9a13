"""OpenVINO on a CPU, in float32 or bfloat16; it reads the same ONNX file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np

from dsgnn.runtime.artifact import Artifact
from dsgnn.runtime.backends.base import Backend, TensorSpec
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.telemetry import import_without_telemetry

IMITATED = " (this CPU has no bfloat16 products: they are imitated, many times slower than float32)"


class OpenVino(Backend):
    """A compiled model in the precision that was asked for, not in the CPU's fastest.

    imitated: bfloat16 was asked for, and the CPU computes it by way of float32.
    """

    device = "cpu"

    def __init__(self, artifact: Artifact, device: str, threads: int, bf16: bool = False) -> None:
        """device: "auto" or "cpu". bf16: round weights and activations to bfloat16.

        Raises BackendError for another device, if openvino is missing, or if it cannot compute in
        bfloat16 here: left alone, it would use float32 and say nothing.
        """
        self.name = "openvino-bf16" if bf16 else "openvino"
        if device not in ("auto", "cpu"):
            raise BackendError(
                f"{self.name} runs on the CPU here, got device {device!r}: use device cpu, or "
                "backend onnxruntime for CUDA"
            )
        if find_spec("openvino") is None:
            raise BackendError("openvino is not installed: pip install 'dsgnn[openvino]'")
        openvino = import_without_telemetry("openvino")
        hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            core = openvino.Core()
            self._compiled = core.compile_model(core.read_model(artifact.path), "CPU", hints)
        except Exception as error:  # OpenVINO raises plain RuntimeError and its own kinds
            raise BackendError(f"openvino cannot load {artifact.path.name}: {error}") from error
        used = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if bf16 and used != "bf16":
            raise BackendError(
                f"OpenVINO computes in {used} on this CPU, which has no bfloat16: use backend "
                "openvino"
            )
        self.imitated = bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.threads = threads
        self.inputs = tuple(_spec(port) for port in self._compiled.inputs)
        self.outputs = tuple(_spec(port) for port in self._compiled.outputs)
        self._requests = threading.local()  # an infer request serves one thread

    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not hasattr(self._requests, "request"):
            self._requests.request = self._compiled.create_infer_request()
        results = self._requests.request.infer(dict(feeds))
        # Copies: the request reuses its buffers in the next call.
        return {spec.name: np.array(results[spec.name]) for spec in self.outputs}

    def _release(self) -> None:
        del self._requests, self._compiled


def _spec(port: Any) -> TensorSpec:
    shape = tuple(
        side.get_length() if side.is_static else None for side in port.get_partial_shape()
    )
    return TensorSpec(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()), shape)
