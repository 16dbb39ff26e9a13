"""From subjects to latency.json, with fake subjects on a fake clock: resume and refusals too."""

import fcntl
import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pytest

from dsgnn.benchmarks import results
from dsgnn.benchmarks.forms import (
    Spec,
    open_subject,
    photos,
    run_once,
    specs,
)
from dsgnn.benchmarks.latency import add_floors, latency
from dsgnn.benchmarks.processes import Bench, BenchProcess, LateError
from dsgnn.benchmarks.timing import Plan
from dsgnn.runtime.artifact import sidecar_path
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import DsgnnError, FolderBusyError
from dsgnn.runtime.ranker import BUNDLED

from .fakes import Clockwork, FakeBench, FakeSubject

PLAN = Plan(duration_s=0.4, runs=8, rounds=4, warm_up_s=0)
MS = {"a": 10.0, "b": 20.0}


def opener(clock: Clockwork, **options: Any) -> Callable[[Spec], FakeBench]:
    def open_bench(spec: Spec) -> FakeBench:
        return FakeBench(clock, spec.model, MS.get(spec.model, 10.0), **options)

    return open_bench


def measured(out: Path, names: str = "ab", batches=(1, 2), resume=False, **options: Any) -> Any:
    clock = Clockwork()
    found = [Spec("artifact", name) for name in names]
    return latency(
        found, batches, PLAN, out, resume=resume, clock=clock, open_bench=opener(clock, **options)
    )


def test_a_row_for_every_model_and_batch_size(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert [(row["subject"]["name"], row["batch"]) for row in found["rows"]] == [
        ("a", 1),
        ("b", 1),
        ("a", 2),
        ("b", 2),
    ]
    row = found["rows"][1]
    assert row["stages"]["compute"]["p50"] == pytest.approx(20.2)
    assert row["stages"]["end_to_end"]["p50"] == pytest.approx(22.2)
    assert row["images_per_s"] == pytest.approx(1e3 / row["stages"]["end_to_end"]["mean"])
    assert found["rows"][3]["images_per_s"] > row["images_per_s"]
    assert row["memory"]["load_mib"] == 200 and row["memory"]["host_mib"] > 150
    assert row["stationary"] and row["load_s"] == 0.5
    assert len(row["samples"]["compute"]) == row["stages"]["compute"]["n"] >= 8
    assert set(row["samples"]["round"]) == {0, 1, 2, 3}
    assert found["noise"]["1"]["quiet"]


def test_the_file_is_the_result_and_has_its_form(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert results.load(tmp_path / "latency.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, stop_after=40)
    lines = (tmp_path / "latency.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines[1:] if "samples" in json.loads(line)]
    assert kept and not (tmp_path / "latency.json").exists()
    found = measured(tmp_path, resume=True)
    row = found["rows"][0]
    first = next(turn for turn in kept if (turn["batch"], turn["name"]) == (1, "a"))
    start = len(first["samples"])
    assert row["samples"]["compute"][:start] == [s["compute"] for s in first["samples"]]
    assert [set(r["samples"]["round"]) for r in found["rows"]] == [{0, 1, 2, 3}] * 4
    assert not (tmp_path / "latency.jsonl").exists()


def test_an_incomplete_round_and_a_cut_line_are_measured_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, batches=(1,), stop_after=18)
    path = tmp_path / "latency.jsonl"
    path.write_text(path.read_text() + '{"batch": 1, "round": 9, "na')
    header = json.loads(path.read_text().splitlines()[0])
    log = results.TurnLog(path, header, {"a", "b"}, resume=True)
    by_round: dict[int, set[str]] = {}
    for turn in log.turns[1]:
        by_round.setdefault(turn.round, set()).add(turn.name)
    log.close(finished=False)
    assert set(map(frozenset, by_round.values())) == {frozenset("ab")}


def test_an_unfinished_run_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, stop_after=40)
    with pytest.raises(DsgnnError, match="unfinished run: resume it, or give another"):
        measured(tmp_path)


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(FolderBusyError, match="another run is writing into"):
        measured(tmp_path)
    assert measured(tmp_path)["rows"]


def test_a_run_of_another_file_is_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, stop_after=40)
    with pytest.raises(DsgnnError, match=r"another run, models differ"):
        measured(tmp_path, resume=True, sha256="other")


def test_finished_results_are_not_overwritten(tmp_path: Path) -> None:
    measured(tmp_path)
    with pytest.raises(DsgnnError, match="exists: give another folder"):
        measured(tmp_path)


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DsgnnError, match="two models are called 'a'"):
        measured(tmp_path, "aa")


def test_stages_are_timed_one_after_the_other() -> None:
    clock = Clockwork()
    subject = FakeSubject(Spec("artifact", "model"))
    sample = run_once(subject, photos()[:2], clock)
    assert sample == {
        "decode": 0,
        "preprocess": 0,
        "compute": 250,
        "postprocess": 0,
        "end_to_end": 250,
    }
    assert subject.seen[0].shape == (2, 96, 128, 3)


def test_photos_take_turns() -> None:
    bench = Bench(Spec("artifact", "model"), FakeSubject, Clockwork())
    assert len(photos()) == 6
    for _ in range(2):
        bench.run(4)
    seen = np.concatenate(bench._subject.seen)
    for number in range(1, 8):
        assert (seen[number] == seen[0]).all() == (number == 6)


@pytest.fixture
def fakes_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process finds `FakeSubject` under the name it has here."""
    depth = FakeSubject.__module__.count(".")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[depth]))


def test_a_worker_is_a_process_that_answers(fakes_in_workers: None) -> None:
    with BenchProcess(Spec("artifact", "model"), FakeSubject) as worker:
        assert worker.facts["name"] == "model" and worker.facts["load_s"] >= 0
        assert worker.run(1).keys() >= {"decode", "compute", "end_to_end"}
        assert worker.peaks()["device_mib"] is None
        process = worker._process
        assert process.pid and process.is_alive()
    assert not process.is_alive()


def test_a_worker_that_cannot_open_or_dies_says_so(fakes_in_workers: None) -> None:
    with pytest.raises(DsgnnError, match=r"broken \(artifact\): this one cannot be opened"):
        BenchProcess(Spec("artifact", "broken"), FakeSubject)
    with (
        BenchProcess(Spec("artifact", "dies"), FakeSubject) as worker,
        pytest.raises(DsgnnError, match="ended with 9.*ran out of memory"),
    ):
        worker.run(1)


def test_a_worker_is_not_waited_for_when_the_time_is_up(fakes_in_workers: None) -> None:
    """`torch.compile` may take minutes, and the table of a GPU is due."""
    with BenchProcess(Spec("artifact", "model"), FakeSubject) as worker:
        worker.until = perf_counter() + 60
        assert worker.run(1)
        os.kill(worker._process.pid, signal.SIGSTOP)  # alive, and it does not answer
        worker.until = perf_counter() + 0.1
        for _ in range(2):  # not that it ran out of memory
            with pytest.raises(DsgnnError, match=r"model \(artifact\): no answer when the time"):
                worker.run(1)
            worker.until = None
        worker._process.join(30)
        assert worker._process.exitcode == -signal.SIGKILL


def test_what_a_worker_started_ends_with_it(fakes_in_workers: None, tmp_path: Path) -> None:
    """`torch.compile` has processes of its own, which went on for minutes beside the next rows."""
    for case in ("interrupted", "late"):
        path = tmp_path / case
        with (
            pytest.raises(KeyboardInterrupt if case == "interrupted" else LateError),
            BenchProcess(Spec("artifact", "parent", export=str(path)), FakeSubject) as worker,
            open(path) as held,
        ):
            worker.run(1)
            with pytest.raises(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if case == "interrupted":
                raise KeyboardInterrupt
            os.kill(worker._process.pid, signal.SIGSTOP)
            worker.until = perf_counter()
            worker.run(1)
        with open(path) as held:
            give_up = perf_counter() + 30
            while True:
                with suppress(BlockingIOError):
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                assert perf_counter() < give_up, "what the worker started goes on"
                sleep(0.05)


def test_a_bug_in_a_worker_is_no_refusal(fakes_in_workers: None) -> None:
    """It surfaces with the traceback of the process it was in."""
    with pytest.raises(RuntimeError, match="(?s)a bug, not a refusal.*Traceback.*fakes.py") as bug:
        BenchProcess(Spec("artifact", "planted"), FakeSubject)
    assert not isinstance(bug.value, DsgnnError)


def test_what_is_asked_for_becomes_subjects() -> None:
    found = specs(
        ["m.onnx", "c.safetensors"],
        ["nano"],
        ["upstream", "deploy"],
        ["onnxruntime", "openvino"],
        threads=1,
    )
    assert [(s.form, s.model, s.synthetic, s.backend) for s in found] == [
        ("upstream", "c.safetensors", False, "auto"),
        ("deploy", "c.safetensors", False, "auto"),
        ("upstream", "nano", True, "auto"),
        ("deploy", "nano", True, "auto"),
        ("artifact", "m.onnx", False, "onnxruntime"),
        ("artifact", "m.onnx", False, "openvino"),
    ]
    assert all(spec.threads == 1 for spec in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], ["deploy"], []), "give a model file, or a configuration"),
        (([], ["nano"], ["deploy"], ["openvino"]), "a backend is for exported artifacts"),
        (([], ["nano"], ["cuda-graph"], []), "choose device cuda, or leave them out"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(DsgnnError, match=message):
        specs(*arguments)


def test_an_unverified_artifact_is_refused_or_marked(tmp_path: Path) -> None:
    path = tmp_path / "nano.onnx"
    path.write_bytes(BUNDLED.read_bytes())
    assert not sidecar_path(path).exists()
    spec = Spec("artifact", str(path), backend="onnxruntime", threads=1)
    with pytest.raises(DsgnnError, match="unverified.*allow unverified artifacts"):
        open_subject(spec)
    subject = open_subject(replace(spec, allow_unverified=True))
    assert subject.facts["status"] == "unverified"


def test_a_missing_gpu_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DsgnnError, match="sees no GPU.*choose device cpu"):
        open_subject(Spec("deploy", "nano", True, device="cuda"))


def test_a_time_on_a_cpu_has_a_floor_where_its_network_is_known() -> None:
    """The rates are real ones; a network's own answers cannot come faster than they allow."""
    clock, spec = Clockwork(), Spec("upstream", "nano", True, threads=1)
    benches: dict[str, Any] = {
        name: FakeBench(clock, name, 10.0, shape=(64, 128), **changes)
        for name, changes in {
            "network": {},
            "half": {"precision": "w16"},
            "rounded": {"backend": "openvino-bf16"},
            "int8": {"precision": "int8"},
            "stranger": {"source_sha256": "another"},
            "gpu": {"device": "cuda"},
        }.items()
    }
    rows = [{"subject": bench.facts, "batch": 2, "floor": None} for bench in benches.values()]
    add_floors(rows, benches, {"source": spec})
    assert [row["floor"] is not None for row in rows] == [True, True, False, False, False, False]
    floor, half = rows[0]["floor"], rows[1]["floor"]
    rate = max(floor["product_tflops"], floor["convolution_tflops"])
    assert floor["operations_ms"] == pytest.approx(floor["operations"] / rate / 1e9)
    assert floor["ms"] >= floor["operations_ms"] == half["operations_ms"]
    assert half["bytes_ms"] < floor["bytes_ms"]
