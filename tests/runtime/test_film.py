"""Videos as they really are: the right times, stream and picture, or an error that says what is
wrong. Each file is made here, with a grey in each frame that tells its number."""

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
from films import film, flat

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import Source, find_sources, video_source
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.run.loop import Outcome, rank_sources
from dsgnn.runtime.video.frames import Frame, Frames, Selection
from dsgnn.runtime.video.to_files import VideoOptions

av = pytest.importorskip("av")

FENCED = 10_000_000  # pixels: films are read in a process of their own here
STEP = 20  # greys from one frame to the next
UNEVEN_MS = (0, 100, 667, 700, 1500, 2600)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def greys(count: int, size: tuple[int, int] = (64, 48)) -> list[np.ndarray]:
    return [flat(20 + STEP * number, size) for number in range(count)]


def read(path: str | Path, **select: Any) -> list[Frame]:
    return list(Frames(video_source(path), Selection(**select), FENCED))


def seen(frames: list[Frame]) -> list[int]:
    """The numbers of the frames, as their pixels tell them."""
    assert all(np.ptp(frame.image.astype(int)) < 8 for frame in frames)
    return [round((float(frame.image.mean()) - 20) / STEP) for frame in frames]


def times(frames: list[Frame]) -> list[float]:
    return [round(frame.time_s, 3) for frame in frames]


@pytest.fixture
def go(ranker: Ranker) -> Callable[..., list[Outcome]]:
    def rank(*arguments: str, kinds=("json",), **options: object) -> list[Outcome]:
        make_folder(Path("out"))
        found = find_sources(arguments, Path("out"))
        video = VideoOptions(**options)
        return list(rank_sources(ranker, found.sources, Path("out"), kinds, "assr", video))

    return rank


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"out/{name}.frames.jsonl").read_text().splitlines()]


def summary(name: str) -> dict:
    return json.loads(Path(f"out/{name}.summary.json").read_text())


# 1. Interlaced

INTERLACED = {
    "clip.mp4": ("libx264", "yuv420p", {"x264-params": "interlaced=1"}, (64, 48)),
    "clip.mpg": ("mpeg2video", "yuv420p", {"flags": "+ildct+ilme"}, (64, 48)),
    "clip.mov": ("prores_ks", "yuv422p10le", {"flags": "+ildct"}, (64, 48)),
    "clip.dv": ("dvvideo", "yuv420p", {}, (720, 576)),
    "clip.avi": ("mpeg4", "yuv420p", {"flags": "+ildct+ilme"}, (64, 48)),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_frames_are_theirs(name: str) -> None:
    """OpenCV gives memory that it has not filled."""
    codec, pix_fmt, coding, size = INTERLACED[name]
    film(name, greys(10, size), codec=codec, pix_fmt=pix_fmt, coding=coding, rate=25)
    with av.open(name) as container:
        assert next(container.decode(video=0)).interlaced_frame
    film("other.mp4", [flat(255, size)] * 10, rate=25)
    read("other.mp4")  # what is left of it in memory must not be seen
    frames = read(name)
    assert seen(frames) == list(range(10))
    assert times(frames) == [round(number / 25, 3) for number in range(10)]


def test_the_two_fields_are_not_left_as_a_comb() -> None:
    """A box that moves between the fields: its edge is straight afterwards."""
    pictures = []
    for number in range(8):
        picture = flat(40, (128, 96))
        picture[24:72:2, 8 + 10 * number : 40 + 10 * number] = 220
        picture[25:73:2, 13 + 10 * number : 45 + 10 * number] = 220
        pictures.append(picture)
    film("clip.mp4", pictures, coding={"x264-params": "interlaced=1", "crf": "4"})
    image = read("clip.mp4")[4].image[30:66].astype(int)
    combed = np.abs(pictures[4][30:66].astype(int)[1:] - pictures[4][30:66].astype(int)[:-1]).mean()
    assert np.abs(image[1:] - image[:-1]).mean() < combed / 3


# 2. Variable frame rate


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.mov", "clip.webm"])
def test_times_are_those_of_presentation(name: str, go) -> None:
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    film(name, greys(6), UNEVEN_MS, codec=codec)
    expected = [ms / 1000 for ms in UNEVEN_MS]
    frames = read(name)
    assert (times(frames), seen(frames)) == (expected, list(range(6)))
    assert seen(read(name, start_s=0.5, end_s=1.5)) == [2, 3]
    assert [frame.number for frame in read(name, start_s=0.7)] == [3, 4, 5]
    go(name)
    assert [line["time_s"] for line in lines("clip")] == pytest.approx(expected, abs=1e-3)
    assert 2.6 <= summary("clip")["seconds"] < 3.8  # the last one counts for its own duration


def test_the_time_at_rank_1_is_true(go, scene) -> None:
    """A red box alone, and from 1.5 s on a larger blue one, in frames of uneven length."""
    film(
        "clip.mp4",
        [
            scene(48, 64, red=(2, 2, 20, 20), **({"blue": (18, 4, 44, 54)} if ms >= 1500 else {}))
            for ms in (0, 100, 200, 900, 1500, 1700, 1800, 3500)
        ],
        (0, 100, 200, 900, 1500, 1700, 1800, 3500),
        coding={"crf": "4"},
    )
    go("clip.mp4")
    objects = {item["identity"]: item for item in summary("clip")["objects"]}
    assert objects[1]["rank_1_s"] == pytest.approx(1.7, abs=0.01)  # blue has been there for 0.1 s
    assert objects[1]["rank_1_s"] + objects[2]["rank_1_s"] == pytest.approx(
        summary("clip")["seconds"]
    )


def test_the_annotated_copy_keeps_the_times(go) -> None:
    film("clip.mkv", greys(6), UNEVEN_MS)
    go("clip.mkv", kinds=("overlay", "map", "json"))
    for name in ("overlay", "map"):
        with av.open(f"out/clip.{name}.mp4") as container:
            shown = [float(frame.time) for frame in container.decode(video=0)]
        assert shown == pytest.approx([ms / 1000 for ms in UNEVEN_MS], abs=1e-3)


def test_a_start_is_not_reached_by_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 frames the 390th: only its group of pictures is decoded, and the number is right."""
    from dsgnn.runtime.video.film import Film

    pictures = [flat(20 + number // 2) for number in range(400)]
    film("clip.mp4", pictures, coding={"g": "20", "bf": "2", "crf": "10"})
    decoded, pictures_of = [], Film._pictures

    def count(self, packet):
        decoded.append(packet)
        return pictures_of(self, packet)

    monkeypatch.setattr(Film, "_pictures", count)
    frames = list(Frames(video_source("clip.mp4"), Selection(start_s=39.0)))  # in this process
    assert [frame.number for frame in frames] == list(range(390, 400))
    assert times(frames) == [round(39 + number / 10, 3) for number in range(10)]
    assert [float(frame.image.mean()) - 20 for frame in frames] == pytest.approx(
        [number // 2 for number in range(390, 400)], abs=2
    )
    assert 10 <= len(decoded) <= 42


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("clip.mp4", "libx264"), ("clip.mkv", "libx264"), ("clip.ts", "libx264")),
        *(("clip.avi", "mpeg4"), ("clip.avi", "libx264"), ("clip.asf", "mpeg4")),
        ("clip.mpg", "mpeg2video"),
    ],
)
def test_any_start_gives_the_frames_from_that_time_on(name: str, codec: str) -> None:
    """In frames of uneven length where the file can hold them; with frames that are decoded in
    another order than they are shown, of which AVI and ASF do not tell when they are shown."""
    even = name[-3:] in ("avi", "asf", "mpg")
    steps = (40, 40, 40) if even else (40, 100, 350)
    at_ms = [sum(steps) * (number // 3) + sum(steps[: number % 3]) for number in range(33)]
    coding = {"g": "7", "bf": "2", "x264-params": "open-gop=1"}
    film(name, greys(11) * 3, None if even else at_ms, codec=codec, rate=25, coding=coding)
    whole = read(name)
    assert times(whole) == [ms / 1000 for ms in at_ms]
    for start_ms in [at + later for at in at_ms for later in (0, 17)]:
        some = read(name, start_s=start_ms / 1000)
        expected = [number for number, at in enumerate(at_ms) if at >= start_ms]
        assert [frame.number for frame in some] == expected
        for frame in some:
            assert frame.time_s == pytest.approx(at_ms[frame.number] / 1000, abs=1e-3)
            assert np.abs(frame.image.astype(int) - whole[frame.number].image).max() <= 3


# 3. What is complete, and what is cut short


def copied(path: str, name: str, shift: int = 0, **options: str) -> Path:
    """A stream copy with its times `shift` frames later."""
    with av.open(path) as source, av.open(name, "w", options=options) as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is None:
                continue
            later = round(shift * packet.duration)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    return Path(name)


def test_an_edit_list(go) -> None:
    """A cut without encoding anew: what comes before it is in the file, and is not shown."""
    film("whole.mp4", greys(11), coding={"g": "20"})
    copied("whole.mp4", "clip.mp4", shift=-4)
    with av.open("clip.mp4") as container:
        assert container.streams.video[0].frames == 11
    assert seen(read("clip.mp4")) == list(range(4, 11))
    assert not any(outcome.error for outcome in go("clip.mp4"))
    assert summary("clip")["complete"] is True


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.mov", "clip.ts"])
def test_sound_longer_than_the_picture(name: str, go) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    sound = "pcm_s16le" if name.endswith("avi") else "aac"
    film(name, greys(11), codec=codec, sound_s=4, sound_codec=sound)
    assert seen(read(name)) == list(range(11))
    assert not any(outcome.error for outcome in go(name))
    assert summary("clip")["complete"] is True


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts", "clip.mov"])
def test_times_that_do_not_start_at_0(name: str, go) -> None:
    film("whole.mp4", greys(11))
    copied("whole.mp4", name, shift=200)
    frames = read(name)
    assert (seen(frames), times(frames)[0], times(frames)[-1]) == (list(range(11)), 0, 1)
    assert not any(outcome.error for outcome in go(name))


@pytest.mark.parametrize("name", ["clip.mpg", "clip.ts"])
def test_a_beginning_that_is_no_whole_microsecond(name: str) -> None:
    rate = Fraction(30_000, 1001)
    film(name, greys(11), codec="mpeg2video", rate=rate)
    frames = read(name)
    assert (seen(frames), frames[0].time_s) == (list(range(11)), 0)
    assert seen(read(name, start_s=3 / rate)) == list(range(3, 11))


@pytest.mark.parametrize("name", ["clip.gif", "clip.png"])
def test_an_animation_cut_short_is_told(name: str, go) -> None:
    animation(name)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(0.7 * len(data))])
    *ranked, failed = go(name)
    assert "it is cut short or damaged" in failed.error and ranked


def test_a_stream_without_its_beginning(go) -> None:
    data = film("whole.ts", greys(11), coding={"g": "100"}).read_bytes()
    Path("clip.ts").write_bytes(data[-188 * 6 :])
    (failed,) = go("clip.ts")
    assert "it is damaged" in failed.error


def test_a_last_frame_that_is_shown_for_long(go) -> None:
    """ASF declares a duration that no packet reaches."""
    film("clip.asf", greys(6), (0, 100, 200, 300, 400, 900), codec="mpeg4")
    assert (seen(read("clip.asf")), times(read("clip.asf"))[-1]) == (list(range(6)), 0.9)
    assert not any(outcome.error for outcome in go("clip.asf"))
    assert summary("clip")["complete"] is True


@pytest.mark.parametrize("live", ["0", "1"])
@pytest.mark.parametrize("name", ["clip.mkv", "clip.webm"])
def test_matroska_without_counts(name: str, live: str, go) -> None:
    """It tells no number of frames, and duration × rate is far from it. live: as a pipe gets it,
    with no duration and no index either."""
    codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
    film(name, greys(6), UNEVEN_MS, codec=codec, options={"live": live})
    assert seen(read(name)) == list(range(6))
    assert not any(outcome.error for outcome in go(name))
    assert summary("clip")["complete"] is True


@pytest.mark.parametrize(
    "name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.webm", "clip.mov", "clip.asf"]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_what_is_cut_short_is_told(name: str, share: float, go) -> None:
    codecs = {"avi": "mjpeg", "webm": "libvpx-vp9", "asf": "mpeg4"}
    codec = codecs.get(name.partition(".")[2], "libx264")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), np.uint8)
    options = {"movflags": "faststart"} if name[-3:] in ("mp4", "mov") else {}
    fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    film(name, noise, codec=codec, pix_fmt=fmt, options=options, coding={"g": "5"}, sound_s=0)
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(share * len(data))])
    *ranked, failed = go(name)
    assert "it is cut short or damaged; the frames that could be read were ranked" in failed.error
    assert 40 * share - 10 < len(ranked) < 40
    assert summary("clip")["complete"] is False


def test_an_mp4_without_its_index(go) -> None:
    film("clip.mp4", greys(11))
    data = Path("clip.mp4").read_bytes()
    Path("clip.mp4").write_bytes(data[: data.index(b"moov") - 4])
    (failed,) = go("clip.mp4")
    assert failed.error.startswith("no frame can be read: it is damaged or cut short")


def test_damage_in_the_middle_is_told(go) -> None:
    film("clip.mov", greys(11), codec="png", pix_fmt="rgb24")
    data = bytearray(Path("clip.mov").read_bytes())
    at = [i for i in range(len(data)) if data[i : i + 4] == b"\x89PNG"][5]
    data[at : at + 40] = bytes(40)
    Path("clip.mov").write_bytes(data)
    *ranked, failed = go("clip.mov")
    assert [line["time_s"] for line in lines("clip")] == [n / 10 for n in range(11) if n != 5]
    assert failed.error == (
        "1 of its packets could not be decoded, so it is damaged; the other frames were ranked"
    )


def test_what_the_decoder_made_up_is_told(go) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)
    film("clip.mp4", noise, coding={"bf": "0"})
    data = bytearray(Path("clip.mp4").read_bytes())
    middle = data.index(b"mdat") + len(data) // 2
    data[middle : middle + 200] = bytes(200)
    Path("clip.mp4").write_bytes(data)
    outcomes = go("clip.mp4")
    said = [outcome.note for outcome in outcomes if outcome.note]
    assert len(said) == 1 and "damaged frames, which were ranked as they look: " in said[0]


# 4. Several streams, and sound


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


# 5. Transparency


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("clip.mov", "prores_ks", "yuva444p10le"),
        ("clip.mov", "png", "rgba"),
        ("clip.mov", "qtrle", "argb"),
        ("clip.webm", "libvpx-vp9", "yuva420p"),
        ("clip.webm", "libvpx", "yuva420p"),
        ("clip.mkv", "ffv1", "yuva420p"),
    ],
)
def test_what_is_transparent_is_white(name: str, codec: str, pix_fmt: str) -> None:
    picture = np.full((48, 64, 4), (10, 10, 200, 255), np.uint8)
    picture[:, :32] = (230, 20, 20, 0)  # hidden red
    picture[24:, 32:, 3] = 128
    coding = {"auto-alt-ref": "0", "crf": "4", "b": "2M"} if "vpx" in codec else {}
    film(name, [picture] * 4, codec=codec, pix_fmt=pix_fmt, coding=coding)
    image = read(name)[3].image
    np.testing.assert_allclose(image[12, 8], (255, 255, 255), atol=6)
    np.testing.assert_allclose(image[12, 52], (10, 10, 200), atol=14)
    np.testing.assert_allclose(image[40, 52], (132, 132, 228), atol=14)


# 6. Pixels that are not square


@pytest.mark.parametrize(("aspect", "width"), [((2, 1), 128), ((16, 15), 68), ((8, 9), 57)])
def test_pixels_become_square(aspect: tuple[int, int], width: int, go) -> None:
    def prepare(stream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(*aspect)

    film("clip.mp4", greys(3), prepare=prepare)
    assert {frame.image.shape for frame in read("clip.mp4")} == {(48, width, 3)}
    go("clip.mp4", kinds=("overlay", "json"))
    assert (lines("clip")[0]["width"], lines("clip")[0]["height"]) == (width, 48)
    with av.open("out/clip.overlay.mp4") as container:
        assert container.streams.video[0].width == width + width % 2


# 7. Sound


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


# 8. Animations


def animation(name: str) -> None:
    """Ten pictures, the first of which is empty, by OpenCV; each 100 ms."""
    pictures = [np.zeros((48, 64, 4), np.uint8)]
    pictures += [np.dstack([flat(20 + STEP * n), flat(255)[..., :1]]) for n in range(1, 10)]
    shown = cv2.Animation()
    shown.frames, shown.durations = pictures, [100] * 10
    assert cv2.imwriteanimation(name, shown)


@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.webp"])
def test_animations_are_videos(name: str, go) -> None:
    animation(name)
    frames = read(name)
    assert times(frames) == [round(number / 10, 1) for number in range(10)]
    levels = [float(np.median(frame.image)) for frame in frames[1:]]
    np.testing.assert_allclose(levels, 20 + STEP * np.arange(1, 10), atol=20)  # GIF has few colours
    assert frames[0].image.min() > 250  # transparent
    assert len(go(name)) == 10
    assert len(lines("clip")) == 10


@pytest.mark.parametrize("name", ["photo.gif", "photo.png", "photo.webp"])
def test_one_picture_is_a_photo(name: str, photo: np.ndarray, go) -> None:
    cv2.imwrite(name, photo)
    go(name)
    assert len(json.loads(Path("out/results.json").read_text())["images"]) == 1


# 9. By content


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


# 10. What was right before


@pytest.mark.parametrize("curve", [16, 18])
def test_high_dynamic_range_is_not_washed_out(curve: int) -> None:
    """PQ and HLG in BT.2020: black, a grey and a red keep near to where a screen shows them."""

    def code(linear: float) -> int:
        """A share of 203 nits (diffuse white) in 10 bits of full RGB."""
        if curve == 16:
            m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
            power = (linear * 203 / 10_000) ** m1
            value = ((c1 + c2 * power) / (1 + c3 * power)) ** m2
        else:
            scene = linear * 0.265  # 75% HLG is diffuse white
            value = (
                (3 * scene) ** 0.5
                if scene <= 1 / 12
                else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073
            )
        return round(1023 * value)

    def frame_of(form: Any) -> None:
        form.color_trc, form.color_primaries, form.colorspace = curve, 9, 9

    def prepare(stream) -> None:
        codec = stream.codec_context
        codec.color_trc, codec.color_primaries, codec.colorspace = curve, 9, 9

    with av.open("clip.mp4", "w") as out:
        coding = {"x265-params": "log-level=none:lossless=1"}
        stream = out.add_stream("libx265", rate=10, options=coding)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p10le"
        prepare(stream)
        for _ in range(3):
            frame = av.VideoFrame(64, 48, "yuv444p10le")
            # Luma alone: grey, in limited range; dark on the left, mid grey on the right.
            luma = np.full((48, 64), 64, np.uint16)
            luma[:, 32:] = round(64 + 876 * code(0.18) / 1023)
            for plane, values in zip(frame.planes, (luma, 512, 512), strict=True):
                full = np.broadcast_to(np.uint16(values), (48, 64))
                padded = np.zeros((48, plane.line_size // 2), np.uint16)
                padded[:, :64] = full
                plane.update(padded.tobytes())
            frame_of(frame)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    image = read("clip.mp4")[0].image
    assert image[24, 8].max() <= 12
    # 18% grey of diffuse white is 118 in sRGB and 104 in BT.709's curve.
    assert 90 <= image[24, 56].mean() <= 140
    assert np.ptp(image[24, 56].astype(int)) <= 3


def test_ten_bits() -> None:
    film("clip.mp4", greys(11), codec="libx264", pix_fmt="yuv420p10le")
    assert seen(read("clip.mp4")) == list(range(11))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation(degrees: int, mirrored: bool) -> None:
    """As players show it: FFmpeg's display matrix turns anticlockwise by the given degrees, and
    then mirrors."""
    picture = flat(40)
    picture[:24, :32], picture[:24, 32:] = (230, 20, 20), (20, 230, 20)

    def prepare(stream) -> None:
        stream.set_display_rotation(degrees, hflip=mirrored)

    film("clip.mp4", [picture] * 3, prepare=prepare, coding={"crf": "4"})
    expected = np.rot90(picture, degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    image = read("clip.mp4")[0].image
    assert image.shape == expected.shape
    inner = np.abs(image.astype(int) - expected)
    assert np.median(inner) <= 4 and inner.mean() < 12


def test_odd_sizes() -> None:
    film("clip.mp4", greys(5, (63, 47)), pix_fmt="yuv444p")
    frames = read("clip.mp4")
    assert seen(frames) == list(range(5)) and frames[0].image.shape == (47, 63, 3)


def test_one_frame(go) -> None:
    film("clip.mp4", greys(1))
    assert seen(read("clip.mp4")) == [0]
    go("clip.mp4")
    assert summary("clip")["seconds"] == pytest.approx(0.1)


def test_a_very_long_group_of_pictures() -> None:
    film("clip.mp4", [flat(20 + n // 3) for n in range(600)], coding={"g": "100000", "crf": "10"})
    frames = read("clip.mp4", start_s=59.5)
    assert [frame.number for frame in frames] == [595, 596, 597, 598, 599]
    assert frames[0].image.mean() == pytest.approx(20 + 595 // 3, abs=2)


def test_fragments(go) -> None:
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    film("clip.mp4", greys(11), options=options, coding={"g": "3"})
    frames = read("clip.mp4")
    assert (seen(frames), times(frames)[0]) == (list(range(11)), 0)
    assert not any(outcome.error for outcome in go("clip.mp4"))


def test_a_transport_stream_whose_clock_starts_anew() -> None:
    film("a.ts", greys(11))
    data = Path("a.ts").read_bytes()
    film("b.ts", greys(11)[::-1])
    Path("clip.ts").write_bytes(data + Path("b.ts").read_bytes())
    frames = read("clip.ts")
    assert seen(frames) == [*range(11), *range(10, -1, -1)]
    told = times(frames)
    assert told == sorted(set(told)) and told[-1] == pytest.approx(2.1, abs=0.11)


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
