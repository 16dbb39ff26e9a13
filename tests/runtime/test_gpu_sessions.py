"""The sessions that ONNX Runtime has for a GPU: real ones, on the CPU, which say that they are on a
GPU and note how they were used."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest

from dsgnn.runtime.backends import Backend, open_backend
from dsgnn.runtime.backends import onnx as onnx_backend
from dsgnn.runtime.backends.onnx import CUDA, TENSORRT
from dsgnn.runtime.errors import BackendError
from dsgnn.runtime.ranker import BUNDLED
from dsgnn.runtime.telemetry import import_without_telemetry

from .test_backends import expected

IMAGES = np.random.default_rng(0).integers(0, 256, (22, 96, 128, 3), np.uint8)
Opener = Callable[..., Backend]


class Session:
    """What `onnxruntime.InferenceSession` is on a GPU. opened: all of them. fail: what makes the
    next one fail, by raising, by falling back to the CPU, or in its first call."""

    opened: list["Session"]
    fail: str
    at_work = Lock()

    def __init__(self, path, options, providers, disabled_optimizers):
        if Session.fail == "raises":
            Session.fail = ""
            raise RuntimeError("out of memory")
        onnxruntime = import_without_telemetry("onnxruntime")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.asked = [name if isinstance(name, str) else name[0] for name in providers]
        self.shapes = []
        self.fails = False
        if Session.fail == "falls back":
            self.asked = ["CPUExecutionProvider"]
        elif Session.fail == "fails in the call":
            self.fails = True
        Session.fail = ""
        Session.opened.append(self)

    def __getattr__(self, name):
        return getattr(self.session, name)

    def get_providers(self):
        return self.asked

    def get_provider_graph_assignment_info(self):
        return []

    def run(self, names, feeds):
        assert Session.at_work.acquire(blocking=False), "another call is under way"
        try:
            self.shapes.append(feeds["image"].shape)
            sleep(1e-3)
            if self.fails:
                self.fails = False
                raise RuntimeError("out of memory")
            return self.session.run(names, feeds)
        finally:
            Session.at_work.release()


@pytest.fixture
def on_gpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Opens the test's model."""
    pytest.importorskip("onnxruntime")
    real = import_without_telemetry("onnxruntime")
    Session.opened, Session.fail = [], ""
    library = SimpleNamespace(
        get_available_providers=lambda: [TENSORRT, CUDA, "CPUExecutionProvider"],
        SessionOptions=real.SessionOptions,
        InferenceSession=Session,
        __version__=real.__version__,
    )
    monkeypatch.setattr(onnx_backend, "import_without_telemetry", lambda name: library)
    return lambda name="onnxruntime": open_backend(model, name, "cuda")


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-tensorrt"])
def test_one_call_at_a_time(
    name: str, on_gpu: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Several at once gave other objects, and CUDA's error 717, on an H100."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with on_gpu(name) as backend, ThreadPoolExecutor(4) as pool:
        batches = [IMAGES[n : n + 1, : (96, 64)[n % 2]] for n in range(22)] * 2
        found = pool.map(lambda images: backend.infer({"image": images})["saliency"], batches)
        for images, saliency in zip(batches, found, strict=True):
            small = images.astype(np.float32).reshape(1, -1, 4, 32, 4, 3).mean((2, 4))
            red = np.maximum((small @ np.float32([2, -1, -1])) / 32 - 4, 0).mean()
            np.testing.assert_allclose(saliency[0, 0], red, atol=1e-4)
        assert len(Session.opened) == (2 if name == "onnxruntime" else 1)


def test_no_session_meets_a_second_shape(on_gpu: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution plans anew whenever its shape is not that of its last call, which made
    `dsgnn-run` a hundred times slower on an H100 than one shape alone (1.3 photos per second)."""
    monkeypatch.setattr(onnx_backend, "KEPT_SHAPES", 4)
    backend = on_gpu()
    for _ in range(2):
        for images in (IMAGES, IMAGES[:1], IMAGES[:4]):
            outputs = backend.infer({"image": images})
            for name, values in expected(images).items():
                np.testing.assert_allclose(outputs[name], values, atol=1e-4)
    sizes = [{shape[0] for shape in session.shapes} for session in Session.opened]
    assert sizes == [{16}, {4}, {1}]
    for height in (64, 32, 4, 8):  # more shapes than are kept
        backend.infer({"image": IMAGES[:1, :height]})
    assert len(Session.opened) == 7
    kept = [weakref.ref(session) for session in Session.opened]
    Session.opened.clear()
    gc.collect()
    assert [session() is not None for session in kept] == [False] * 3 + [True] * 4


@pytest.mark.parametrize("how", ["raises", "falls back", "fails in the call"])
def test_where_there_is_no_room_a_new_shape_takes_the_place_of_the_others(
    how: str, on_gpu: Opener
) -> None:
    backend = on_gpu()
    for height in (96, 64):
        backend.infer({"image": IMAGES[:1, :height]})
    first, second = map(weakref.ref, Session.opened)
    Session.fail = how
    assert backend.infer({"image": IMAGES[:1, :32]})["score"].shape[0] == 1
    Session.opened.clear()
    gc.collect()
    assert first() is None and second() is None


def test_a_failure_without_other_sessions_is_told_and_not_remembered(
    on_gpu: Opener, model: Path
) -> None:
    backend = on_gpu()
    Session.opened[0].fails = True
    with pytest.raises(BackendError, match="onnxruntime failed: out of memory"):
        backend.infer({"image": IMAGES[:1]})
    backend.infer({"image": IMAGES[:1]})
    model.write_bytes(BUNDLED.read_bytes())
    with pytest.raises(BackendError, match="another file than when it was opened: open it again"):
        backend.infer({"image": IMAGES[:1, :12]})
