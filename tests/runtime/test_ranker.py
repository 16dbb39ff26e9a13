"""The one call, from a photo to its ranked objects."""

import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime import Ranker, Ranking, samples
from dsgnn.runtime.artifact import Sidecar, open_artifact, sha256_of, write_sidecar
from dsgnn.runtime.backends import open_backend
from dsgnn.runtime.errors import ArtifactError, BackendError, OptionError
from dsgnn.runtime.letterbox import Fixed, LongestSide
from dsgnn.runtime.ranker import BUNDLED, LARGEST_BATCH

Write = Callable[..., Path]
STAGES = ["decode", "preprocess", "inference", "postprocess"]


def same(one: Ranking, other: Ranking) -> None:
    assert len(one.objects) == len(other.objects)
    for first, second in zip(one.objects, other.objects, strict=True):
        assert (first.rank, first.query, first.box) == (second.rank, second.query, second.box)
        assert first.saliency == pytest.approx(second.saliency, abs=1e-5)
        np.testing.assert_array_equal(first.mask, second.mask)


def test_ranks_the_larger_blob_first(ranker: Ranker, photo: np.ndarray) -> None:
    ranking = ranker(photo)
    assert (ranking.height, ranking.width) == (48, 64)
    red, blue = ranking.objects
    assert (red.query, blue.query) == (0, 2)
    assert red.saliency > blue.saliency and red.score > 0.99
    np.testing.assert_allclose(red.box, (4, 8, 36, 40), atol=1)
    np.testing.assert_allclose(blue.box, (44, 20, 60, 36), atol=1)
    assert red.area == pytest.approx(32 * 32 / (48 * 64), rel=0.1)
    assert red.mask[10:38, 6:34].all() and not red.mask[:, 38:].any()
    assert list(ranking.timings_ms) == STAGES
    assert all(value > 0 for value in ranking.timings_ms.values())


@pytest.mark.parametrize("rule", [Fixed(96, 128), LongestSide(128), LongestSide(64, 8)])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (301, 77), (100, 640)])
def test_boxes_are_in_the_photos_own_pixels(
    scene, tmp_path: Path, write_model: Write, rule, shape: tuple[int, int]
) -> None:
    h, w = shape
    box = (h // 4, w // 4, 3 * h // 4, 3 * w // 4)
    ranking = Ranker(write_model(tmp_path / "m.onnx", input=rule))(scene(h, w, green=box))
    (item,) = ranking.objects
    scale = max(rule.geometry(h, w).original) / max(rule.geometry(h, w).resized)
    np.testing.assert_allclose(item.box, (box[1], box[0], box[3], box[2]), atol=4 * scale + 1)


def test_every_kind_of_source(ranker: Ranker, photo: np.ndarray, tmp_path: Path) -> None:
    data = cv2.imencode(".png", photo[..., ::-1])[1].tobytes()
    path = tmp_path / "日本.png"
    path.write_bytes(data)
    expected = ranker(photo)
    for source in (path, str(path), data):
        same(ranker(source), expected)


def test_one_pixel_and_48_megapixels(ranker: Ranker, scene) -> None:
    assert ranker(np.full((1, 1, 3), 128, np.uint8)).objects == ()
    (dot,) = ranker(np.uint8([[(230, 20, 20)]])).objects
    assert dot.box == (0, 0, 1, 1) and dot.area == 1
    (large,) = ranker(scene(6000, 8000, blue=(1000, 2000, 5000, 6000))).objects
    assert large.mask.shape == (6000, 8000)
    np.testing.assert_allclose(large.box, (2000, 1000, 6000, 5000), atol=64)


@pytest.mark.parametrize("rule", [Fixed(96, 128), LongestSide(128)])
def test_a_batch_equals_its_photos(scene, tmp_path: Path, write_model: Write, rule) -> None:
    ranker = Ranker(write_model(tmp_path / "m.onnx", input=rule))
    photos = [
        scene(48, 64, red=(8, 4, 40, 36)),
        scene(64, 48, blue=(2, 2, 20, 40), green=(30, 10, 60, 40)),
        scene(48, 64),
        scene(96, 128, green=(20, 20, 90, 90)),
    ]
    rankings = ranker.batch(photos)
    assert [len(ranking.objects) for ranking in rankings] == [1, 2, 0, 1]
    for photo, ranking in zip(photos, rankings, strict=True):
        same(ranking, ranker(photo))
    assert ranker.batch([]) == []


def test_photos_of_one_size_share_an_inference(
    ranker: Ranker, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    infer = ranker.backend.infer
    monkeypatch.setattr(
        ranker.backend, "infer", lambda feeds: sizes.append(len(feeds["image"])) or infer(feeds)
    )
    ranker.batch([photo] * 3)
    assert sizes == [3]
    sizes.clear()
    assert len(ranker.batch([photo] * (LARGEST_BATCH + 3))) == LARGEST_BATCH + 3
    assert sizes == [LARGEST_BATCH, 3]  # in bounded memory
    sizes.clear()
    monkeypatch.setattr(ranker.backend, "max_batch", 2)  # as an engine's profile says
    ranker.batch([photo] * 3)
    assert sizes == [2, 1]


def test_threshold(model: Path, photo: np.ndarray) -> None:
    photo = np.where(photo == (20, 20, 230), (128, 128, 200), photo).astype(np.uint8)  # paler
    assert Ranker(model).threshold == 0.5  # the artifact's own
    red, blue = Ranker(model)(photo).objects
    assert red.score > 0.99 and 0.5 < blue.score < 0.9
    assert len(Ranker(model, threshold=blue.score - 0.01)(photo).objects) == 2
    assert len(Ranker(model, threshold=blue.score)(photo).objects) == 1  # strictly above
    assert len(Ranker(model, threshold=0)(photo).objects) == 5


def test_if_none(model: Path, scene) -> None:
    empty = scene(48, 64)
    assert Ranker(model)(empty).objects == ()
    everything = Ranker(model, if_none="all")(empty).objects
    assert len(everything) == 5 and all(item.area == 0 for item in everything)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, got 1.0"),
        ({"threshold": 1.5}, "threshold must be at least 0 and below 1, got 1.5"),
        ({"threshold": -0.1}, "threshold must be at least 0 and below 1, got -0.1"),
        ({"if_none": "some"}, 'if_none must be "none" or "all", got \'some\''),
    ],
)
def test_refuses_wrong_settings(model: Path, arguments: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Ranker(model, **arguments)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"queries": 8}, r"expected saliency to be float32 \(any, 8\), got float32 \(any, 5\)"),
        ({"queries": 8}, "the graph does not fit its description: .* export the checkpoint again"),
    ],
)
def test_a_graph_that_belies_its_description(
    tmp_path: Path, write_model: Write, facts: dict, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        Ranker(write_model(tmp_path / "m.onnx", **facts))


def test_a_graph_without_an_output(tmp_path: Path, write_model: Write, graph: bytes) -> None:
    path = write_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"score", b"grade"))
    with pytest.raises(ArtifactError, match=r"score to be float32 \(any, 5\), got no such tensor"):
        Ranker(path)


def test_describes_itself(model: Path, tmp_path: Path, write_model: Write) -> None:
    ranker = Ranker(model, backend="onnxruntime", threshold=0.25)
    assert str(ranker) == (
        "colours.onnx: colours, trained weights, unverified (no sidecar beside it); "
        "onnxruntime on cpu, 2 threads"
    )
    assert ranker.describe() == {
        "file": "colours.onnx",
        "sha256": sha256_of(model),
        "status": "unverified",
        "config": "colours",
        "weights": "trained",
        "precision": "fp32",
        "toolkit": "0.1.0",
        "backend": "onnxruntime",
        "device": "cpu",
        "threshold": 0.25,
        "if_none": "none",
        "specks": "drop",
    }
    synthetic = write_model(tmp_path / "s.onnx", weights="synthetic")
    write_sidecar(synthetic, Sidecar(synthetic.name, sha256_of(synthetic), verified=True))
    assert str(Ranker(synthetic)).startswith(
        "s.onnx: colours, synthetic weights, so the ranks mean nothing, verified; "
    )


def test_the_bundled_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Ranker("nano").artifact.path == Ranker().artifact.path == BUNDLED
    assert "verified (gives PyTorch's answers on " in str(Ranker("nano"))
    (tmp_path / "nano").mkdir()
    assert Ranker("nano").artifact.path == BUNDLED
    (tmp_path / "nano").rmdir()
    (tmp_path / "nano").write_text("a file of that name")
    with pytest.raises(ArtifactError, match=r"ending in .onnx or .engine, got nano"):
        Ranker("nano")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.safetensors", "make an ONNX file of it with dsgnn-export onnx"),
        ("m.pth", "convert it with dsgnn-convert, and make an ONNX file"),
        ("m.pt", "convert it with dsgnn-convert"),
    ],
)
def test_a_checkpoint_is_answered_with_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Ranker(name)


def test_a_ranking_knows_its_photo(model: Path, scene, tmp_path: Path) -> None:
    ranker, photo = Ranker(model), scene(48, 64, red=(8, 8, 40, 40))
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), photo[..., ::-1])
    by_array, by_path, by_bytes = ranker.batch([photo, path, path.read_bytes()])
    assert by_array.image is photo and by_array.file is None and by_bytes.file is None
    assert by_path.file == str(path)
    for ranking in (by_array, by_path, by_bytes):
        np.testing.assert_array_equal(ranking.draw(), by_array.draw(photo))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_threads_share_a_ranker(model: Path, scene, backend: str) -> None:
    pytest.importorskip(backend)
    ranker = Ranker(model, backend=backend)
    photos = [scene(48, 64, red=(0, 0, 10 + i, 20 + i), blue=(30, 30, 40, 40)) for i in range(24)]
    expected = [ranker(photo) for photo in photos]
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(ranker, photos), expected, strict=True):
            same(one, other)


def test_pickles(model: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    ranker = Ranker(model.name, backend="onnxruntime", threads=1, threshold=0.3, if_none="all")
    monkeypatch.chdir("/")  # where a worker process may run
    copy = pickle.loads(pickle.dumps(ranker))
    assert copy.describe() == ranker.describe() and copy.backend.threads == 1
    same(copy(photo), ranker(photo))


def test_a_block_closes_a_ranker(model: Path, photo: np.ndarray) -> None:
    with Ranker(model) as ranker:
        assert len(ranker(photo).objects) == 2
    with pytest.raises(BackendError, match="was closed: open the artifact again"):
        ranker(photo)
    with pytest.raises(BackendError, match="was closed"):
        ranker.batch([photo, photo])
    ranker.close()
    assert len(pickle.loads(pickle.dumps(ranker))(photo).objects) == 2  # another one


def test_a_ranker_of_a_loaded_artifact(model: Path, photo: np.ndarray, write_model: Write) -> None:
    artifact = open_artifact(model)
    backend = open_backend(artifact)
    ranker = Ranker.of(artifact, backend, threshold=0.3, if_none="all")
    same(ranker(photo), Ranker(model, threshold=0.3, if_none="all")(photo))
    assert (ranker.threshold, ranker.if_none) == (0.3, "all")
    assert Ranker.of(artifact, backend).threshold == 0.5
    with pytest.raises(OptionError, match="threshold must be"):
        Ranker.of(artifact, backend, threshold=2)
    other = open_artifact(write_model(model.with_name("other.onnx"), queries=8))
    with pytest.raises(ArtifactError, match="the graph does not fit its description"):
        Ranker.of(other, backend)


def test_sample_photos() -> None:
    names = [path.name for path in samples()]
    assert names == [
        f"{name}.jpg" for name in ("birthday", "cake", "desk", "goats", "tennis", "tie")
    ]
    credits = samples()[0].with_name("README.md").read_text("utf-8")
    assert all(f"| `{name}` |" in credits for name in names)


def test_the_bundled_model() -> None:
    """Its weights may improve; its interface stays."""
    ranker = Ranker()
    assert ranker.artifact.description.config == "nano"
    assert re.match("nano.onnx: nano, (trained on |synthetic weights)", str(ranker))
    for path, ranking in zip(samples(), ranker.batch(samples()), strict=True):
        photo = cv2.imread(str(path))
        assert (ranking.height, ranking.width) == photo.shape[:2]
        assert 1 <= len(ranking.objects) <= ranker.artifact.description.queries
        shares = [item.attention for item in ranking.objects]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
        same(ranking, ranker(path))


def test_a_batch_is_of_several_photos(ranker: Ranker, photo: np.ndarray) -> None:
    for one in ("photo.jpg", Path("photo.jpg"), b"photo", photo):
        with pytest.raises(ValueError, match="expected several photos, such as a list of them"):
            ranker.batch(one)
    assert len(ranker.batch(np.stack([photo, photo]))) == 2
