"""LoadGen drives a fake server of known service time; what is measured is held against theory."""

import re
import time
from pathlib import Path

import pytest

from dsgnn.benchmarks.load.loadgen import KEPT, QUERIES, TRACE, BusyError, Load, drive, highest_rate
from dsgnn.runtime.errors import BackendError

pytest.importorskip("mlperf_loadgen")
SERVICE_S = 0.1


class Sleeper:
    """Takes SERVICE_S for each answer, and a little more where the machine wakes it late: it keeps
    the times that it really took, in seconds."""

    def __init__(self) -> None:
        self.took: list[float] = []

    def __call__(self, sample: int) -> int:
        start = time.perf_counter()
        time.sleep(SERVICE_S)
        self.took.append(time.perf_counter() - start)
        return sample


def lindley(arrivals: list[float], services: list[float]) -> list[float]:
    """Seconds that each customer waits in the queue of one server (Lindley, 1952)."""
    waits = [0.0]
    for before, now, service in zip(arrivals, arrivals[1:], services, strict=False):
        waits.append(max(0.0, waits[-1] + service - (now - before)))
    return waits


def queries(trace: str) -> list[tuple[float, float]]:
    """Seconds of each query in LoadGen's trace: when it was due, and until it was answered."""
    found = re.findall(r'"name":"Sample".*?"ph":"b".*?"ts":([\d.]+).*?"complete_ns":(\d+)', trace)
    return sorted((float(due) / 1e6, int(took) / 1e9) for due, took in found)


def test_waiting_times_are_those_of_lindleys_recursion(tmp_path: Path) -> None:
    """Sums, because one late thread shifts a few of them; the recursion takes LoadGen's arrivals
    and the fake's own times, so only what the lane adds between two queries is ours."""
    load, fake = Load("server", 0.6 / SERVICE_S, 1e3, 0.0, 50, trace=True), Sleeper()
    found = drive(load, fake, lambda *_: None, 4, 1, tmp_path)
    logged = queries((tmp_path / TRACE).read_text())
    assert len(logged) == len(fake.took) == found["queries"] == 50
    expected = lindley([due for due, _ in logged], fake.took)
    waited = [took - service for (_, took), service in zip(logged, fake.took, strict=True)]
    assert sum(expected) > 10 * SERVICE_S  # there was a queue
    assert sum(waited) == pytest.approx(sum(expected), rel=0.05)
    assert found["mean_ms"] == pytest.approx(1e3 * sum(took for _, took in logged) / 50, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*KEPT, TRACE))


def test_lanes_answer_at_the_same_time(tmp_path: Path) -> None:
    found = drive(Load("offline", 1, 1, 0, 24), Sleeper(), lambda *_: None, 3, 8, tmp_path)
    assert found["queries"] == 24 and 4 / SERVICE_S < found["per_s"] <= 8 / SERVICE_S
    assert found["valid"] and (tmp_path / KEPT[0]).exists()


def test_early_stopping_needs_enough_queries(tmp_path: Path) -> None:
    few, enough = (
        drive(Load("single-stream", 1, 1, 0, n), int, lambda *_: None, 3, 1, tmp_path / str(n))
        for n in (100, QUERIES)
    )
    assert few["p90_early_ms"] >= few["p90_ms"] and few["p99_early_ms"] is None
    assert enough["p99_early_ms"] >= enough["p99_ms"] > 0


def test_wrong_answers_and_failures_end_a_test(tmp_path: Path) -> None:
    def check(sample: int, answer: int) -> None:
        if answer == 2:
            raise BackendError("another ranking than alone")

    load = Load("offline", 1, 1, 0, 20)
    with pytest.raises(BackendError, match="another ranking"):
        drive(load, int, check, 3, 2, tmp_path)
    with pytest.raises(ZeroDivisionError):  # a bug of ours surfaces
        drive(load, lambda sample: 1 // sample, lambda *_: None, 3, 2, tmp_path)


def test_who_was_turned_away_is_counted(tmp_path: Path) -> None:
    def ask(sample: int) -> int:
        if sample == 0:
            raise BusyError("full")
        return sample

    found = drive(Load("offline", 1, 1, 0, 40), ask, lambda *_: None, 2, 2, tmp_path)
    assert found["queries"] == 40 and 0 < found["refused"] < 40


@pytest.mark.parametrize(("limit", "found"), [(0.0, None), (41.0, 40.0), (1e9, 77.5)])
def test_the_highest_rate_is_searched_by_halving(limit: float, found: float | None) -> None:
    tried: list[float] = []
    assert highest_rate(lambda rate: tried.append(rate) or rate <= limit, 80.0) == found
    assert len(tried) == 5 and tried[0] == 40.0


@pytest.mark.parametrize(("lowest", "tried"), [(0.0, 5), (10.0, 3), (11.0, 2), (99.0, 1)])
def test_low_rates_are_not_tried_after_the_first(lowest: float, tried: int) -> None:
    rates: list[float] = []
    assert highest_rate(lambda rate: bool(rates.append(rate)), 80.0, lowest) is None
    assert len(rates) == tried
    assert highest_rate(lambda rate: rate <= 41, 80.0, lowest) == 40.0  # one was kept: it goes on
