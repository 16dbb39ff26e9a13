"""Decode photos of strangers in a process of its own, which can be killed.

A photo may be made to crash its decoder, to keep it busy for minutes or to fill the memory. Here it
ends that process alone: the photo is refused, and the next one gets a new process. OpenCV's own
limit on pixels is set as well; it is read when OpenCV is loaded, so before the process starts.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from dsgnn.runtime.errors import BackendError, InputError
from dsgnn.runtime.fence import (
    DECODE_S,
    Answer,
    Child,
    answer_all,
    limit_memory,
    limit_time,
    stay_quiet,
)
from dsgnn.runtime.images import ImageSource, keep_quiet, picture_or_bytes, read_image
from dsgnn.runtime.photo.headers import MAX_PIXELS, ImageTooLargeError

PATIENCE = 6  # an answer may take so many times the processor time, as others use it too
START_S = 60.0  # seconds for the process to start, on a busy machine
CHILD = f"from {__name__} import main; main()"
ERRORS = (ImageTooLargeError, InputError)


class Decoder:
    """One decoding process. It serves one photo at a time."""

    def __init__(self, max_pixels: int = MAX_PIXELS, limit_s: int = DECODE_S) -> None:
        """max_pixels: width × height of the largest photo. limit_s: seconds of processor time for
        one photo."""
        self._max_pixels, self._limit_s = max_pixels, limit_s
        self._busy = threading.Lock()
        self._started = False
        self._process = self._spawn()

    def __call__(self, data: bytes) -> np.ndarray:
        """Decode one photo to (h, w, 3) uint8 RGB. Raises InputError if that cannot be done within
        the limits, RuntimeError for a bug of ours in the process, with its traceback."""
        self.start()
        with self._busy:
            return self._ask("decode", PATIENCE * self._limit_s, data)

    def start(self) -> None:
        """Wait until a photo can be decoded, with a new process if the last one has ended. A call
        does so as well.

        Raises BackendError if no process can be started.
        """
        with self._busy:
            if self._process.poll() is not None:
                self._process.end()
                self._process, self._started = self._spawn(), False
            try:
                if not self._started:
                    self._ask("start", START_S)
                    self._started = True
            except InputError:
                raise BackendError(
                    "the process that decodes photos has ended at its start: is there too little "
                    "memory, or a limit on processes?"
                ) from None

    def stop(self) -> None:
        """Give up the photo that another thread is decoding: its call raises InputError."""
        self._process.kill()

    def yield_to_others(self) -> None:
        """Let the process run only when no other wants the processor, for as long as it lives."""
        if hasattr(os, "setpriority"):
            with suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)

    def close(self) -> None:
        """End the process, after the photo that another thread may be decoding."""
        with self._busy:
            self._process.end()

    def _spawn(self) -> Child:
        return Child(CHILD, ERRORS, self._max_pixels, self._limit_s)

    def _ask(self, what: str, patience_s: float, data: bytes = b"") -> np.ndarray:
        """Ask the process, and kill it if it does not answer in time."""
        timer = threading.Timer(patience_s, self._process.give_up)
        timer.daemon = True
        timer.start()
        try:
            too_long = f"decoding it takes longer than {self._limit_s} s"
            return self._process.ask(what, too_long, data)[1]
        finally:
            timer.cancel()


class Decoders:
    """Decoding processes for the threads of one Ranker: as many as decode at the same time.

    A process that is not needed waits for the next photo. All end with `close`, or with this
    process.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        """Start one process, which is ready some tenths of a second later. See Decoder."""
        self._max_pixels = max_pixels
        self._idle = [Decoder(max_pixels)]

    def __call__(self, source: ImageSource) -> np.ndarray:
        """Read one photo as `read_image` does, with its errors and those of Decoder."""
        found = picture_or_bytes(source)
        if isinstance(found, np.ndarray):
            return found
        try:
            decoder = self._idle.pop()
        except IndexError:
            decoder = Decoder(self._max_pixels)
        try:
            return decoder(found)
        finally:
            self._idle.append(decoder)

    def close(self) -> None:
        """End the processes. No other thread may be decoding."""
        while self._idle:
            self._idle.pop().close()


def main() -> None:
    """Decode the photos that come on standard input until it is closed."""
    asks, out = sys.stdin.buffer, stay_quiet()
    keep_quiet()
    max_pixels, limit_s = int(sys.argv[1]), int(sys.argv[2])
    limit_memory(max_pixels)

    def answer(question: dict[str, Any], data: bytes) -> Answer:
        if question["ask"] == "start":
            return {}, None
        limit_time(limit_s)
        try:
            return {}, read_image(data, max_pixels)
        except MemoryError:
            said = "there is not enough memory for an image of this size"
            raise InputError(said) from None

    answer_all(asks, out, answer, ERRORS, "decoding process")
