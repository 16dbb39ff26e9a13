"""The targets of fuzz.py: good files of each kind, and the reader that gets them damaged."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import re
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

HELPERS = Path(__file__).parent / "runtime"  # of other tests: conftest.py and serving.py
sys.path.insert(0, str(HELPERS))


class Target(NamedTuple):
    """corpus: good files. read: gives one to its reader. text: whether words are changed too."""

    corpus: list[bytes]
    read: Callable[[bytes], object]
    text: bool = False


def folder() -> Path:
    memory = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if os.path.isdir(memory) else None))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def image_targets() -> dict[str, Callable[[], Target]]:
    """One for each format of photos, behind the fence as in the commands."""

    def picture(channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
        side = (np.arange(40)[:, None] * 3 + np.arange(56)) % 256
        return np.repeat(side[..., None], channels, 2).astype(dtype)

    def encoded(suffix: str, *options: int, **shape: object) -> bytes:
        return cv2.imencode(suffix, picture(**shape), options)[1].tobytes()  # type: ignore[arg-type]

    def animated(suffix: str) -> bytes:
        animation = cv2.Animation()
        animation.frames = [picture(4), 255 - picture(4)]
        animation.durations = np.array([50, 50])
        return cv2.imencodeanimation(suffix, animation)[1].tobytes()

    grey = b"".join(b" %d" % n for n in range(6))
    corpora = {
        "jpeg": lambda: [
            encoded(".jpg"),
            encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
            encoded(".jpg", channels=1),
            encoded(".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        ],
        "png": lambda: [
            encoded(".png"),
            encoded(".png", channels=4),
            encoded(".png", dtype=np.uint16),
            animated(".png"),
        ],
        "webp": lambda: [
            encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 80),
            encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101),
            encoded(".webp", channels=4),
            animated(".webp"),
        ],
        "gif": lambda: [encoded(".gif"), animated(".gif")],
        "tiff": lambda: [
            encoded(".tiff"),
            encoded(".tiff", cv2.IMWRITE_TIFF_COMPRESSION, 1),
            encoded(".tiff", cv2.IMWRITE_TIFF_COMPRESSION, 8, dtype=np.uint16),
        ],
        "bmp": lambda: [encoded(".bmp"), encoded(".bmp", channels=4)],
        "avif": lambda: [encoded(".avif"), encoded(".avif", channels=4)],
        "jpeg2000": lambda: [encoded(".jp2"), encoded(".jp2", channels=1)],
        "pnm": lambda: [
            *(encoded(suffix) for suffix in (".ppm", ".pnm")),
            encoded(".pgm", channels=1),
            encoded(".pbm", channels=1),
            *(b"P%d\n# comment\n3 2\n7\n%b\n" % (kind, grey) for kind in (1, 2)),
            b"P7\nWIDTH 2\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nTUPLTYPE GRAYSCALE\nENDHDR\nab",
        ],
    }

    def target(corpus: Callable[[], list[bytes]]) -> Target:
        from dsgnn.runtime.photo.decoder import Decoder

        return Target(corpus(), Decoder())

    return {name: partial(target, corpus) for name, corpus in corpora.items()}


def model_bytes() -> bytes:
    """An ONNX file with a description: the small network of the tests."""
    from conftest import description, field

    graph = (HELPERS / "colours.onnx").read_bytes()
    return graph + field(14, field(1, b"dsgnn") + field(2, description().to_json().encode()))


def artifact() -> Target:
    from dsgnn.runtime.artifact import open_artifact

    place = folder() / "a.onnx"
    return Target([model_bytes()], lambda data: open_artifact(written(place, data)))


def sidecar() -> Target:
    from dsgnn.runtime.artifact import Sidecar, open_artifact, sha256_of, sidecar_path

    place = written(folder() / "a.onnx", model_bytes())
    good = Sidecar(
        place.name, sha256_of(place), True, ({"check": "order", "largest": 0.5},), {"cpu": "x"}
    ).to_json()

    def read(data: bytes) -> None:
        written(sidecar_path(place), data)
        open_artifact(place)

    return Target([good.encode()], read, text=True)


def checkpoint() -> Target:
    import torch

    from dsgnn.weights.pickles import read_tensors

    place = folder() / "a.pth"
    corpus = []
    for archive in (True, False):
        out = io.BytesIO()
        tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float16)[1:]}
        content = {"meta": {"seed": 1, "t": (1, 2)}, "state_dict": tensors}
        torch.save(content, out, _use_new_zipfile_serialization=archive)
        corpus.append(out.getvalue())
    return Target(corpus, lambda data: read_tensors(written(place, data)))


def safetensors() -> Target:
    from dsgnn.weights.pretrained import read_source

    place = folder() / "a.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    good = struct.pack("<Q", len(head)) + head + bytes(16)
    return Target([good], lambda data: read_source(written(place, data)))


def results() -> Target:
    """A results.json: as predictions to measure, and as what an earlier run has left."""
    from dsgnn.data.sample import Sample
    from dsgnn.evaluation.rankers import predictions_ranker
    from dsgnn.runtime.disk.durable import record_file
    from dsgnn.runtime.run.resume import Earlier

    item = {"rank": 1, "saliency": 0.5, "score": 0.9, "bbox": [1, 1, 2, 2], "area": 4, "query": 0}
    item["segmentation"] = {"size": [6, 8], "counts": [0, 4, 44]}
    image = {"file": "a.jpg", "width": 8, "height": 6, "objects": [item], "made": {"of": 1}}
    content = {"schema": "dsgnn.results/1", "model": {}, "images": [image]}
    place = folder() / "results.json"
    empty = np.zeros((0, 6, 8), bool)
    sample = Sample(np.zeros((6, 8, 3), np.uint8), empty, np.zeros(0, np.int64), "a")

    def read(data: bytes) -> None:
        written(place, data)
        written(place.with_name(".results.journal"), data)
        Earlier(place.parent, {}, {})
        rank, _ = predictions_ranker(place)
        try:
            rank(sample)
        finally:
            with record_file(place, {"schema": "dsgnn.results/1"}, "images"):
                pass

    return Target([json.dumps(content).encode()], read, text=True)


def irsr_pickle() -> Target:
    from dsgnn.data.irsr import load_plain_pickle

    place = folder() / "test.pkl"
    entry = {
        "file_name": "x/1.jpg",
        "rank": np.arange(2),
        "annotations": [{"bbox": [1.0, 2.0], "segmentation": [[1.0, 2.0, 3.0]]}, {"n": None}],
    }
    corpus = [pickle.dumps([entry, entry], protocol) for protocol in range(6)]
    return Target(corpus, lambda data: load_plain_pickle(written(place, data)))


def coco() -> Target:
    from dsgnn.data.coco import CocoReader
    from dsgnn.runtime.rle import encode

    place = folder()
    cv2.imwrite(str(place / "a.png"), np.zeros((60, 80, 3), np.uint8))
    outline = [[10.0, 10.0, 30.0, 10.0, 30.0, 40.0]]
    runs = {"size": [60, 80], "counts": [600, 30, 4170]}
    annotations = [
        {"id": n, "image_id": 7, "category_id": 1, "segmentation": one, "visiting_order": n}
        for n, one in enumerate((outline, runs, encode(np.ones((60, 80), bool))), start=1)
    ]
    data = {
        "images": [{"id": 7, "file_name": "a.png", "width": 80, "height": 60}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }
    file = place / "instances.json"

    def read(data: bytes) -> None:
        assert CocoReader(written(file, data), place)[0].masks.shape[1:] == (60, 80)

    return Target([json.dumps(data).encode()], read, text=True)


def fixations() -> Target:
    from dsgnn.data.gaze import density, read_gaze

    place = folder()
    entry = {"file_name": "a.png", "width": 16, "height": 12, "source": "O", "dev": False}
    viewers = [[[8.0, 6.0, 250], [3.5, 2.0, 100]], [[8.0, 6.0, 30]]]
    entries = [entry | {"viewers": viewers}, entry | {"file_name": "b.png", "points": [[1, 2]]}]

    def read(data: bytes) -> None:
        written(place / "fixations.json", data)
        for photo in read_gaze(place):
            density(photo, (12, 16), 2.0)

    return Target([json.dumps({"images": entries}).encode()], read, text=True)


def source_list() -> Target:
    from dsgnn.runtime.disk.sources import find_sources

    place = folder()
    (place / "a.png").touch()
    os.chdir(place)  # there are no slashes, so a changed pattern finds nothing elsewhere
    text = "# photos\na.png\n*.png\n0\nshot%04d.png\n-\n"
    corpus = [text.encode(), text.encode("utf-16"), text.replace("\n", "\r\n").encode()]
    lists = place / "list.txt"

    def read(data: bytes) -> None:
        if not re.search(rb"(?m)^[\s\0]*[/.]", data):  # "/" means every file of the machine
            find_sources([str(written(lists, data))], place / "out")

    return Target(corpus, read)


def video() -> Target:
    from dsgnn.runtime.disk.sources import Source
    from dsgnn.runtime.video.frames import Frames, Selection

    place = folder()
    corpus = []
    for suffix, code in ((".mp4", "mp4v"), (".avi", "MJPG"), (".mkv", "mp4v")):
        path = str(place / f"clip{suffix}")
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*code), 10, (64, 48))
        for level in range(4):
            writer.write(np.full((48, 64, 3), 60 * level, np.uint8))
        writer.release()
        corpus.append(Path(path).read_bytes())
    broken = place / "broken.mp4"

    def read(data: bytes) -> None:
        written(broken, data)
        for _ in Frames(Source(broken, broken.name), Selection(max_frames=3)):
            pass

    return Target(corpus, read)


def multipart() -> Target:
    from starlette.requests import Request

    from dsgnn.runtime.serving.body import take_photo
    from dsgnn.runtime.serving.worker import Refused

    head = b'--x\r\nContent-Disposition: form-data; name="p"; filename="a b.png"\r\n'
    body = head + b"Content-Type: image/png\r\n\r\nabc\r\n--x--\r\n"
    kind = b"multipart/form-data; boundary=x"
    corpus = [kind + b"\0" + body, b'multipart/form-data; boundary="x"\0' + body, b"image/png\0ab"]

    def read(data: bytes) -> None:
        kind, _, body = data.partition(b"\0")

        async def receive() -> dict[str, object]:
            nonlocal body
            part, body = body[:50], body[50:]
            return {"type": "http.request", "body": part, "more_body": bool(body)}

        scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}
        with suppress(Refused):
            asyncio.run(take_photo(Request(scope, receive), 10_000))

    return Target(corpus, read, text=True)


def http() -> Target:
    """Whole requests, over a socket of this machine."""
    from serving import serving

    from dsgnn.runtime.serving.app import ServeLimits
    from dsgnn.runtime.serving.worker import Reply

    class Echo:
        model, shown = {"file": "echo"}, "echo"

        async def rank(self, data: bytes, media: str, file: str) -> Reply:
            return Reply(json.dumps(file).encode(), {"decode": 1.0}, 1)

        async def ready(self) -> bool:
            return True

    running = serving(Echo(), ServeLimits(timeout_s=2, max_bytes=10_000))
    place = running.__enter__()
    form = b'--x\r\nContent-Disposition: form-data; name="p"; filename="a"\r\n\r\nabc\r\n--x--\r\n'
    kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
    post = b"POST /rank HTTP/1.1\r\nHost: localhost\r\n"
    corpus = [
        post + b"Content-Length: 3\r\nAccept: image/png;q=0.5, */*\r\n\r\nabc",
        post + kind + b"Content-Length: %d\r\n\r\n" % len(form) + form,
        post + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        post + b"Upgrade: h2c\r\nConnection: Upgrade\r\nContent-Length: 1\r\n\r\na",
        b"GET /ready HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n\r\n",
        b"GET /metrics?x=%00 HTTP/1.0\r\n\r\n",
    ]

    def read(data: bytes, running: object = running) -> None:  # which ends with its last reader
        with socket.create_connection(place, 30) as connection:
            answer = b""
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    answer += part
            except ConnectionError:
                return
            if answer and not re.match(rb"HTTP/1\.1 (1\d\d|[234]\d\d|501|503)", answer):
                raise AssertionError(answer[:200])

    return Target(corpus, read, text=True)


TARGETS: dict[str, Callable[[], Target]] = {
    **image_targets(),
    "artifact": artifact,
    "sidecar": sidecar,
    "results": results,
    "checkpoint": checkpoint,
    "safetensors": safetensors,
    "irsr-pickle": irsr_pickle,
    "coco": coco,
    "fixations": fixations,
    "source-list": source_list,
    "video": video,
    "multipart": multipart,
    "http": http,
}
