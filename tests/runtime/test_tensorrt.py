"""The TensorRT backend's calls, on stand-ins of both libraries: none here has met a GPU."""

import ctypes
import gc
import json
import sys
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.runtime import Ranker
from dsgnn.runtime.artifact import Sidecar, sha256_of, write_sidecar
from dsgnn.runtime.backends import TensorSpec, open_backend
from dsgnn.runtime.backends import tensorrt as backend_module
from dsgnn.runtime.errors import ArtifactError, BackendError
from dsgnn.runtime.letterbox import Fixed
from dsgnn.runtime.run.cli import main

from .conftest import description

H, W, Q = 32, 64, 5
BUILD = {
    "flavour": "tensorrt-rtx",
    "version": "1.7.1",
    "sms": [89, 120],
    "profile": {"batch": [1, 2, 4]},
}


class Cuda:
    """Device memory in host arrays; copies and launches happen when they are asked for."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.calls: list[str] = []
        self.recording: list | None = None
        self.strategies: list[str] = []
        self.devices, self.sm, self.streams, self.mallocs = 1, (8, 9), 0, 0

    def cudaGetDeviceCount(self):
        return (0, self.devices) if self.devices else (SimpleNamespace(name="NoDevice"), 0)

    def cudaGetDeviceProperties(self, index):
        return 0, SimpleNamespace(name=b"Fake 4090\0", major=self.sm[0], minor=self.sm[1])

    def cudaSetDevice(self, index):
        return (0,)

    def cudaStreamCreate(self):
        self.streams += 1
        return 0, self.streams

    def cudaStreamSynchronize(self, stream):
        self.calls.append("wait")
        return (0,)

    def cudaStreamDestroy(self, stream):
        self.streams -= 1
        return (0,)

    def cudaMalloc(self, size):
        self.mallocs += 1
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        device = target if kind == 1 else source
        assert size <= self.memory[device].size
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream):
        graph, self.recording = self.recording, None
        return 0, graph

    def cudaGraphInstantiate(self, graph, flags):
        return 0, graph

    def cudaGraphDestroy(self, graph):
        return (0,)

    def cudaGraphExecDestroy(self, graph):
        self.calls.append("forget graph")
        return (0,)

    def cudaGraphLaunch(self, graph, stream):
        self.calls.append("graph")
        for work in graph:
            work()
        return (0,)


class Context:
    """Refuses what NVIDIA forbids: capture before a run at the shape, replay after another one."""

    def __init__(self, cuda: Cuda, config: SimpleNamespace | None) -> None:
        self.cuda, self.shape, self.at, self.ran, self.changes = cuda, (), {}, False, 0
        if config is not None:
            cuda.strategies.append(config.cuda_graph_strategy)

    def set_input_shape(self, name, shape):
        self.shape, self.ran, self.changes = shape, False, self.changes + 1
        return True

    def get_tensor_shape(self, name):
        B = self.shape[0]
        return (B, Q, H // 4, W // 4) if name == "masks" else (B, Q)

    def set_tensor_address(self, name, address):
        self.at[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream > 0  # its own, not the default one
        work = self._work(self.shape[0])
        if self.cuda.recording is None:
            self.cuda.calls.append("run")
            work()
            self.ran = True
        else:
            assert self.ran
            captured = self.changes

            def replayed():
                assert self.changes == captured
                work()

            self.cuda.recording.append(replayed)
        return True

    def _work(self, B: int):
        def values(name, dtype, count):
            return self.cuda.memory[self.at[name]].view(dtype)[:count]

        def work():
            images = values("image", np.uint8, B * H * W * 3).reshape(B, -1)
            mean = images.mean(1, dtype=np.float32)[:, None]
            values("saliency", np.float32, B * Q)[:] = (mean + np.arange(Q)).ravel()
            values("score", np.float32, B * Q)[:] = np.repeat(mean / 255, Q, 1).ravel()
            values("masks", np.float32, B * Q * H * W // 16)[:] = np.repeat(mean, Q * H * W // 16)

        return work


class Engine:
    names = ["image", "saliency", "score", "masks"]
    num_io_tensors = 4

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_mode(self, name):
        return "in" if name == "image" else "out"

    def get_tensor_dtype(self, name):
        return np.uint8 if name == "image" else np.float32

    def get_tensor_shape(self, name):
        return {"image": (-1, H, W, 3), "masks": (-1, Q, H // 4, W // 4)}.get(name, (-1, Q))

    def create_runtime_config(self):
        return SimpleNamespace(cuda_graph_strategy="off")

    def create_execution_context(self, config=None):
        return Context(self.cuda, config)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    loaded: list[bytes] = []

    def deserialise(data):
        loaded.append(data)
        return Engine(cuda)

    def logger(level):
        return None

    logger.WARNING = 1
    library = {
        "__version__": "1.7.1",
        "Logger": logger,
        "Runtime": lambda log: SimpleNamespace(deserialize_cuda_engine=deserialise),
        "TensorIOMode": SimpleNamespace(INPUT="in"),
        "nptype": lambda dtype: dtype,
    }
    cuda.loaded = loaded
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(**library))
    strategies = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    rtx = SimpleNamespace(**library, CudaGraphStrategy=strategies)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setattr(backend_module, "_cuda", lambda: cuda)
    return cuda


def engine(folder: Path, **changes: object) -> Path:
    """An engine file and its sidecar."""
    path = folder / "m.engine"
    path.write_bytes(b"an engine")
    build = {key: value for key, value in {**BUILD, **changes}.items() if value is not None}
    facts = description(input=Fixed(H, W))
    sidecar = Sidecar(path.name, sha256_of(path), False, build=build, description=facts)
    write_sidecar(path, sidecar)
    return path


def images(batch: int, value: int) -> dict[str, np.ndarray]:
    return {"image": np.full((batch, H, W, 3), value, np.uint8)}


def check(outputs: dict[str, np.ndarray], batch: int, value: int) -> None:
    assert outputs["masks"].shape == (batch, Q, H // 4, W // 4)
    np.testing.assert_array_equal(outputs["saliency"], [value + np.arange(Q)] * batch)
    np.testing.assert_array_equal(outputs["masks"], np.float32(value))


def test_declares_and_computes(cuda: Cuda, tmp_path: Path) -> None:
    backend = open_backend(engine(tmp_path))
    assert cuda.loaded == [b"an engine"]
    assert backend.picked == "tensorrt-rtx on cuda:0 (auto: an engine of tensorrt-rtx)"
    assert backend.inputs == (TensorSpec("image", np.dtype(np.uint8), (None, H, W, 3)),)
    assert [spec.name for spec in backend.outputs] == ["saliency", "score", "masks"]
    first = backend.infer(images(1, 7))
    for batch, value in ((1, 9), (4, 20), (2, 30)):
        check(backend.infer(images(batch, value)), batch, value)
    check(first, 1, 7)  # results stay when the next call comes
    assert len(cuda.memory) == 4  # buffers grow, they do not pile up
    made = cuda.mallocs
    for batch, value in ((4, 40), (1, 50), (4, 60)):
        check(backend.infer(images(batch, value)), batch, value)
    assert cuda.mallocs == made == 8  # and what is large enough is used again
    with pytest.raises(BackendError, match="the engine takes batches of 1 to 4, got 5"):
        backend.infer(images(5, 1))


def test_outputs_that_keep_layers_apart_are_nobodys(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine writes them, so they have memory; nobody copies it or sees it."""
    monkeypatch.setattr(Engine, "names", [*Engine.names, "apart.0"])
    monkeypatch.setattr(Engine, "num_io_tensors", 5)
    addresses: dict[str, int] = {}
    monkeypatch.setattr(
        Context,
        "set_tensor_address",
        lambda self, name, at: addresses.update({name: at}) or self.at.update({name: at}) or True,
    )
    backend = open_backend(engine(tmp_path))
    assert [spec.name for spec in backend.outputs] == ["saliency", "score", "masks"]
    outputs = backend.infer(images(2, 7))
    check(outputs, 2, 7)
    assert set(outputs) == {"saliency", "score", "masks"}
    assert cuda.memory[addresses["apart.0"]].nbytes == 2 * Q * 4


def test_a_ranker_splits_what_the_profile_does_not_take(cuda: Cuda, tmp_path: Path) -> None:
    path = engine(tmp_path)
    ranker = Ranker(path, if_none="all")
    assert ranker.backend.max_batch == 4 and ranker.artifact.status == "unverified"
    rankings = ranker.batch([images(1, value)["image"][0] for value in range(9)])
    assert [ranking.objects[0].saliency for ranking in rankings] == [v + Q - 1 for v in range(9)]
    assert "unverified" in str(ranker) and "tensorrt-rtx on cuda:0" in str(ranker)


def test_each_thread_has_its_own_lane_and_gives_it_back(cuda: Cuda, tmp_path: Path) -> None:
    backend = open_backend(engine(tmp_path), "tensorrt-rtx", "cuda")
    backend.infer(images(1, 1))
    seen = []

    def run():
        check(backend.infer(images(2, 50)), 2, 50)
        seen.append((cuda.streams, len(cuda.memory)))

    thread = Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(2, 8)]
    assert (cuda.streams, len(cuda.memory)) == (1, 4)


def test_graphs_per_shape_after_a_warm_up(cuda: Cuda, tmp_path: Path) -> None:
    backend = open_backend(engine(tmp_path, flavour="tensorrt"), "tensorrt-cuda-graph")
    assert backend.picked == "tensorrt-cuda-graph on cuda:0"
    first, later = ["run", "graph", "graph"], ["graph"] * 3
    for batch, said in ((2, first), (1, first), (2, later), (4, first), (1, later)):
        cuda.calls.clear()
        for value in (1, 2, 3):
            check(backend.infer(images(batch, value + batch)), batch, value + batch)
        assert [call for call in cuda.calls if call != "wait"] == said
    assert (cuda.streams, len(cuda.memory)) == (3, 12) and not cuda.strategies
    cuda.calls.clear()
    del backend
    gc.collect()
    assert cuda.calls.count("forget graph") == 3
    assert (cuda.streams, len(cuda.memory)) == (0, 0)


def test_closing_frees_the_gpu(cuda: Cuda, tmp_path: Path) -> None:
    backend = open_backend(engine(tmp_path, flavour="tensorrt"), "tensorrt-cuda-graph")
    for batch in (1, 1, 2, 2):
        backend.infer(images(batch, 1))
    assert cuda.streams and cuda.memory
    backend.close()
    gc.collect()
    assert (cuda.streams, len(cuda.memory)) == (0, 0)
    with pytest.raises(BackendError, match="tensorrt-cuda-graph was closed"):
        backend.infer(images(1, 1))


def test_tensorrt_rtx_captures_by_itself(cuda: Cuda, tmp_path: Path) -> None:
    backend = open_backend(engine(tmp_path), "tensorrt-rtx-cuda-graph")
    assert backend.picked == "tensorrt-rtx-cuda-graph on cuda:0"
    for batch, value in ((2, 1), (2, 2), (1, 3), (2, 4)):
        check(backend.infer(images(batch, value)), batch, value)
    assert [call for call in cuda.calls if call != "wait"] == ["run"] * 4
    assert cuda.strategies == ["whole graph"] * 2  # a context for each shape


@pytest.mark.parametrize(("suffix", "launched"), [("", []), ("-cuda-graph", ["graph", "graph"])])
def test_graphs_by_the_command_line(
    cuda: Cuda, suffix: str, launched: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        cv2.imwrite(str(folder / f"{name}.png"), np.full((H, W, 3), 60, np.uint8))
    arguments = [
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--save",
        "json",
        "--backend",
        f"tensorrt{suffix}",
        "--model",
    ]
    done = CliRunner().invoke(main, [*arguments, str(engine(tmp_path, flavour="tensorrt"))])
    assert done.exit_code == 0, done.output
    assert f"unverified; tensorrt{suffix} on cuda:0" in done.output
    assert [call for call in cuda.calls if call == "graph"] == launched
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["backend"] == f"tensorrt{suffix}"


def test_graphs_are_refused_for_an_onnx_file(model: Path, tmp_path: Path) -> None:
    arguments = [
        "photo.jpg",
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(model),
        "--backend",
        "tensorrt-cuda-graph",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "tensorrt-cuda-graph does not run colours.onnx: engines are for" in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.4.0"}, "built with tensorrt-rtx 1.4.0, but 1.7.1 is installed"),
        ({"sms": [120]}, r"built for SM120, but this GPU is Fake 4090 \(SM89\)"),
        ({"sms": None, "gpu": "NVIDIA L4"}, "built for NVIDIA L4, but this GPU is Fake 4090"),
    ],
)
def test_engines_for_other_machines(
    cuda: Cuda, changes: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=message):
        open_backend(engine(tmp_path, **changes))
    assert not cuda.loaded  # recognised before it was deserialised


def test_an_engine_of_this_gpu_by_name(cuda: Cuda, tmp_path: Path) -> None:
    check(open_backend(engine(tmp_path, sms=None, gpu="Fake 4090")).infer(images(1, 3)), 1, 3)


def test_wrong_use(cuda: Cuda, tmp_path: Path) -> None:
    path = engine(tmp_path)
    with pytest.raises(BackendError, match="engine of tensorrt-rtx, but tensorrt was asked for"):
        open_backend(path, "tensorrt")
    with pytest.raises(BackendError, match="onnxruntime does not run m.engine: engines are for"):
        open_backend(path, "onnxruntime")
    with pytest.raises(BackendError, match="an engine needs an NVIDIA GPU, got device cpu"):
        open_backend(path, device="cpu")
    with pytest.raises(BackendError, match="cuda:3 was asked for, but this machine has 1 GPUs"):
        open_backend(path, device="cuda:3")
    cuda.devices = 0
    with pytest.raises(BackendError, match="no NVIDIA GPU can be used here: CUDA: NoDevice"):
        open_backend(path)
    assert not cuda.loaded


def test_sidecars_that_say_too_little(cuda: Cuda, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not say how it was built \(no profile\)"):
        open_backend(engine(tmp_path, profile=None))
    with pytest.raises(ArtifactError, match=r"\(no sms or gpu\)"):
        open_backend(engine(tmp_path, sms=None))
    with pytest.raises(ArtifactError, match="flavour must be one of tensorrt, tensorrt-rtx"):
        open_backend(engine(tmp_path, flavour="other"))
    path = engine(tmp_path)
    path.write_bytes(b"another engine")
    with pytest.raises(ArtifactError, match="is not the file that .*; build it again"):
        open_backend(path)
    write_sidecar(path, Sidecar(path.name, sha256_of(path), False))
    with pytest.raises(ArtifactError, match="m.engine is native code and nothing beside it"):
        open_backend(path)
    assert not cuda.loaded


def test_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"pip install 'dsgnn\[tensorrt-rtx\]'"):
        open_backend(path)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match="the CUDA runtime bindings are not installed"):
        open_backend(path)


def test_onnx_files_are_not_for_engines(model: Path) -> None:
    with pytest.raises(BackendError, match="tensorrt does not run colours.onnx"):
        open_backend(model, "tensorrt")
