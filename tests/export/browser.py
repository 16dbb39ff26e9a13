"""A folder on loopback, and the system's Chromium to open it in."""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dsgnn.export.web.npm import fetch_runtime
from dsgnn.runtime.errors import BackendError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WEB = Path(__file__).parents[2] / "export" / "web"
WAIT_MS = 180_000  # a busy machine is slow
# WebGPU without a graphics processor, which a browser does not offer by itself.
FLAGS = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")


class Place:
    """A folder over HTTP, as `python -m http.server` serves it. asked: the paths so far. isolated:
    with the headers that let pages use threads."""

    def __init__(self, folder: Path, isolated: bool = False) -> None:
        asked: list[str] = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                asked.append(self.path)

            def end_headers(self) -> None:
                if isolated:
                    self.send_header("Cross-Origin-Opener-Policy", "same-origin")
                    self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
                super().end_headers()

        self.asked = asked
        handler = partial(Handler, directory=str(folder))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}/"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)


@contextmanager
def placed(folder: Path, isolated: bool = False) -> Iterator[Place]:
    place = Place(folder, isolated)
    try:
        yield place
    finally:
        place.stop()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium without a window. With REQUIRE_CHROMIUM set a missing one fails the test."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        missing = "no chromium here: apt-get install chromium"
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """A page of its own, with nothing kept from others; an error in its scripts fails the test."""
    errors: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert errors == []


def runtime() -> Path:
    """The kept onnxruntime-web, or a new one; without a network the test is skipped."""
    try:
        return fetch_runtime()
    except BackendError as error:
        pytest.skip(str(error))


def text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def array(values: str, dtype: str = "uint8") -> np.ndarray:
    return np.frombuffer(base64.b64decode(values), dtype)


def pixels(image: np.ndarray) -> dict[str, Any]:
    """An image for a page: {height, width, data}, its bytes as text."""
    return {"height": image.shape[0], "width": image.shape[1], "data": text(image)}
