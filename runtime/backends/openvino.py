"""OpenVINO on a CPU; it reads the same ONNX file."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.runtime.backends import Backend, BackendError, TensorSpec


class OpenVino(Backend):
    """A compiled model in float32 (OpenVINO's own default rounds to bf16 where a CPU has it)."""

    name = "openvino"
    device = "cpu"

    def __init__(self, path: Path, device: str, threads: int) -> None:
        """device: "auto" or "cpu". Raises BackendError for another, or if openvino is missing."""
        if device not in ("auto", "cpu"):
            raise BackendError(
                f"openvino runs on the CPU here, got device {device!r}: use --device cpu, or "
                "--backend onnxruntime for CUDA"
            )
        if find_spec("openvino") is None:
            raise BackendError("openvino is not installed: pip install 'dsgnn[openvino]'")
        import openvino

        try:
            core = openvino.Core()
            model = core.read_model(path)
            self._compiled = core.compile_model(
                model,
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": "f32",
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": threads,
                },
            )
        except Exception as error:  # OpenVINO raises plain RuntimeError and its own kinds
            raise BackendError(f"openvino cannot load {path.name}: {error}") from error
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


def _spec(port: Any) -> TensorSpec:
    shape = tuple(
        side.get_length() if side.is_static else None for side in port.get_partial_shape()
    )
    return TensorSpec(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()), shape)
