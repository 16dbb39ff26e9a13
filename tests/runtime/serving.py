"""dsgnn-serve's application on loopback without Ray: in a thread, over the test's own workers."""

import asyncio
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.runtime.serving.app import ServeLimits, Workers, build_app
from dsgnn.runtime.serving.listen import bind, make_server
from dsgnn.runtime.serving.worker import PhotoWorker, Refused, Reply


@contextmanager
def serving(
    workers: Workers | dict[str, Workers],
    limits: ServeLimits | None = None,
    hosts: Collection[str] = (),
) -> Iterator[tuple[str, int]]:
    """Gives (host, port) until the block ends; as `listen`, but signals are for the main thread."""
    limits = limits or ServeLimits()
    models = workers if isinstance(workers, dict) else {"colours": workers}
    bound = bind("127.0.0.1", 0)
    app = build_app(models, limits, hosts)
    server = make_server(app, limits.max_connections, limits.timeout_s, log_level="warning")
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    place = bound.getsockname()
    bound.listen()  # clients wait until uvicorn takes over
    thread.start()
    try:
        yield place
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def serving_model(model: Path, limits: ServeLimits | None = None) -> Iterator[tuple[str, int]]:
    """As `serving`, with an artifact."""
    worker = PhotoWorker({"model": model, "threads": 1}, None, 50_000_000)
    try:
        with serving(worker, limits) as place:
            yield place
    finally:
        worker.close()


def send(
    place: tuple[str, int],
    body: Any = None,
    path: str = "/rank",
    method: str = "POST",
    timeout_s: float = 60,
    **headers: str,
) -> tuple[int, Any, bytes]:
    """One request on its own connection: (status, headers, body). user_agent= is User-Agent."""
    connection = http.client.HTTPConnection(*place, timeout=timeout_s)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def resident_kb(pid: int) -> int:
    """Memory of a process and of those that it started; one that has just ended has none."""
    children = " ".join(
        path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")
    ).split()
    status = Path(f"/proc/{pid}/status")
    held = re.search(r"VmRSS:\s+(\d+)", status.read_text() if status.exists() else "")
    return int(held[1] if held else 0) + sum(resident_kb(int(child)) for child in children)


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def said(body: bytes) -> str:
    return json.loads(body)["error"]


class Slow:
    """Workers that hold what they get until `go` is set, and count what was cancelled."""

    def __init__(self) -> None:
        self.model, self.shown = {"file": "slow"}, "slow"
        self.go = threading.Event()
        self.arrived, self.cancelled = 0, 0

    async def rank(
        self, data: bytes, media: str, file: str, aspects: object = ()
    ) -> Reply | Refused:
        self.arrived += 1
        try:
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Reply(b"{}", {"decode": 1.0}, 1)

    async def ready(self) -> bool:
        return self.go.is_set()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
