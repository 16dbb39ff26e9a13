"""Videos cropped to other aspects: what is in the window, when, with which sound."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from films import film

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.framing import parse_aspects
from dsgnn.runtime.run.loop import Outcome, rank_sources
from dsgnn.runtime.video import reframe
from dsgnn.runtime.video.camera import EASE_S, LOOKAHEAD_S
from dsgnn.runtime.video.frames import Selection
from dsgnn.runtime.video.to_files import VideoOptions

av = pytest.importorskip("av")

SIZE = (90, 160)  # of the frames; the model sees them at 96 × 128
Go = Callable[..., list[Outcome]]


@pytest.fixture
def go(ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """dsgnn-run --aspect in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(source: str, aspect: str = "9:16", kinds=("json",), skip=False, **options):  # type: ignore[no-untyped-def]
        make_folder(Path("out"))
        found = find_sources([source], Path("out"))
        video, aspects = VideoOptions(**options), parse_aspects(aspect)
        sources = found.sources
        return list(rank_sources(ranker, sources, Path("out"), kinds, "assr", video, skip, aspects))

    return run


def walk(scene: Callable[..., np.ndarray], count: int, cut: int = 0) -> Iterator[np.ndarray]:
    """A red box that goes right by 1 pixel a frame. From the frame `cut` on another scene: a bright
    ground, and the box back at the left."""
    for i in range(count):
        x = 8 + (i if not cut or i < cut else i - cut)
        frame = scene(*SIZE, red=(24, x, 66, x + 30))
        if cut and i >= cut:
            ground = (frame == 128).all(2)
            frame[ground] = (250, 250, 200)
        yield frame


def box_in(picture: np.ndarray) -> tuple[int, int]:
    """The columns from and to which a picture is red."""
    red = (picture[..., 0].astype(int) - picture[..., 1] > 100).sum(0) > 20
    return int(red.argmax()), int(len(red) - red[::-1].argmax())


def read(path: str) -> tuple[list[np.ndarray], list[float]]:
    with av.open(path) as container:
        pairs = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
    return [picture for picture, _ in pairs], [time for _, time in pairs]


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("out/clip.frames.jsonl").read_text().splitlines()]


def sound_s(path: str) -> float:
    with av.open(path) as container:
        ends = [
            p.pts * p.time_base + p.duration * p.time_base
            for p in container.demux(audio=0)
            if p.pts is not None
        ]
        return float(max(ends))


def test_the_window_follows_what_is_ranked_first(go: Go, scene: Callable[..., np.ndarray]) -> None:
    film("clip.mp4", walk(scene, 100), rate=25)
    outcomes = go("clip.mp4")
    assert len(outcomes) == 100 and not any(one.error for one in outcomes)
    pictures, times = read("out/clip.9x16.mp4")
    assert len(pictures) == 100 and pictures[0].shape == (90, 50, 3)
    assert times == pytest.approx([i / 25 for i in range(100)], abs=1e-4)
    starts = [line["crops"]["9:16"]["box"][0] for line in lines()]
    for picture, start, i in zip(pictures, starts, range(100), strict=True):
        left, right = box_in(picture)
        assert right - left >= 28  # whole, as colours are stored for each second pixel
        assert left + start == pytest.approx(8 + i, abs=2)
    assert (np.diff(starts) >= 0).all() and starts[-1] > starts[0]
    assert lines()[0]["crops"]["9:16"] == {
        "box": [starts[0], 0, starts[0] + 50, 90],
        "attention": None,
    }


def test_it_jumps_with_the_cut(go: Go, scene: Callable[..., np.ndarray]) -> None:
    film("clip.mp4", walk(scene, 80, cut=50), rate=25)
    go("clip.mp4", "9:16,1:1")
    for aspect in ("9x16", "1x1"):
        pictures, _ = read(f"out/clip.{aspect}.mp4")
        assert all(right - left >= 28 for left, right in map(box_in, pictures))
    steps = np.diff([line["crops"]["9:16"]["box"][0] for line in lines()])
    assert steps[49] < -10 and (np.abs(np.delete(steps, 49)) <= 4).all()


def test_times_and_sound_are_those_of_the_source(go: Go, scene: Callable[..., np.ndarray]) -> None:
    gaps = np.random.default_rng(0).choice([20, 33, 60, 200], 40)
    times_ms = np.concatenate([[0], np.cumsum(gaps)]).tolist()
    film("clip.mp4", walk(scene, 41), times_ms, sound_s=times_ms[-1] / 1000)
    go("clip.mp4")
    _, times = read("out/clip.9x16.mp4")
    assert times == pytest.approx([t / 1000 for t in times_ms], abs=2e-3)
    assert sound_s("out/clip.9x16.mp4") == pytest.approx(sound_s("clip.mp4"), abs=0.03)


def test_a_source_that_is_read_once_gives_the_same_window(
    go: Go, scene: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no frame waits longer than the look-ahead."""
    film("clip.mp4", walk(scene, 100, cut=60), rate=25)
    waiting: list[float] = []
    real = reframe._write

    def spied(write, frame, box, start_s):  # type: ignore[no-untyped-def]
        waiting.append(frame.time_s)
        real(write, frame, box, start_s)

    monkeypatch.setattr(reframe, "_write", spied)
    monkeypatch.setattr(reframe, "readable_twice", lambda source: False)
    seen: list[tuple[float, int]] = []
    finder = reframe.CutFinder.__call__

    def found(self, image):  # type: ignore[no-untyped-def]
        seen.append((len(seen) / 25, len(waiting)))
        return finder(self, image)

    monkeypatch.setattr(reframe.CutFinder, "__call__", found)
    go("clip.mp4")
    pictures, _ = read("out/clip.9x16.mp4")
    assert len(pictures) == 100
    assert all(right - left >= 28 for left, right in map(box_in, pictures))
    longest = max(time_s - (count / 25) for time_s, count in seen)
    assert longest <= LOOKAHEAD_S + EASE_S / 2 + 0.2
    assert len(lines()) == 100 and all("crops" in line for line in lines())


def test_what_was_done_is_not_done_again(go: Go, scene: Callable[..., np.ndarray]) -> None:
    film("clip.mp4", walk(scene, 10), rate=25)
    go("clip.mp4")
    assert [one.skipped for one in go("clip.mp4", skip=True)] == [True]
    assert len(go("clip.mp4", "9:16,1:1", skip=True)) == 10
    Path("out/clip.1x1.mp4").unlink()
    assert len(go("clip.mp4", "9:16,1:1", skip=True)) == 10
    assert Path("out/clip.1x1.mp4").is_file()


def test_only_what_was_selected(go: Go, scene: Callable[..., np.ndarray]) -> None:
    film("clip.mp4", walk(scene, 50), rate=25, sound_s=2)
    go("clip.mp4", select=Selection(every=2, start_s=0.4, end_s=1.2))
    pictures, times = read("out/clip.9x16.mp4")
    assert len(pictures) == 10 and times == pytest.approx([0.08 * i for i in range(10)], abs=1e-3)
    assert sound_s("out/clip.9x16.mp4") == pytest.approx(0.8, abs=0.05)


def test_a_crop_is_enough(go: Go, scene: Callable[..., np.ndarray]) -> None:
    film("clip.mp4", walk(scene, 5), rate=25)
    assert len(go("clip.mp4", kinds=("sheet",))) == 5
    assert sorted(path.name for path in Path("out").iterdir()) == ["clip.9x16.mp4"]


def test_ctrl_c_leaves_no_half_crop(
    go: Go, scene: Callable[..., np.ndarray], ranker: Ranker
) -> None:
    film("clip.mp4", walk(scene, 40), rate=25)
    make_folder(Path("out"))
    sources = find_sources(["clip.mp4"], Path("out")).sources
    outcomes = rank_sources(ranker, sources, Path("out"), aspects=parse_aspects("9:16"))
    for _ in range(10):
        next(outcomes)
    outcomes.close()
    names = sorted(path.name for path in Path("out").iterdir())
    assert "clip.9x16.mp4" not in names and "clip.overlay.mp4" in names
    assert not [name for name in names if name.startswith(".")]


def test_a_file_that_breaks_off_keeps_what_was_read(
    go: Go, scene: Callable[..., np.ndarray]
) -> None:
    film("clip.mkv", walk(scene, 60), rate=25, coding={"g": "5"})
    whole = Path("clip.mkv").read_bytes()
    Path("clip.mkv").write_bytes(whole[: int(0.7 * len(whole))])
    outcomes = go("clip.mkv")
    assert outcomes[-1].error
    pictures, _ = read("out/clip.9x16.mp4")
    assert len(pictures) == len(outcomes) - 1 == len(lines()) and len(pictures) > 10
    assert all("crops" in line for line in lines())


def test_a_wide_window_moves_up_and_down(go: Go, scene: Callable[..., np.ndarray]) -> None:
    pictures = [scene(160, 90, red=(100, 20, 140, 70)) for _ in range(10)]
    film("clip.mp4", pictures, rate=25)
    go("clip.mp4", "16:9")
    x0, y0, x1, y1 = lines()[0]["crops"]["16:9"]["box"]
    assert (x0, x1) == (0, 90) and y0 <= 100 and y1 >= 140 and y1 - y0 == 50
    assert cv2.VideoCapture("out/clip.16x9.mp4").get(cv2.CAP_PROP_FRAME_HEIGHT) == 50
