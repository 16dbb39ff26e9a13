"""One process per model: its memory is its own, and its threads disturb nobody.

The parent asks one worker at a time for one run. The worker takes the times; the pipe between them
is outside every measurement.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from math import inf
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np

from dsgnn.benchmarks.environment import peak_mib, reset_peak
from dsgnn.benchmarks.forms import Answers, Spec, Subject, open_subject, photos, run_once
from dsgnn.benchmarks.timing import Clock, Sample
from dsgnn.runtime.errors import BackendError, DsgnnError
from dsgnn.runtime.fence import end_with_parent
from dsgnn.runtime.images import read_image
from dsgnn.runtime.letterbox import letterbox


class Bench:
    """A subject with its photos. facts: the subject's, with load_s, load_peak_mib, and the shape
    (H, W) that its network gets of a photo."""

    def __init__(self, spec: Spec, opener: Callable[[Spec], Subject], clock: Clock):
        self._clock = clock
        start = clock()
        self._subject = opener(spec)
        self.facts = {**self._subject.facts, "load_s": clock() - start, "load_peak_mib": peak_mib()}
        self._photos = photos()
        padded, _ = letterbox(read_image(self._photos[0]), self._subject.rule)
        self.facts["shape"] = padded.shape[:2]
        self._next = 0

    def run(self, batch: int) -> Sample:
        """Photos of one batch to rankings; other photos each time, in turn."""
        count = len(self._photos)
        chosen = [self._photos[(self._next + b) % count] for b in range(batch)]
        self._next = (self._next + batch) % count
        return run_once(self._subject, chosen, self._clock)

    def answers(self, images: np.ndarray) -> Answers:
        """images: (B, H, W, 3) uint8, letterboxed."""
        return self._subject.infer(images, self._clock)[0]

    def start_peaks(self) -> bool:
        """Forget the peaks so far. Returns False where the system does not allow that, so that the
        host's peak is that of the whole process."""
        if self.facts["device"].startswith("cuda") and self.facts["backend"] == "pytorch":
            import torch

            torch.cuda.reset_peak_memory_stats()
        return reset_peak()

    def peaks(self) -> dict[str, float | None]:
        """The most memory held since `start_peaks`, in MiB: "host_mib", and "device_mib", which is
        None where PyTorch does not allocate it."""
        device = None
        if self.facts["device"].startswith("cuda") and self.facts["backend"] == "pytorch":
            import torch

            device = torch.cuda.max_memory_reserved() / 2**20
        return {"host_mib": peak_mib(), "device_mib": device}


class LateError(BackendError):
    """A subject that was not waited for any longer."""


class BenchProcess:
    """A `Bench` in a process of its own; the same methods. Use it in a `with` block.

    until: if set, a time of `time.perf_counter`, after which an answer is not waited for: the
    process is ended and the call raises LateError.
    """

    alive: ClassVar[WeakSet[BenchProcess]] = WeakSet()
    until: float | None

    def __init__(
        self,
        spec: Spec,
        opener: Callable[[Spec], Subject] = open_subject,
        until: float | None = None,
    ):
        """Waits until the subject is loaded. Raises BackendError with what the process said,
        RuntimeError with its traceback for a bug."""
        self.until = until
        context = multiprocessing.get_context("spawn")
        self._who = f"{spec.model} ({spec.form})"
        self._late = self._ended = False
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, spec, opener), daemon=False)
        self._process.start()
        self.alive.add(self)
        other.close()
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.kill()
            self.close()
            raise

    def run(self, batch: int) -> Sample:
        return self._call("run", batch)

    def answers(self, images: np.ndarray) -> Answers:
        return self._call("answers", images)

    def start_peaks(self) -> bool:
        return self._call("start_peaks")

    def peaks(self) -> dict[str, float | None]:
        return self._call("peaks")

    def close(self) -> None:
        self._pipe.close()  # the worker sees the end of it and leaves
        self._wait(10)
        self.kill()
        self._process.join()
        self._ended = True

    def kill(self) -> None:
        """End the process with those that it started: `torch.compile` has some that compile on."""
        pid = self._process.pid
        if self._ended or not pid:
            return
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):  # none is left, or it is to come
                os.killpg(pid, signal.SIGKILL)
        self._process.kill()

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # Ctrl-C, say, which reaches the parent alone
            self.kill()
        self.close()

    def _wait(self, limit_s: float | None = None) -> None:
        """Until the process has ended. Its number is still its own then, unlike after `join`."""
        wait([self._process.sentinel], limit_s)

    def _call(self, method: str, *arguments: Any) -> Any:
        with suppress(BrokenPipeError):  # the process is gone: the answer says so
            self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        left = inf if self.until is None else max(0.0, self.until - perf_counter())
        if self._late or (left < inf and not self._pipe.poll(left)):
            self._late = True
            self.kill()
            raise LateError(f"{self._who}: no answer when the time was up")
        try:
            good, value, trace = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._wait()
            self.kill()
            self._process.join()
            self._ended = True
            raise BackendError(
                f"the process of {self._who} ended with {self._process.exitcode}; -9 usually means "
                "that the machine ran out of memory: measure fewer models or smaller batches at "
                "once"
            ) from None
        if trace:  # not a refusal but a bug, here or in a library
            raise RuntimeError(f"{self._who}: {value}\n{trace}")
        if not good:
            raise BackendError(f"{self._who}: {value}")
        return value


def apart(function: Callable[[Spec], Any], spec: Spec) -> Any:
    """Call a function in a process of its own, so that what it needs is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        return pool.submit(function, spec).result()


def _serve(pipe: Connection, spec: Spec, opener: Callable[[Spec], Subject]) -> None:
    end_with_parent()
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    try:
        bench = Bench(spec, opener, perf_counter)
        pipe.send((True, bench.facts, ""))
        while True:
            method, arguments = pipe.recv()
            pipe.send((True, getattr(bench, method)(*arguments), ""))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except (DsgnnError, OSError, MemoryError) as error:
        pipe.send((False, str(error) or type(error).__name__, ""))
    except Exception as error:  # a bug: the parent must show it
        pipe.send((False, f"{type(error).__name__}: {error}", traceback.format_exc()))
