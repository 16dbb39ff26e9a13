"""The frames of a video file, a stream or a pipe as they are meant to be seen, by PyAV.

Each has its presentation time, counted from the beginning of the source, and its picture: that of
the right stream, deinterlaced, upright, with square pixels, laid on white where it is transparent,
and brought from high dynamic range to that of a screen (by FFmpeg's swscale).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dsgnn.runtime.disk.sources import Source
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import to_rgb
from dsgnn.runtime.photo.headers import MAX_PIXELS
from dsgnn.runtime.video.container import chosen, decoder, opened, origin_s
from dsgnn.runtime.video.feed import DEFAULT_RATE, KEPT, Ended, Feed, Shot
from dsgnn.runtime.video.picture import deinterlaced, shown

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

HELD_BYTES = 64 << 20  # packets that are kept back at most while the start is searched
BACK_S = 0.5  # a clock that goes back by more was set anew; if it is less, that one time is wrong
LATE_S = 1.0  # a frame is shown at most so much later than it is decoded
# Kinds of files that declare how long they are. (Others are estimated by FFmpeg.)
DECLARING = ("avi", "matroska,webm", "mxf")
# Kinds of files that tell when a packet is decoded and not when its frame is shown, which FFmpeg
# then guesses.
UNTOLD = ("avi", "asf")
LAST_BYTES = {"gif": b"\0;", "apng": b"IEND"}  # of animations
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
WEBP_PICTURES = 16  # of an animated WebP in memory at a time


def open_film(
    source: Source,
    rate: float | None,
    max_pixels: int = MAX_PIXELS,
    renew: Callable[[], None] = lambda: None,
) -> Feed:
    """Open a video or an animation. rate: frames per second, for a source that has no times.

    max_pixels: width × height of the largest frame. renew: called before each packet is decoded,
    for a limit that holds from one to the next.
    Raises InputError if it holds no video that can be decoded, or if PyAV is missing, and OSError
    if it cannot be opened.
    """
    if source.path is not None and source.path.is_file():
        with source.path.open("rb") as file:
            if file.read(12)[8:] == b"WEBP":
                return _WebP(source.path)
    return Film(source, rate, max_pixels, renew)


class Film(Feed):
    """A feed of one video stream; see the head of this module. It is read once."""

    def __init__(
        self, source: Source, rate: float | None, max_pixels: int, renew: Callable[[], None]
    ) -> None:
        """See `open_film`."""
        self._path, self._max_pixels, self._renew = source.path, max_pixels, renew
        self._container = opened(source)
        try:
            self._stream, self.notes = chosen(self._container)
            if (pixels := self._stream.width * self._stream.height) > max_pixels:
                raise InputError(
                    f"its frames have {pixels:,} pixels, more than the {max_pixels:,} that are "
                    "allowed"
                )
            self._origin_s = origin_s(self._container, self._stream)
        except BaseException:
            self._container.close()
            raise
        self.has_sound = bool(self._container.streams.audio)
        told = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        self.rate = told if 0 < told < 1000 else rate or DEFAULT_RATE
        self._step_s = 1 / rate if rate else 0.0
        self.declared = self._stream.frames
        seconds = (self._container.duration or 0) / 1e6
        if not self.declared and seconds > 0:
            self.declared = round(seconds * self.rate)
        # A camera may serve HTTP too. A file that is served states its length.
        self._live = source.is_live or (source.feed == "url" and not self.declared)
        if source.is_live:
            self.declared = 0
        else:
            self._stream.thread_type = "AUTO"
        self._decoder: Any = decoder(self._stream)
        self._size = (0, 0)  # (width, height) of all pictures, before they are turned
        self._stored = (0, 0)  # (width, height) before pixels are made square
        self._resized = False
        self._passed = 0  # frames before the first one that is decoded
        self._from_s = float("-inf")  # where decoding begins
        self._is_told = self._container.format.name not in UNTOLD
        self._first_dts: int | None = None  # when the packet of the first frame's number is decoded
        self._lag: int | None = None  # from then until that frame comes out of the decoder
        self._last_s = 0.0  # where the latest packet of any stream ends, by its clock
        self._lost = 0  # packets that gave no picture, because they are damaged

    def shots(self, start_s: float) -> Iterator[Shot]:
        from av.video.reformatter import VideoReformatter

        reformatter, clock = VideoReformatter(), _Clock(self._origin_s)
        number, hidden = 0, 0
        broken: Ended | None = None
        try:
            for frame in deinterlaced(self._decoded(start_s)):
                duration_s = self._step_s or _seconds(frame, frame.duration) or 1 / self.rate
                time_s = clock(frame, duration_s)
                if time_s < self._from_s:
                    continue
                hidden += frame.is_corrupt
                picture = partial(self._picture, frame, reformatter)
                yield Shot(self._passed + number, time_s, duration_s, picture)
                number += 1
        except Ended as error:
            broken = error
        if hidden:
            self.notes.append(f"damaged frames, which were ranked as they look: {hidden}")
        self._check_end(self._passed + number)
        if broken is not None:
            raise broken

    def release(self) -> None:
        self._container.close()

    def _decoded(self, start_s: float) -> Iterator[VideoFrame]:
        """Decode the frames from the last key frame at or before `start_s` on.

        Packets before that are read and counted, and not decoded.
        """
        import av

        held: list[Packet] | None = [] if start_s > 0 else None
        size = 0
        try:
            for packet in self._container.demux():
                self._renew()
                end = _seconds(packet, packet.pts) + _seconds(packet, packet.duration)
                self._last_s = max(self._last_s, end)
                if packet.stream is not self._stream:
                    continue
                if held is None:
                    yield from self._pictures(packet)
                    continue
                time_s = self._time(packet)
                if packet.is_keyframe and time_s <= start_s:
                    self._passed += len(held)
                    held, size = [], 0
                held.append(packet)
                size += packet.size
                # Frames that are shown before the key frame come right behind it.
                begins = time_s >= start_s and time_s > self._time(held[0])
                if begins or not packet.size or size > HELD_BYTES:
                    yield from self._begin(held)
                    held = None
        except av.FFmpegError as error:
            yield from self._pictures(None)
            if self._live:
                return
            said = error.strerror or str(error)
            raise Ended(f"it cannot be read on ({said}); {KEPT}") from error

    def _time(self, packet: Packet) -> float:
        """When a packet's frame is shown, or at the latest where only its decoding has a time."""
        if packet.pts is not None:
            return _seconds(packet, packet.pts) - self._origin_s
        if packet.dts is not None:
            return _seconds(packet, packet.dts) - self._origin_s + LATE_S
        return float("inf")  # decoding begins at once

    def _begin(self, held: list[Packet]) -> Iterator[VideoFrame]:
        """Decode from a key frame on, without the frames that are shown before it: they build on
        frames that were passed over."""
        if self._passed:
            first = held[0].pts
            times = [packet.pts for packet in held if packet.pts is not None]
            before = sum(time < first for time in times) if first is not None else 0
            self._passed += before
            if not self._is_told:
                self._first_dts = held[before].dts
            elif first is not None:
                self._from_s = self._time(held[0]) - 1e-6
        for packet in held:
            yield from self._pictures(packet)

    def _pictures(self, packet: Packet | None) -> Iterator[VideoFrame]:
        """The frames that a packet completes. None: those that the decoder still holds."""
        import av

        if packet is not None and self._first_dts is None:
            self._first_dts = packet.dts
        try:
            for frame in self._decoder.decode(packet):
                if not self._is_told:
                    frame.pts = self._in_turn(frame.dts)
                yield frame
        except av.FFmpegError:
            self._lost += packet is not None

    def _in_turn(self, dts: int | None) -> int | None:
        """When a frame is shown that came out of the decoder after the packet of this time: frames
        are shown in the rhythm in which packets are decoded, the first one without delay."""
        if dts is None or self._first_dts is None:
            return None
        if self._lag is None:
            self._lag = dts - self._first_dts
        return dts - self._lag

    def _picture(self, frame: VideoFrame, reformatter: Any) -> np.ndarray:
        """The frame as it is meant to be seen: (h, w, 3) uint8 RGB."""
        import av

        if frame.width * frame.height > self._max_pixels:
            raise Ended(f"a frame has more than {self._max_pixels:,} pixels; {KEPT}")
        if not self._size[0]:
            aspect = float(self._stream.sample_aspect_ratio or 1)
            width = round(frame.width * aspect) if 0.1 < aspect < 10 else frame.width
            self._stored, self._size = (frame.width, frame.height), (max(1, width), frame.height)
        elif (frame.width, frame.height) != self._stored and not self._resized:
            self._resized = True
            self.notes.append("its frames change size: all were scaled to that of the first one")
        try:
            return shown(frame, self._size, reformatter)
        except (av.FFmpegError, ValueError) as error:
            raise Ended(f"a frame cannot be converted to RGB ({error}); {KEPT}") from error

    def _check_end(self, count: int) -> None:
        """Raise Ended if there should have been more than `count` frames."""
        if self._live:
            raise Ended(f"the stream stopped after {count} frames; they were ranked")
        if self._is_cut_short():
            declared, whole_s = self._stream.frames, (self._container.duration or 0) / 1e6
            ends = "its file ends before its pictures or its sound do"
            if declared > count:
                ends = f"it ends after {count} of the {declared} frames it declares"
            elif whole_s > self._last_s:
                ends = f"it ends after {self._last_s:.2f} of the {whole_s:.2f} s it declares"
            raise Ended(
                f"{ends}, so it is cut short or damaged; the frames that could be read were ranked"
            )
        if self._lost:
            raise Ended(
                f"{self._lost} of its packets could not be decoded, so it is damaged; the other "
                "frames were ranked"
            )

    def _is_cut_short(self) -> bool:
        """Whether the file ends before what it declares: by its index, or else by its length."""
        size = self._container.size or 0
        if self._path is not None and self._container.format.name in LAST_BYTES:
            return LAST_BYTES[self._container.format.name] not in _end_of(self._path)
        if self._path is not None and self._container.format.name == "asf":
            return size < _declared_bytes(self._path)
        for stream in self._container.streams if size > 0 else ():
            entries = stream.index_entries
            for index in range(max(0, len(entries) - 100), len(entries)):
                if entries[index].pos + entries[index].size > size:
                    return True
        if self._container.format.name not in DECLARING or not self._container.duration:
            return False
        whole_s = self._container.duration / 1e6
        return self._last_s < whole_s - max(2 / self.rate, 0.02 * whole_s)


class _Clock:
    """Times of frames that always grow, in seconds from the beginning of the source.

    Where a source sets its clock anew, as joined transport streams do, time goes on.
    """

    def __init__(self, origin_s: float) -> None:
        self._offset_s = -origin_s
        self._last_s, self._next_s = float("-inf"), 0.0

    def __call__(self, frame: VideoFrame, duration_s: float) -> float:
        stamp = frame.pts if frame.pts is not None else frame.dts
        time_s = self._next_s
        if stamp is not None:
            time_s = _seconds(frame, stamp) + self._offset_s
            if self._last_s < 0 and time_s < 0:  # the first frame of all
                self._offset_s -= time_s
                time_s = 0.0
            if time_s < self._last_s - BACK_S:
                self._offset_s += self._next_s - time_s
                time_s = self._next_s
        time_s = max(time_s, self._last_s + 1e-3)
        self._last_s, self._next_s = time_s, time_s + duration_s
        return time_s


def _end_of(path: Path) -> bytes:
    """The last bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read()


def _declared_bytes(path: Path) -> int:
    """The size that an ASF file declares, 0 if it does not. Source: Advanced Systems Format, 3.2.

    Its duration is no measure: the last frame may be shown for any part of it.
    """
    with path.open("rb") as file:
        head = file.read(1 << 16)
    at = head.find(ASF_PROPERTIES)
    if at < 0 or len(head) < at + 92 or head[at + 88] & 1:  # a broadcast
        return 0
    (size,) = struct.unpack_from("<Q", head, at + 40)
    return size


def _seconds(timed: Packet | VideoFrame, ticks: int | None) -> float:
    """A time or duration in the time base of a packet or frame; 0 where there is none."""
    return float((ticks or 0) * (timed.time_base or 0))


class _WebP(Feed):
    """An animated WebP, which FFmpeg does not read; by OpenCV, a few pictures at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            (size,) = struct.unpack("<I", file.read(8)[4:])
        self.declared = cv2.imcount(str(path)) if size + 8 <= path.stat().st_size else 0
        self.notes: list[str] = []
        first = [ms for _, ms in self._pictures(0)] if self.declared else []
        if not first:
            raise InputError("the WebP data is damaged or cut short")
        self.rate = 1e3 * len(first) / sum(first)

    def shots(self, start_s: float) -> Iterator[Shot]:
        number = time_ms = 0
        while number < self.declared:
            for pixels, ms in self._pictures(number):
                yield Shot(number, time_ms / 1e3, ms / 1e3, partial(to_rgb, pixels))
                number, time_ms = number + 1, time_ms + ms

    def _pictures(self, start: int) -> list[tuple[np.ndarray, int]]:
        """Some BGR or BGRA pictures, and for how many milliseconds each is shown; browsers take 100
        for 10 or less. Raises Ended."""
        done, part = cv2.imreadanimation(str(self._path), start, WEBP_PICTURES)
        if not done or not part.frames:
            raise Ended(f"frame {start} or one behind it cannot be decoded; {KEPT}")
        shown = [ms if ms > 10 else 100 for ms in part.durations]
        return list(zip(part.frames, shown, strict=True))
