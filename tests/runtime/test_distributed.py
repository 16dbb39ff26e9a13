"""Ray Data on this machine, for real: killed workers, tables of images, resumed jobs.

One local Ray of two CPUs serves all tests, so two workers of one thread each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from sockets import listening

from dsgnn.runtime import Ranker
from dsgnn.runtime.cluster import connect, job, parquet
from dsgnn.runtime.cluster.cli import main
from dsgnn.runtime.cluster.job import run_on_ray
from dsgnn.runtime.cluster.parquet import Parts
from dsgnn.runtime.cluster.probe import SAME
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.errors import BackendError, FolderBusyError, InputError
from dsgnn.runtime.photo.headers import READABLE
from dsgnn.runtime.run.loop import rank_sources

# Read when Ray is imported: dsgnn-batch sets it in time, here the import comes first.
os.environ[connect.ONE_MACHINE] = "0"
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray")


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """Ray on loopback, started as dsgnn-batch does, but of two CPUs wherever this runs."""
    with connect.cluster("local", "data", 2):
        yield


def make_images(folder: Path, count: int) -> list[Path]:
    """PNG files of 48 × 64, of one to three coloured boxes, no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        image = np.full((48, 64, 3), 128, np.uint8)
        for colour in ((20, 20, 230), (230, 20, 20), (20, 230, 20))[: 1 + index % 3]:
            (y, x), (h, w) = rng.integers(0, (32, 44)), rng.integers(6, (16, 20))
            image[y : y + h, x : x + w] = colour
        paths.append(folder / f"{index:03}.png")
        cv2.imwrite(str(paths[-1]), image)
    return paths


def rows_of(out: Path) -> list[dict]:
    return [row for part in sorted(out.glob("*")) for row in pq.read_table(part).to_pylist()]


def plain(ranker: Ranker, source: Path, out: Path) -> dict[str, dict]:
    """What dsgnn-run says of each image, by its name, but for what it resumes by."""
    out.mkdir()
    for _ in rank_sources(ranker, find_sources([str(source)], out).sources, out, ("json",)):
        pass
    images = json.loads((out / "results.json").read_text())["images"]
    for image in images:
        image.pop("made", None)
    return {image.pop("file"): image for image in images}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "map"], "No such option"),
        (["--device", "cuda:1"], "a worker's device is cpu or cuda"),
        (["--model", "none.onnx"], "there is no model file at none.onnx"),
        (["--cluster", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1: [Errno 111]"),
        (["--cluster", "photos"], "expected the address of a cluster as HOST:PORT, or auto, got"),
        (["--out", ""], "the name is empty"),
    ],
)
def test_wrong_use(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["photo.png", "-o", "out", *arguments])
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


def test_a_worker_is_killed_half_way(
    two_cpus: None, ranker: Ranker, model: Path, tmp_path: Path
) -> None:
    folder, loads, killed = tmp_path / "images", tmp_path / "loads", tmp_path / "killed"
    paths = make_images(folder, 500)
    paths[77].write_bytes(paths[77].read_bytes()[:60])
    loads.mkdir()

    class Mortal(Ranker):
        """Notes its process; the first that has ranked 125 images is killed in the next."""

        def __init__(self) -> None:
            super().__init__(model, "onnxruntime", "cpu", 1)
            (loads / f"{os.getpid()}-{os.urandom(4).hex()}").touch()
            self.ranked = 0

        def batch(self, images: list) -> list:
            if self.ranked == 125 and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            self.ranked += 1
            return super().batch(images)

    out = tmp_path / "out"
    out.mkdir()
    found = find_sources([str(folder)], out)
    summary = run_on_ray(Mortal, found.sources, out, workers=2, threads=1)

    assert (summary.images, len(summary.failures)) == (499, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(killed.read_text()), 0)
    # one before work is begun, one in each worker, one in the worker that came for the killed one
    assert len(list(loads.iterdir())) == 4
    rows = rows_of(out)
    assert sorted(row["file"] for row in rows) == sorted(map(str, paths))
    expected = plain(ranker, folder, tmp_path / "plain")
    for row in rows:
        assert row.pop("table") is None and row.pop("row") is None
        image = expected[row.pop("file")]
        for item in row["objects"] or ():
            assert item.pop("attention") is None  # this model does not know it
        if "error" in image:
            assert row == {"width": None, "height": None, "objects": None, "error": image["error"]}
        else:
            assert row == {**image, "error": None}


def test_rows_that_hold_nothing_have_errors_of_their_own(tmp_path: Path) -> None:
    """An error that is raised again and again holds on to the photos of every batch it was in."""
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"path": [None, None, "a\0.png", "b\0.png"]}), table)
    (piece,) = parquet.pieces_of_table(table, "a.parquet")
    errors = [error for _, error in piece.images(tmp_path)]
    assert all(isinstance(error, InputError) for error in errors)
    assert len({id(error) for error in errors}) == 4


def test_tables_bad_rows_and_a_resumed_job(
    two_cpus: None,
    ranker: Ranker,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bytes, paths and both from several row groups; Ctrl-C; the same command again."""
    monkeypatch.chdir(tmp_path)
    paths = make_images(tmp_path / "images", 30)
    blobs = [path.read_bytes() for path in paths]
    files = [f"images/{path.name}" for path in paths]
    both = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [{"bytes": blobs[i], "path": f"{i}.png"} for i in range(20, 28)]
    images += [{"bytes": None, "path": files[28]}, {"bytes": blobs[29], "path": None}, None]
    names = [*files[10:20], "images/gone.png", None, "images/no\0name.png"]
    pq.write_table(pa.table({"id": range(10), "bytes": blobs[:10]}), "a.parquet", 4)
    pq.write_table(pa.table({"path": names}), "b.parquet", 5)
    pq.write_table(pa.table({"image": pa.array(images, both)}), "c.parquet")
    pq.write_table(pa.table({"text": ["x"]}), "d.parquet")
    Path("clip.mp4").touch()
    Path("cut.parquet").write_bytes(Path("a.parquet").read_bytes()[:-10])
    out = Path("out")
    out.mkdir()
    sources = find_sources(["*.parquet", files[0], "clip.mp4", "-"], out).sources
    make = partial(Ranker, model, "onnxruntime", "cpu", 1)

    expected = plain(ranker, tmp_path / "images", tmp_path / "plain")
    want = {("a.parquet", i, None): i for i in range(10)}
    want |= {("b.parquet", i, files[10 + i]): 10 + i for i in range(10)}
    want |= {("c.parquet", i, f"{20 + i}.png"): 20 + i for i in range(8)}
    want |= {("c.parquet", 8, files[28]): 28, ("c.parquet", 9, None): 29}
    want |= {(None, None, files[0]): 0}
    nothing = "its row has neither bytes nor a path"
    failures = {
        ("b.parquet", 10, "images/gone.png"): "No such file or directory",
        ("b.parquet", 11, None): nothing,
        ("b.parquet", 12, "images/no\0name.png"): "its path holds the character of code 0",
        ("c.parquet", 10, None): nothing,
        (None, None, "cut.parquet"): "Parquet magic bytes not found",
        (None, None, "d.parquet"): "expected columns bytes and/or path, or a column image of both "
        "(binary and string), got text string",
        (None, None, "clip.mp4"): "workers read image files and Parquet: rank it with dsgnn-run",
        (None, None, "stdin"): "workers read image files and Parquet: rank it with dsgnn-run",
    }

    def check(rows: list[dict]) -> None:
        for row in rows:
            place = (row.pop("table"), row.pop("row"), row.pop("file"))
            if place in failures:
                assert failures[place] in row.pop("error")
                assert row == {"width": None, "height": None, "objects": None}
            else:
                image = expected[str(paths[want[place]])]
                assert [item.pop("attention") for item in row["objects"]].count(None) == len(
                    row["objects"]
                )
                assert row == {**image, "error": None}

    add = Parts.add
    monkeypatch.setattr(parquet, "PART_ROWS", 8)
    with monkeypatch.context() as patch:

        def interrupted(parts: Parts, row: dict) -> None:
            add(parts, row)
            if len(parts.done) == 20:
                raise KeyboardInterrupt

        patch.setattr(Parts, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_on_ray(make, sources, out, workers=2, threads=1)
    first = rows_of(out)
    assert len(first) == 20 and len(list(out.iterdir())) == 3
    good = sum(row["error"] is None for row in first)
    check(first)

    summary = run_on_ray(make, sources, out, workers=2, threads=1, batch=3, skip_existing=True)
    assert (summary.skipped, summary.images) == (good, len(want) - good)
    assert len(summary.failures) == len(failures)
    rows = rows_of(out)
    places = [(row["table"], row["row"], row["file"]) for row in rows]
    assert Counter(places) == Counter([*want, *failures])
    check(rows)
    assert f"b.parquet#11: {nothing}" in capsys.readouterr().err

    other = partial(Ranker, model, "onnxruntime", "cpu", 1, 0.9)
    with pytest.raises(ValueError, match=r"part-0000\d.parquet was made with another model .*0.5"):
        run_on_ray(other, sources, out, threads=1, skip_existing=True)
    assert rows_of(out)  # nothing was touched
    summary = run_on_ray(other, sources[:1], out, threads=1)
    assert summary.images == len(rows_of(out)) == 10


def test_a_bug_is_a_row_that_says_which(
    two_cpus: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of days does not end for it, and neither the row nor the exit status hides it."""
    folder, out = tmp_path / "images", tmp_path / "out"
    paths = make_images(folder, 6)
    for index, value in ((2, 0), (4, 255)):
        cv2.imwrite(str(paths[index]), np.full((48, 64, 3), value, np.uint8))
    paths[5].write_bytes(b"hello")

    class Buggy(Ranker):
        def batch(self, images: list) -> list:
            if any(not image.any() for image in images):
                return np.zeros((2, 3)) + np.zeros((2, 2))
            if any((image == 255).all() for image in images):
                return None + 1
            return super().batch(images)

    monkeypatch.setattr(job, "Ranker", partial(Buggy))
    options = ["--out", str(out), "--model", str(model), "--threads", "1", "--batch", "3"]
    result = CliRunner().invoke(main, [str(folder), *options])
    assert result.exit_code == 3, result.output
    assert "3 images ranked" in result.stdout and "3 inputs failed" in result.stdout
    assert "2 inputs met a bug of dsgnn: please report it" in result.stdout
    errors = {Path(row["file"]).stem: row["error"] for row in rows_of(out) if row["error"]}
    assert errors.keys() == {"002", "004", "005"}
    here = f"({Path(__file__).name}, line "
    assert errors["002"].startswith("bug of dsgnn: ValueError: operands could not be broadcast tog")
    assert errors["004"].startswith("bug of dsgnn: TypeError: unsupported operand type(s) for +")
    assert all(
        here in errors[name] and errors[name].endswith("in batch)") for name in ("002", "004")
    )
    assert errors["005"].startswith("it is not an image")
    again = CliRunner().invoke(main, [str(folder), *options, "--skip-existing"])
    assert again.exit_code == 3 and "3 inputs skipped" in again.stdout  # bugs are tried again


@pytest.mark.slow
def test_an_image_that_kills_its_workers(two_cpus: None, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    paths = make_images(folder, 20)
    cv2.imwrite(str(paths[13]), np.zeros((48, 64, 3), np.uint8))

    class Allergic(Ranker):
        def __init__(self) -> None:
            super().__init__(model, "onnxruntime", "cpu", 1)

        def batch(self, images: list) -> list:
            if any(not image.any() for image in images):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().batch(images)

    out = tmp_path / "out"
    out.mkdir()
    found = find_sources([str(folder)], out)
    summary = run_on_ray(Allergic, found.sources, out, threads=1, batch=5)
    assert summary.images == 19
    failed = {row["file"]: row["error"] for row in rows_of(out) if row["error"]}
    assert failed == {str(paths[13]): "2 workers died while they ranked it (out of memory?)"}


LOSES_CONTROL = """
import os, signal, sys
from pathlib import Path
from dsgnn.runtime.cluster.connect import cluster, descendants
with cluster("local", "data", 1) as ray:
    print(*(numbers := descendants(os.getpid())))
    name = "gcs_server"
    (control,) = [n for n in numbers if Path(f"/proc/{n}/comm").read_text().strip() == name]
    os.kill(control, signal.SIGKILL)
    for _ in range(600):
        ray.get(ray.remote(lambda: __import__("time").sleep(1)).remote())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
def test_ray_loses_its_control_process() -> None:
    """A message, and no process is left. Ray alone tells of it in its own words, and leaves two."""
    command = [sys.executable, "-c", LOSES_CONTROL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and connect.LOST in done.stderr
    numbers = [int(number) for number in done.stdout.split()]
    assert len(numbers) > 3  # its control process, its node's and their agents
    deadline = time.monotonic() + 20  # the system takes ended processes away a little later
    while left := [number for number in numbers if Path(f"/proc/{number}").is_dir()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="sockets are read off /proc")
def test_only_this_machine_reaches_it(two_cpus: None) -> None:
    found = listening(os.getpid())
    assert {"gcs_server", "raylet"} <= {name for name, _ in found}
    assert all(address.is_loopback for _, address in found), found


def test_a_ray_that_others_reach_is_refused() -> None:
    for address in ("127.0.0.1", "::1"):
        connect._check_confined(address)
    with pytest.raises(BackendError, match=r"Ray listens on 10.0.0.7, expected loopback: .*=0 bef"):
        connect._check_confined("10.0.0.7")


@pytest.mark.parametrize("part", ["data", "serve"])
def test_ray_is_missing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, f"ray.{part}", None)
    message = rf"Ray {part.title()} is not installed: pip install 'dsgnn\[ray\]'"
    with pytest.raises(BackendError, match=message), connect.cluster("local", part):
        pass


def test_what_cannot_be_begun(two_cpus: None, model: Path, tmp_path: Path) -> None:
    """It stops before a worker is started, or an earlier result is touched."""
    part = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table({"mine": [1]}), part)
    make = partial(Ranker, model, "onnxruntime", "cpu", 1)
    with pytest.raises(ValueError, match="part-00000.parquet is not of dsgnn.results/1: move it"):
        run_on_ray(make, [], tmp_path, threads=1)
    assert part.exists()
    with pytest.raises(ValueError, match="no worker fits: it needs 3 CPUs of one machine, and"):
        run_on_ray(make, [], tmp_path, threads=3)
    with pytest.raises(ValueError, match="it needs a GPU of one machine, .* 2 CPUs and 0 GPUs;"):
        run_on_ray(make, [], tmp_path, gpu=True)
    with pytest.raises(RuntimeError, match="a worker cannot load the model: there is no model fi"):
        run_on_ray(partial(Ranker, tmp_path / "none.onnx"), [], tmp_path, threads=1)
    with pytest.raises(ValueError, match="threshold must be"):
        run_on_ray(partial(Ranker, model, threshold=2), [], tmp_path, threads=1)
    with pytest.raises(ValueError, match="workers and batch must be at least 1, got 0 and 1"):
        run_on_ray(make, [], tmp_path, workers=0)
    with claimed(tmp_path), pytest.raises(FolderBusyError):
        run_on_ray(make, [], tmp_path, threads=1)


def test_a_machine_that_joins_without_the_model_is_named(tmp_path: Path) -> None:
    """It was not there when all machines were asked for the model. The errors are those that Ray
    makes of what the worker raises."""
    from ray.exceptions import ActorDiedError, RayTaskError

    def refusal(make: job.MakeRanker) -> Exception:
        with pytest.raises(Exception) as told:
            job._Member(make, {}, 1, 1, tmp_path, lambda work, by: by)
        trace = "".join(traceback.format_exception(told.value))
        cause = RayTaskError("_Member.__init__", trace, told.value, "worker", 1, "10.0.0.7")
        return ActorDiedError(cause)

    said = job._last_words(refusal(partial(Ranker, tmp_path / "absent.onnx")))
    assert f"on {socket.gethostname()}: there is no model file" in said and "absent.onnx" in said
    assert said.endswith(SAME) and len(said.splitlines()) == 1, said
    assert "Traceback" in job._last_words(refusal(lambda: 1 / 0))  # a bug keeps its place


@pytest.mark.skipif(sys.platform != "linux", reason="disks elsewhere have Unicode names alone")
def test_a_name_that_is_not_unicode_is_refused(
    photo: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, however wrong; Parquet and Ray cannot hold such a name."""
    data = cv2.imencode(".png", photo)[1].tobytes()
    monkeypatch.chdir(tmp_path)
    folder = Path(os.fsdecode(b"d\xe9j\xe0"))
    folder.mkdir()
    for path in (Path("a.png"), Path(os.fsdecode(b"caf\xe9.png")), folder / "b.png"):
        path.write_bytes(data)
    names = ["a.png", os.fsdecode(b"caf\xe9.png"), str(folder), os.fsdecode(b"gon\xe9.png")]
    work = job.plan(find_sources(names, tmp_path / "out").sources)
    assert work.names == [(None, "a.png")]
    why = "the name is not Unicode: rename the file, or its folder"
    rows = [("caf\\xe9.png", why), ("d\\xe9j\\xe0/b.png", why)]
    rows.append(("gon\\xe9.png", "there is no such file or folder"))
    assert [(row["file"], row["error"]) for row in work.refused] == rows
    assert parquet.results_table(work.refused).num_rows == 3
    monkeypatch.chdir(folder)
    work = job.plan(find_sources(["b.png"], tmp_path / "out").sources)
    assert work.names == [] and work.refused[0]["error"] == why


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "gpu", "count", "cpus", "gpus"),
    [
        ([{"CPU": 8.0}, {"CPU": 3.0}, {"memory": 1.0}], None, None, False, 5, 2, 0),
        ([{"CPU": 8.0}], None, 3, False, 2, 3, 0),
        ([{"CPU": 1.0}], 4, 2, False, 4, 2, 0),  # for machines that join
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], None, None, True, 3, 1, 1),
        ([{"CPU": 8.0, "GPU": 2.0}], 5, None, True, 5, 1, 1 / 3),  # 3 on one, 2 on the other
        ([{"CPU": 8.0, "GPU": 2.0}], 1, None, True, 1, 1, 1),
        ([{"CPU": 2.0}], 2, None, True, 2, 1, 1),
    ],
)
def test_how_many_workers_fit(
    nodes: list[dict],
    workers: int | None,
    threads: int | None,
    gpu: bool,
    count: int,
    cpus: int,
    gpus: float,
) -> None:
    got = job.fit(nodes, workers, threads, gpu)
    assert got == (count, {"num_cpus": cpus, "num_gpus": gpus})


@pytest.mark.slow
def test_the_command_starts_a_cluster_of_its_own(model: Path, tmp_path: Path) -> None:
    """A process of its own: options, exit status, what is said."""
    paths = make_images(tmp_path / "images", 3)
    paths[1].write_bytes(b"nothing")
    command = [Path(sys.executable).with_name("dsgnn-batch"), tmp_path / "images"]
    options = ["--out", tmp_path / "out", "--model", model, "--threads", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("2 images ranked, 4 objects; ms per image: decode ")
    assert "save" not in said[0] and said[1:] == [f"1 input failed: {paths[1]}"]
    lines = [line for line in done.stderr.splitlines() if line[0] != "["]  # those are Ray's log
    found, first, *others = lines
    assert found == "photos and videos found: 3"
    assert first.startswith("colours.onnx: colours, trained weights") and " worker" in first
    assert others == [f"{paths[1]}: it is not an image ({READABLE} is expected)"]
    assert sorted(row["file"] for row in rows_of(tmp_path / "out")) == sorted(map(str, paths))
