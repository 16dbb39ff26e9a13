"""Write H.264 in MP4 through PyAV, which ordinary players and browsers open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np

from dsgnn.runtime.disk.files import ffmpeg_name

MISSING = (
    "PyAV is not installed, so videos are written as MPEG-4 Part 2, which browsers do not play: "
    "pip install 'dsgnn[video]' for H.264"
)
# The quality is constant, and the preset keeps encoding well below the cost of inference.
OPTIONS = {"crf": "20", "preset": "veryfast"}
SLOWEST = 100_000  # seconds per frame; MP4 counts time in a 32-bit fraction
# FFmpeg's numbers for the colour descriptions of H.273.
SMPTE170M, LIMITED, BT709 = 6, 1, 1


def is_installed() -> bool:
    """Whether `h264_writer` can be used."""
    return find_spec("av") is not None


@contextmanager
def h264_writer(
    path: Path, rate: float, size: tuple[int, int]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends (h, w, 3) uint8 RGB frames of `size` (width, height).

    rate: frames per second. The video is yuv420p and has its index in front, so that a browser can
    play it before it has all of it. Both sides of the video are even: where a side of the frames is
    odd, the last row or column is repeated. When the block is left, also by an error, the file is
    finished with the frames it has. Raises OSError if it cannot be written.
    """
    import av

    width, height = size
    try:
        options = {"movflags": "faststart"}
        with av.open(ffmpeg_name(path), "w", format="mp4", options=options) as container:
            exact = Fraction(rate).limit_denominator(SLOWEST) or Fraction(1, SLOWEST)
            stream = container.add_stream("libx264", rate=exact, options=OPTIONS)
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            # Players guess by the size if the file does not say it. FFmpeg converts RGB by BT.601.
            codec = stream.codec_context
            codec.colorspace, codec.color_range = SMPTE170M, LIMITED
            codec.color_primaries = codec.color_trc = BT709

            def write(picture: np.ndarray) -> None:
                if width % 2 or height % 2:
                    odd = (0, height % 2, 0, width % 2)
                    picture = cv2.copyMakeBorder(picture, *odd, cv2.BORDER_REPLICATE)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))

            try:
                yield write
            finally:
                container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror} (writing H.264)") from error
