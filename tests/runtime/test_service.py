"""dsgnn-serve as it is started: what it refuses, and the whole for real, with and without Ray."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from serving import encoded, said, send, until
from sockets import family, listening

from dsgnn.runtime import Ranker, samples
from dsgnn.runtime.images import read_image
from dsgnn.runtime.serving import replicas
from dsgnn.runtime.serving.app import ServeLimits
from dsgnn.runtime.serving.cli import main
from dsgnn.runtime.serving.listen import bind

pytest.importorskip("uvicorn")


@pytest.fixture
def data(photo: np.ndarray) -> bytes:
    return encoded(photo)


def test_wrong_use() -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    assert "max_bytes must be positive, got 0" in refused("--max-bytes", "0")
    assert "at least 1 replica, got 0" in refused("--replicas", "0", "--port", "0")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}: " in refused("--port", port)
    assert "cannot listen on 192.0.2.1" in refused("--host", "192.0.2.1", "--port", "0")
    assert "missing.onnx" in refused("--port", "0", "--model", "small=missing.onnx")
    assert "as HOST:PORT, or auto, got 'here'" in refused("--port", "0", "--cluster", "here")
    assert "two models have the name a" in refused("--model", "a=b.onnx", "--model", "a=c.onnx")


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    result = CliRunner().invoke(main, ["--port", "0"])
    words = "serving needs python_multipart, which is not installed: pip install 'dsgnn[serve]'"
    assert result.exit_code == 2 and words in " ".join(result.output.split())


HELD = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}, {"memory": 1.0}]


@pytest.mark.parametrize(
    ("device", "threads", "count", "room"),
    [
        (None, None, 6, 5),
        ("cpu", 1, 12, 11),
        ("cpu", 9, 1, 0),
        ("cuda", None, 4, 3),
        ("cuda:1", 3, 4, 3),
        ("cuda", 4, 3, 2),
    ],
)
def test_workers_that_will_never_fit(
    device: str | None, threads: int | None, count: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Serve would wait for them for ever."""
    nodes = [{"Alive": True, "Resources": one} for one in HELD]
    nodes.append({"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}})
    ray = SimpleNamespace(nodes=lambda: nodes)
    monkeypatch.setattr(replicas, "cluster", lambda *arguments: nullcontext(ray))
    asked = {"device": device, "threads": threads}
    with (
        pytest.raises(ValueError, match=rf"{count} replicas do not fit, {room} do: each needs"),
        replicas.replicas({"small": asked}, ServeLimits(), count),
    ):
        pass
    replicas.check_room(HELD, room, threads or 2, str(device).startswith("cuda"))


def start(tmp_path: Path, *options: str | Path) -> tuple[subprocess.Popen[bytes], Path]:
    """dsgnn-serve on a free port of loopback, and the file it writes to."""
    log = tmp_path / "log"
    command = [Path(sys.executable).with_name("dsgnn-serve"), "--port", "0", *options]
    with log.open("wb") as file:
        home = {**os.environ, "HOME": str(tmp_path)}  # Ray keeps its token there
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=home)
    return process, log


def test_a_start_without_ray(tmp_path: Path) -> None:
    """It costs less than two seconds of processor time, so it takes no longer on a machine that has
    nothing else to do; and it needs no Ray."""
    run = (
        "import sys; sys.modules['ray'] = None; from dsgnn.runtime.serving.cli import main; main()"
    )
    command = [sys.executable, "-c", run, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("listening on "):
                break
        place = ("127.0.0.1", int(line.rpartition(":")[2].strip("/\n")))
        if sys.platform == "linux":
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])  # in user and system mode
            assert ticks / os.sysconf("SC_CLK_TCK") < 2
        assert send(place, samples()[0].read_bytes())[0] == 200
        assert os.listdir(tmp_path) == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def difference(got: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Of two objects of one rank, the largest: in saliency, score, or pixels as a share of the
    photo. A batch rounds otherwise than a single photo."""
    decode = pytest.importorskip("pycocotools.mask").decode
    assert got["rank"] == wanted["rank"]
    one, other = (decode(item["segmentation"]) for item in (got, wanted))
    numbers = (abs(got[name] - wanted[name]) for name in ("saliency", "score"))
    return max(*numbers, (one != other).mean())


@pytest.mark.parametrize("on_ray", [False, True], ids=["here", "ray"])
def test_for_real(tmp_path: Path, on_ray: bool) -> None:
    """One start of dsgnn-serve with the bundled model, in its own process and on Ray: who reaches
    it, many at once, what is refused, a worker's death, and the end."""
    limits: tuple[str, ...] = ("--max-pixels", "4000000", "--timeout", "300")
    if on_ray:
        pytest.importorskip("ray")
        limits = (*limits, "--cluster", "local")
    process, log = start(tmp_path, "--threads", "1", *limits)
    try:
        until_listening = re.compile(r"listening on http://127\.0\.0\.1:(\d+)/")
        end = time.monotonic() + 300
        while not (found := until_listening.search(log.read_text())):
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        place = ("127.0.0.1", int(found[1]))
        until(lambda: send(place, path="/ready", method="GET")[0] == 200)

        if sys.platform == "linux":  # where there is /proc
            sockets = listening(process.pid)
            names = {name for name, _ in sockets}
            assert names >= {"gcs_server", "raylet", "dsgnn-serve"} if on_ray else len(sockets) == 1
            assert all(address.is_loopback for _, address in sockets), sockets

        images = [read_image(path) for path in samples()]
        photos = [encoded(cv2.resize(images[n % 3], (300 + n, 200 + n))) for n in range(64)]
        ranker = Ranker(threads=1)
        direct = [ranker(data).to_dict() for data in photos]
        assert sum(len(answer["objects"]) > 0 for answer in direct) > 32
        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(lambda data: send(place, data, timeout_s=300), photos))
        assert [status for status, _, _ in answers] == [200] * 64
        for (_, _, body), expected in zip(answers, direct, strict=True):
            results = json.loads(body)
            (image,) = results["images"]
            assert results["model"] == ranker.describe()
            for item, wanted in zip(image.pop("objects"), expected.pop("objects"), strict=True):
                assert difference(item, wanted) < 1e-3
            assert image == {"file": "photo", **expected}
        metrics = send(place, path="/metrics", method="GET")[2].decode()
        (together,) = re.findall(r"^dsgnn_batch_photos_sum (\S+)$", metrics, re.MULTILINE)
        assert float(together) > 64  # some were ranked together

        bomb = encoded(np.zeros((20_000, 20_000, 3), np.uint8))
        assert len(bomb) < 2_000_000  # 1.2 GB when decoded
        for body, expected_status in (
            (bomb, 413),
            (bytes(20_000_001), 413),
            (photos[0][:-40], 422),
            (b"no photo", 415),
        ):
            status, _, body = send(place, body)
            assert status == expected_status, body
        with socket.create_connection(place) as client:  # breaks off in the middle
            client.sendall(
                b"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\nhalf"
            )
        assert send(place, photos[0])[0] == 200

        # What a worker held when it died is answered, and another comes in its place.
        large = encoded(cv2.resize(images[0], (2000, 1500)))
        if sys.platform == "linux":
            names = family(process.pid)
            whose = "ray::ServeRepli" if on_ray else "python"  # the process that decodes
            (worker,) = (pid for pid in names if names[pid].startswith(whose))
            with ThreadPoolExecutor(16) as pool:
                held = [pool.submit(send, place, large, timeout_s=300) for _ in range(16)]
                until(lambda: any(answer.done() for answer in held))
                os.kill(worker, signal.SIGKILL)
                bodies = {answer.result()[0]: answer.result()[2] for answer in held}
            if on_ray:
                assert bodies.keys() == {200, 503}
                assert said(bodies[503]).startswith("the worker was lost (")
            else:  # only the photo that was in the process is lost, if there was one
                assert 200 in bodies and bodies.keys() <= {200, 422}
                assert worker not in family(process.pid)
            until(lambda: send(place, photos[0], timeout_s=300)[0] == 200)

        # At the signal one is arriving and others are held: all are answered.
        with ThreadPoolExecutor(8) as pool, socket.create_connection(place) as client:
            client.sendall(b"POST /rank HTTP/1.1\r\nHost: localhost\r\nAccept: image/png\r\n")
            client.sendall(b"Content-Length: %d\r\n\r\n" % len(large) + large[:100])
            held = [pool.submit(send, place, large, timeout_s=300) for _ in range(8)]
            until(lambda: b"held 9.0" in send(place, path="/metrics", method="GET")[2])
            process.send_signal(signal.SIGTERM)
            until(lambda: "Shutting down" in log.read_text())
            with pytest.raises(ConnectionError):
                send(place, photos[0])
            client.sendall(large[100:])
            client.settimeout(300)
            assert client.recv(20).startswith(b"HTTP/1.1 200 OK")
            assert [answer.result()[0] for answer in held] == [200] * 8
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
