"""Which stream of a file is ranked, what becomes of its sound, and that a file is known by its
content, whatever its name."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from films import FENCED, film, flat, greys, lines, read, seen, summary
from outputs import runs

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.sources import Source, find_sources, video_source
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.run.loop import Outcome
from dsgnn.runtime.video.frames import Frames, Selection

av = pytest.importorskip("av")


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def go(ranker: Ranker) -> Callable[..., list[Outcome]]:
    return runs(ranker)


def two_films(name: str, first: dict, second: dict, container: str | None = None) -> None:
    """A file with two video streams: size, and what else `prepare` does to each."""
    with av.open(name, "w", format=container) as out:
        streams = []
        for facts in (first, second):
            stream = out.add_stream(facts.get("codec", "libx264"), rate=10)
            stream.width, stream.height = facts["size"]
            stream.pix_fmt = facts.get("pix_fmt", "yuv420p")
            stream.disposition = facts.get("disposition", 0)
            streams.append(stream)
        for stream, facts in zip(streams, (first, second), strict=True):
            for number, picture in enumerate(facts["pictures"]):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "marked"),
    [("clip.mp4", True), ("clip.mp4", False), ("clip.mov", False), ("clip.avi", False)],
)
def test_a_cover_before_the_film(name: str, marked: bool, go) -> None:
    """A stream of one picture. MP4 writes one that is marked as a cover behind the film."""
    from av.stream import Disposition

    cover = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "size": (200, 200)}
    cover |= {"pictures": [flat(250, (200, 200))]}
    cover |= {"disposition": Disposition.attached_pic} if marked else {}
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    two_films(name, cover, {"codec": codec, "size": (64, 48), "pictures": greys(11)})
    with av.open(name) as container:
        widths = [stream.width for stream in container.streams.video]
        assert sorted(widths) == [64, 200] and (marked or widths[0] == 200)
    assert seen(read(name)) == list(range(11))
    assert not any(outcome.note for outcome in go(name))  # there was no choice


@pytest.mark.parametrize("default", [True, False])
def test_the_default_stream_or_the_largest(default: bool, go) -> None:
    from av.stream import Disposition

    small = {"size": (32, 24), "pictures": [flat(250, (32, 24))] * 11}
    large = {"size": (64, 48), "pictures": greys(11)}
    if default:
        large, small = small | {"disposition": Disposition.default}, large
        two_films("clip.mkv", small, large)
        assert {frame.image.shape for frame in read("clip.mkv")} == {(24, 32, 3)}
        said = "it has 2 video streams: stream 1, of 32×24 pixels, was ranked"
    else:
        two_films("clip.mkv", small, large)
        assert seen(read("clip.mkv")) == list(range(11))
        said = "it has 2 video streams: stream 1, of 64×48 pixels, was ranked"
    assert [outcome.note for outcome in go("clip.mkv") if outcome.note] == [said]
    assert summary("clip")["notes"] == [said]


def tagged(sound: bytes, picture: bytes) -> bytes:
    """MP3 with a cover picture in front (ID3 2.3)."""
    body = b"\0image/png\0\x03\0" + picture
    entry = b"APIC" + struct.pack(">IH", len(body), 0) + body
    size = len(entry)
    seven = bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + seven + entry + sound


def sound_file(name: str, codec: str) -> bytes:
    from films import tone_of

    with av.open(name, "w") as out:
        stream = out.add_stream(codec, rate=48_000)
        tone = tone_of(1.0)
        for at in range(0, tone.shape[1], 1024):
            part = np.ascontiguousarray(tone[:, at : at + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, at, Fraction(1, 48_000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return Path(name).read_bytes()


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.wav", "pcm_s16le"), ("a.flac", "flac")),
        *(("a.ogg", "libopus"), ("a.mka", "libopus"), ("a.mp4", "aac"), ("a.aac", "aac")),
    ],
)
def test_sound_is_not_called_damaged(name: str, codec: str, go) -> None:
    sound_file(name, codec)
    (failed,) = go(name)
    assert failed.error == "it holds sound and no video"


def test_sound_with_a_cover_is_no_video(go) -> None:
    sound = sound_file("a.mp3", "libmp3lame")
    cover = cv2.imencode(".png", flat(200, (64, 64)))[1].tobytes()
    Path("a.mp3").write_bytes(tagged(sound, cover))
    (failed,) = go("a.mp3")
    assert failed.error == "it holds sound with a cover picture and no video"


# Sound in the annotated copy


def sound_of(path: str) -> tuple[list[bytes], list[float]]:
    """The packets of the sound, and when each begins."""
    with av.open(path) as container:
        if not container.streams.audio:
            return [], []
        packets = [p for p in container.demux(container.streams.audio[0]) if p.dts is not None]
        return [bytes(p) for p in packets], [float(p.pts * p.time_base) for p in packets]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("clip.mp4", "aac"),
        ("clip.mkv", "libopus"),
        ("clip.mov", "pcm_s16le"),
        ("clip.ts", "aac"),
        ("clip.mkv", "flac"),
    ],
)
def test_the_annotated_copy_has_the_sound(name: str, codec: str, go) -> None:
    film(name, greys(11), sound_s=2.5, sound_codec=codec)
    go(name, kinds=("overlay", "map"))
    wanted, begins = sound_of(name)
    packets, copied_at = sound_of("out/clip.overlay.mp4")
    if name.endswith("ts"):
        wanted = [packet[7:] for packet in wanted]  # without the header that MP4 does not need
    with av.open(name) as container:
        origin = max(0.0, (container.start_time or 0) / 1e6)
    assert packets == wanted
    at = [time - origin for time in begins]
    if codec != "pcm_s16le":
        np.testing.assert_allclose(copied_at, at, atol=2e-3)
    assert sound_of("out/clip.map.mp4") == ([], [])


def test_the_sound_of_a_part(go) -> None:
    film("clip.mp4", greys(11) * 3, sound_s=3.3)
    wanted, begins = sound_of("clip.mp4")
    go("clip.mp4", kinds=("overlay",), select=Selection(start_s=1.0, end_s=2.0))
    packets, at = sound_of("out/clip.overlay.mp4")
    first = next(number for number, time in enumerate(begins) if time >= 1.0)
    assert packets == wanted[first : first + len(packets)]
    assert at[0] == pytest.approx(begins[first] - 1, abs=1e-3) and 0.95 < at[-1] < 1.0
    go("clip.mp4", kinds=("overlay",), select=Selection(max_frames=5))
    assert 0.45 < sound_of("out/clip.overlay.mp4")[1][-1] < 0.5


def test_sound_that_an_mp4_cannot_hold_is_told(go) -> None:
    film("clip.avi", greys(11), codec="mpeg4", sound_s=1.1, sound_codec="adpcm_ms")
    notes = [outcome.note for outcome in go("clip.avi", kinds=("overlay", "json")) if outcome.note]
    assert notes == ["its sound (adpcm_ms) is left out: an MP4 cannot hold it as it is"]
    assert summary("clip")["notes"] == notes
    assert sound_of("out/clip.overlay.mp4") == ([], [])


# By content


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("clip.mxf", "mpeg2video", "mxf"),
        ("clip.vob", "mpeg2video", "vob"),
        ("clip.asf", "mpeg4", "asf"),
        ("clip.3g2", "libx264", "3g2"),
        ("clip.f4v", "libx264", "f4v"),
        ("clip.h264", "libx264", "h264"),
        ("clip.hevc", "libx265", "hevc"),
        ("clip.dat", "libx264", "mp4"),
        ("clip", "libx264", "matroska"),
        ("clip.jpg", "libx264", "mp4"),
        ("clip.bin", "mpeg4", "avi"),
        ("clip.rec", "libx264", "mpegts"),
        ("clip.x", "mpeg1video", "mpeg1video"),
        ("clip.flv", "flv", "flv"),
        ("clip.cam", "flv", "flv"),
        ("clip.y4m", "wrapped_avframe", "yuv4mpegpipe"),
        ("clip.ivf", "libvpx", "ivf"),
        ("clip.nut", "ffv1", "nut"),
    ],
)
def test_videos_are_told_by_content(name: str, codec: str, container: str) -> None:
    rate = 25 if container in ("mxf", "vob", "mpeg1video") else 10
    coding = {"x265-params": "log-level=none"} if codec == "libx265" else {"b": "2M"}
    film(name, greys(11), codec=codec, container=container, rate=rate, coding=coding)
    (source,) = find_sources([name], Path("out")).sources
    assert source.is_video
    assert seen(list(Frames(source, Selection(), FENCED))) == list(range(11))


class Piped(io.RawIOBase):
    """Standard input that is a pipe."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        part = self._data.read(min(len(buffer), 4096))
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("piped", [True, False])
@pytest.mark.parametrize("name", ["clip.mp4", "front.mp4", "clip.mkv", "clip.ts", "clip.avi"])
def test_a_video_on_standard_input(
    name: str, piped: bool, go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an MP4 whose index comes last."""
    options = {"movflags": "faststart"} if name == "front.mp4" else {}
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = film(name, greys(11), codec=codec, options=options)
    stream = io.BufferedReader(Piped(path.read_bytes())) if piped else path.open("rb")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    outcomes = go("-")
    assert [outcome.error for outcome in outcomes] == [""] * 11
    assert [line["time_s"] for line in lines("stdin")] == [number / 10 for number in range(11)]


@pytest.mark.parametrize("piped", [True, False])
def test_the_command_ranks_a_video_on_standard_input(piped: bool, model: Path) -> None:
    clip = film("clip.mp4", greys(5))
    command = [Path(sys.executable).with_name("dsgnn-run"), "-", "--out", "out", "--model", model]
    given: dict[str, Any] = {"input": clip.read_bytes()} if piped else {"stdin": clip.open("rb")}
    done = subprocess.run([*command, "--save", "json"], capture_output=True, **given)
    assert done.returncode == 0, done.stderr.decode()
    assert len(lines("stdin")) == 5


def test_a_photo_on_standard_input_is_a_photo(
    go, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cv2.imencode(".png", photo)[1].tobytes()
    stream = io.BufferedReader(Piped(data))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    assert [outcome.error for outcome in go("-")] == [""]
    assert len(json.loads(Path("out/results.json").read_text())["images"]) == 1


def test_what_is_neither(go) -> None:
    Path("clip.xyz").write_bytes(b"hello")
    Path("clip.mp4").write_bytes(b"hello")
    one, two = go("clip.xyz", "clip.mp4")
    assert one.error.startswith("it is not an image")
    assert two.error.startswith("no frame can be read: it is damaged or cut short, or no video")


# Without PyAV


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.gif", "http://127.0.0.1:9/a.mp4"])
def test_without_pyav_the_remedy_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not name.startswith("http"):
        film("clip.mp4", greys(3))
        film("clip.avi", greys(3), codec="mpeg4")
        film("clip.gif", greys(3), codec="gif", pix_fmt="rgb8")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"needs PyAV.*pip install 'dsgnn\[video\]'"):
        Frames(video_source(name), Selection())


def test_a_source_is_told_by_its_path(tmp_path: Path) -> None:
    """A file that is not there is what its suffix says."""
    assert Source(tmp_path / "a.MP4", "a.MP4").is_video
    assert not Source(tmp_path / "a.jpg", "a.jpg").is_video
