"""A client of Triton Inference Server: photos are prepared and masks are made here, and the network
runs there.

It takes models that `dsgnn-export triton` wrote. Their configuration carries what is known about
the artifact, so the server's address and the model's name are enough. The client speaks gRPC. It
was tested against a stand-in that serves the protocol with ONNX Runtime, and it has not met a real
server.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
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
    """A Ranker whose network runs on a Triton Inference Server. It is called like any other.

    model: its name on the server. url: host:port of the server's gRPC. timeout_s: seconds that one
    request may take. threshold, if_none, specks: as of Ranker.

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
    """One model on a server. It can be sent to another process, which then connects by itself.

    config: the model's configuration on the server, a protobuf ModelConfig.
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
        """This thread's client, because one client must not serve several threads."""
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
        del self._local  # and with it the clients of all threads

    def __reduce__(self) -> tuple[type[Triton], tuple[str, str, float]]:
        return type(self), (self._model, self._url, self._timeout_s)


def specs(config: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs that a ModelConfig states, with the batch as their first axis."""
    from tritonclient.grpc.model_config_pb2 import DataType
    from tritonclient.utils import triton_to_np_dtype

    def spec(tensor: Any) -> TensorSpec:
        sides = [None if side < 0 else side for side in tensor.dims]
        dtype = triton_to_np_dtype(DataType.Name(tensor.data_type).removeprefix("TYPE_"))
        return TensorSpec(tensor.name, np.dtype(dtype), (None, *sides))

    return tuple(map(spec, config.input)), tuple(map(spec, config.output))
