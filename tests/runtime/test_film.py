"""Videos as they really are: the right times, and what is complete. Each file is made here, with a
grey in each frame that tells its number."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from films import STEP, film, flat, greys, lines, read, seen, summary, times
from outputs import runs

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.sources import video_source
from dsgnn.runtime.run.loop import Outcome
from dsgnn.runtime.video.frames import Frames, Selection

av = pytest.importorskip("av")

UNEVEN_MS = (0, 100, 667, 700, 1500, 2600)


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def go(ranker: Ranker) -> Callable[..., list[Outcome]]:
    return runs(ranker)


# Variable frame rate


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


# What is complete, and what is cut short


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


def test_a_duration_that_no_packet_reaches(go) -> None:
    """ASF declares one, and does not tell how long its last frame is shown."""
    at_ms = [490 * (number // 3) + (0, 40, 140)[number % 3] for number in range(11)]
    film("clip.asf", greys(11), at_ms, codec="mpeg4")
    frames = read("clip.asf")
    assert (seen(frames), times(frames)) == (list(range(11)), [ms / 1000 for ms in at_ms])
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


# Animations


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


# What was right before


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
