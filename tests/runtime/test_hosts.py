"""dsgnn-batch and dsgnn-serve on three hosts with a Ray node each: what only some of them have, and
one that is cut off half-way."""

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hosts import BIN, Host, end, hosts, needs_hosts, start_ray, until
from serving import send

from dsgnn.runtime import Ranker
from dsgnn.runtime.cluster.parquet import Row, read_results

pytestmark = needs_hosts
BATCH = (BIN / "dsgnn-batch", "photos", "--out", "out")
RAY = ("--model", "colours.onnx", "--cluster", "auto", "--threads", "1")
SERVE = (BIN / "dsgnn-serve", *RAY, "--replicas", "3", "--host", "10.77.0.1", "--timeout", "10")
PORT = 8000
TIMEOUT_S = 10
# Takes its time, and notes on its host's disk how often it has ranked.
SLOW_BATCH = """
import time
from pathlib import Path
from dsgnn.runtime import Ranker
from dsgnn.runtime.cluster import cli, job

class Slow(Ranker):
    def batch(self, images):
        time.sleep(0.3)
        with Path("{ranked}").open("a") as file:
            file.write("+")
        return super().batch(images)

job.Ranker = Slow
cli.main()
"""


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Host]]:
    with hosts(3, tmp_path) as made:
        yield made


def give(host: Host, model: Path, photos: dict[str, bytes]) -> None:
    """Put a model and photos on a host's disk."""
    (host.disk / model.name).write_bytes(model.read_bytes())
    (host.disk / "photos").mkdir()
    for name, data in photos.items():
        (host.disk / name).write_bytes(data)


def make_photos(count: int) -> dict[str, bytes]:
    """PNG files of 48 × 64 by their names, each with a box of its own."""
    found = {}
    for number in range(count):
        image = np.full((48, 64, 3), 128, np.uint8)
        y, x = number // 12, number % 12 * 3
        image[y : y + 20, x : x + 24] = (20, 20, 230) if number % 2 else (230, 20, 20)
        found[f"photos/{number:03}.png"] = cv2.imencode(".png", image)[1].tobytes()
    return found


def boxes(objects: list[dict]) -> list:
    return [(item["bbox"], item["area"], item["rank"]) for item in objects]


def check(rows: list[Row], photos: dict[str, bytes], ranker: Ranker) -> dict[str, str]:
    """Each photo has one row, and each ranking is right; gives the errors by photo."""
    assert Counter(row["file"] for row in rows) == Counter(photos.keys())
    for row in rows:
        if row["error"] is None:
            right = ranker(photos[row["file"]]).to_dict()
            assert boxes(row["objects"]) == boxes(right["objects"]) != []
    return {row["file"]: row["error"] for row in rows if row["error"] is not None}


def test_hosts_are_apart_and_leave_nothing(tmp_path: Path) -> None:
    """Even after a failure. Nothing leads out of them."""

    def reaches(host: Host, address: str) -> bool:
        with host.network():
            try:
                socket.create_connection((address, 7), timeout=0.5).close()
            except ConnectionRefusedError:
                return True
            except OSError:
                return False
        raise AssertionError("somebody listens")

    with pytest.raises(ZeroDivisionError), hosts(2, tmp_path) as (one, other):
        (one.disk / "file").touch()
        assert one.run("test", "-f", "file") == 0 and other.run("test", "-f", "file") == 1
        assert other.run("hostname", log="name") == 0 and other.said("name") == "host2\n"
        assert reaches(one, other.address) and not reaches(one, "192.0.2.1")
        other.cut()
        assert not reaches(one, other.address)
        other.join()
        until(lambda: reaches(one, other.address), 10)
        begun = [
            host.start("sh", "-c", "touch begun; sleep 1000", log="sh") for host in (one, other)
        ]
        until(lambda: all((host.disk / "begun").exists() for host in (one, other)), 10)
        other.kill()
        assert begun[1].wait(10) != 0 and begun[0].poll() is None
        raise ZeroDivisionError
    assert begun[0].wait(10) != 0
    gone = [Path(f"/proc/{number}") for number in (one.first, other.first, one.switch)]
    assert not any(path.exists() for path in (*gone, one.place))


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_hosts_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from hosts import hosts
with hosts(1, Path(sys.argv[1])) as (host,):
    print(host.first, host.switch)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=Path(__file__).parent, stdout=subprocess.PIPE
    )
    numbers = done.stdout.split()
    assert done.returncode < 0 and len(numbers) == 2
    until(lambda: not any(Path(f"/proc/{number.decode()}").exists() for number in numbers), 10)


@pytest.mark.slow
def test_what_only_some_hosts_have(
    three: list[Host], model: Path, ranker: Ranker, write_model: Callable[..., Path]
) -> None:
    photos = make_photos(72)
    missing = {"host2": list(photos)[:24], "host3": list(photos)[48:]}
    for host in three:
        lacks = missing.get(host.name, ())
        give(host, model, {name: data for name, data in photos.items() if name not in lacks})
    first, _, third = three
    start_ray(three)

    (third.disk / "colours.onnx").unlink()
    absent = f"on host3: there is no model file at {third.place / 'colours.onnx'}: put the same"
    for command in ((*BATCH, *RAY), SERVE):
        assert first.run(*command, log="absent", seconds=300) == 2
        said = first.said("absent")
        assert absent in " ".join(said.split()) and "Traceback" not in said, said
    write_model(third.disk / "colours.onnx", threshold=0.25)
    assert first.run(*BATCH, *RAY, log="other", seconds=300) == 2
    assert "the model on host" in (said := first.said("other")) and "Traceback" not in said, said
    assert not list((first.disk / "out").glob("*.parquet"))
    (third.disk / "colours.onnx").write_bytes(model.read_bytes())

    status = first.run(*BATCH, *RAY, log="batch", seconds=300)
    errors = check(read_results(first.disk / "out")[0], photos, ranker)
    assert status == (1 if errors else 0), first.said("batch")
    for name, error in errors.items():
        assert error in [
            f"No such file or directory (on {host})"
            for host, names in missing.items()
            if name in names
        ]
    print(f"{len(errors)} of {len(photos)} photos failed, each where it is not")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cut", "kill"])
def test_a_batch_goes_on(three: list[Host], model: Path, ranker: Ranker, way: str) -> None:
    photos = make_photos(150)
    for host in three:
        give(host, model, photos)
    start_ray(three)

    def ranked(host: Host) -> int:
        path = host.disk / "ranked"
        return path.stat().st_size if path.exists() else 0

    first, _, third = three
    program = SLOW_BATCH.format(ranked=first.place / "ranked")
    process = first.start(sys.executable, "-c", program, *BATCH[1:], *RAY, log="batch")
    until(lambda: ranked(third) >= 8, 300, first)
    getattr(third, way)()
    before = [ranked(host) for host in three]
    assert process.poll() is None and sum(before) < len(photos)
    seconds = until(lambda: process.poll() is not None, 240, first)
    assert process.returncode == 0, first.said("batch")
    assert check(read_results(first.disk / "out")[0], photos, ranker) == {}
    after = [ranked(host) for host in three]
    assert sum(after[:2]) >= len(photos) - before[2]
    print(f"{way} at {before}: done {seconds:.0f} s later, ranked {after}, lost 0")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cut", "kill"])
def test_a_service_goes_on(three: list[Host], model: Path, ranker: Ranker, way: str) -> None:
    """Six clients without a pause, and a supervisor, until long after Ray knows of the loss."""
    photos = make_photos(24)
    for host in three:
        give(host, model, photos)
    start_ray(three)
    first, _, third = three
    server = first.start(*SERVE, "--port", f"{PORT}", log="serve")
    until(lambda: "listening on" in first.said("serve"), 300, first)
    right = [boxes(ranker(data).to_dict()["objects"]) for data in photos.values()]
    place, answers, stopped = (first.address, PORT), list[tuple[float, float, int]](), False

    def ask(client: int) -> None:
        number = client
        while not stopped:
            number = (number + 1) % len(photos)
            begun = time.monotonic()
            with first.network():
                status, _, body = send(place, list(photos.values())[number])
            answers.append((begun, time.monotonic(), status))
            if status == 200:
                (image,) = json.loads(body)["images"]
                assert boxes(image["objects"]) == right[number]

    def supervise() -> set[int]:
        found = set()
        while not stopped:
            with first.network():
                found.add(send(place, path="/ready", method="GET")[0])
            time.sleep(0.5)
        return found

    with ThreadPoolExecutor(7) as pool:
        clients = [pool.submit(ask, client) for client in range(6)]
        supervisor = pool.submit(supervise)
        try:
            time.sleep(5)
            getattr(third, way)()
            lost = time.monotonic()
            time.sleep(90)
        finally:
            stopped = True
        for client in clients:
            client.result()
        assert supervisor.result() == {200}
    errors = [(begun, until, status) for begun, until, status in answers if status != 200]
    assert {status for _, _, status in errors} <= {503, 504}
    assert len(errors) <= 12 and all(begun < lost + TIMEOUT_S for begun, _, _ in errors)
    assert all(end - begun < TIMEOUT_S + 5 for begun, end, _ in answers)
    good = sorted(end for _, end, status in answers if status == 200 and end > lost)
    gap = max(np.diff([lost, *good]))
    assert len(good) > 200 and gap < TIMEOUT_S
    end(server)
    assert server.wait(60) == 0, first.said("serve")
    statuses = dict(Counter(status for _, _, status in errors))
    last = max((begun - lost for begun, _, _ in errors), default=0)
    print(
        f"{way}: {len(good)} answered after it, errors {statuses}, the last one of a request "
        f"{last:.1f} s after it, longest gap {gap:.1f} s"
    )
