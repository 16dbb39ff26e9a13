"""dsgnn-serve: the application over HTTP, without Ray."""

import asyncio
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from serving import Slow, encoded, said, send, serving, serving_model, until

from dsgnn.runtime import Ranker, Ranking
from dsgnn.runtime import ranker as ranker_module
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.serving.app import ServeLimits, WorkersLostError, negotiate
from dsgnn.runtime.serving.models import parse_models
from dsgnn.runtime.serving.worker import PhotoWorker, Refused, Reply

Place = tuple[str, int]

pytest.importorskip("uvicorn")


def form(data: bytes, name: str = "photo.png", field: str = "photo") -> tuple[bytes, str]:
    """A multipart body with one file, and its Content-Type."""
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


@pytest.fixture
def data(photo: np.ndarray) -> bytes:
    return encoded(photo)


@pytest.fixture
def place(model: Path) -> Iterator[Place]:
    with serving_model(model, ServeLimits(max_bytes=100_000)) as address:
        yield address


class Failing:
    model, shown = {"file": "failing"}, "failing"

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def rank(
        self, data: bytes, media: str, file: str, aspects: object = ()
    ) -> Reply | Refused:
        raise self.error

    async def ready(self) -> bool:
        raise self.error


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("image/png", "image/png"),
        ("image/*", "image/jpeg"),
        ("text/html, image/avif, image/*;q=0.5, */*;q=0.1", "image/jpeg"),
        ("image/png;q=0.9, image/jpeg;q=0.8, application/json;q=0.1", "image/png"),
        ("image/*, image/jpeg;q=0", "image/png"),
        ("application/json;q=0, */*", "image/jpeg"),
        ("application/json;charset=utf-8;q=0.1, IMAGE/PNG ; Q=0.2", "image/png"),
        ("image/png;q=high, image/jpeg", "image/jpeg"),
        ("text/html", None),
        ("application/*;q=0", None),
        ("nonsense", None),
    ],
)
def test_negotiation(accept: str, media: str | None) -> None:
    assert negotiate(accept) == media


def test_the_answers_are_the_direct_calls(
    place: Place, data: bytes, ranker: Ranker, photo: np.ndarray
) -> None:
    direct = ranker(data)
    status, headers, body = send(place, data)
    results = json.loads(body)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert results["schema"] == "dsgnn.results/1" and results["model"] == ranker.describe()
    assert results["images"] == [{"file": "photo", **direct.to_dict()}]
    assert re.search(r"decode;dur=[\d.]+.*inference;dur=", headers["Server-Timing"])

    body, kind = form(data, "a cat.png")
    status, headers, body = send(place, body, Content_Type=kind)
    assert status == 200
    assert json.loads(body)["images"] == [{"file": "a cat.png", **direct.to_dict()}]

    status, headers, body = send(place, data, Accept="image/png")
    assert status == 200 and headers["Content-Type"] == "image/png"
    grey = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(grey, direct.rank_map())

    status, headers, body = send(place, data, Accept="image/jpeg")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert body == cv2.imencode(".jpg", direct.draw(photo)[..., ::-1], [1, 92])[1].tobytes()


WIDE = cv2.imencode(".png", np.zeros((8, 65_501), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"", {}, 400, "expected a photo in the request's body, got 0 bytes"),
        (b"no photo", {}, 415, "it is not an image (JPEG, PNG, "),
        (b"%PDF-1.7", {"Content_Type": "image/png"}, 415, "it is a PDF"),
        (b"\x89PNG\r\n\x1a\n cut", {}, 422, "the PNG data is damaged or cut short (12 bytes)"),
        (bytes(100_001), {}, 413, "at most 100,000 bytes, got a Content-Length of 100001"),
        (iter([bytes(99_999)] * 2), {}, 413, "at most 100,000 bytes, got 1"),
        (WIDE, {"Accept": "image/jpeg"}, 422, "at most 65,500 pixels a side, not 65501×8: ask for"),
        (b"x", {"Accept": "text/html"}, 406, "image/jpeg or image/png, got text/html"),
        (b"x", {"Content_Type": "multipart/form-data"}, 400, "the boundary of the form"),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
            {"Content_Type": "multipart/form-data; boundary=x"},
            400,
            "expected one file in the form, got the field 'a'",
        ),
        (
            form(b"1")[0].replace(b"--x--\r\n", b"") + form(b"2")[0],
            {"Content_Type": form(b"")[1]},
            400,
            "expected one file in the form, got a second field",
        ),
    ],
)
def test_what_is_refused(
    place: Place, data: bytes, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    got, sent, answer = send(place, body, **headers)
    assert (got, sent["Content-Type"]) == (status, "application/json")
    assert json.loads(answer)["status"] == status and message in said(answer)
    assert send(place, data)[0] == 200


def test_the_first_of_several_pictures_is_told(place: Place, data: bytes) -> None:
    """As a note beside the answer; a file of one picture has none."""
    file = io.BytesIO()
    pictures = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    (several,) = json.loads(send(place, file.getvalue())[2])["images"]
    assert "animation, of which the first picture" in several["note"]
    (one,) = json.loads(send(place, data)[2])["images"]
    assert "note" not in one


def test_other_addresses(place: Place) -> None:
    status, headers, body = send(place, path="/rank", method="GET")
    assert status == 405 and headers["Allow"] == "POST" and "expected POST /rank" in said(body)
    assert send(place, path="/nothing", method="GET")[0] == 404
    assert json.loads(send(place, path="/health", method="GET")[2]) == {"status": "ok"}
    status, _, body = send(place, path="/ready", method="GET")
    assert status == 200 and json.loads(body)["model"]["file"] == "colours.onnx"


def test_a_full_server(data: bytes) -> None:
    slow = Slow()
    limits = ServeLimits(max_requests=2)
    with serving(slow, limits) as place, ThreadPoolExecutor(2) as pool:
        assert send(place, path="/ready", method="GET")[0] == 503  # the workers are not
        held = [pool.submit(send, place, data) for _ in range(2)]
        until(lambda: slow.arrived == 2)
        status, headers, body = send(place, data)
        assert status == 503 and int(headers["Retry-After"]) >= 1
        assert said(body).startswith("the server holds 2 requests, as many as it takes")
        assert send(place, path="/health", method="GET")[0] == 200
        slow.go.set()
        assert [answer.result()[0] for answer in held] == [200, 200]
        assert send(place, data)[0] == 200
        assert send(place, path="/ready", method="GET")[0] == 200


def test_no_ranking_in_time(data: bytes) -> None:
    slow = Slow()
    with serving(slow, ServeLimits(timeout_s=0.2)) as place:
        status, _, body = send(place, data)
        assert status == 504 and "expected a ranking within 0.2 s" in said(body)
        until(lambda: slow.cancelled == 1)


def test_a_photo_that_comes_too_slowly() -> None:
    with (
        serving(Slow(), ServeLimits(timeout_s=0.2)) as place,
        socket.create_connection(place) as client,
    ):
        client.sendall(b"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nhalf")
        client.settimeout(60)
        answer = b""
        while b"}" not in answer:
            answer += client.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"whole photo within 0.2 s" in answer


def test_a_client_that_leaves(data: bytes) -> None:
    """In the middle of its photo, or of the wait: its place is free again."""
    slow = Slow()
    head = b"POST /rank HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
    with serving(slow, ServeLimits(max_requests=1)) as place:

        def metrics() -> bytes:
            return send(place, path="/metrics", method="GET")[2]

        for part in (data[:50], data):
            with socket.create_connection(place) as client:
                client.sendall(head + part)
                until(lambda: b"dsgnn_requests_held 1.0" in metrics())
            until(lambda: b"dsgnn_requests_held 0.0" in metrics())
        assert (slow.arrived, slow.cancelled) == (1, 1)
        assert b'dsgnn_requests_total{answer="json",status="499"} 2.0' in metrics()


def test_workers_that_fail(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serving(Failing(WorkersLostError("the worker was lost (ActorDiedError)"))) as place:
        status, headers, body = send(place, data)
        assert status == 503 and headers["Retry-After"] == "1"
        assert said(body) == "the worker was lost (ActorDiedError): send the photo again"
        assert send(place, path="/ready", method="GET")[0] == 503
    with serving(Failing(KeyError("secret"))) as place:
        status, _, body = send(place, data)
        assert status == 500 and b"secret" not in body
    assert "secret" in caplog.text


def test_metrics(place: Place, data: bytes) -> None:
    send(place, data, Accept="image/png")
    send(place, b"no photo")
    text = send(place, path="/metrics", method="GET")[2].decode()
    for line in (
        'dsgnn_requests_total{answer="map",status="200"} 1.0',
        'dsgnn_requests_total{answer="json",status="415"} 1.0',
        "dsgnn_requests_held 0.0",
        "dsgnn_request_seconds_count 1.0",
        'dsgnn_stage_seconds_count{stage="inference"} 1.0',
        "dsgnn_batch_photos_sum 1.0",
    ):
        assert line in text
    assert re.search(r'^dsgnn_model{.*file="colours.onnx".*} 1.0$', text, re.MULTILINE)


@pytest.mark.parametrize("stage", ["ranking", "drawing"])
def test_a_bug_of_ours_is_not_the_clients_fault(
    model: Path,
    scene: Callable[..., np.ndarray],
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """500 with its traceback in the log; the photos beside it are answered."""
    first, gathered = threading.Event(), threading.Event()

    def planted(run: Callable[..., Any], height: Callable[..., int]) -> Callable[..., Any]:
        def broken(*arguments: Any) -> Any:
            if not first.is_set():  # what comes meanwhile is one batch
                first.set()
                assert gathered.wait(60)
            if height(*arguments) == 40:
                return np.zeros((2, 3)) + np.zeros((4, 5))  # does not broadcast: a ValueError
            return run(*arguments)

        return broken

    if stage == "ranking":
        post = planted(ranker_module.postprocess, lambda *given: given[3].original[0])
        monkeypatch.setattr(ranker_module, "postprocess", post)
    else:
        draw = planted(Ranking.draw, lambda ranking, photo: ranking.height)
        monkeypatch.setattr(Ranking, "draw", draw)
    photos = [encoded(scene(h, 64, red=(4, 4, 30, 30))) for h in (48, 48, 40, 48)]
    with serving_model(model) as place, ThreadPoolExecutor(4) as pool:

        def post(photo: bytes) -> tuple[int, Any, bytes]:
            return send(place, photo, Accept="image/jpeg")

        answers = [pool.submit(post, photos[0])]
        assert first.wait(60)
        answers += [pool.submit(post, photo) for photo in photos[1:]]
        until(lambda: b"held 4.0" in send(place, path="/metrics", method="GET")[2])
        gathered.set()
        assert [answer.result()[0] for answer in answers] == [200, 200, 500, 200]
        assert "its log says why" in said(answers[2].result()[2])
    assert "Traceback" in caplog.text and "in broken" in caplog.text
    assert "could not be broadcast" in caplog.text


def test_not_ready_when_a_photo_would_be_late() -> None:
    """Six photos held, one answered in about .3 s: another would wait longer than the limit."""

    class Steady(Slow):
        def __init__(self) -> None:
            super().__init__()
            self.turn = asyncio.Semaphore(1)

        async def rank(
            self, data: bytes, media: str, file: str, aspects: object = ()
        ) -> Reply | Refused:
            async with self.turn:
                await asyncio.sleep(0.3)
            return Reply(b"{}", {"decode": 1.0}, 1)

        async def ready(self) -> bool:
            return True

    def ready() -> int:
        return send(place, path="/ready", method="GET")[0]

    with (
        serving(Steady(), ServeLimits(timeout_s=1.5)) as place,
        ThreadPoolExecutor(12) as pool,
    ):
        assert ready() == 200
        assert [send(place, b"x")[0] for _ in range(4)] == 4 * [200]
        assert ready() == 200
        held = [pool.submit(send, place, b"x") for _ in range(10)]
        until(lambda: b"held 10.0" in send(place, path="/metrics", method="GET")[2])
        assert ready() == 503
        assert {200, 504} == {one.result()[0] for one in held}
        assert ready() == 200


def test_several_models(model: Path, data: bytes, tmp_path: Path) -> None:
    workers = {
        name: PhotoWorker({"model": model, "threads": 1, "threshold": threshold}, None, 10**6)
        for name, threshold in (("usual", None), ("strict", 0.99999))
    }
    with serving(workers) as place:

        def objects(path: str) -> int:
            status, _, body = send(place, data, path)
            assert status == 200
            return len(json.loads(body)["images"][0]["objects"])

        assert objects("/rank") == objects("/rank?model=usual") == 2
        assert objects("/rank?model=strict") < 2
        for query, status, words in (
            ("model=other", 404, "one model of usual, strict, got other"),
            ("model=usual&model=strict", 404, "got usual, strict"),
            ("threshold=0.3", 400, "no query parameter but model and aspect, got threshold"),
            ("model=usual&Threshold=&x=1", 400, "got Threshold, x"),
        ):
            got, _, body = send(place, data, f"/rank?{query}")
            assert got == status and words in said(body)
        ready = json.loads(send(place, path="/ready", method="GET")[2])
        assert list(ready["models"]) == ["usual", "strict"]
        assert ready["model"] == ready["models"]["usual"]
        metrics = send(place, path="/metrics", method="GET")[2].decode()
        assert (
            len(re.findall(r'^dsgnn_model{.*name="(?:usual|strict)".*} 1.0$', metrics, re.M)) == 2
        )
    for worker in workers.values():
        worker.close()


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.onnx").touch()
    assert parse_models([]) == {"nano": None}
    assert parse_models(["x=y/z.onnx", "n.onnx", "a=b.onnx"]) == {
        "x": tmp_path / "y/z.onnx",
        "n": tmp_path / "n.onnx",
        "a=b": tmp_path / "a=b.onnx",
    }
    for texts in (["=x.onnx"], ["x="], ["n.onnx", "folder/n.onnx"]):
        with pytest.raises(OptionError):
            parse_models(texts)


@pytest.mark.parametrize(
    "name", ["max_bytes", "max_pixels", "max_requests", "timeout_s", "max_connections"]
)
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        ServeLimits(**{name: 0})


@pytest.fixture
def heedful(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    """An artifact that tells where people look: at what is blue."""
    return write_model(tmp_path / "heedful.onnx", attention=True)


def test_crops(heedful: Path, photo: np.ndarray, data: bytes) -> None:
    ranking = Ranker(heedful)(photo)
    with serving_model(heedful) as place:
        status, _, body = send(place, data, "/rank?aspect=9:16,1:1")
        assert status == 200
        image = json.loads(body)["images"][0]
        assert image["focus"] == pytest.approx(ranking.focus, abs=1e-4)
        assert {name: tuple(crop["box"]) for name, crop in image["crops"].items()} == {
            name: ranking.crop_box(name) for name in ("9:16", "1:1")
        }
        shares = np.array(image["attention_map"]["shares"])
        assert shares.sum() == pytest.approx(1, abs=1e-3)
        assert image["attention_map"]["columns"][-1] == 64 and shares.shape == (6, 8)
        status, headers, body = send(place, data, "/rank?aspect=9:16", accept="image/jpeg")
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        x0, y0, x1, y1 = ranking.crop_box("9:16")
        made = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert made.shape == (y1 - y0, x1 - x0, 3)
        assert np.abs(made.astype(int) - photo[y0:y1, x0:x1]).mean() < 8
        assert "crops" not in json.loads(send(place, data)[2])["images"][0]


def test_without_a_map_crops_go_by_the_ranks(place: Place, data: bytes) -> None:
    image = json.loads(send(place, data, "/rank?aspect=1:1")[2])["images"][0]
    assert image["attention_map"] is None and image["crops"]["1:1"]["attention"] is None


@pytest.mark.parametrize(
    ("query", "accept", "message"),
    [
        ("aspect=wide", "*/*", "WIDTH:HEIGHT"),
        ("aspect=1:1,4:5", "image/jpeg", "a JPEG has one aspect, got 2"),
        ("aspect=1:1", "image/png", "a rank map has no aspect"),
        ("&".join(f"aspect={i}:1" for i in range(1, 19)), "*/*", "at most 16 aspects, got 18"),
        ("aspect=" + "9" * 500, "*/*", "WIDTH:HEIGHT"),
    ],
)
def test_aspects_that_cannot_be_are_refused(
    place: Place, data: bytes, query: str, accept: str, message: str
) -> None:
    status, _, body = send(place, data, f"/rank?{query}", accept=accept)
    assert status == 400 and message in json.loads(body)["error"]
    assert len(body) < 500
