"""Write H.264 in MP4 through PyAV, which ordinary players and browsers open, with its sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np

from dsgnn.runtime.disk.files import ffmpeg_name

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.packet import Packet

MISSING = (
    "PyAV is not installed, so videos are written as MPEG-4 Part 2, which browsers do not play, "
    "and without sound: pip install 'dsgnn[video]' for H.264"
)
# The quality is constant, and the preset keeps encoding well below the cost of inference.
OPTIONS = {"crf": "20", "preset": "veryfast"}
TICKS = 90_000  # per second, at least
# FFmpeg's numbers for the colour descriptions of H.273.
SMPTE170M, LIMITED, BT709 = 6, 1, 1


class WriteFrame(Protocol):
    """Appends a frame to a video.

    picture: (h, w, 3) uint8 RGB. time_s: when it is shown, in seconds from the beginning of the
    video; it must grow from frame to frame. duration_s: how long it is shown if it is the last one.
    """

    def __call__(self, picture: np.ndarray, time_s: float, duration_s: float) -> None: ...


class Sound:
    """The sound of a video file, to be copied as it is into a video that is written.

    It is the stream that players take, from `start_s` of the file on; the copy begins at 0 s there.
    end_s: where the copy ends, in its own seconds; None = with the last picture that is written. It
    may be set until the video is finished. note: why the sound is left out; empty if it is not, or
    if there is none.
    """

    def __init__(self, path: Path, start_s: float = 0.0) -> None:
        """Open a file that a video is being read from. Raises InputError if that fails."""
        from dsgnn.runtime.video.container import sound_of

        self.end_s: float | None = None
        self.note = ""
        self._start_s = start_s
        self._source, self._stream, self._origin_s = sound_of(path)
        self._packets = self._shifted()
        self._next = next(self._packets, None)

    def join(self, video: OutputContainer) -> None:
        """Give a video that is about to be written a stream for the sound, if it can hold it."""
        if self._stream is None:
            return
        codec = self._stream.codec_context
        name = codec.codec.canonical_name if codec else "of an unknown kind"
        if name in video.supported_codecs:
            self._copy = video.add_stream_from_template(self._stream)
        else:
            self.note = f"its sound ({name}) is left out: an MP4 cannot hold it as it is"
            self._next = None

    def write_until(self, video: OutputContainer, end_s: float) -> None:
        """Write what begins before `end_s`, in seconds of the copy."""
        while self._next is not None and self._next[0] < end_s:
            _, packet = self._next
            packet.stream = self._copy
            video.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        self._source.close()

    def _shifted(self) -> Iterator[tuple[float, Packet]]:
        """The packets with the times of the copy, and when each begins, in seconds."""
        import av

        if self._stream is None:
            return
        try:
            for packet in self._source.demux(self._stream):
                if packet.dts is None:  # the end
                    continue
                shift = round((self._origin_s + self._start_s) / packet.time_base)
                packet.dts -= shift
                packet.pts = packet.dts if packet.pts is None else packet.pts - shift
                begins_s = float(packet.pts * packet.time_base)
                # What comes before 0 of the whole sound prepares its decoder.
                if not self._start_s or begins_s >= 0:
                    yield begins_s, packet
        except av.FFmpegError:  # the picture breaks off there too, and says so
            return


@contextmanager
def h264_writer(
    path: Path, rate: float, size: tuple[int, int], sound: Sound | None = None
) -> Iterator[WriteFrame]:
    """Give a function that appends frames of `size` (width, height), each with its time.

    rate: frames per second, as far as they are known. sound: what to copy beside the pictures.

    The video is yuv420p and has its index in front, so that a browser can play it before it has all
    of it. Both sides of the video are even: where a side of the frames is odd, the last row or
    column is repeated. When the block is left, also by an error, the file is finished with the
    frames it has. Raises OSError if it cannot be written.
    """
    import av

    width, height = size
    try:
        options = {"movflags": "faststart"}
        with av.open(ffmpeg_name(path), "w", format="mp4", options=options) as container:
            exact = Fraction(rate).limit_denominator(100_000) or Fraction(1, 100_000)
            tick = Fraction(1, exact.numerator * -(-TICKS // exact.numerator))  # seconds
            stream = container.add_stream("libx264", rate=exact, options=OPTIONS)
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            # Players guess by the size if the file does not say it. FFmpeg converts RGB by BT.601.
            codec = stream.codec_context
            codec.time_base = tick  # a frame of this rate is a whole number of them
            codec.colorspace, codec.color_range = SMPTE170M, LIMITED
            codec.color_primaries = codec.color_trc = BT709
            if sound is not None:
                sound.join(container)
            shown_s = 0.0

            def write(picture: np.ndarray, time_s: float, duration_s: float) -> None:
                nonlocal shown_s
                if width % 2 or height % 2:
                    odd = (0, height % 2, 0, width % 2)
                    picture = cv2.copyMakeBorder(picture, *odd, cv2.BORDER_REPLICATE)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.time_base = tick
                frame.pts, frame.duration = round(time_s / tick), round(duration_s / tick)
                container.mux(stream.encode(frame))
                shown_s = time_s + duration_s
                if sound is not None:
                    sound.write_until(container, time_s)

            try:
                yield write
            finally:
                container.mux(stream.encode(None))
                if sound is not None:
                    ends_s = shown_s if sound.end_s is None else sound.end_s
                    sound.write_until(container, ends_s)
    except av.FFmpegError as error:
        raise OSError(error.errno, f"{error.strerror} (writing H.264)") from error


def is_installed() -> bool:
    """Whether `h264_writer` can be used."""
    return find_spec("av") is not None
