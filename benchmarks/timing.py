"""When each model runs, and what its times say. Nothing here has a clock, model or file of its own.

Models are timed interleaved: in every round each has one turn, in an order shuffled anew, so that
whatever slows the machine slows all of them and their ratios hold. A turn starts with one untimed
run, which brings caches and thread pools back to the model. Intervals are over the medians of
rounds: runs of one turn share their disturbances and are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from dsgnn.runtime.errors import OptionError

STAGES = ("decode", "preprocess", "host_to_device", "compute", "device_to_host", "postprocess")
INFERENCE = ("host_to_device", "compute", "device_to_host")  # some forms time only their sum
END_TO_END = "end_to_end"
Sample = dict[str, float]
"""Milliseconds of one run, by stage and end to end; a stage that does not exist there is absent."""
Clock = Callable[[], float]
"""Monotonic seconds."""

DRIFT = 0.05  # of the median from the first third of the rounds to the last
NOISE = 0.05  # between ratios of the same two models


@dataclass(frozen=True)
class Plan:
    """How long each model runs at each batch size: at least duration_s and at least `runs` timed
    runs, spread evenly over the rounds; before them at least warm_up_s and warm_up_runs."""

    duration_s: float = 20.0
    runs: int = 30
    rounds: int = 10
    warm_up_s: float = 1.0
    warm_up_runs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.duration_s < 0 or self.runs < 1 or self.rounds < 2 or self.warm_up_runs < 1:
            raise OptionError(
                "a plan needs duration_s ≥ 0, runs ≥ 1, rounds ≥ 2 and warm_up_runs ≥ 1, got "
                f"{self}"
            )

    @classmethod
    def of(cls, duration_s: float, runs: int, seed: int) -> Plan:
        """With fewer runs than there would be rounds, a round for each: a run may take minutes."""
        return cls(duration_s, runs, rounds=min(cls.rounds, max(2, runs)), seed=seed)


@dataclass(frozen=True)
class Turn:
    """The timed runs of one model in one round."""

    round: int
    name: str
    samples: list[Sample]


def warm_up(run: Callable[[], Sample], plan: Plan, clock: Clock) -> float:
    """Run untimed until the plan's warm-up is over; milliseconds of the very first run."""
    start = clock()
    first = run()[END_TO_END]
    count = 1
    while count < plan.warm_up_runs or clock() - start < plan.warm_up_s:
        run()
        count += 1
    return first


def interleave(
    runners: Mapping[str, Callable[[], Sample]], plan: Plan, clock: Clock, done: Container[int] = ()
) -> Iterator[Turn]:
    """Give every runner its turn in every round that is not done; see the module's header."""
    names = list(runners)
    turn_runs, turn_s = -(-plan.runs // plan.rounds), plan.duration_s / plan.rounds
    for number in range(plan.rounds):
        order = np.random.default_rng((plan.seed, number)).permutation(len(names))
        if number in done:
            continue
        for name in (names[index] for index in order):
            run = runners[name]
            run()
            samples: list[Sample] = []
            start = clock()
            while len(samples) < turn_runs or clock() - start < turn_s:
                samples.append(run())
            yield Turn(number, name, samples)


def summarise(values_ms: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Milliseconds → mean, std (of a sample), min, p50, p90, p95, p99, cv, n.

    Percentiles are interpolated linearly; p99 of fewer than 100 values lies beside the largest.
    """
    values = np.asarray(values_ms, float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"expected finite times, got {values_ms!r}")
    mean, std = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    p50, p90, p95, p99 = (float(p) for p in np.percentile(values, (50, 90, 95, 99)))
    return {
        "mean": mean,
        "std": std,
        "min": float(values.min()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "cv": std / mean if mean else 0.0,
        "n": len(values),
    }


def inference(samples: Mapping[str, Any]) -> np.ndarray:
    """Raw samples of a row, {"round": [...], stage: [...]} → milliseconds of the network of each
    run, transfers to and from its device included, (n,)."""
    return np.sum([samples[stage] for stage in INFERENCE if stage in samples], axis=0)


def medians(samples: Mapping[str, Any]) -> np.ndarray:
    """Raw samples of a row → the median of `inference` in each round, (R,)."""
    rounds, values = np.asarray(samples["round"]), inference(samples)
    return np.array([np.median(values[rounds == number]) for number in np.unique(rounds)])


def drift(by_round: np.ndarray) -> float:
    """(R,) medians → by what share the last third is slower than the first (negative: faster)."""
    third = max(1, len(by_round) // 3)
    return float(np.median(by_round[-third:]) / np.median(by_round[:third]) - 1)


@dataclass(frozen=True)
class Ratio:
    """Time of b over time of a, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f}…{self.high:.3f})"


def ratio(a: np.ndarray, b: np.ndarray, paired: bool) -> Ratio:
    """Medians by round, two or more → geometric mean of b / a; the interval is Student's over the
    logarithms of rounds, Welch's where they are not paired.

    paired: both were interleaved in one run, so that their rounds belong together.
    """
    log_a, log_b = np.log(a), np.log(b)
    if paired and len(a) != len(b):
        raise ValueError(f"paired rounds must be equal in number, got {len(a)} and {len(b)}")
    parts = [log_b - log_a] if paired else [log_a, log_b]
    errors = np.array([part.var(ddof=1) / len(part) for part in parts])  # of the means
    squares = sum(e**2 / (len(part) - 1) for e, part in zip(errors, parts, strict=True))
    freedom = errors.sum() ** 2 / squares if squares else len(parts[0]) - 1
    half = stdtrit(freedom, 0.975) * np.sqrt(errors.sum())
    value = log_b.mean() - log_a.mean()
    low, high = np.exp(value - half), np.exp(value + half)
    return Ratio(float(np.exp(value)), float(low), float(high))


def split_half(by_name: Mapping[str, np.ndarray], baseline: str) -> dict[str, Any]:
    """Whether a run agrees with itself: ratios to the baseline in its first and second half.

    One model alone is compared with itself. Returns {"quiet", "worst", "why"}: worst is the
    largest disagreement, quiet when it is at most NOISE.
    """
    half = len(by_name[baseline]) // 2
    worst, who = 0.0, baseline
    for name, values in by_name.items():
        base = by_name[baseline] if len(by_name) > 1 else np.ones_like(values)
        logs = np.log(values / base)
        halves = np.exp([logs[:half].mean(), logs[half:].mean()])
        apart = float(halves.max() / halves.min() - 1)
        if apart > worst:
            worst, who = apart, name
    what = f"its time relative to {baseline}" if len(by_name) > 1 else "its time"
    return {
        "quiet": worst <= NOISE,
        "worst": worst,
        "why": f"{who}: {what} differs by {worst:.1%} between the halves of the run "
        f"(limit {NOISE:.0%})",
    }
