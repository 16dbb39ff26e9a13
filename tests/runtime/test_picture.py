"""The picture of a frame as it is meant to be seen: deinterlaced, upright, with square pixels, laid
on white, in the range of a screen."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from films import film, flat, greys, lines, read, seen, times
from outputs import runs

from dsgnn.runtime import Ranker
from dsgnn.runtime.run.loop import Outcome

av = pytest.importorskip("av")


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def go(ranker: Ranker) -> Callable[..., list[Outcome]]:
    return runs(ranker)


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


# Transparency


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


# Pixels that are not square


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


# What was right before


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
