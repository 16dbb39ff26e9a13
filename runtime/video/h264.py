"""H.264 in MP4 through PyAV: video that ordinary players and browsers open."""

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
# Constant quality; the preset keeps encoding well below the cost of inference.
OPTIONS = {"crf": "20", "preset": "veryfast"}
SLOWEST = 100_000  # seconds a frame; MP4 counts time in a 32-bit fraction
# FFmpeg's numbers of H.273 colour descriptions.
SMPTE170M, LIMITED, BT709 = 6, 1, 1


def is_installed() -> bool:
    """Whether `h264_writer` can be used."""
    return find_spec("av") is not None


@contextmanager
def h264_writer(
    path: Path, rate: float, size: tuple[int, int]
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends (h, w, 3) uint8 RGB frames of `size` (width, height).

    yuv420p, the index in front (a browser plays before it has everything). Its sides are even: an
    odd one repeats its last row or column. On leaving, on an error too, the file is finished with
    what it has. Raises OSError if that cannot be written.
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
            # Said in the file, or players guess by the size: FFmpeg converts from RGB by BT.601.
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
