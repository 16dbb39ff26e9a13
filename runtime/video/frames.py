"""Frames of a video, whatever it comes from: file, URL, camera, numbered images, raw bytes.

Frame times are frame numbers over the frame rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import BinaryIO, Protocol

import cv2
import numpy as np

from dsgnn.runtime.disk.files import check_unicode
from dsgnn.runtime.disk.sources import Source, numbered, standard_input
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import read_image

DEFAULT_RATE = 25.0  # where the source tells none
TIMEOUT_MS = 10_000  # of opening a stream, and of waiting for a frame


class Ended(InputError):
    """A source that ended before it should; the frames before are good."""


@dataclass(frozen=True)
class Selection:
    """Which frames. every: each N-th, beginning with the first taken. start_s, end_s: seconds of
    the source, the end excluded. max_frames: at most so many of them. rate: frames per second of a
    source that tells none (raw, numbered images); None = 25. raw: (width, height) of raw frames.
    Raises ValueError for values that cannot be."""

    every: int = 1
    start_s: float = 0.0
    end_s: float | None = None
    max_frames: int | None = None
    rate: float | None = None
    raw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.max_frames is not None and self.max_frames < 1):
            raise ValueError(
                f"every and max_frames must be at least 1, got {self.every} and {self.max_frames}"
            )
        end_s = math.inf if self.end_s is None else self.end_s
        if not 0 <= self.start_s < end_s or math.isinf(self.end_s or 0):
            raise ValueError(
                f"expected 0 ≤ start < end, in seconds, got {self.start_s} and {self.end_s}"
            )
        if self.rate is not None and not 0 < self.rate < 1000:
            raise ValueError(f"rate must be over 0 and under 1000, got {self.rate}")


@dataclass(frozen=True, eq=False)
class Frame:
    """image: (h, w, 3) uint8 RGB. number: in the source, from 0. time_s: of the source.
    decode_ms: what getting it took."""

    image: np.ndarray
    number: int
    time_s: float
    decode_ms: float


class _Feed(Protocol):
    """grab: step to the next frame, False at the end. picture: the frame stepped to, (h, w, 3)
    uint8 RGB. check_end: raise Ended if there should have been more than `count` frames."""

    rate: float
    declared: int  # number of frames, 0 = unknown

    def grab(self) -> bool: ...
    def picture(self) -> np.ndarray: ...
    def check_end(self, count: int) -> None: ...
    def release(self) -> None: ...


class Frames:
    """The selected frames of one source; iterate once. rate: frames per second of those selected.
    expected: their number as far as is known, else 0."""

    def __init__(self, source: Source, select: Selection) -> None:
        """Raises ValueError or OSError if the source cannot be opened."""
        self._feed = _open(source, select)
        self._select = select
        self.rate = self._feed.rate / select.every
        end = self._feed.declared
        if select.end_s is not None and end:
            end = min(end, round(select.end_s * self._feed.rate))
        left = max(0, end - round(select.start_s * self._feed.rate))
        self.expected = min(-(-left // select.every), select.max_frames or left)

    def __iter__(self) -> Iterator[Frame]:
        """Raises Ended after the last good frame if the source broke off or changed its size."""
        select, feed = self._select, self._feed
        end_s = float("inf") if select.end_s is None else select.end_s
        number = taken = skipped = 0
        size: tuple[int, ...] = ()
        try:
            start = perf_counter()
            while feed.grab():
                time_s = number / feed.rate
                if time_s >= end_s - 1e-9:
                    return
                skipped += time_s < select.start_s - 1e-9
                if time_s >= select.start_s - 1e-9 and (number - skipped) % select.every == 0:
                    image = feed.picture()
                    size = size or image.shape[:2]
                    if image.shape[:2] != size:
                        raise Ended(
                            f"frame {number} is {image.shape[1]}×{image.shape[0]}, the video began "
                            f"with {size[1]}×{size[0]}: cut it where the size changes; what came "
                            "before is in place"
                        )
                    yield Frame(image, number, time_s, 1e3 * (perf_counter() - start))
                    taken += 1
                    if taken == select.max_frames:
                        return
                    start = perf_counter()
                number += 1
            if number:
                feed.check_end(number)
        finally:
            feed.release()

    def close(self) -> None:
        """Let go of a source that was not iterated."""
        self._feed.release()


def _open(source: Source, select: Selection) -> _Feed:
    if source.feed == "raw":
        if select.raw is None:
            raise ValueError("frames on standard input need --raw WIDTHxHEIGHT")
        return _Raw(standard_input(), select.raw, select.rate or DEFAULT_RATE)
    if source.feed == "sequence":
        return _Numbered(source.address, select.rate or DEFAULT_RATE)
    return _Capture(source, select.rate)


class _Capture:
    """What OpenCV opens: a file, a URL or a camera."""

    def __init__(self, source: Source, rate: float | None) -> None:
        self._capture = _capture(source)
        if not self._capture.isOpened():
            if source.path is not None and not source.path.open("rb").read(1):
                raise ValueError("the file is empty (0 bytes)")
            what = {"camera": "no such camera, or another program uses it", "url": "no answer"}
            damaged = "no frame can be read: damaged, or no video that OpenCV decodes"
            raise ValueError(what.get(source.feed, damaged))
        told = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = told if 0 < told < 1000 else rate or DEFAULT_RATE
        self.declared = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        # Cameras serve HTTP too; a file that is served tells its length.
        self._live = source.is_live or (source.feed == "url" and not self.declared)

    def grab(self) -> bool:
        return self._capture.grab()

    def picture(self) -> np.ndarray:
        done, frame = self._capture.retrieve()
        if not done:
            raise Ended("a frame cannot be decoded; what came before is in place")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def check_end(self, count: int) -> None:
        if self._live:
            raise Ended(f"the stream stopped after {count} frames; what came is in place")
        # Some containers only estimate their number.
        if count < self.declared - max(2, 0.02 * self.declared):
            raise Ended(
                f"it ends after {count} of the {self.declared} frames it declares: cut short or "
                "damaged; what could be read is in place"
            )

    def release(self) -> None:
        self._capture.release()


def _capture(source: Source) -> cv2.VideoCapture:
    if source.feed == "camera":
        return cv2.VideoCapture(int(source.address))
    name = str(source.path or source.address)
    check_unicode(name)
    if source.feed == "url":
        limits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
        options = [value for limit in limits for value in (limit, TIMEOUT_MS)]
        return cv2.VideoCapture(name, cv2.CAP_FFMPEG, options)
    return cv2.VideoCapture(name)


class _Numbered:
    """Numbered images: shot%04d.png. All there are, by number; gaps are closed."""

    def __init__(self, pattern: str, rate: float) -> None:
        self._paths = numbered(pattern)
        self.rate, self.declared = rate, len(self._paths)
        self._next = 0

    def grab(self) -> bool:
        self._next += 1
        return self._next <= len(self._paths)

    def picture(self) -> np.ndarray:
        path = self._paths[self._next - 1]
        try:
            return read_image(path)
        except (OSError, ValueError) as error:
            raise Ended(f"{path.name}: {error}; what came before is in place") from error

    def check_end(self, count: int) -> None:
        """A sequence has all it has."""

    def release(self) -> None:
        """Nothing is open."""


class _Raw:
    """Frames of width × height × 3 bytes, RGB, one after the other."""

    declared = 0

    def __init__(self, stream: BinaryIO, size: tuple[int, int], rate: float) -> None:
        # Without its buffer: a thread that waits in there at exit would bring Python down.
        self._stream = getattr(stream, "raw", stream)
        self._size, self.rate = size, rate
        self._data = bytearray()

    def grab(self) -> bool:
        width, height = self._size
        wanted = width * height * 3
        self._data = bytearray()
        while len(self._data) < wanted and (part := self._stream.read(wanted - len(self._data))):
            self._data += part
        if 0 < len(self._data) < wanted:
            raise Ended(
                f"the input ends inside a frame: {len(self._data)} of {wanted} bytes; is --raw "
                f"{width}x{height} its size? What came before is in place"
            )
        return bool(self._data)

    def picture(self) -> np.ndarray:
        width, height = self._size
        return np.frombuffer(self._data, np.uint8).reshape(height, width, 3)

    def check_end(self, count: int) -> None:
        """A pipe ends when it ends."""

    def release(self) -> None:
        """Standard input stays open."""


def parse_raw(text: str) -> tuple[int, int]:
    """ "640x360" to (640, 360). Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"--raw takes WIDTHxHEIGHT such as 640x360, got {text!r}")
    return int(match[1]), int(match[2])
