"""Subjects that take the time they are told to, on a clock of their own."""

from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.benchmarks.forms import Spec
from dsgnn.benchmarks.timing import Clock, Sample
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Fixed


def facts(name: str, **changes: Any) -> dict[str, Any]:
    found = {
        "name": name,
        "form": "artifact",
        "file": f"{name}.onnx",
        "sha256": f"{name}-hash",
        "status": "verified",
        "config": "nano",
        "weights": "trained",
        "precision": "fp32",
        "backend": "onnxruntime",
        "device": "cpu",
        "threads": 2,
        "input": "Fixed(96, 128)",
        "bytes": 1_000_000,
        "source_sha256": "source",
        "load_s": 0.5,
        "load_peak_mib": 200.0,
        "specks": "keep",  # artifacts tell more than results hold
        "origin": "mine (train), 6 iterations of 2 images",
    }
    return {**found, **changes}


class Clockwork:
    """A clock that moves only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBench:
    """`BenchProcess`'s methods without a process. ms: of one photo. fails_at: a batch size."""

    def __init__(self, clock: Clockwork, name: str, ms: float, stop_after: int = -1, **changes):
        self.facts = facts(name, **changes)
        self.clock, self.ms, self.left = clock, ms, stop_after
        self.runs: list[int] = []
        self.closed = False

    def run(self, batch: int) -> Sample:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.runs.append(batch)
        compute = self.ms * batch * (1 + 0.01 * (len(self.runs) % 3))
        self.clock.now += (compute + 2) / 1e3
        return {"decode": 1.0, "compute": compute, "postprocess": 1.0, "end_to_end": compute + 2}

    def start_peaks(self) -> bool:
        return True

    def peaks(self) -> dict[str, float | None]:
        return {"host_mib": 150.0 + len(self.runs), "device_mib": None}

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class FakeSubject:
    """Answers with five empty masks; on a fake clock an inference takes 0.25 s."""

    rule, threshold = Fixed(96, 128), 0.5

    def __init__(self, spec: Spec):
        if spec.model == "broken":
            raise OptionError("this one cannot be opened: mend it")
        self.facts = facts(Path(spec.model).stem)
        self.seen: list[np.ndarray] = []
        self.dies = spec.model == "dies"
        if spec.model == "planted":
            raise ValueError("a bug, not a refusal")

    def infer(self, images: np.ndarray, clock: Clock) -> tuple[dict[str, np.ndarray], Sample]:
        if self.dies:
            import os

            os._exit(9)
        self.seen.append(images)
        start = clock()
        if isinstance(clock, Clockwork):
            clock.now += 0.25
        batch = len(images)
        answers = {
            "saliency": np.zeros((batch, 5), np.float32),
            "score": np.zeros((batch, 5), np.float32),
            "masks": np.full((batch, 5, 24, 32), -1, np.float32),
        }
        return answers, {"compute": 1e3 * (clock() - start)}
