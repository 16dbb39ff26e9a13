"""Decode photos that strangers sent in a process of its own, which can be killed.

A photo may be made to crash its decoder, to keep it busy for minutes or to fill the memory. Here it
ends that process alone: the photo is refused, and the next one gets a new process. The limit on
pixels is OpenCV's own and is compared with the photo's header before anything is decoded; OpenCV
reads it once, when it is loaded, so it has to be set before the process starts.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import IO

import numpy as np

from dsgnn.runtime.errors import InputError
from dsgnn.runtime.images import read_image, silence_opencv

PIXELS_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
DECODE_S = 5  # seconds of processor time for one photo
PATIENCE = 6  # and as many times that until the answer, as others use the processor too
PIXEL_BYTES = 24  # memory for one pixel: sixteen bits of four channels, three times over
BASE_BYTES = 256 << 20  # and for what does not depend on the size
START_S = 60.0  # seconds for the process to start, on a busy machine
# A request is the length of the photo and the photo. An answer is one of these kinds and two
# numbers: height and width, before the pixels; or the length of the text, and 0, before the text.
REQUEST, ANSWER = struct.Struct("<Q"), struct.Struct("<BQQ")
PIXELS, UNREADABLE, BUG, STARTED = range(4)


class Decoder:
    """One decoding process. It serves one photo at a time."""

    def __init__(self, max_pixels: int, limit_s: int = DECODE_S) -> None:
        """max_pixels: width × height of the largest photo. limit_s: seconds of processor time for
        one photo."""
        self._max_pixels, self._limit_s = max_pixels, limit_s
        self._started = False
        self._process = self._start()

    def __call__(self, data: bytes) -> np.ndarray:
        """Decode one photo to (h, w, 3) uint8 RGB. Raises InputError if that cannot be done within
        the limits, RuntimeError for a bug of ours in the process, with its traceback."""
        if self._process.poll() is not None:
            self.close()
            self._process, self._started = self._start(), False
        late = threading.Event()
        if not self._started:
            self._answer(START_S, threading.Event())
            self._started = True
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(REQUEST.pack(len(data)) + data)
            self._process.stdin.flush()
            kind, height, width, body = self._answer(PATIENCE * self._limit_s, late)
        except (EOFError, BrokenPipeError):
            status = self._process.wait()
            if late.is_set() or status == -getattr(signal, "SIGXCPU", 0):
                raise InputError(f"decoding it takes longer than {self._limit_s} s") from None
            raise InputError("its decoder crashed on it") from None
        if kind == PIXELS:
            return np.frombuffer(body, np.uint8).reshape(height, width, 3)
        if kind == UNREADABLE:
            raise InputError(body.decode())
        raise RuntimeError(f"a bug in the decoding process:\n{body.decode()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # by a photo that it never read
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        paths = os.pathsep.join(path for path in map(os.path.abspath, sys.path) if path)
        environment = {
            **os.environ,
            PIXELS_VARIABLE: str(self._max_pixels),
            "PYTHONPATH": paths,
            "OPENBLAS_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self._max_pixels), str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def _answer(self, limit_s: float, late: threading.Event) -> tuple[int, int, int, bytes]:
        """Read one answer. Kills the process after limit_s and sets `late`; then, and when the
        process has ended by itself, raises EOFError."""
        process = self._process
        assert process.stdout is not None

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, kill)
        timer.daemon = True
        timer.start()
        try:
            kind, height, width = ANSWER.unpack(_exactly(process.stdout, ANSWER.size))
            size = height * width * 3 if kind == PIXELS else height
            return kind, height, width, _exactly(process.stdout, size)
        finally:
            timer.cancel()


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _limit_memory(max_pixels: int) -> None:
    """Bound what this process may allocate beyond what it has now. Linux only."""
    if sys.platform != "linux":
        return
    import resource

    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            held = int(line.split()[1]) << 10
            _lower(resource.RLIMIT_DATA, held + BASE_BYTES + PIXEL_BYTES * max_pixels)


def _limit_time(limit_s: int) -> None:
    """Have this process ended when it has used so much more processor time. Not on Windows."""
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _lower(resource.RLIMIT_CPU, ceil(used.ru_utime + used.ru_stime) + limit_s)


def _lower(kind: int, limit: int) -> None:
    """Set a limit of this process, unless it has a lower one that it may not change."""
    import resource

    _, hard = resource.getrlimit(kind)
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (soft, hard))


def main() -> None:
    """Decode the photos that come on standard input until it is closed."""
    # The server answers the photos it holds after these signals, so it decides when this ends.
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get among the answers
    silence_opencv()
    _limit_memory(int(sys.argv[1]))

    def answer(kind: int, height: int, width: int, body: bytes | memoryview) -> None:
        out.write(ANSWER.pack(kind, height, width))
        out.write(body)
        out.flush()

    answer(STARTED, 0, 0, b"")
    while head := source.read(REQUEST.size):
        (size,) = REQUEST.unpack(head)
        data = source.read(size)
        _limit_time(int(sys.argv[2]))
        try:
            pixels = np.ascontiguousarray(read_image(data))
        except InputError as error:
            text = str(error).encode()
            answer(UNREADABLE, len(text), 0, text)
        except MemoryError:
            text = b"there is not enough memory for an image of this size"
            answer(UNREADABLE, len(text), 0, text)
        except Exception:
            text = traceback.format_exc().encode()
            answer(BUG, len(text), 0, text)
        else:
            height, width, _ = pixels.shape
            answer(PIXELS, height, width, pixels.data.cast("B"))


if __name__ == "__main__":
    main()
