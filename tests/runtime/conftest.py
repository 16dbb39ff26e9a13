"""A network small enough to read, and scenes it understands.

`colours.onnx` (574 bytes, made by graphs.py::colours_graph) finds red, green, blue and
yellow blobs: query 0, 1, 2 and 3; the larger and purer the blob the more salient; query 4 finds
nothing. It has no size of its own and no metadata, so each test writes the description it needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result
from graphs import colours_graph
from hypothesis import HealthCheck, settings
from outputs import write

from dsgnn.runtime import Ranker
from dsgnn.runtime.artifact import Description
from dsgnn.runtime.letterbox import Fixed
from dsgnn.runtime.run.cli import main

if TYPE_CHECKING:
    from playwright.sync_api import Page

HERE = Path(__file__).parent
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230), "green": (20, 230, 20)}

Scene = Callable[..., np.ndarray]

# A loaded machine may be slow, and no test here is about time; the same examples every time.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("here")


def description(**changes: object) -> Description:
    facts = {
        "config": "colours",
        "input": Fixed(96, 128),
        "queries": 5,
        "threshold": 0.5,
        "precision": "fp32",
        "weights": "trained",
        "source_sha256": "0" * 64,
        "toolkit": "0.1.0",
    }
    return Description(**{**facts, **changes})


def field(number: int, data: bytes) -> bytes:
    """One length-delimited protobuf field."""
    size = len(data)
    varint = b""
    while size >= 0x80:
        varint += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + data


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def graph() -> bytes:
    return (HERE / "colours.onnx").read_bytes()


@pytest.fixture
def write_model(graph: bytes) -> Callable[..., Path]:
    """write_model(path, **facts): the graph with a description; metadata=None leaves it out.
    attention=True makes a graph that has it."""

    def write(path: Path, metadata: str | None = "", **facts: object) -> Path:
        data = graph
        if facts.get("attention"):
            pytest.importorskip("onnx")
            data = colours_graph(attention=True)
        if metadata is not None:
            text = metadata or description(**facts).to_json()
            data += field(14, field(1, b"dsgnn") + field(2, text.encode()))
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def model(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    """An artifact of 96 × 128 pixels."""
    folder = tmp_path / "model"
    folder.mkdir()
    return write_model(folder / "colours.onnx")


@pytest.fixture
def ranker(model: Path) -> Ranker:
    return Ranker(model, backend="onnxruntime")


@pytest.fixture
def command(model: Path) -> Callable[..., Result]:
    """command(argument, …): dsgnn-run into the folder out."""

    def call(*arguments: str) -> Result:
        options = ("--out", "out", "--model", str(model))
        return CliRunner().invoke(main, [*options, *arguments])

    return call


@pytest.fixture
def scene() -> Scene:
    """scene(h, w, red=(y0, x0, y1, x1), …): coloured boxes on grey, (h, w, 3) uint8 RGB."""

    def paint(h: int, w: int, **boxes: tuple[int, int, int, int]) -> np.ndarray:
        image = np.full((h, w, 3), 128, np.uint8)
        for colour, (y0, x0, y1, x1) in boxes.items():
            image[y0:y1, x0:x1] = COLOURS[colour]
        return image

    return paint


@pytest.fixture
def photo(scene: Scene) -> np.ndarray:
    """48 × 64: a large red box and a small blue one."""
    return scene(48, 64, red=(8, 4, 40, 36), blue=(20, 44, 36, 60))


@pytest.fixture
def photos(place: Path, photo: np.ndarray) -> None:
    """photos/a.png, b.png and c.png."""
    for name in "abc":
        write(f"photos/{name}.png", photo)


@pytest.fixture
def page() -> Iterator[Page]:
    """An empty page of the system's Chromium, without a window; an error in its scripts fails the
    test. With REQUIRE_CHROMIUM set (.ci/run does) a missing browser fails it too.

    Each test starts its own: Playwright's event loop runs in this thread until the test ends.
    """
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        missing = "no chromium here: apt-get install chromium"
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    errors: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium)
        tab = browser.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        yield tab
        browser.close()
    assert errors == []
