"""The frames of a video that comes from a file, a URL, a camera, numbered images or raw bytes.

The time of a frame is its number divided by the frame rate.
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
from dsgnn.runtime.errors import InputError, OptionError
from dsgnn.runtime.images import read_image

DEFAULT_RATE = 25.0  # frames per second of a source that does not state its rate
TIMEOUT_MS = 10_000  # for opening a stream, and for each frame of it
KEPT = "the frames before that were ranked"  # the end of a message about what broke off


class Ended(InputError):
    """A source broke off before its end. The frames that came before are good."""


@dataclass(frozen=True)
class Selection:
    """Which frames of a source are taken.

    every: take each N-th frame, beginning with the first one in the range. start_s, end_s: the
    range in seconds of the source, the end excluded. max_frames: take at most so many. rate: frames
    per second of a source that does not state its rate (raw frames, numbered images); None = 25.
    raw: (width, height) of raw frames. Raises OptionError for values that cannot be.
    """

    every: int = 1
    start_s: float = 0.0
    end_s: float | None = None
    max_frames: int | None = None
    rate: float | None = None
    raw: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.max_frames is not None and self.max_frames < 1):
            raise OptionError(
                f"every and max_frames must be at least 1, got {self.every} and {self.max_frames}"
            )
        end_s = math.inf if self.end_s is None else self.end_s
        if not 0 <= self.start_s < end_s or math.isinf(self.end_s or 0):
            raise OptionError(
                f"expected 0 ≤ start < end, in seconds, got {self.start_s} and {self.end_s}"
            )
        if self.rate is not None and not 0 < self.rate < 1000:
            raise OptionError(f"rate must be over 0 and under 1000, got {self.rate}")


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a source.

    image: (h, w, 3) uint8 RGB. number: its number in the source, from 0. time_s: its time in the
    source, seconds. decode_ms: how long reading and decoding it took.
    """

    image: np.ndarray
    number: int
    time_s: float
    decode_ms: float


class _Feed(Protocol):
    """Where frames come from.

    rate: frames per second. declared: the number of frames that the source says it has, 0 if it
    does not say. grab: go to the next frame, and return False at the end. picture: the frame that
    was gone to, (h, w, 3) uint8 RGB. check_end: raise Ended if there should have been more than
    `count` frames. release: close the source.
    """

    rate: float
    declared: int

    def grab(self) -> bool: ...
    def picture(self) -> np.ndarray: ...
    def check_end(self, count: int) -> None: ...
    def release(self) -> None: ...


class Frames:
    """The selected frames of one source; they can be iterated once.

    rate: selected frames per second. expected: how many will be selected, 0 if that is not known.
    """

    def __init__(self, source: Source, select: Selection) -> None:
        """Open the source. Raises InputError or OSError if that fails, OptionError for raw frames
        without their size."""
        self._feed = _open(source, select)
        self._select = select
        self.rate = self._feed.rate / select.every
        end = self._feed.declared
        if select.end_s is not None and end:
            end = min(end, round(select.end_s * self._feed.rate))
        left = max(0, end - round(select.start_s * self._feed.rate))
        self.expected = min(-(-left // select.every), select.max_frames or left)

    def __iter__(self) -> Iterator[Frame]:
        """Raises Ended after the last good frame if the source broke off or its size changed."""
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
                            f"with {size[1]}×{size[0]}: cut it where the size changes; the frames "
                            "before that were ranked"
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
        """Close a source that was not iterated."""
        self._feed.release()


def _open(source: Source, select: Selection) -> _Feed:
    if source.feed == "raw":
        if select.raw is None:
            raise OptionError("frames on standard input need their size: give it as raw")
        return _Raw(standard_input(), select.raw, select.rate or DEFAULT_RATE)
    if source.feed == "sequence":
        return _Numbered(source.address, select.rate or DEFAULT_RATE)
    return _Capture(source, select.rate)


class _Capture:
    """A file, a URL or a camera, opened by OpenCV."""

    def __init__(self, source: Source, rate: float | None) -> None:
        self._capture = _capture(source)
        if not self._capture.isOpened():
            if source.path is not None and not source.path.open("rb").read(1):
                raise InputError("the file is empty (0 bytes)")
            what = {"camera": "no such camera, or another program uses it", "url": "no answer"}
            damaged = "no frame can be read: it is damaged, or no video that OpenCV decodes"
            raise InputError(what.get(source.feed, damaged))
        told = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = told if 0 < told < 1000 else rate or DEFAULT_RATE
        self.declared = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        # A camera may serve HTTP too. A file that is served states its number of frames.
        self._live = source.is_live or (source.feed == "url" and not self.declared)

    def grab(self) -> bool:
        try:
            return self._capture.grab()
        except cv2.error as error:
            raise Ended(f"OpenCV cannot read on ({error.err}); {KEPT}") from error

    def picture(self) -> np.ndarray:
        try:
            done, frame = self._capture.retrieve()
        except cv2.error as error:
            raise Ended(f"OpenCV cannot decode a frame ({error.err}); {KEPT}") from error
        if not done:
            raise Ended(f"a frame cannot be decoded; {KEPT}")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def check_end(self, count: int) -> None:
        if self._live:
            raise Ended(f"the stream stopped after {count} frames; they were ranked")
        # Some containers only estimate their number of frames.
        if count < self.declared - max(2, 0.02 * self.declared):
            raise Ended(
                f"it ends after {count} of the {self.declared} frames it declares, so it is cut "
                "short or damaged; the frames that could be read were ranked"
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
    """Numbered images such as shot%04d.png: all that exist, by their number; gaps are closed."""

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
        except (OSError, InputError) as error:
            raise Ended(f"{path.name}: {error}; {KEPT}") from error

    def check_end(self, count: int) -> None:
        """Nothing says that there should be more."""

    def release(self) -> None:
        """No file is kept open."""


class _Raw:
    """Frames of width × height × 3 bytes, RGB, one after the other on standard input."""

    declared = 0

    def __init__(self, stream: BinaryIO, size: tuple[int, int], rate: float) -> None:
        # It is read without its buffer: a thread that waits inside the buffer when Python exits
        # would crash it.
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
                f"the input ends inside a frame: {len(self._data)} of {wanted} bytes; are its "
                f"frames {width}x{height}? The frames before that were ranked"
            )
        return bool(self._data)

    def picture(self) -> np.ndarray:
        width, height = self._size
        return np.frombuffer(self._data, np.uint8).reshape(height, width, 3)

    def check_end(self, count: int) -> None:
        """A pipe may end after any frame."""

    def release(self) -> None:
        """Standard input stays open."""


def parse_raw(text: str) -> tuple[int, int]:
    """Read "640x360" as (640, 360), width and height in pixels. Raises OptionError."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if match is None:
        raise OptionError(f"expected a size as WIDTHxHEIGHT, such as 640x360, got {text!r}")
    return int(match[1]), int(match[2])
