"""Decode photos of strangers in a process of its own, which can be killed.

A photo may be made to crash its decoder, to keep it busy for minutes or to fill the memory. Here it
ends that process alone: the photo is refused, and the next one gets a new process. OpenCV's own
limit on pixels is set as well; it is read when OpenCV is loaded, so before the process starts.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress

import numpy as np

from dsgnn.runtime.errors import BackendError, InputError
from dsgnn.runtime.fence import (
    DECODE_S,
    end,
    exactly,
    limit_memory,
    limit_time,
    spawn,
    stay_quiet,
    took_too_long,
)
from dsgnn.runtime.images import ImageSource, keep_quiet, picture_or_bytes, read_image
from dsgnn.runtime.photo.headers import MAX_PIXELS, ImageTooLargeError

PATIENCE = 6  # an answer may take so many times the processor time, as others use it too
MAX_TEXT = 1 << 20  # bytes of an answer in words
START_S = 60.0  # seconds for the process to start, on a busy machine
CHILD = f"from {__name__} import main; main()"
# A request is the length of the photo and the photo. An answer is one of these kinds and two
# numbers: height and width, before the pixels; or the length of the text, and 0, before the text.
REQUEST, ANSWER = struct.Struct("<Q"), struct.Struct("<BQQ")
PIXELS, UNREADABLE, TOO_LARGE, BUG, STARTED = range(5)


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
            return self._decode(data)

    def start(self) -> None:
        """Wait until a photo can be decoded, with a new process if the last one has ended. A call
        does so as well.

        Raises BackendError if no process can be started.
        """
        with self._busy:
            if self._process.poll() is not None:
                end(self._process)
                self._process, self._started = self._spawn(), False
            try:
                if not self._started:
                    self._answer(START_S, threading.Event())
                    self._started = True
            except EOFError:
                raise BackendError(
                    "the process that decodes photos has ended at its start: is there too little "
                    "memory, or a limit on processes?"
                ) from None

    def _decode(self, data: bytes) -> np.ndarray:
        late = threading.Event()
        try:
            request = REQUEST.pack(len(data)) + data
            kind, height, width, body = self._answer(PATIENCE * self._limit_s, late, request)
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            if late.is_set() or took_too_long(status):
                raise InputError(f"decoding it takes longer than {self._limit_s} s") from None
            raise InputError("its decoder crashed on it") from None
        if kind == PIXELS:
            return body.reshape(height, width, 3)
        said = body.tobytes().decode()
        if kind in (UNREADABLE, TOO_LARGE):
            raise (InputError if kind == UNREADABLE else ImageTooLargeError)(said)
        raise RuntimeError(f"a bug in the decoding process:\n{said}")

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
            end(self._process)

    def _spawn(self) -> subprocess.Popen[bytes]:
        pixels, limit_s = self._max_pixels, self._limit_s
        return spawn(CHILD, pixels, pixels, limit_s, stdin=subprocess.PIPE)

    def _answer(
        self, limit_s: float, late: threading.Event, request: bytes = b""
    ) -> tuple[int, int, int, np.ndarray]:
        """Send a request and read one answer. Kills the process after limit_s and sets `late`;
        then, and when the process has ended by itself, raises EOFError or BrokenPipeError."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            kind, height, width = ANSWER.unpack(exactly(process.stdout, ANSWER.size).tobytes())
            if height * width > self._max_pixels:  # someone else has taken over the process
                process.kill()
                raise EOFError
            size = height * width * 3 if kind == PIXELS else height % MAX_TEXT
            return kind, height, width, exactly(process.stdout, size)
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
    source, out = sys.stdin.buffer, stay_quiet()
    keep_quiet()
    max_pixels, limit_s = int(sys.argv[1]), int(sys.argv[2])
    limit_memory(max_pixels)

    def answer(kind: int, height: int, width: int, body: bytes | memoryview) -> None:
        try:
            out.write(ANSWER.pack(kind, height, width))
            out.write(body)
            out.flush()
        except BrokenPipeError:  # nobody waits for it any more
            os._exit(0)

    answer(STARTED, 0, 0, b"")
    while head := source.read(REQUEST.size):
        (size,) = REQUEST.unpack(head)
        data = source.read(size)
        limit_time(limit_s)
        try:
            pixels = np.ascontiguousarray(read_image(data, max_pixels))
        except InputError as error:
            text = str(error).encode()
            kind = TOO_LARGE if isinstance(error, ImageTooLargeError) else UNREADABLE
            answer(kind, len(text), 0, text)
        except MemoryError:
            text = b"there is not enough memory for an image of this size"
            answer(UNREADABLE, len(text), 0, text)
        except Exception:
            text = traceback.format_exc().encode()
            answer(BUG, len(text), 0, text)
        else:
            height, width, _ = pixels.shape
            answer(PIXELS, height, width, pixels.data.cast("B"))
