"""Both libraries on the same file; every refusal by its text."""

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from graphs import colours_graph

from dsgnn.runtime.artifact import Artifact, open_artifact, sha256_of
from dsgnn.runtime.backends import BACKENDS, Backend, TensorSpec, open_backend
from dsgnn.runtime.backends import onnx as onnx_backend
from dsgnn.runtime.backends import openvino as openvino_backend
from dsgnn.runtime.backends.base import parse_device
from dsgnn.runtime.backends.onnx import CUDA, TENSORRT
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.ranker import BUNDLED
from dsgnn.runtime.run.cli import main as rank
from dsgnn.runtime.serving.cli import main as serve
from dsgnn.runtime.telemetry import import_without_telemetry

from .conftest import description

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), np.uint8)


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest, model: Path) -> Backend:
    pytest.importorskip(request.param)
    return open_backend(model, request.param)


def expected(images: np.ndarray) -> dict[str, np.ndarray]:
    """The graph by hand; see conftest."""
    small = images.astype(np.float32).reshape(len(images), 24, 4, 32, 4, 3).mean((2, 4))
    weights = np.float32([[2, -1, -1], [-1, 2, -1], [-1, -1, 2], [1, 1, -2], [0, 0, 0]]) / 32
    masks = np.einsum("bhwc,qc->bqhw", small, weights)
    masks += np.float32([-4, -4, -4, -10, -8])[:, None, None]
    return {
        "masks": masks,
        "saliency": np.maximum(masks, 0).mean((2, 3)),
        "score": 1 / (1 + np.exp(-masks.max((2, 3)))),
    }


def test_declares_and_computes(backend: Backend) -> None:
    assert backend.inputs == (TensorSpec("image", np.dtype(np.uint8), (None, None, None, 3)),)
    assert {spec.name for spec in backend.outputs} == {"saliency", "score", "masks"}
    outputs = backend.infer({"image": IMAGES})
    for name, values in expected(IMAGES).items():
        assert outputs[name].dtype == np.float32
        np.testing.assert_allclose(outputs[name], values, atol=1e-4)


def test_results_stay_when_the_next_call_comes(backend: Backend) -> None:
    first = backend.infer({"image": IMAGES[:1]})
    kept = {name: values.copy() for name, values in first.items()}
    backend.infer({"image": 255 - IMAGES[:1]})
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"expected inputs \['image'\], got \[\]"),
        ({"picture": IMAGES}, r"expected inputs \['image'\], got \['picture'\]"),
        ({"image": IMAGES, "size": IMAGES}, r"got \['image', 'size'\]"),
        (
            {"image": IMAGES.astype(np.float32)},
            r"input image: expected uint8 \(any, any, any, 3\), got float32 \(2, 96, 128, 3\)",
        ),
        ({"image": IMAGES[0]}, r"expected uint8 \(any, any, any, 3\), got uint8 \(96, 128, 3\)"),
        ({"image": IMAGES.transpose(0, 3, 1, 2)}, r"got uint8 \(2, 3, 96, 128\)"),
    ],
)
def test_refuses_wrong_inputs(backend: Backend, feeds: dict, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        backend.infer(feeds)


def test_a_failing_inference_is_named(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(feeds: dict) -> dict:
        raise RuntimeError("no memory")

    monkeypatch.setattr(backend, "_infer", out_of_memory)
    with pytest.raises(BackendError, match=f"{backend.name} failed: no memory"):
        backend.infer({"image": IMAGES})


def test_says_what_is_used(backend: Backend, model: Path) -> None:
    assert backend.picked == f"{backend.name} on cpu, 2 threads"
    assert open_backend(model, backend.name, "cpu", 1).picked.endswith("on cpu, 1 threads")


def test_auto_picks_by_what_is_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picked = open_backend(model).picked
    assert picked.endswith("(auto: an ONNX file, and onnxruntime is installed)")
    monkeypatch.setattr("dsgnn.runtime.backends.find_spec", lambda name: None)
    message = r"no library to run an ONNX file.*pip install 'dsgnn\[cpu\]'.*'dsgnn\[openvino\]'"
    with pytest.raises(BackendError, match=message):
        open_backend(model)


def test_auto_without_onnxruntime(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    only_openvino = {"openvino": True}
    monkeypatch.setattr("dsgnn.runtime.backends.find_spec", only_openvino.get)
    assert "onnxruntime is not)" in open_backend(model).picked
    assert open_backend(model).name == "openvino"
    with pytest.raises(BackendError, match="no library to run an ONNX file"):
        open_backend(model, device="cuda")  # openvino could not


@pytest.mark.parametrize("command", [rank, serve])
def test_commands_take_every_backend(command: click.Command) -> None:
    option = next(parameter for parameter in command.params if parameter.name == "backend")
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == ("auto", *BACKENDS)


def test_unknown_backend_threads_and_device(model: Path) -> None:
    message = "backend must be auto, onnxruntime or .* or openvino-bf16 or .*, got 'tvm'"
    with pytest.raises(BackendError, match=message):
        open_backend(model, "tvm")
    with pytest.raises(BackendError, match="threads must be 1 to .*, got 0"):
        open_backend(model, threads=0)
    for device in ("gpu", "cuda:x", "cpu:1"):
        with pytest.raises(BackendError, match=f"cpu, cuda or cuda:N, got '{device}'"):
            open_backend(model, "onnxruntime", device)


@pytest.mark.parametrize(("device", "cuda"), [("cpu", (False, 0)), ("cuda:3", (True, 3))])
def test_devices(device: str, cuda: tuple[bool, int]) -> None:
    assert parse_device(device) == cuda


def test_cuda_without_its_provider(model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    message = "device cuda:0 .* no CUDA provider, only .*CPU.*pip install 'dsgnn.gpu.'"
    with pytest.raises(BackendError, match=message):
        open_backend(model, "onnxruntime", "cuda:0")


def fake_onnxruntime(loaded: list[str], seen: dict) -> SimpleNamespace:
    """Offers CUDA, and loads the given providers; as onnxruntime-gpu on a host without a driver."""

    class Session:
        def __init__(self, path, options, **arguments):
            seen.update(arguments)

        def disable_fallback(self):
            seen["fallback"] = False

        def get_providers(self):
            return loaded

        def get_inputs(self):
            return []

        get_outputs = get_inputs

    return SimpleNamespace(
        get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
        SessionOptions=lambda: SimpleNamespace(add_session_config_entry=seen.__setitem__),
        InferenceSession=Session,
        __version__="1.31.1",
    )


@pytest.mark.parametrize(("version", "cuda"), [("1.26.0", 12), ("1.27.0", 13), ("2.0.0", 13)])
def test_cuda_that_does_not_load(
    version: str, cuda: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict = {}
    monkeypatch.setattr(onnx_backend, "check_packages", lambda: None)
    library = fake_onnxruntime(["CPUExecutionProvider"], seen)
    library.__version__ = version
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    pair = rf"CUDA {cuda} and cuDNN 9 \(pip install 'onnxruntime-gpu\[cuda,cudnn\]=={version}'\)"
    message = rf"device cuda .* could not load its CUDA provider.* {pair}; or use device cpu"
    with pytest.raises(BackendError, match=message):
        open_backend(model, "onnxruntime", "cuda")
    assert open_backend(model, "onnxruntime", "auto").device == "cpu"


@pytest.mark.parametrize("operator", ["Shape", "Gather", "GridSample", "Conv"])
def test_work_that_would_run_on_the_cpu_is_refused(
    operator: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes and indices may be computed there."""
    loaded = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    library = fake_onnxruntime(loaded, {})
    part = SimpleNamespace(
        ep_name="CPUExecutionProvider", get_nodes=lambda: [SimpleNamespace(op_type=operator)] * 2
    )
    library.InferenceSession.get_provider_graph_assignment_info = lambda self: [part]
    monkeypatch.setattr(onnx_backend, "check_packages", lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    if operator in ("Shape", "Gather"):
        assert open_backend(model, "onnxruntime", "cuda").device == "cuda:0"
        return
    with pytest.raises(BackendError, match=f"would run 2 {operator} of {model.name} on the CPU"):
        open_backend(model, "onnxruntime", "cuda")


def test_the_cpu_takes_all_of_it(model: Path) -> None:
    """The real library tells what runs where, in the form that is read."""
    onnxruntime = import_without_telemetry("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(BUNDLED), options, providers=["CPUExecutionProvider"]
    )
    if hasattr(session, "get_provider_graph_assignment_info"):
        found = onnx_backend._on_cpu(session)
        assert found["Conv"] > 50 and found["MatMul"] > 10 and found["Shape"] > 0


def test_cuda_session(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict = {}
    loaded = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnx_backend, "check_packages", lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(loaded, seen))
    backend = open_backend(model, "onnxruntime", "cuda:2")
    assert backend.device == "cuda:2" and backend.picked == "onnxruntime on cuda:2"
    assert seen["providers"] == [
        ("CUDAExecutionProvider", {"device_id": 2, "use_tf32": 0}),
        "CPUExecutionProvider",
    ]
    assert seen["disabled_optimizers"] == ["SkipLayerNormFusion"] and seen["fallback"] is False
    assert seen["session.x64quantprecision"] == "1"
    open_backend(model, "onnxruntime", "cpu")
    assert seen["providers"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_provider(
    precision: str,
    model: Path,
    write_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No such provider has run where this was written: the options are as documented."""
    seen: dict = {}
    loaded = [TENSORRT, CUDA, "CPUExecutionProvider"]
    write_model(model, precision=precision)
    monkeypatch.setattr(onnx_backend, "check_packages", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_onnxruntime(loaded, seen))
    backend = open_backend(model, "onnxruntime-tensorrt", "cuda:1")
    assert backend.picked == "onnxruntime-tensorrt on cuda:1"
    (first, options), *others = seen["providers"]
    assert first == TENSORRT
    assert others == [(CUDA, {"device_id": 1, "use_tf32": 0}), "CPUExecutionProvider"]
    cache = Path(options.pop("trt_engine_cache_path"))
    assert cache.is_dir() and cache.parent == tmp_path / "dsgnn" / "tensorrt"
    typed = {"trt_fp16_enable": True} if precision == "fp16" else {}
    assert options == {
        "device_id": 1,
        "trt_engine_cache_enable": True,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache.parent),
        **typed,
    }
    assert open_backend(model, "onnxruntime-tensorrt").device == "cuda:0"
    loaded.remove(TENSORRT)
    with pytest.raises(BackendError, match=r"could not load its TensorRT provider .*'dsgnn\[tens"):
        open_backend(model, "onnxruntime-tensorrt")


def test_tensorrt_provider_that_is_not_there(model: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(BackendError, match="onnxruntime-tensorrt needs an NVIDIA GPU, got device"):
        open_backend(model, "onnxruntime-tensorrt", "cpu")
    with pytest.raises(BackendError, match=r"has no TensorRT provider.*pip install 'dsgnn.gpu.'"):
        open_backend(model, "onnxruntime-tensorrt")


def test_both_onnxruntime_packages(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_backend, "version", lambda name: "1.0")
    message = (
        "onnxruntime and onnxruntime-gpu are both installed.*"
        r"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'dsgnn\[cpu\]'"
    )
    with pytest.raises(BackendError, match=message):
        open_backend(model, "onnxruntime")


def test_no_onnxruntime(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise onnx_backend.PackageNotFoundError(name)

    monkeypatch.setattr(onnx_backend, "version", missing)
    monkeypatch.setattr(onnx_backend, "find_spec", lambda name: None)
    message = r"onnxruntime is not installed: pip install 'dsgnn\[cpu\]', or 'dsgnn\[gpu\]'"
    with pytest.raises(BackendError, match=message):
        open_backend(model, "onnxruntime")


def test_no_openvino(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "find_spec", lambda name: None)
    message = r"openvino is not installed: pip install 'dsgnn\[openvino\]'"
    with pytest.raises(BackendError, match=message):
        open_backend(model, "openvino")
    with pytest.raises(BackendError, match="openvino runs on the CPU here, got device 'cuda'"):
        open_backend(model, "openvino", "cuda")


def test_openvino_in_bfloat16(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    fast = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    try:
        backend = open_backend(model, "openvino-bf16")
    except BackendError as error:  # neither products nor a way to imitate them
        assert not fast and "which has no bfloat16: use backend openvino" in str(error)
    else:
        assert backend.name == "openvino-bf16"
        assert ("they are imitated" in backend.picked) == (not fast)
        full = open_backend(model, "openvino").infer({"image": IMAGES})
        for name, values in backend.infer({"image": IMAGES}).items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, full[name], atol=0.05 * np.ptp(full[name]))
            assert not np.array_equal(values, full[name])

    class Compiled:
        def get_property(self, name):
            return openvino.Type.f32

    core = openvino.Core()
    fake = SimpleNamespace(read_model=core.read_model, compile_model=lambda *_: Compiled())
    monkeypatch.setattr(openvino, "Core", lambda: fake)
    with pytest.raises(BackendError, match="OpenVINO computes in f32 on this CPU"):
        open_backend(model, "openvino-bf16")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_the_library_refuses(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x08")  # an IR version and no graph
    artifact = Artifact(path, description(), sha256_of(path), None)
    with pytest.raises(BackendError, match=f"{name} cannot load broken.onnx: "):
        open_backend(artifact, name)


def test_opens_the_artifact_it_is_given(
    model: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    """Facts are not read from the file a second time."""
    artifact = open_artifact(model)
    for name in ("open_artifact", "read_description", "sha256_of"):
        monkeypatch.setattr(f"dsgnn.runtime.artifact.{name}", None)
    monkeypatch.setattr("dsgnn.runtime.backends.open_artifact", None)
    outputs = open_backend(artifact, backend.name).infer({"image": IMAGES})
    np.testing.assert_allclose(outputs["masks"], expected(IMAGES)["masks"], atol=1e-4)


def test_a_closed_backend_says_so(backend: Backend) -> None:
    with backend as entered:
        assert entered is backend
        outputs = backend.infer({"image": IMAGES})
    np.testing.assert_allclose(outputs["masks"], expected(IMAGES)["masks"], atol=1e-4)
    backend.close()  # once more does nothing
    with pytest.raises(BackendError, match=f"{backend.name} was closed: open the artifact again"):
        backend.infer({"image": IMAGES})


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_closing_gives_the_session_back(name: str, model: Path) -> None:
    pytest.importorskip(name)
    backend = open_backend(model, name)
    backend.infer({"image": IMAGES})
    (held,) = [vars(backend)[key] for key in ("_session", "_compiled") if key in vars(backend)]
    gone = weakref.ref(held)
    del held
    assert gone() is not None
    backend.close()
    gc.collect()
    assert gone() is None


def test_the_graph_is_what_the_source_says(graph: bytes) -> None:
    pytest.importorskip("onnx")
    assert colours_graph() == graph
