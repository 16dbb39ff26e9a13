"""`dsgnn-bench load` on stand-ins of known answers, and one new process with the real model."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("mlperf_loadgen")
from dsgnn.benchmarks import environment
from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.load import loadgen, meters
from dsgnn.benchmarks.load import run as load
from dsgnn.benchmarks.load.loadgen import KEPT
from dsgnn.benchmarks.report.page import report
from dsgnn.benchmarks.results import load as read
from dsgnn.runtime.errors import ArtifactError, BackendError, OptionError

TAKES_S = 0.01


def objects(photo: bytes) -> list[dict[str, Any]]:
    """Of a fake ranking: two objects that are another pair for each photo."""
    return [
        {"rank": rank, "saliency": rank / 4, "bbox": [len(photo) % 100, rank, 9, 9]}
        for rank in (2, 1)
    ]


class FakeRanker:
    """`Ranker`, as far as a load needs it; from its seventh call on it is broken if it is told to
    be. Six photos are ranked alone."""

    def __init__(self, model: Path | None = None, **options: Any) -> None:
        self.artifact = SimpleNamespace(path=Path(model or "nano.onnx"), status="verified")
        if "unverified" in self.artifact.path.name:
            self.artifact.status = "unverified"
        self.backend = SimpleNamespace(threads=options.get("threads", 2), device="cpu")
        self.calls = 0

    def __enter__(self) -> "FakeRanker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def describe(self) -> dict[str, str]:
        return {"file": self.artifact.path.name, "backend": "onnxruntime"}

    def __call__(self, photo: bytes) -> Any:
        self.calls += 1
        time.sleep(TAKES_S)
        found = objects(photo)
        if "wrong" in self.artifact.path.name and self.calls > 6:
            found[0]["rank"], found[1]["rank"] = 1, 2
        return SimpleNamespace(to_dict=lambda: {"objects": found})


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {"cold_s": 0.5, "first_ms": 20.0, "warm_ms": 10.0}
    monkeypatch.setattr(load, "Ranker", FakeRanker)
    monkeypatch.setattr(load, "cold_start", lambda *_: started)
    monkeypatch.setattr(meters, "WATCH_S", 0.01)
    monkeypatch.setattr(load, "QUIET_S", 0.0)
    halve = loadgen.highest_rate
    monkeypatch.setattr(loadgen, "highest_rate", lambda *given: halve(*given, steps=2))


@contextmanager
def server(answer: Any) -> Iterator[str]:
    """answer: gives (status, objects) of a photo."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/rank"
            status, found = answer(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"images": [{"objects": found}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


SHORT = {"duration_s": 0.0, "queries": 24, "p99_ms": 1e4}


def test_an_artifact_in_three_scenarios(fakes: None, tmp_path: Path) -> None:
    options = ["--duration", "0", "--queries", "24", "--lanes", "3", "--p99", "10000"]
    result = CliRunner().invoke(main, ["load", "mine.onnx", "--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    results = read(tmp_path / "load.json")
    single, offline, served = results["rows"]
    names = [row["scenario"] for row in results["rows"]]
    assert names == ["single-stream", "offline", "server"]
    assert [row["lanes"] for row in results["rows"]] == [1, 3, 3]
    assert single["per_s"] <= 1 / TAKES_S and single["p50_ms"] >= 1e3 * TAKES_S
    assert single["queries"] == 24 and offline["per_s"] <= 3 / TAKES_S
    # 24 queries are too few for LoadGen to say that 99% keep the limit
    assert results["highest_per_s"] is None and not served["valid"]
    rates = [tried["rate_per_s"] for tried in results["search"]]
    assert rates == pytest.approx([offline["per_s"] / 2**n for n in (1, 2)])
    assert "No rate that was tried keeps a p99 of 10000 ms." in result.output
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("mlperf*"))
    assert kept == sorted(f"loadgen/{name}/{file}" for name in names for file in KEPT)
    text = report([tmp_path / "load.json"], tmp_path / "report.html", None)
    assert "**Load.** " in text and " mine.onnx, onnxruntime, 2 threads an inference" in text
    assert "| single-stream | 1 | 24 | " in text and "| INVALID | " in text
    assert "<td>single-stream</td>" in (tmp_path / "report.html").read_text()
    with pytest.raises(OptionError, match=r"load.json exists"):
        load.load("mine.onnx", tmp_path, **SHORT)


def test_the_report_says_that_the_machine_was_busy(fakes: None, tmp_path: Path) -> None:
    load.load("mine.onnx", tmp_path, **SHORT)
    text = (tmp_path / "load.json").read_text()
    results = json.loads(text)
    for share, said in ((0.4, True), (0.01, False), (None, False)):
        results["conditions"]["busy_before"] = share
        (tmp_path / "load.json").write_text(json.dumps(results))
        found = report([tmp_path / "load.json"], None, None)
        assert ("busy before it began (40% of its processor time)" in found) == said


def test_a_server_that_runs(fakes: None, tmp_path: Path) -> None:
    def answer(photo: bytes) -> tuple[int, Any]:
        time.sleep(TAKES_S)
        return 200, objects(photo)

    with server(answer) as address:
        results = load.load(address, tmp_path, lanes=4, **{**SHORT, "queries": 24})
    assert results["target"] == "server" and results["start"]["cold_s"] is None
    assert [row["refused"] for row in results["rows"]] == [0, 0, 0]
    assert results["rows"][0]["p50_ms"] >= 1e3 * TAKES_S


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[:1], "otherwise under load"),
        (lambda found: [{**item, "saliency": item["saliency"] + 0.01} for item in found], "other"),
        (lambda found: [{**item, "rank": 3 - item["rank"]} for item in found], "otherwise under"),
    ],
)
def test_a_fast_server_that_is_wrong_cannot_win(
    fakes: None, tmp_path: Path, change: Any, message: str
) -> None:
    with (
        server(lambda photo: (200, change(objects(photo)))) as address,
        pytest.raises(BackendError, match=message),
    ):
        load.load(address, tmp_path, lanes=2, **SHORT)
    assert not (tmp_path / "load.json").exists()


def test_an_artifact_that_is_wrong_under_load_cannot_win(fakes: None, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"wrong.onnx ranks photo \d otherwise under load"):
        load.load("wrong.onnx", tmp_path, **SHORT)


def test_a_server_that_turns_photos_away_or_fails(fakes: None, tmp_path: Path) -> None:
    with (
        server(lambda photo: (500, [])) as address,
        pytest.raises(BackendError, match="answered 500"),
    ):
        load.load(address, tmp_path, **SHORT)
    asked = iter(range(10**6))
    busy_after = load.WARM + 30
    with (
        server(lambda p: (200 if next(asked) < busy_after else 503, objects(p))) as address,
        pytest.raises(BackendError, match="turned photos away"),
    ):
        load.load(address, tmp_path, lanes=2, **SHORT)


def test_what_cannot_be_measured_is_refused(fakes: None, tmp_path: Path) -> None:
    for address in (
        *("http://example.org", "https://127.0.0.1:8000", "http://127.0.0.1:8000/rank"),
        "http://127.0.0.1:port",
    ):
        with pytest.raises(OptionError, match="expected a server on this machine"):
            load.load(address, tmp_path, **SHORT)
    with pytest.raises(ArtifactError, match="unverified"):
        load.load("unverified.onnx", tmp_path, **SHORT)
    with pytest.raises(OptionError, match="must be positive"):
        load.load("mine.onnx", tmp_path, p99_ms=0)


def test_a_new_process_loads_and_ranks() -> None:
    found = load.cold_start(None, {"threads": 1})
    assert found["cold_s"] > 0.05 and found["first_ms"] > 0 and found["warm_ms"] > 0
    with pytest.raises(BackendError, match="could not rank"):
        load.cold_start(Path("nowhere.onnx"), {})


def test_energy_memory_and_listeners_are_read_where_they_can_be(tmp_path: Path) -> None:
    assert meters.joules(tmp_path) == {}  # here is no GPU, and there no meter
    assert meters.resident_mib(1, tmp_path) is None is meters.listener(80, tmp_path)
    for name, text in (("intel-rapl:0", "5000000"), ("intel-rapl:0:0", "1"), ("dtpm", "1")):
        (tmp_path / "sys/class/powercap" / name).mkdir(parents=True)
        (tmp_path / "sys/class/powercap" / name / "energy_uj").write_text(text)
    assert meters.joules(tmp_path) == {"rapl:0": 5.0}
    for pid, kib, children in ((7, 2048, "8 9"), (8, 1024, ""), (10, 9, "")):  # 9 has ended
        (tmp_path / f"proc/{pid}/task/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/status").write_text(f"Name: x\nVmRSS:\t{kib} kB\n")
        (tmp_path / f"proc/{pid}/task/{pid}/children").write_text(children)
    assert meters.resident_mib(7, tmp_path) == 3.0


def test_the_listener_of_a_port_is_found() -> None:
    with server(lambda _: (200, [])) as address:
        assert meters.listener(int(address.rpartition(":")[2])) == os.getpid()


def test_a_busy_machine_is_told() -> None:
    first = {"ticks": {"total": 100, "idle": 50, "steal": 0}}
    later = {"ticks": {"total": 300, "idle": 200, "steal": 0}}
    assert environment.busy(first, later) == 0.25
    assert environment.busy(first, {"ticks": None}) is None is environment.busy(first, first)
