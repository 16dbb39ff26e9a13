"""Warm-up, interleaving and statistics on a fake clock with fake runners."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import ttest_ind

from dsgnn.benchmarks.timing import (
    Plan,
    Sample,
    Turn,
    drift,
    inference,
    interleave,
    medians,
    ratio,
    split_half,
    summarise,
    warm_up,
)


class Machine:
    """A clock that moves only when a runner works; `calls` says who worked, in order."""

    def __init__(self) -> None:
        self.now, self.calls = 100.0, []

    def clock(self) -> float:
        return self.now

    def runner(self, name: str, seconds: float):
        def run() -> Sample:
            self.calls.append(name)
            self.now += seconds
            return {"compute": 900 * seconds, "end_to_end": 1000 * seconds}

        return run


def turns_of(machine: Machine, plan: Plan, done=(), **seconds: float) -> list[Turn]:
    runners = {name: machine.runner(name, each) for name, each in seconds.items()}
    return list(interleave(runners, plan, machine.clock, done))


def test_percentiles_are_those_of_the_definition() -> None:
    found = summarise([float(value) for value in range(101)])
    assert (found["p50"], found["p90"], found["p95"], found["p99"]) == (50, 90, 95, 99)
    assert (found["min"], found["mean"], found["n"]) == (0, 50, 101)
    assert found["std"] == pytest.approx(np.sqrt(sum((v - 50) ** 2 for v in range(101)) / 100))
    assert found["cv"] == pytest.approx(found["std"] / 50)


def test_percentiles_are_interpolated() -> None:
    assert summarise([1.0, 2.0, 4.0, 8.0])["p90"] == pytest.approx(4 + 0.7 * 4)
    assert summarise([3.0]) == {
        "mean": 3,
        "std": 0,
        "min": 3,
        "p50": 3,
        "p90": 3,
        "p95": 3,
        "p99": 3,
        "cv": 0,
        "n": 1,
    }


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_no_statistics_of_nothing(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite times"):
        summarise(values)


def test_every_model_has_one_turn_per_round_in_changing_order() -> None:
    turns = turns_of(Machine(), Plan(duration_s=0, runs=8, rounds=8), a=0.1, b=0.2, c=0.3)
    orders = [[t.name for t in turns[i : i + 3]] for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert [t.round for t in turns] == [i // 3 for i in range(24)]
    assert len({tuple(order) for order in orders}) > 1
    again = turns_of(Machine(), Plan(duration_s=0, runs=8, rounds=8), a=0.1, b=0.2, c=0.3)
    assert [t.name for t in again] == [t.name for t in turns]


def test_a_turn_begins_with_one_untimed_run() -> None:
    machine = Machine()
    turns = turns_of(machine, Plan(duration_s=0, runs=6, rounds=2), a=0.1, b=0.1)
    assert [len(t.samples) for t in turns] == [3] * 4
    assert Counter(machine.calls) == {"a": 8, "b": 8}
    assert all(len(set(machine.calls[i : i + 4])) == 1 for i in range(0, 16, 4))


def test_by_time_and_by_count() -> None:
    plan = Plan(duration_s=10, runs=20, rounds=5)
    timed = Counter()
    for turn in turns_of(Machine(), plan, fast=0.015625, slow=3.0):
        timed[turn.name] += len(turn.samples)
    assert timed["fast"] == 640  # ten seconds of it
    assert timed["slow"] == 20  # twenty runs of it, though they take a minute


@pytest.mark.parametrize("runs, rounds", [(1, 2), (3, 3), (10, 10), (30, 10)])
def test_few_runs_take_few_rounds(runs: int, rounds: int) -> None:
    plan = Plan.of(0, runs, 0)
    assert plan.rounds == rounds
    assert len(turns_of(Machine(), plan, a=60)) == rounds


def test_rounds_that_are_done_are_left_out_and_the_others_unchanged() -> None:
    plan = Plan(duration_s=0, runs=4, rounds=4, seed=3)
    whole = turns_of(Machine(), plan, a=0.1, b=0.2)
    rest = turns_of(Machine(), plan, {0, 2}, a=0.1, b=0.2)
    assert [(t.round, t.name) for t in rest] == [
        (t.round, t.name) for t in whole if t.round in (1, 3)
    ]


def test_warm_up_ends_by_time_and_by_count_and_tells_the_first_run() -> None:
    machine = Machine()
    assert warm_up(machine.runner("a", 0.25), Plan(warm_up_s=1), machine.clock) == 250
    assert machine.calls == ["a"] * 4
    machine = Machine()
    warm_up(machine.runner("a", 5.0), Plan(warm_up_s=1, warm_up_runs=3), machine.clock)
    assert machine.calls == ["a"] * 3


def test_a_plan_that_measures_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds ≥ 2"):
        Plan(rounds=1)


def test_medians_are_by_round() -> None:
    samples = {"round": [0, 0, 0, 2, 2], "compute": [1.0, 9.0, 2.0, 4.0, 6.0]}
    assert medians(samples).tolist() == [2, 5]


def test_inference_includes_the_transfers_that_some_forms_time_apart() -> None:
    whole = {"round": [0, 0], "compute": [3.0, 4.0], "decode": [9.0, 9.0]}
    parts = {
        "round": [0, 0],
        "host_to_device": [1.0, 1.0],
        "compute": [1.5, 2.0],
        "device_to_host": [0.5, 1.0],
        "end_to_end": [9.0, 9.0],
    }
    assert inference(whole).tolist() == inference(parts).tolist() == [3, 4]
    assert medians(parts).tolist() == [3.5]


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift(np.array([10.0] * 9)) == 0
    assert drift(np.array([10.0, 10, 10, 50, 50, 50, 12, 12, 12])) == pytest.approx(0.2)


def test_the_interval_of_a_steady_ratio_is_narrow() -> None:
    a = np.linspace(10, 20, 10)  # the machine slows down for both alike
    found = ratio(a, 0.5 * a, paired=True)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    alone = ratio(a, 0.5 * a, paired=False)  # as if from two runs, it cannot be told apart
    assert alone.value == pytest.approx(0.5) and alone.low < 0.48 and alone.high > 0.52


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("rounds", [2, 4, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(rounds: int, paired: bool) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):
        a, b = np.exp(rng.normal(0, 0.1, (2, rounds)))
        found = ratio(a, 0.8 * b, paired)
        held += found.low <= 0.8 <= found.high
    assert 0.935 <= held / 2000 <= 0.99


def test_unpaired_intervals_are_welchs() -> None:
    a, b = np.array([10.0, 12, 11, 15]), np.array([7.0, 9, 8])
    theirs = ttest_ind(np.log(b), np.log(a), equal_var=False).confidence_interval()
    found = ratio(a, b, paired=False)
    assert (found.low, found.high) == pytest.approx((np.exp(theirs.low), np.exp(theirs.high)))


def test_paired_rounds_must_be_equal_in_number() -> None:
    with pytest.raises(ValueError, match="got 3 and 2"):
        ratio(np.ones(3), np.ones(2), paired=True)


def test_a_run_that_slows_as_a_whole_is_quiet() -> None:
    slowing = np.linspace(10, 20, 10)
    verdict = split_half({"base": slowing, "other": 0.7 * slowing}, "base")
    assert verdict["quiet"] and verdict["worst"] < 1e-9


def test_a_run_where_one_model_slows_is_noisy_and_names_it() -> None:
    slower = np.array([7.0] * 5 + [8.0] * 5)
    verdict = split_half({"base": np.full(10, 10.0), "other": slower}, "base")
    assert not verdict["quiet"] and verdict["worst"] == pytest.approx(1 / 7)
    assert verdict["why"].startswith("other: its time relative to base differs by 14.3%")


def test_one_model_alone_is_compared_with_itself() -> None:
    verdict = split_half({"only": np.array([10.0] * 5 + [11.0] * 5)}, "only")
    assert not verdict["quiet"] and verdict["worst"] == pytest.approx(0.1)
