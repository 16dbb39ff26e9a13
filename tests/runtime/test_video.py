"""Videos from end to end: what is written, and what `Ranker.stream` gives."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from outputs import runs

from dsgnn.runtime import Ranker, Ranking
from dsgnn.runtime.disk.outputs import OutputFiles
from dsgnn.runtime.disk.sources import Source, find_sources
from dsgnn.runtime.run.loop import Outcome
from dsgnn.runtime.video.feed import Ended
from dsgnn.runtime.video.fence import FencedFilm
from dsgnn.runtime.video.frames import Selection
from dsgnn.runtime.video.h264 import h264_writer
from dsgnn.runtime.video.to_files import (
    RANKED,
    Presence,
    VideoOptions,
    choose_threads,
    rank_video,
)

if TYPE_CHECKING:
    from playwright.sync_api import Page

Run = Callable[..., list[Outcome]]


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def clip(scene) -> Callable[..., None]:
    pytest.importorskip("av")  # which reads it

    def write(path: str = "clip.avi", frames: int = 20, size: tuple[int, int] = (48, 64)) -> None:
        """A red box that moves right, and below it from frame 10 on a larger blue one."""
        h, w = size
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (w, h))
        for number in range(frames):
            boxes = {"red": (2, number, 14, number + 16)}
            if number >= 10:
                boxes["blue"] = (18, 4, h - 4, w - 10)
            writer.write(scene(h, w, **boxes)[..., ::-1])
        writer.release()

    return write


@pytest.fixture
def go(ranker: Ranker) -> Run:
    return runs(ranker)


def lines(name: str = "clip") -> list[dict]:
    return [json.loads(line) for line in Path(f"out/{name}.frames.jsonl").read_text().splitlines()]


def summary(name: str = "clip") -> dict:
    return json.loads(Path(f"out/{name}.summary.json").read_text())


def frames(path: str) -> list[np.ndarray]:
    capture, found = cv2.VideoCapture(path), []
    while (pair := capture.read())[0]:
        found.append(pair[1][..., ::-1])
    return found


def test_summary_tells_who_held_rank_1(go: Run, clip, ranker: Ranker) -> None:
    clip()
    go("clip.avi")
    found = summary()
    assert found["schema"] == "dsgnn.video/1" and found["model"] == ranker.describe()
    assert (found["file"], found["complete"], found["frames"]) == ("clip.avi", True, 20)
    assert (found["width"], found["height"], found["seconds"]) == (64, 48, 2.0)
    objects = {item["identity"]: item for item in found["objects"]}
    assert list(objects) in ([1, 2], [2, 1])
    red, blue = objects[1], objects[2]
    assert red["frames"] == 20 and red["first_s"] == 0 and red["last_s"] == 1.9
    assert blue["best_rank"] == 1 and blue["first_s"] == pytest.approx(1.1)  # seen for 0.1 s
    assert red["rank_1_s"] + blue["rank_1_s"] == pytest.approx(2.0)
    assert red["rank_1_s"] == pytest.approx(1.1)
    held = sum(line["objects"][0]["identity"] == 1 for line in lines())
    assert held / 10 == pytest.approx(red["rank_1_s"])


def test_every_frame_for_itself(go: Run, clip, ranker: Ranker) -> None:
    clip()
    go("clip.avi", steady=False)
    expected = [ranker(frame).to_dict() for frame in frames("clip.avi")]
    for line, one in zip(lines(), expected, strict=True):
        assert [item["bbox"] for item in line["objects"]] == [
            item["bbox"] for item in one["objects"]
        ]
        assert "identity" not in str(line)
    assert summary()["objects"] == []


def test_map_and_masks(go: Run, clip, ranker: Ranker) -> None:
    clip(frames=3)
    go("clip.avi", kinds=("map", "masks"))
    names = sorted(path.relative_to("out").as_posix() for path in Path("out").rglob("*.*"))
    masks = [f"clip.masks/{number:06}.mask1.png" for number in range(3)]
    assert names == ["clip.map.mp4", "clip.masks", *masks]
    photo = frames("clip.avi")[2]
    (item,) = ranker(photo).objects
    np.testing.assert_array_equal(cv2.imread(f"out/{masks[2]}", 0), item.mask * np.uint8(255))
    grey = frames("out/clip.map.mp4")[2].astype(int)
    assert np.abs(grey - ranker(photo).rank_map()[..., None]).mean() < 8  # lossy


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_change_nothing(go: Run, clip, batch: int) -> None:
    clip()
    select = Selection(every=2, start_s=0.2)
    assert len(go("clip.avi", batch=batch, select=select)) == 9
    assert [line["frame"] for line in lines()] == list(range(2, 20, 2))
    lefts = [line["objects"][-1]["bbox"][0] for line in lines()]
    assert lefts == sorted(lefts)
    assert summary()["frames_per_second"] == 5


def test_no_frame_is_left(go: Run, clip) -> None:
    clip()
    (outcome,) = go("clip.avi", select=Selection(start_s=9))
    assert outcome.error == "it has no frame to rank: it is empty, or it ends before the start"
    assert sorted(path.name for path in Path("out").iterdir()) == ["results.json"]


def test_stream(clip, ranker: Ranker) -> None:
    clip()
    pairs = list(ranker.stream("clip.avi"))
    assert len(pairs) == 20
    for (frame, ranking), expected in zip(pairs, frames("clip.avi"), strict=True):
        np.testing.assert_array_equal(frame, expected)
        assert (ranking.height, ranking.width) == frame.shape[:2]
        assert [item.identity for item in ranking.objects][-1] == 1
        assert ranking.timings_ms["decode"] > 0
    raw = list(ranker.stream("clip.avi", every=5, start_s=0.5, end_s=1.7, batch=2, steady=False))
    assert len(raw) == 3 and all(item.identity is None for _, r in raw for item in r.objects)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("clip.avi", {"batch": 0}, "^batch must be at least 1, got 0"),
        ("clip.avi", {"every": 0}, "^every and max_frames must be at least 1, got 0 and None"),
        (
            "clip.avi",
            {"start_s": 2, "end_s": 1},
            "^expected 0 ≤ start < end, in seconds, got 2 and",
        ),
        ("other.avi", {}, "there is no video file other.avi"),
        ("damaged.avi", {}, "no frame can be read"),
        ("shot%d.png", {}, "no file has a name of this pattern"),
    ],
)
def test_a_stream_that_cannot_begin_says_so_at_the_call(
    clip, ranker: Ranker, source: str, arguments: dict, message: str
) -> None:
    clip()
    Path("damaged.avi").write_bytes(b"hello")
    with pytest.raises((ValueError, OSError), match=message):
        ranker.stream(source, **arguments)


def test_a_stream_can_be_left(clip, ranker: Ranker) -> None:
    clip()
    stream = ranker.stream("clip.avi")
    assert len(list(itertools.islice(stream, 3))) == 3
    stream.close()
    assert all(thread.name != "dsgnn-read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("batch", [1, 8])
def test_a_stream_that_breaks_off_gives_what_came(clip, ranker: Ranker, batch: int) -> None:
    clip(frames=40)
    data = Path("clip.avi").read_bytes()
    Path("clip.avi").write_bytes(data[: len(data) // 2])
    got = []
    with pytest.raises(Ended, match=r"it ends after \d+ of the 40 frames it declares"):
        for pair in ranker.stream("clip.avi", batch=batch):
            got.append(pair)
    assert len(got) == len(frames("clip.avi"))


def test_stages_overlap(go: Run, clip, ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frame 0 is ranked only once frame 1 is decoded, and written once frame 1 is ranked."""
    clip(frames=6)
    decoded, ranked = threading.Event(), threading.Event()
    batch, add, picture = ranker.batch, Presence.add, FencedFilm._picture
    calls = []

    def decode(self, *arguments) -> np.ndarray:
        calls.append("decode")
        if calls.count("decode") == 2:
            decoded.set()
        return picture(self, *arguments)

    def rank(images):
        calls.append("rank")
        assert decoded.wait(10)
        if calls.count("rank") == 2:
            ranked.set()
        return batch(images)

    def write(self, frame, ranking) -> None:
        assert ranked.wait(10)
        add(self, frame, ranking)

    monkeypatch.setattr(FencedFilm, "_picture", decode)
    monkeypatch.setattr(ranker, "batch", rank)
    monkeypatch.setattr(Presence, "add", write)
    assert [outcome.error for outcome in go("clip.avi")] == [""] * 6
    assert [line["frame"] for line in lines()] == list(range(6))


def test_the_time_of_writing_is_told(go: Run, clip, monkeypatch: pytest.MonkeyPatch) -> None:
    clip()
    add = Presence.add
    monkeypatch.setattr(Presence, "add", lambda *arguments: time.sleep(0.02) or add(*arguments))
    told_ms = sum(outcome.timings_ms["save"] for outcome in go("clip.avi"))
    assert told_ms > 20 * (20 - RANKED - 2)  # but for what was still waiting


def test_h264_that_browsers_play(go: Run, clip) -> None:
    av = pytest.importorskip("av")
    for number in range(20):
        cv2.imwrite(f"clip{number:02}.png", np.full((47, 63, 3), 10 * number, np.uint8))
    go("clip%02d.png", kinds=("overlay",), select=Selection(rate=10))
    with av.open("out/clip.overlay.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (64, 48)  # sides made even
        assert stream.average_rate == 10 and stream.frames == 20
        codec = stream.codec_context  # how players get from YUV to the same colours
        assert (codec.colorspace, codec.color_range) == (6, 1)
        assert (codec.color_primaries, codec.color_trc) == (1, 1)
    data = Path("out/clip.overlay.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")  # plays before it is there in whole


PLAY = """() => new Promise((done, failed) => {
    const video = document.querySelector("video"), clock = [];
    setTimeout(() => failed(video.error?.message ?? `stopped at ${video.currentTime} s`), 60000);
    video.ontimeupdate = () => clock.push(video.currentTime);
    video.onended = () => done([video.videoWidth, video.videoHeight, video.duration, clock]);
    Object.assign(video, {muted: true, controls: false, currentTime: 0});
    video.play();
})"""


def test_chromium_plays_it(go: Run, ranker: Ranker, page: Page) -> None:
    pytest.importorskip("av")
    for number in range(30):
        cv2.imwrite(f"clip{number:02}.png", np.full((47, 63, 3), 8 * number, np.uint8))
    go("clip%02d.png", kinds=("overlay",), select=Selection(rate=10))
    page.goto(Path("out/clip.overlay.mp4").resolve().as_uri())
    width, height, seconds, clock = page.evaluate(PLAY)
    assert (width, height, seconds) == (64, 48, 3)
    assert clock == sorted(clock) and clock[0] < clock[-1] == seconds
    shown = cv2.imdecode(np.frombuffer(page.locator("video").screenshot(), np.uint8), 1)
    last = np.full((47, 63, 3), 8 * 29, np.uint8)
    expected = ranker(last).draw(last)[24, 32]
    assert np.abs(shown[24, 32].astype(int) - expected).max() <= 4


@pytest.mark.parametrize("rate", [25.0, 29.97, 24000 / 1001, 999.9, 25 / 30_000])
def test_h264_keeps_the_rate(rate: float) -> None:
    """The last: a frame every 20 minutes."""
    av = pytest.importorskip("av")
    with h264_writer(Path("clip.mp4"), rate, (64, 48)) as write:
        write(np.zeros((48, 64, 3), np.uint8), 0, 1 / rate)
        write(np.zeros((48, 64, 3), np.uint8), 1 / rate, 1 / rate)
    with av.open("clip.mp4") as video:
        stream = video.streams.video[0]
        assert float(stream.duration * stream.time_base) == pytest.approx(2 / rate, rel=1e-3)


@pytest.mark.parametrize("size", [(48, 64), (720, 1280)])
def test_h264_keeps_the_colours(size: tuple[int, int]) -> None:
    av = pytest.importorskip("av")
    h, w = size
    with h264_writer(Path("red.mp4"), 29.97, (w, h)) as write:
        for number in range(3):
            write(np.full((h, w, 3), (230, 20, 20), np.uint8), number / 29.97, 1 / 29.97)
    with av.open("red.mp4") as video:
        assert float(video.streams.video[0].average_rate) == pytest.approx(29.97)
        (_, frame, _) = video.decode(video=0)
        shown = frame.to_ndarray(format="rgb24")
    assert np.abs(shown.astype(int) - (230, 20, 20)).max() <= 4
    assert np.abs(frames("red.mp4")[1].astype(int) - (230, 20, 20)).max() <= 4


def test_the_overlay_is_of_its_frame(go: Run, clip, ranker: Ranker) -> None:
    clip()
    go("clip.avi", kinds=("overlay",), steady=False)
    for number in (0, 19):
        expected = ranker(frames("clip.avi")[number]).draw(frames("clip.avi")[number])
        assert np.abs(frames("out/clip.overlay.mp4")[number].astype(int) - expected).mean() < 20


def test_show(go: Run, clip, monkeypatch: pytest.MonkeyPatch) -> None:
    clip()
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(
        "dsgnn.runtime.video.to_files.cv2.imshow", lambda name, image: shown.append(image)
    )
    monkeypatch.setattr(
        "dsgnn.runtime.video.to_files.cv2.destroyAllWindows", lambda: shown.append("closed")
    )
    keys = iter([-1, -1, ord("q")])
    monkeypatch.setattr("dsgnn.runtime.video.to_files.cv2.waitKey", lambda delay: next(keys))
    with pytest.raises(KeyboardInterrupt):
        go("clip.avi", show=True)
    assert len(shown) == 4 and shown[0].shape == (48, 64, 3) and shown[3] == "closed"
    assert len(lines()) == 3 and summary()["complete"] is False


def test_show_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsgnn.runtime.video.to_files.sys.platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="a window needs a screen, and DISPLAY is not set"):
        VideoOptions(show=True)


@pytest.mark.parametrize(
    ("asked", "name", "cores", "expected"),
    [
        (None, "clip.mp4", 2, 1),
        (None, "clip.mp4", 1, 1),
        (None, "clip.mp4", 4, None),
        (None, "photo.jpg", 2, None),
        (2, "clip.mp4", 2, 2),
        (0, "clip.mp4", 2, 0),
    ],
)
def test_a_video_leaves_one_of_two_cores_to_its_coding(
    asked: int | None, name: str, cores: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsgnn.runtime.video.to_files.cores", lambda: cores)
    assert choose_threads(asked, [Source(Path(name), name)]) == expected


@pytest.mark.parametrize("stage", ["ranking", "writing"])
def test_a_bug_of_ours_surfaces_after_the_files(
    go: Run, clip, ranker: Ranker, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no fault of the video's; what was ranked before it is whole."""
    clip()
    batch, draw, calls = ranker.batch, Ranking.draw, itertools.count(1)

    def planted(run: Callable[..., Any]) -> Callable[..., Any]:
        def fifth_fails(*arguments: Any) -> Any:
            if next(calls) == 5:
                return np.zeros((2, 3)) + np.zeros((4, 5))  # does not broadcast: a ValueError
            return run(*arguments)

        return fifth_fails

    if stage == "ranking":
        monkeypatch.setattr(ranker, "batch", planted(batch))
    else:
        monkeypatch.setattr(Ranking, "draw", planted(draw))
    find = find_sources(["clip.avi"], Path("out")).sources[0]
    Path("out").mkdir()
    target = OutputFiles(Path("out"), find, ("overlay", "json"), "assr", frozenset())
    with pytest.raises(ValueError, match="could not be broadcast") as raised:
        list(rank_video(ranker, target, VideoOptions(), []))
    assert "fifth_fails" in [entry.name for entry in raised.traceback]
    assert [line["frame"] for line in lines()] == [0, 1, 2, 3]
    assert (summary()["frames"], summary()["complete"]) == (4, False)
    assert len(frames("out/clip.overlay.mp4")) == 4


def test_what_is_no_bug_leaves_no_files(go: Run, clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, for one: half a record is none."""
    clip()
    add, calls = Presence.add, itertools.count(1)

    def fails(*arguments: Any) -> None:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        add(*arguments)

    monkeypatch.setattr(Presence, "add", fails)
    assert go("clip.avi", kinds=("overlay", "json"))[-1].error == "No space left on device"
    assert [path.name for path in Path("out").iterdir()] == ["results.json"]
