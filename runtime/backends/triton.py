"""A client of Triton Inference Server: pre- and post-processing here, the network there.

For models that `dsgnn-export triton` wrote: their configuration carries what is known about the
artifact, so the server's address is enough. The client speaks gRPC. It was tested against a
stand-in that serves the protocol with ONNX Runtime, and it has not met a real server.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.runtime.artifact import Artifact, Sidecar
from dsgnn.runtime.backends.base import Backend, TensorSpec
from dsgnn.runtime.errors import ArtifactError, BackendError
from dsgnn.runtime.ranker import Ranker

PARAMETER = "dsgnn"  # of a model's configuration: its Sidecar as JSON, with the description


def TritonRanker(
    model: str = "nano",
    url: str = "localhost:8001",
    timeout_s: float = 60.0,
    threshold: float | None = None,
    if_none: str = "none",
    specks: str = "drop",
) -> Ranker:
    """A Ranker whose network runs on a Triton Inference Server; it is called like any other.

    model: its name on the server. url: host:port of the server's gRPC. timeout_s: of one request.
    threshold, if_none, specks: as of Ranker.

    Raises BackendError if tritonclient is not installed, or the server does not answer or has no
    such model; ArtifactError for a model that `dsgnn-export triton` did not write; OptionError.
    """
    backend = Triton(model, url, timeout_s)
    if PARAMETER not in backend.config.parameters:
        raise ArtifactError(
            f"{model} on {url} has no parameter `{PARAMETER}`, so it was not made by this toolkit: "
            "write its repository with `dsgnn-export triton`"
        )
    sidecar = Sidecar.from_json(backend.config.parameters[PARAMETER].string_value)
    if sidecar.description is None:
        raise ArtifactError(f"{model} on {url} lacks its description: export it again")
    artifact = Artifact(Path(model), sidecar.description, sidecar.sha256, sidecar)
    return Ranker.of(artifact, backend, threshold, if_none, specks)


class Triton(Backend):
    """One model on a server; a copy in another process connects again.

    config: the model's configuration there, a protobuf ModelConfig.
    """

    name = "triton"
    threads = 1

    def __init__(self, model: str, url: str, timeout_s: float) -> None:
        """See TritonRanker."""
        try:
            import tritonclient.grpc
        except ImportError as error:
            raise BackendError(
                f"tritonclient is not installed: pip install 'dsgnn[triton]' ({error})"
            ) from error
        self._library = tritonclient.grpc
        self._model, self._url, self._timeout_s = model, url, timeout_s
        self._local = threading.local()
        try:
            self.config = self._client().get_model_config(model, client_timeout=timeout_s).config
        except self._library.InferenceServerException as error:
            raise BackendError(f"no model {model} at {url}: {error.message()}") from error
        self.device, self.picked = url, f"triton, {model} on {url}"
        self.inputs, self.outputs = specs(self.config)
        self.max_batch = self.config.max_batch_size

    def _client(self) -> Any:
        """The client of this thread: one must not serve several."""
        if not hasattr(self._local, "client"):
            self._local.client = self._library.InferenceServerClient(self._url)
        return self._local.client

    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for name, value in feeds.items():
            tensor = self._library.InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
            inputs.append(tensor.set_data_from_numpy(np.ascontiguousarray(value)))
        names = [spec.name for spec in self.outputs]
        wanted = [self._library.InferRequestedOutput(name) for name in names]
        result = self._client().infer(
            self._model, inputs, outputs=wanted, client_timeout=self._timeout_s
        )
        return {name: result.as_numpy(name) for name in names}

    def _release(self) -> None:
        del self._local  # every thread's client with it

    def __reduce__(self) -> tuple[type[Triton], tuple[str, str, float]]:
        return type(self), (self._model, self._url, self._timeout_s)


def specs(config: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a ModelConfig, with the batch in front."""
    from tritonclient.grpc.model_config_pb2 import DataType
    from tritonclient.utils import triton_to_np_dtype

    def spec(tensor: Any) -> TensorSpec:
        sides = [None if side < 0 else side for side in tensor.dims]
        dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
        return TensorSpec(tensor.name, np.dtype(dtype), (None, *sides))

    def all_of(tensors: Sequence[Any]) -> tuple[TensorSpec, ...]:
        return tuple(spec(tensor) for tensor in tensors)

    return all_of(config.input), all_of(config.output)
