"""The arithmetic of the scaling benchmark, on arms of known times."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsgnn.benchmarks import scaling
from dsgnn.benchmarks.cli import main
from dsgnn.benchmarks.report.page import report
from dsgnn.benchmarks.results import load


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPUs; the single process slows down from 10 ms per image by 1 ms each turn."""
    times = iter(range(10, 1000))

    @contextmanager
    def runs(*_: object) -> Iterator[tuple[int, float]]:
        yield 8000, 4.0

    class Fake:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __call__(self, photo: Path) -> None:
            pass

        def describe(self) -> dict[str, str]:
            return {"file": "nano.onnx"}

    fakes = {
        "Ranker": Fake,
        "single": lambda *_: float(next(times)),
        "cluster": runs,
        "server": runs,
        "ray_data": lambda ray, model, sources, workers, threads: (30.0 / workers, 2.5),
        "ray_serve": lambda port, sources, clients, start: (40.0 if clients == 1 else 20.0, start),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(scaling, name, fake)
    monkeypatch.setattr(scaling.os, "cpu_count", lambda: 2)


def test_each_arm_is_held_against_the_turns_around_it(arms: None, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["scaling", "--out", str(tmp_path), "--images", "16", "--rounds", "2"]
    )
    assert result.exit_code == 0, result.output
    rows = load(tmp_path / "scaling.json")["rows"]
    known = [(row["name"], row["workers"], row["clients"], row["turns"]) for row in rows]
    assert known == [
        ("Ray Data", 1, 0, [[10, 30, 11], [12, 30, 13]]),
        ("Ray Data", 2, 0, [[14, 15, 15], [16, 15, 17]]),
        ("Ray Serve", 1, 1, [[18, 40, 19], [20, 40, 21]]),
        ("Ray Serve", 1, 8, [[22, 20, 23], [24, 20, 25]]),
    ]
    first = rows[0]
    assert (first["ms_per_image"], first["single_ms"], first["start_s"]) == (30, 11.5, 2.5)
    assert first["overhead_ms"] == 18.5
    assert first["speed_up"] == pytest.approx((10.5 + 12.5) / 2 / 30)
    assert [row["start_s"] for row in rows] == [2.5, 2.5, 4, 4]
    line = "| Ray Serve, 8 clients | 1 × 1 threads | 20.0 | 23.5 | -3.5 | 1.1"
    assert line in result.output
    text = report([tmp_path / "scaling.json"], tmp_path / "report.html", None)
    assert line in text and re.search(
        r"^\*\*Ray\.\*\* .* nano.onnx, 16 images a turn; ", text, re.M
    )
    page = (tmp_path / "report.html").read_text()
    assert "<td>Ray Serve, 8 clients</td><td>1 × 1 threads</td><td>20.0</td>" in page


def test_wrong_use(arms: None, tmp_path: Path) -> None:
    arguments = ["scaling", "--out", str(tmp_path)]
    few = CliRunner().invoke(main, [*arguments, "--images", "15"])
    assert few.exit_code == 2 and "at least 16 images and one round, got 15 and 3" in few.output
    (tmp_path / "scaling.json").write_text(json.dumps({}))
    there = CliRunner().invoke(main, arguments)
    assert there.exit_code == 2 and "scaling.json exists: give another folder, or" in there.output
