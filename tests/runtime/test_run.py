"""Whole runs: what is written, what is not, and what is said."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from outputs import clip, files, read, results, runs, write

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import KINDS as ALL_KINDS
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.errors import DsgnnError, InputError
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run.loop import STAGES, Outcome, Summary, rank_sources, run

KINDS = tuple(kind for kind in ALL_KINDS if kind != "heat")  # these models have no attention


@pytest.fixture
def go(ranker: Ranker, place: Path) -> Callable[..., list[Outcome]]:
    return runs(ranker, KINDS)


def test_everything_of_one_photo(go, photo: np.ndarray, ranker: Ranker) -> None:
    write("photo.png", photo)
    (outcome,) = go("photo.png")
    assert outcome.objects == 2 and not outcome.error
    assert sorted(outcome.timings_ms) == sorted(STAGES)
    assert files() == [
        *("photo.crop1.png", "photo.crop2.png", "photo.map.png", "photo.mask1.png"),
        *("photo.mask2.png", "photo.overlay.jpg", "results.json", "sheet.jpg"),
    ]
    ranking = ranker(photo)
    red, blue = ranking.objects
    np.testing.assert_array_equal(read("out/photo.mask1.png"), red.mask * np.uint8(255))
    np.testing.assert_array_equal(read("out/photo.mask2.png"), blue.mask * np.uint8(255))
    np.testing.assert_array_equal(read("out/photo.map.png"), ranking.rank_map())
    overlay = read("out/photo.overlay.jpg")[..., ::-1].astype(int)
    assert np.abs(overlay - ranking.draw(photo)).mean() < 12  # JPEG
    x0, y0, x1, y1 = red.box
    crop = read("out/photo.crop1.png")
    np.testing.assert_array_equal(crop[..., 2::-1], photo[y0:y1, x0:x1])
    np.testing.assert_array_equal(crop[..., 3], red.crop(photo)[..., 3])
    file = Path("photo.png").stat()
    of = {"bytes": file.st_size, "modified_ns": file.st_mtime_ns}
    saved = ["overlay", "map of assr", "masks", "crops", "json", "sheet"]
    entry = {"file": "photo.png", "made": {"of": of, "saved": saved}, **ranking.to_dict()}
    assert results() == {
        "schema": "dsgnn.results/1",
        "model": ranker.describe(),
        "images": [entry],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_was_asked_for(go, photo: np.ndarray, kind: str) -> None:
    write("photo.png", photo)
    go("photo.png", kinds=(kind,))
    endings = {"overlay": ".overlay.jpg", "map": ".map.png", "json": "results.json"}
    endings["sheet"] = "sheet.jpg"
    expected = endings.get(kind, f".{kind[:-1]}")
    assert files() and all(expected in name for name in files())


def test_palette(go, photo: np.ndarray) -> None:
    write("photo.png", photo)
    go("photo.png", kinds=("map",), palette="irsr")
    assert set(np.unique(read("out/photo.map.png"))) == {0, 128, 255}


def test_an_object_with_an_empty_mask(place: Path, model: Path, scene) -> None:
    write("grey.png", scene(48, 64))
    ranker = Ranker(model, if_none="all")
    make_folder(Path("out"))
    found = find_sources(["grey.png"], Path("out"))
    (outcome,) = rank_sources(ranker, found.sources, Path("out"), KINDS)
    assert outcome.objects == 5 and not outcome.error
    assert "grey.mask5.png" in files() and "grey.crop1.png" not in files()
    assert results()["images"][0]["objects"][0]["bbox"] == [0, 0, 0, 0]
    assert not read("out/grey.mask1.png").any()


def test_a_bad_file_does_not_stop_the_others(go, photo: np.ndarray) -> None:
    write("photos/a.png", photo)
    write("photos/deep/c.png", photo)
    Path("photos/b.jpg").write_bytes(b"hello")
    outcomes = go("photos", "missing.jpg")
    assert [(item.source.shown, item.error) for item in outcomes] == [
        ("photos/a.png", ""),
        ("photos/b.jpg", outcomes[1].error),
        ("photos/deep/c.png", ""),
        ("missing.jpg", "there is no such file or folder"),
    ]
    assert outcomes[1].error.startswith("it is not an image (JPEG, PNG")
    assert "deep/c.overlay.jpg" in files()
    bad = results()["images"][1]
    expected = {"file": "photos/b.jpg", "width": None, "height": None, "objects": []}
    assert bad == {**expected, "error": outcomes[1].error}
    assert len(results()["images"]) == 4


def test_a_failure_without_words_is_a_failure(place, ranker, photo: np.ndarray) -> None:
    write("photo.png", photo)
    make_folder(Path("out"))
    found = find_sources(["photo.png"], Path("out"))
    failing = Stopping(ranker, 0, lambda _: InputError())
    summary = run(failing, found.sources, Path("out"))
    assert (summary.images, [outcome.error for outcome in summary.failures]) == (0, ["InputError"])
    assert results()["images"][0]["error"] == "InputError"


def test_standard_input(go, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    data = cv2.imencode(".png", photo[..., ::-1])[1].tobytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    (outcome,) = go("-")
    assert outcome.objects == 2 and "stdin.overlay.jpg" in files()
    assert results()["images"][0]["file"] == "stdin"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert go("-")[0].error == "the file is empty (0 bytes)"
    monkeypatch.setattr("sys.stdin", None)  # what Python has where the shell closed it
    assert go("-")[0].error == "standard input is closed"


class Stopping:
    """A ranker that is interrupted after some photos."""

    def __init__(self, ranker: Ranker, after: int, error: Callable[[str], BaseException]) -> None:
        self.ranker, self.left, self.error = ranker, after, error

    def describe(self) -> dict:
        return self.ranker.describe()

    def read(self, source):
        return self.ranker.read(source)

    def __call__(self, photo):
        if not self.left:
            raise self.error("stop")
        self.left -= 1
        return self.ranker(photo)

    def batch(self, photos):
        return [self(photo) for photo in photos]


def test_interrupted_photos_leave_what_was_done(place, ranker, photo: np.ndarray) -> None:
    for index in range(4):
        write(f"photos/{index}.png", photo)
    make_folder(Path("out"))
    found = find_sources(["photos"], Path("out"))
    stopping = Stopping(ranker, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stopping, found.sources, Path("out"))
    assert [image["file"] for image in results()["images"]] == ["photos/0.png", "photos/1.png"]
    assert files() == ["0.overlay.jpg", "1.overlay.jpg", "results.json"]


def test_an_interrupted_resumed_run_keeps_the_earlier_results(
    place, ranker, photo: np.ndarray
) -> None:
    for index in range(5):
        write(f"photos/{index}.png", photo)
    make_folder(Path("out"))
    sources = find_sources(["photos"], Path("out")).sources
    run(ranker, sources, Path("out"))
    before = results()["images"]
    for index in (1, 2, 4):
        Path(f"out/{index}.overlay.jpg").unlink()
    stopping = Stopping(ranker, 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stopping, sources, Path("out"), skip_existing=True)
    assert results()["images"] == [before[0], before[1], before[3]]
    again = run(ranker, sources, Path("out"), skip_existing=True)
    assert (again.images, again.skipped) == (2, 3) and results()["images"] == before


@pytest.mark.parametrize("closed", [False, True])
def test_a_stop_that_meets_a_write_error_is_still_a_stop(
    place, ranker, photo: np.ndarray, scene, closed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The writer's error replaces the Ctrl-C, or the generator's end, on the way out."""
    clip("clip.mp4", scene, frames=3)
    write("photo.png", photo)
    make_folder(Path("out"))
    Path("out/clip.masks").write_text("in the way of the first frame's mask")
    sources = find_sources(["clip.mp4", "photo.png"], Path("out")).sources
    kinds = ("masks", "json")
    if closed:
        outcomes = rank_sources(ranker, sources, Path("out"), kinds)
        assert next(outcomes).objects == 1
        outcomes.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            run(Stopping(ranker, 1, KeyboardInterrupt), sources, Path("out"), kinds)
        assert "clip.mp4: File exists" in capsys.readouterr().err
    (failed,) = results()["images"]
    assert failed["file"] == "clip.mp4" and failed["error"] == "File exists"
    assert files() == ["clip.masks", "results.json"]


@pytest.mark.parametrize(
    "bug",
    [
        lambda _: np.zeros(3) + np.zeros(2),  # ValueError: operands could not be broadcast
        lambda _: cv2.resize(np.zeros(3), (0, 0)),  # cv2.error
        lambda _: None + 1,  # TypeError
    ],
)
def test_a_bug_ends_the_run_and_leaves_what_was_done(
    go, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, bug: Callable
) -> None:
    """It is raised as it is, and never counted as a bad photo."""
    for index in range(3):
        write(f"photos/{index}.png", photo)
    draw, drawn = Ranking.draw, []

    def broken(ranking: Ranking, image: np.ndarray) -> np.ndarray:
        drawn.append(image)
        return bug(image) if len(drawn) == 3 else draw(ranking, image)

    monkeypatch.setattr(Ranking, "draw", broken)
    with pytest.raises((ValueError, cv2.error, TypeError)) as caught:
        go("photos", kinds=("overlay", "json"))
    assert not isinstance(caught.value, DsgnnError)
    assert files() == ["0.overlay.jpg", "1.overlay.jpg", "results.json"]
    assert [image["file"] for image in results()["images"]] == ["photos/0.png", "photos/1.png"]
    assert not any("error" in image for image in results()["images"])


def test_too_little_memory_in_opencv_spoils_one_source(
    go, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("photo.png", photo)
    error = cv2.error("Failed to allocate")
    error.code = cv2.Error.StsNoMem

    def draw(*_: object) -> None:
        raise error

    monkeypatch.setattr(Ranking, "draw", draw)
    (outcome,) = go("photo.png", kinds=("overlay", "json"))
    assert outcome.error == "there is not enough memory for an image of this size"


def frames(path: str) -> list[np.ndarray]:
    capture, found = cv2.VideoCapture(path), []
    while (pair := capture.read())[0]:
        found.append(pair[1][..., ::-1])
    return found


@pytest.mark.parametrize(
    ("name", "library"), [("clip.mp4", "cv2"), ("clip.avi", "cv2"), ("clip.mp4", "av")]
)
def test_a_video(
    go, ranker: Ranker, scene, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    monkeypatch.setattr("dsgnn.runtime.disk.outputs.h264.is_installed", lambda: library == "av")
    clip(name, scene)
    outcomes = go(name, kinds=("overlay", "json"))
    assert len(outcomes) == 12 and all(item.objects == 1 for item in outcomes)
    assert files() == [
        *("clip.frames.jsonl", "clip.overlay.mp4", "clip.summary.json", "results.json")
    ]
    assert results()["images"] == []
    lines = [json.loads(line) for line in Path("out/clip.frames.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(12))
    assert [line["time_s"] for line in lines] == pytest.approx([i / 10 for i in range(12)])
    assert {line["file"] for line in lines} == {name}
    lefts = [line["objects"][0]["bbox"][0] for line in lines]
    assert lefts == pytest.approx(range(12), abs=2) and lefts == sorted(lefts)
    drawn = frames("out/clip.overlay.mp4")
    assert len(drawn) == 12 and drawn[0].shape == (48, 64, 3)
    expected = ranker(frames(name)[5]).draw(frames(name)[5])
    assert np.abs(drawn[5].astype(int) - expected).mean() < 20  # lossy


def test_a_video_and_a_photo_of_one_name(go, scene, photo: np.ndarray) -> None:
    clip("x.mp4", scene, frames=3)
    write("x.png", photo)
    go("x.mp4", "x.png", kinds=("overlay", "json"))
    assert files() == [
        *("results.json", "x.mp4.frames.jsonl", "x.mp4.overlay.mp4", "x.mp4.summary.json"),
        "x.png.overlay.jpg",
    ]


def test_a_video_gives_no_crops(go, scene) -> None:
    clip("clip.mp4", scene, frames=3)
    (outcome,) = go("clip.mp4", kinds=("crops",))
    assert outcome.error == "a video gives overlay, map, masks, json, and only crops was asked for"
    assert files() == []


def test_no_video(go) -> None:
    pytest.importorskip("av")
    Path("clip.mp4").write_bytes(b"hello")
    (outcome,) = go("clip.mp4", kinds=("overlay", "json"))
    assert outcome.error == (
        "no frame can be read: it is damaged or cut short, or no video that FFmpeg decodes"
    )
    assert files() == ["results.json"]
    assert results()["images"][0]["error"] == outcome.error


def test_a_video_cut_short_keeps_what_was_read(go, scene) -> None:
    clip("clip.avi", scene, frames=40)
    data = Path("clip.avi").read_bytes()
    Path("clip.avi").write_bytes(data[: len(data) // 2])
    *ranked, failed = go("clip.avi", kinds=("overlay", "json"))
    assert 5 < len(ranked) < 35
    assert failed.error == (
        f"it ends after {len(ranked)} of the 40 frames it declares, so it is cut short or damaged; "
        "the frames that could be read were ranked"
    )
    assert len(Path("out/clip.frames.jsonl").read_text().splitlines()) == len(ranked)
    assert len(frames("out/clip.overlay.mp4")) == len(ranked)


def test_a_camera_that_changes_size(go, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([(48, 64), (48, 64), (64, 48)])
    capture = SimpleNamespace(
        get=lambda what: 0.0,  # no frame rate, no number of frames
        isOpened=lambda: True,
        grab=lambda: True,
        retrieve=lambda: (True, np.full((*next(sizes), 3), 128, np.uint8)),
        release=lambda: None,
    )
    monkeypatch.setattr("dsgnn.runtime.video.frames._capture", lambda number: capture)
    *ranked, failed = go("0", kinds=("overlay", "json"))
    assert len(ranked) == 2
    assert failed.error == (
        "frame 2 is 48×64, the video began with 64×48: cut it where the size changes; the frames "
        "before that were ranked"
    )
    assert len(Path("out/camera0.frames.jsonl").read_text().splitlines()) == 2
    assert json.loads(Path("out/camera0.summary.json").read_text())["complete"] is False


def test_an_interrupted_video_leaves_what_was_done(place, ranker: Ranker, scene) -> None:
    clip("clip.mp4", scene)
    make_folder(Path("out"))
    found = find_sources(["clip.mp4"], Path("out"))
    with pytest.raises(KeyboardInterrupt):
        run(Stopping(ranker, 5, KeyboardInterrupt), found.sources, Path("out"))
    assert len(frames("out/clip.overlay.mp4")) == 5
    assert len(Path("out/clip.frames.jsonl").read_text().splitlines()) == 5
    assert results()["images"] == []


def test_summary(go, photo: np.ndarray) -> None:
    write("photo.png", photo)
    summary = Summary()
    assert str(summary) == "0 images ranked, 0 objects"
    summary.add(Outcome(find_sources(["photo.png"], Path("out")).sources[0], 1, {"decode": 2.0}))
    assert str(summary) == "1 image ranked, 1 object; ms per image: decode 2.0"
    for outcome in go("a.jpg", "b.jpg"):
        summary.add(outcome)
    assert str(summary).endswith("\n2 inputs failed: a.jpg, b.jpg")
