"""What tests of whole runs write first and read afterwards, in the folder they stand in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime import Ranker
from dsgnn.runtime.disk.outputs import make_folder
from dsgnn.runtime.disk.sources import find_sources
from dsgnn.runtime.run.loop import Outcome, rank_sources
from dsgnn.runtime.video.to_files import VideoOptions


def write(path: str, image: np.ndarray) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(cv2.imencode(Path(path).suffix, image[..., ::-1])[1].tobytes())


def read(path: str) -> np.ndarray:
    return cv2.imread(path, cv2.IMREAD_UNCHANGED)


def results(out: str = "out") -> dict:
    return json.loads(Path(out, "results.json").read_text())


def files(out: str = "out") -> list[str]:
    return sorted(
        path.relative_to(out).as_posix() for path in Path(out).rglob("*") if path.is_file()
    )


def clip(path: str, scene, frames: int = 12, size: tuple[int, int] = (48, 64)) -> None:
    """A red box that moves right, 10 frames a second."""
    pytest.importorskip("av")  # which reads it
    codes = {".mp4": "mp4v", ".avi": "MJPG"}
    code = cv2.VideoWriter.fourcc(*codes[Path(path).suffix])
    writer = cv2.VideoWriter(path, code, 10, size[::-1])
    for index in range(frames):
        writer.write(scene(*size, red=(8, index % 20, 40, index % 20 + 32))[..., ::-1])
    writer.release()


def runs(ranker: Ranker, kinds: Sequence[str] = ("json",)) -> Callable[..., list[Outcome]]:
    """rank(source, ..., kinds=, out=, palette=, **options of videos): a run into the folder out."""

    def rank(
        *arguments: str,
        kinds: Sequence[str] = kinds,
        out: str = "out",
        palette: str = "assr",
        skip: bool = False,
        **options: object,
    ) -> list[Outcome]:
        make_folder(Path(out))
        sources = find_sources(arguments, Path(out)).sources
        video = VideoOptions(**options)
        return list(rank_sources(ranker, sources, Path(out), kinds, palette, video, skip))

    return rank
