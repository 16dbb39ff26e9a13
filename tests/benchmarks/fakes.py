"""Subjects that take the time they are told to, on a clock of their own, and results of theirs."""

import fcntl
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.benchmarks import results
from dsgnn.benchmarks.environment import environment
from dsgnn.benchmarks.forms import Spec
from dsgnn.benchmarks.latency import latency
from dsgnn.benchmarks.timing import Clock, Plan, Sample
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import Fixed

PLAN = Plan(duration_s=0.2, runs=4, rounds=4, warm_up_s=0)
KINDS = {"up": {"form": "upstream", "weights": "synthetic"}, "fast": {}}


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
        if spec.model == "parent":  # of a process that holds a lock on the file `spec.export`
            with open(spec.export, "w") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()])

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


def timed(out: Path, **ms: float) -> Path:
    """latency.json of the models `up` and `fast` (KINDS), which take so long for a photo."""
    clock = Clockwork()

    def open_bench(spec: Spec) -> FakeBench:
        return FakeBench(clock, spec.model, ms[spec.model], **KINDS[spec.model])

    found = [Spec("artifact", name) for name in ms]
    latency(found, (1,), PLAN, out, clock=clock, open_bench=open_bench)
    return out / "latency.json"


def measured(out: Path, sha256: str = "fast-hash") -> Path:
    """accuracy.json of the file `fast`."""
    subject = {k: v for k, v in facts("fast").items() if k in results.SUBJECT}
    row = {
        "subject": subject | {"sha256": sha256},
        "data": {"spec": "composite:9", "split": "test", "images": 9, "protocol": "dsgnn"},
        "figures": {"sa_sor": 0.75, "sor": None},
        "used": {"sa_sor": 8},
        "reference": {"sa_sor": 0.7505},
        "parity": [{"passed": True, "iou_mean": 0.9991}],
        "parity_from": "here",
    }
    results.save(out / "accuracy.json", "accuracy", environment(), seed=0, rows=[row])
    return out / "accuracy.json"


def save_again(path: Path, loaded: dict[str, Any]) -> None:
    """Write what was loaded and then changed."""
    kept = {name: value for name, value in loaded.items() if name not in ("schema", "created")}
    results.save(path, **kept)
