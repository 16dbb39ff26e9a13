"""Frames of every kind of video, and which of them are taken."""

import http.server
import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rtsp import camera

from dsgnn.runtime.disk.sources import Source, find_sources, video_source
from dsgnn.runtime.video.frames import Ended, Frames, Selection, parse_raw


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clip(place: Path) -> Path:
    """50 frames of 48 × 64 at 10 per second; their grey tells their number."""
    pytest.importorskip("av")  # which reads it
    path = place / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(50):
        writer.write(np.full((48, 64, 3), 5 * number, np.uint8))
    writer.release()
    return path


def numbers(frames: Frames) -> list[int]:
    """The frames' numbers, read off their pixels."""
    found = list(frames)
    seen = [round(frame.image.mean() / 5) for frame in found]
    assert [frame.number for frame in found] == seen
    assert all(frame.image.dtype == np.uint8 and frame.decode_ms >= 0 for frame in found)
    return seen


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (Selection(), range(50)),
        (Selection(every=7), range(0, 50, 7)),
        (Selection(start_s=1.0, end_s=2.0), range(10, 20)),
        (Selection(start_s=1.05, every=3), range(11, 50, 3)),
        (Selection(max_frames=4, every=2), range(0, 8, 2)),
        (Selection(start_s=4.5), range(45, 50)),
        (Selection(end_s=99), range(50)),
        (Selection(start_s=5), range(0)),
    ],
)
def test_selection(clip: Path, select: Selection, expected: range) -> None:
    frames = Frames(video_source(clip), select)
    assert frames.expected == pytest.approx(len(expected), abs=1)
    assert frames.rate == 10 / select.every
    assert numbers(frames) == list(expected)


def test_times(clip: Path) -> None:
    frames = list(Frames(video_source(clip), Selection(every=10)))
    assert [frame.time_s for frame in frames] == pytest.approx([0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": 0}, "every and max_frames must be at least 1, got 0 and None"),
        ({"max_frames": 0}, "must be at least 1, got 1 and 0"),
        ({"start_s": -1}, "expected 0 ≤ start < end, in seconds, got -1 and None"),
        ({"start_s": 2, "end_s": 2}, "got 2 and 2"),
        ({"start_s": float("nan")}, "got nan and None"),
        ({"start_s": float("inf")}, "got inf and None"),
        ({"end_s": float("inf")}, "got 0.0 and inf"),
        ({"end_s": float("nan")}, "got 0.0 and nan"),
        ({"rate": 0}, "rate must be over 0 and under 1000, got 0"),
    ],
)
def test_selections_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**values)


def raw(monkeypatch: pytest.MonkeyPatch, data: bytes, **values: object) -> Frames:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    (source,) = find_sources(["-"], Path("out"), raw=True).sources
    assert source.is_video and source.name == "stdin"
    return Frames(source, Selection(raw=(4, 3), **values))


def test_raw_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    frames = list(raw(monkeypatch, pixels.tobytes(), rate=5.0))
    np.testing.assert_array_equal([frame.image for frame in frames], pixels)
    assert [frame.time_s for frame in frames] == [0, 0.2]
    assert list(raw(monkeypatch, b"")) == []
    got = []
    message = "the input ends inside a frame: 1 of 36 bytes; are its frames 4x3"
    with pytest.raises(Ended, match=message):
        for frame in raw(monkeypatch, pixels[0].tobytes() + b"x"):
            got.append(frame)
    assert len(got) == 1
    with pytest.raises(ValueError, match="frames on standard input need their size"):
        Frames(Source(None, "stdin", feed="raw"), Selection())


def test_raw_sizes() -> None:
    assert parse_raw("640x360") == (640, 360)
    for text in ("640", "0x5", "axb", "4x3x3"):
        with pytest.raises(ValueError, match="a size as WIDTHxHEIGHT, such as 640x360, got"):
            parse_raw(text)


def test_numbered_images() -> None:
    Path("shots").mkdir()
    for number in (8, 9, 10, 12):
        image = np.full((4, 6, 3), 5 * number, np.uint8)
        cv2.imwrite(f"shots/a{number:03}.png", image)
    Path("shots/a.png").touch()
    Path("shots/b001.png").touch()
    frames = list(Frames(video_source("shots/a%03d.png"), Selection(rate=2.0)))
    assert [round(frame.image.mean() / 5) for frame in frames] == [8, 9, 10, 12]
    assert [frame.time_s for frame in frames] == [0, 0.5, 1.0, 1.5]
    with pytest.raises(ValueError, match="no file has a name of this pattern"):
        Frames(video_source("shots/c%03d.png"), Selection())
    Path("shots/a9.png").touch()
    with pytest.raises(ValueError, match="a009.png and a9.png are both number 9"):
        Frames(video_source("shots/a%03d.png"), Selection())
    Path("shots/a9.png").unlink()
    Path("shots/a011.png").write_bytes(b"hello")
    got = []
    with pytest.raises(
        Ended, match=r"a011.png: it is not an image .* the frames before that were ranked"
    ):
        for frame in Frames(video_source("shots/a%d.png"), Selection()):
            got.append(frame)
    assert len(got) == 3


@pytest.fixture
def server(place: Path) -> Iterator[str]:
    """Serves the folder over HTTP."""
    pytest.importorskip("av")  # which reads it

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/camera":
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                for number in range(20):
                    data = cv2.imencode(".jpg", np.full((48, 64, 3), 5 * number, np.uint8))[1]
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n")
                    self.wfile.write(b"Content-Length: %d\r\n\r\n%b\r\n" % (len(data), bytes(data)))
                return
            if self.path != "/half.avi":
                return super().do_GET()
            data = (place / "clip.avi").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])  # and the connection is lost

    handler = partial(Quiet, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address(server: str, clip: Path) -> None:
    assert numbers(Frames(video_source(f"{server}/clip.avi"), Selection(every=10)))[:3] == [
        0,
        10,
        20,
    ]
    with pytest.raises(ValueError, match="no answer"):
        Frames(video_source(f"{server}/none.mp4"), Selection())


def test_an_address_whose_connection_is_lost(server: str, clip: Path) -> None:
    got = []
    with pytest.raises(Ended, match=r"it ends after \d+ of the 50 frames it declares"):
        for frame in Frames(video_source(f"{server}/half.avi"), Selection()):
            got.append(round(frame.image.mean() / 5))
    assert 5 < len(got) < 35 and got == list(range(len(got)))


def test_an_http_camera_that_dies(server: str) -> None:
    got = []
    with pytest.raises(Ended, match="the stream stopped after 20 frames; they were ranked"):
        for frame in Frames(video_source(f"{server}/camera"), Selection()):
            got.append(round(frame.image.mean() / 5))
    assert got == list(range(20))


@pytest.fixture
def transport_stream(place: Path) -> bytes:
    """50 frames as in `clip`, as network cameras send them."""
    pytest.importorskip("av")  # which reads it
    path = str(place / "clip.ts")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 48))
    for number in range(50):
        writer.write(np.full((48, 64, 3), 5 * number, np.uint8))
    writer.release()
    return Path(path).read_bytes()


@pytest.mark.parametrize("hangs", [False, True])
def test_a_network_camera_that_dies(
    transport_stream: bytes, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real RTSP: the connection is closed, or stays open and nothing comes."""
    monkeypatch.setattr("dsgnn.runtime.video.container.TIMEOUT_S", 2.0)
    with camera(transport_stream, hangs) as address:
        frames = Frames(video_source(f"rtsp://me:secret@{address}/live"), Selection())
        assert (frames.rate, frames.expected) == (25, 0)
        got = []
        with pytest.raises(Ended, match=r"the stream stopped after \d+ frames; they were ranked"):
            for frame in frames:
                got.append(round(frame.image.mean() / 5))
    assert len(got) > 40 and got == sorted(got)


class Camera:
    """An OpenCV capture that gives two frames and dies."""

    def __init__(self, index: int) -> None:
        assert index == 3
        self.left = 2

    def isOpened(self) -> bool:
        return True

    def get(self, what: int) -> float:
        return -1.0

    def grab(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.zeros((4, 6, 3), np.uint8)

    def release(self) -> None:
        self.left = -1


def test_a_camera_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsgnn.runtime.video.frames.cv2.VideoCapture", Camera)
    frames = Frames(video_source(3), Selection())
    assert frames.expected == 0 and frames.rate == 25
    got = []
    with pytest.raises(Ended, match="the stream stopped after 2 frames; they were ranked"):
        for frame in frames:
            got.append(frame)
    assert len(got) == 2
    assert len(list(Frames(video_source(3), Selection(max_frames=2)))) == 2


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no such camera, or another program uses it"):
        Frames(video_source(99), Selection())


def test_no_video_file() -> None:
    with pytest.raises(FileNotFoundError, match="there is no video file missing.mp4"):
        video_source("missing.mp4")
