"""dsgnn-serve's application on loopback without Ray: in a thread, over the test's own workers."""

import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsgnn.runtime.serving.app import Limits, Workers, build_app
from dsgnn.runtime.serving.listen import bind
from dsgnn.runtime.serving.worker import Refused, Reply, Worker


class Direct:
    """A Worker in this process in place of Ray's."""

    def __init__(self, model: Path | None, max_pixels: int = 50_000_000) -> None:
        self.worker = Worker({"model": model, "threads": 1}, None, max_pixels)
        self.model: Mapping[str, Any] = {"file": "colours.onnx"}

    async def rank(self, data: bytes, media: str, file: str) -> Reply | Refused:
        return await self.worker.rank(data, media, file)

    async def ready(self) -> bool:
        return True


@contextmanager
def serving(workers: Workers, limits: Limits | None = None) -> Iterator[tuple[str, int]]:
    """Gives (host, port) until the block ends; as `listen`, but signals are for the main thread."""
    import uvicorn

    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        build_app(workers, limits or Limits()), ws="none", lifespan="off", log_level="warning"
    )
    server = uvicorn.Server(config)
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
