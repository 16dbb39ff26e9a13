"""The frames of a video that comes from a file, a stream, a camera, numbered images or raw bytes.

Which of them are taken, and in what way each kind of source but a film (dsgnn.runtime.video.film)
is read.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

import cv2
import numpy as np

from dsgnn.runtime.disk.sources import Source, numbered, standard_input
from dsgnn.runtime.errors import InputError, OptionError
from dsgnn.runtime.images import read_image
from dsgnn.runtime.photo.decoder import Decoders
from dsgnn.runtime.photo.headers import MAX_PIXELS
from dsgnn.runtime.video.feed import DEFAULT_RATE, KEPT, Ended, Feed, Shot, steady_shots
from dsgnn.runtime.video.fence import FencedFilm
from dsgnn.runtime.video.film import open_film

CLOSE_S = 1e-6  # times are sums of fractions


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

    image: (h, w, 3) uint8 RGB. number: its number in the source, from 0. time_s: its presentation
    time, in seconds from the beginning of the source. duration_s: how long it is shown, or, where
    frames are left out, how long it stands for them; only that of the last frame counts, as each is
    shown until the next. decode_ms: how long reading and decoding it took.
    """

    image: np.ndarray
    number: int
    time_s: float
    duration_s: float
    decode_ms: float


class Frames:
    """The selected frames of one source; they can be iterated once.

    rate: selected frames per second, on average and as the source states it. expected: how many
    will be selected, 0 if that is not known. notes: what a person should know of what was taken.
    has_sound: whether the source holds sound too.
    whole: whether the source was read to its end, or to the end of what was selected.
    """

    def __init__(self, source: Source, select: Selection, fenced: int | None = None) -> None:
        """Open the source.

        fenced: width × height of the largest frame, for what strangers made: it is decoded in a
        process that can be killed (dsgnn.runtime.video.fence). None: in this process.
        Raises InputError or OSError if that fails, OptionError for raw frames without their size.
        """
        self._feed = _open(source, select, fenced)
        self._select = select
        self.notes, self.has_sound = self._feed.notes, self._feed.has_sound
        self.whole = False
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
        taken = passed = 0
        size: tuple[int, ...] = ()
        try:
            start = perf_counter()
            for shot in feed.shots(select.start_s):
                if shot.time_s >= end_s - CLOSE_S:
                    self.whole = True
                    return
                if shot.time_s < select.start_s - CLOSE_S:
                    continue
                if passed % select.every == 0:
                    image = shot.picture()
                    size = size or image.shape[:2]
                    if image.shape[:2] != size:
                        raise Ended(
                            f"frame {shot.number} is {image.shape[1]}×{image.shape[0]}, the video "
                            f"began with {size[1]}×{size[0]}: cut it where the size changes; the "
                            "frames before that were ranked"
                        )
                    shown_s = shot.duration_s * select.every
                    decode_ms = 1e3 * (perf_counter() - start)
                    yield Frame(image, shot.number, shot.time_s, shown_s, decode_ms)
                    taken += 1
                    if taken == select.max_frames:
                        return
                    start = perf_counter()
                passed += 1
            self.whole = True
        finally:
            feed.release()

    def close(self) -> None:
        """Close a source that was not iterated."""
        self._feed.release()


def _open(source: Source, select: Selection, fenced: int | None) -> Feed:
    if source.feed == "raw":
        if select.raw is None:
            raise OptionError("frames on standard input need their size: give it as raw")
        return _Raw(standard_input(), select.raw, select.rate or DEFAULT_RATE)
    if source.feed == "sequence":
        return _Numbered(source.address, select.rate or DEFAULT_RATE, fenced)
    if source.feed == "camera":
        return _Camera(int(source.address), select.rate)
    if fenced is None or sys.platform == "win32":  # where pipes cannot be handed on
        return open_film(source, select.rate, fenced or MAX_PIXELS)
    return FencedFilm(source, select.rate, fenced)


class _Camera(Feed):
    """A camera of this machine, opened by OpenCV. The time of a frame is when it came."""

    def __init__(self, number: int, rate: float | None) -> None:
        self._capture = _capture(number)
        if not self._capture.isOpened():
            raise InputError("no such camera, or another program uses it")
        told = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = told if 0 < told < 1000 else rate or DEFAULT_RATE
        self.notes: list[str] = []

    def shots(self, start_s: float) -> Iterator[Shot]:
        number, start, last_s = 0, 0.0, -1.0
        try:
            while self._capture.grab():
                start = start or perf_counter()
                last_s = max(perf_counter() - start, last_s + 1e-3)
                yield Shot(number, last_s if number else 0.0, 1 / self.rate, self._picture)
                number += 1
        except cv2.error as error:
            raise Ended(f"OpenCV cannot read on ({error.err}); {KEPT}") from error
        raise Ended(f"the stream stopped after {number} frames; they were ranked")

    def _picture(self) -> np.ndarray:
        done, frame = self._capture.retrieve()
        if not done:
            raise Ended(f"a frame cannot be decoded; {KEPT}")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def release(self) -> None:
        self._capture.release()


def _capture(number: int) -> cv2.VideoCapture:
    return cv2.VideoCapture(number)


class _Numbered(Feed):
    """Numbered images such as shot%04d.png: all that exist, by their number; gaps are closed."""

    def __init__(self, pattern: str, rate: float, fenced: int | None) -> None:
        self._paths = numbered(pattern)
        self._decoders = None if fenced is None else Decoders(fenced)
        self.rate, self.declared = rate, len(self._paths)
        self.notes: list[str] = []

    def shots(self, start_s: float) -> Iterator[Shot]:
        return steady_shots(self.rate, (partial(self._picture, path) for path in self._paths))

    def _picture(self, path: Path) -> np.ndarray:
        try:
            return (self._decoders or read_image)(path)
        except (OSError, InputError) as error:
            raise Ended(f"{path.name}: {error}; {KEPT}") from error

    def release(self) -> None:
        """Close the processes that decode; no file is kept open."""
        if self._decoders is not None:
            self._decoders.close()


class _Raw(Feed):
    """Frames of width × height × 3 bytes, RGB, one after the other on standard input. That stays
    open."""

    def __init__(self, stream: BinaryIO, size: tuple[int, int], rate: float) -> None:
        # It is read without its buffer: a thread that waits inside the buffer when Python exits
        # would crash it.
        self._stream = getattr(stream, "raw", stream)
        self._size, self.rate = size, rate
        self.notes: list[str] = []

    def shots(self, start_s: float) -> Iterator[Shot]:
        return steady_shots(self.rate, self._pictures())

    def _pictures(self) -> Iterator[Callable[[], np.ndarray]]:
        """Raises Ended if the input ends inside a frame. It may end after any."""
        width, height = self._size
        wanted = width * height * 3
        while True:
            data = bytearray()
            while len(data) < wanted and (part := self._stream.read(wanted - len(data))):
                data += part
            if 0 < len(data) < wanted:
                raise Ended(
                    f"the input ends inside a frame: {len(data)} of {wanted} bytes; are its "
                    f"frames {width}x{height}? The frames before that were ranked"
                )
            if not data:
                return
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3).view


def parse_raw(text: str) -> tuple[int, int]:
    """Read "640x360" as (640, 360), width and height in pixels. Raises OptionError."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", text)
    if match is None:
        raise OptionError(f"expected a size as WIDTHxHEIGHT, such as 640x360, got {text!r}")
    return int(match[1]), int(match[2])
