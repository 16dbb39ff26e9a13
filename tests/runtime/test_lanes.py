"""Photos side by side: how many, in which order, and what becomes of them when it ends early."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.ranking import Ranking
from dsgnn.runtime.run import lanes
from dsgnn.runtime.run.cli import main
from dsgnn.runtime.run.lanes import cores, lanes_for, memory_bytes, side_by_side
from dsgnn.runtime.run.loop import Outcome, rank_sources

WAIT_S = 60  # far longer than anything here takes


def files_of(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        (
            {  # the group around it has less
                "proc/self/cgroup": "0::/system.slice/job\n",
                "sys/fs/cgroup/system.slice/job/cpu.max": "600000 100000\n",
                "sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
            },
            3,
        ),
        (
            {  # version 1, in a container that is listed under its name on the host
                "proc/self/cgroup": "5:memory:/docker/f00\n4:cpu,cpuacct:/docker/f00\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_are_those_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores(files_of(tmp_path, files)) == expected


def test_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    everything = memory_bytes(tmp_path)
    files_of(tmp_path, {"proc/self/cgroup": "3:memory:/a\n0::/b\n"})
    files_of(tmp_path, {"sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{1 << 62}\n"})
    assert memory_bytes(tmp_path) == (everything or 1 << 62)
    files_of(tmp_path, {"sys/fs/cgroup/b/memory.max": "max\n"})
    files_of(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "70000000\n"})
    assert memory_bytes(tmp_path) == 70_000_000


@pytest.mark.parametrize(
    ("has", "asked", "expected"),
    [
        ((16, 64 << 30), (1,), 17),
        ((16, 64 << 30), (2,), 9),
        ((16, 64 << 30), (32,), 2),
        ((16, 64 << 30), (1, "cuda:0"), 4),
        ((16, 5 << 30), (1,), 5),
        ((16, 1), (1,), 1),
        ((2, None), (1,), 3),
        ((2, None), (1, "cpu", 9), 3),
        ((2, None), (1, "cpu", 8), 2),
        ((2, None), (1, "cpu", 0), 1),
    ],
)
def test_how_many_lanes(
    monkeypatch: pytest.MonkeyPatch, has: tuple, asked: tuple, expected: int
) -> None:
    monkeypatch.setattr(lanes, "cores", lambda: has[0])
    monkeypatch.setattr(lanes, "memory_bytes", lambda: has[1])
    assert lanes_for(*asked) == expected


def test_eight_lanes_do_eight_at_once_and_in_order() -> None:
    """Every eight meet, so none of the lanes idles; those that meet later come out later."""
    meeting = threading.Barrier(8)

    def stages(number: int) -> int:
        for _ in ("decode", "rank", "save"):
            meeting.wait(WAIT_S)
        return -number

    pairs = side_by_side(stages, range(64), 8)
    assert [(item, result()) for item, result in pairs] == [(n, -n) for n in range(64)]


def test_eight_lanes_are_busy() -> None:
    """Stages that sleep, of uneven length: the lanes work at .9 of what they could at least."""
    busy: list[float] = []

    def stages(number: int) -> None:
        start = time.perf_counter()
        for part in (1, 2 + number % 3, 1):
            time.sleep(0.03 * part)
        busy.append(time.perf_counter() - start)

    start = time.perf_counter()
    for _, result in side_by_side(stages, range(160), 8):
        result()
    assert sum(busy) >= 0.9 * 8 * (time.perf_counter() - start)


def test_what_is_taken_in_advance_is_bounded() -> None:
    given = 0

    def numbers() -> Iterator[int]:
        nonlocal given
        while given < 100:
            given += 1
            yield given

    with closing(side_by_side(lambda number: number, numbers(), 3)) as pairs:
        for told, (_, result) in enumerate(pairs):
            assert result() == told + 1 and given - told <= 6


@pytest.mark.parametrize("many", [1, 4])
def test_an_error_comes_at_its_turn(many: int) -> None:
    def invert(number: int) -> float:
        return 1 / number

    got: list[object] = []
    for _, result in side_by_side(invert, [2, 0, 4], many):
        try:
            got.append(result())
        except ZeroDivisionError as error:
            got.append(type(error))
    assert got == [0.5, ZeroDivisionError, 0.25]


def test_what_is_under_way_at_the_end_is_told() -> None:
    """Not what had not begun, and not what failed."""
    begun, go_on = threading.Barrier(3), threading.Event()
    late: list[tuple[int, int]] = []

    def work(number: int) -> int:
        if number:
            begun.wait(WAIT_S)
            go_on.wait(WAIT_S)
        if number == 1:
            raise ZeroDivisionError
        return 10 * number

    pairs = side_by_side(work, range(9), 2, lambda *pair: late.append(pair))
    assert next(pairs)[0] == 0
    begun.wait(WAIT_S)
    threading.Timer(0.2, go_on.set).start()
    pairs.close()
    assert late == [(2, 20)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene) -> Path:
    """A folder to stand in, with photos/00.png … 11.png, whose red box grows."""
    folder = tmp_path / "here"
    (folder / "photos").mkdir(parents=True)
    for number in range(12):
        picture = scene(48, 64, red=(4, 4, 20 + number, 40))[..., ::-1]
        cv2.imwrite(str(folder / f"photos/{number:02}.png"), picture)
    monkeypatch.chdir(folder)
    return folder


def go(ranker: Ranker, many: int, kinds: tuple[str, ...] = ("overlay", "json"), **how) -> list:
    make_folder(Path("out"))
    found = find_sources(["photos"], Path("out"))
    return list(rank_sources(ranker, found.sources, Path("out"), kinds, lanes=many, **how))


def recorded() -> list[str]:
    return [
        Path(i["file"]).stem for i in json.loads(Path("out/results.json").read_text())["images"]
    ]


def drawn() -> list[str]:
    return sorted(path.name.partition(".")[0] for path in Path("out").glob("*.overlay.jpg"))


def test_lanes_change_nothing_in_the_files(place: Path, ranker: Ranker) -> None:
    Path("photos/05.png").write_bytes(b"no photo")
    kinds = ("overlay", "map", "masks", "crops", "json", "sheet")
    told, written = [], []
    for many in (1, 3):
        outcomes = go(ranker, many, kinds)
        told.append([(o.source.shown, o.objects, o.error) for o in outcomes])
        written.append({path.name: path.read_bytes() for path in Path("out").iterdir()})
    assert told[0] == told[1] and [bool(error) for *_, error in told[0]].count(True) == 1
    assert written[0] == written[1] and len(written[0]) == 11 * 4 + 2


def test_a_bug_in_a_lane_ends_the_run_and_leaves_what_was_done(
    place: Path, ranker: Ranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photo 04 waits until a later one is done, and meets the bug; all that is drawn is told."""
    later, draw = threading.Event(), Ranking.draw

    def broken(ranking: Ranking, image: np.ndarray) -> np.ndarray:
        last = int(np.flatnonzero(image[:, 10, 0] > image[:, 10, 1]).max())  # grows with the photo
        if last == number_row[4]:
            later.wait(WAIT_S)
            return None + 1
        if last > number_row[4]:
            later.set()
        return draw(ranking, image)

    number_row = [19 + number for number in range(12)]
    monkeypatch.setattr(Ranking, "draw", broken)
    with pytest.raises(TypeError, match="unsupported operand"):
        go(ranker, 3)
    assert "04" not in recorded() and recorded() == drawn()
    assert recorded()[:4] == ["00", "01", "02", "03"] and "05" in recorded()
    monkeypatch.setattr(Ranking, "draw", draw)
    outcomes = go(ranker, 3, skip_existing=True)
    assert sum(outcome.skipped for outcome in outcomes) >= 5
    assert recorded() == drawn() == [f"{number:02}" for number in range(12)]


def test_closing_a_run_in_lanes_leaves_what_was_done(place: Path, ranker: Ranker) -> None:
    make_folder(Path("out"))
    sources = find_sources(["photos"], Path("out")).sources
    outcomes = rank_sources(ranker, sources, Path("out"), lanes=3)
    assert isinstance(next(outcomes), Outcome)
    outcomes.close()
    assert recorded() == drawn() and 1 <= len(recorded()) < 12


def test_other_sources_keep_their_place(
    place: Path, ranker: Ranker, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input may be waited for, so it is read where its turn is."""
    stdin = io.TextIOWrapper(io.BytesIO(Path("photos/00.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    make_folder(Path("out"))
    names = ["photos/01.png", "photos/02.png", "-", "missing.png", "photos/03.png"]
    sources = find_sources(names, Path("out")).sources
    outcomes = list(rank_sources(ranker, sources, Path("out"), lanes=3))
    assert [outcome.source.shown for outcome in outcomes] == [
        n.replace("-", "stdin") for n in names
    ]
    assert [bool(outcome.error) for outcome in outcomes] == [False] * 3 + [True, False]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
def test_an_interrupted_run_in_lanes_is_resumed(place: Path, model: Path, photo) -> None:
    for number in range(120):
        cv2.imwrite(f"photos/{number:03}.jpg", photo[..., ::-1])
    command = ["photos", "-o", "out", "--model", str(model), "--lanes", "3", "--skip-existing"]
    journal = Path("out/.results.journal")
    process = subprocess.Popen(
        [Path(sys.executable).with_name("dsgnn-run"), *command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 2 * WAIT_S
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 20):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=2 * WAIT_S)[1]
    assert process.returncode == 1 and "Aborted!" in said and "Traceback" not in said
    done = recorded()
    assert 20 <= len(done) < 132 and done == drawn() and not journal.exists()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert (
        f"{132 - len(done)} images ranked" in result.output and "images per second" in result.output
    )
    assert recorded() == sorted(recorded()) and len(recorded()) == 132


def test_a_ranker_maps(scene, ranker: Ranker) -> None:
    photos = [scene(48, 64, red=(4, 4, 20 + number, 40)) for number in range(9)]
    expected = [ranking[0].box for ranking in ranker.batch(photos)]
    for how in ({}, {"lanes": 1}, {"lanes": 4}):
        assert [ranking[0].box for ranking in ranker.map(iter(photos), **how)] == expected
    assert list(ranker.map([])) == []


def test_an_error_of_a_map_comes_after_the_rankings_before_it(photo, ranker: Ranker) -> None:
    rankings = ranker.map([photo, photo, b"no photo", photo], lanes=3)
    assert len(next(rankings)) == len(next(rankings)) == 2
    with pytest.raises(InputError, match="it is not an image"):
        next(rankings)


@pytest.mark.parametrize("wrong", [0, -1])
def test_lanes_that_cannot_be(photo, ranker: Ranker, wrong: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must be at least 1, got {wrong}"):
        ranker.map([photo], lanes=wrong)
    result = CliRunner().invoke(main, ["photo.png", "-o", "out", "--lanes", str(wrong)])
    assert result.exit_code == 2 and "--lanes" in result.output


def test_no_thread_is_left(photo, ranker: Ranker) -> None:
    before = threading.active_count()
    rankings = ranker.map([photo] * 20, lanes=4)
    next(rankings)
    rankings.close()
    assert threading.active_count() == before
