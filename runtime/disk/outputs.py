"""What a run writes: pictures, results.json, JSON lines and annotated video."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from dsgnn.runtime.disk.files import ffmpeg_name, whole_file, write_whole
from dsgnn.runtime.disk.sources import Source, numbered
from dsgnn.runtime.errors import InputError
from dsgnn.runtime.ranking import RankedObject, Ranking
from dsgnn.runtime.video import h264

KINDS = ("overlay", "map", "masks", "crops", "json", "sheet")
VIDEO_KINDS = ("overlay", "map", "masks", "json")
RESULTS_SCHEMA = "dsgnn.results/1"
JPEG_QUALITY = 92
JPEG_SIDE_PX = 65_500  # libjpeg's limit

Record = Callable[[Mapping[str, Any]], None]
Frame = Callable[[np.ndarray], None]


def parse_kinds(text: str) -> tuple[str, ...]:
    """ "overlay,json" to its kinds. Raises ValueError for one that is not in KINDS."""
    kinds = tuple(part.strip() for part in text.split(","))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"--save takes {','.join(KINDS)}, got {', '.join(map(repr, unknown))}")
    return kinds


def make_folder(out: Path) -> None:
    """Make the output folder. Raises OSError if it cannot be made or written to."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the output folder {out} cannot be written to")


@dataclass(frozen=True)
class Target:
    """Where the outputs of one source go, and which.

    out: the output folder. kinds: some of KINDS. palette: of the map. inputs: `real_place` of all
    the run reads, which is not to be written over.
    """

    out: Path
    source: Source
    kinds: Collection[str]
    palette: str
    inputs: frozenset[Path]

    def path(self, ending: str) -> Path:
        """OUT/NAME.ending, with its folder made. Raises ValueError if it must not be written."""
        path = self.out / f"{self.source.name}.{ending}"
        if not path.parent.resolve().is_relative_to(self.out.resolve()):
            raise ValueError(f"its output {path} would leave the output folder through a link")
        if real_place(path) in self.inputs:
            raise ValueError(f"its output {path} is one of the inputs: choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self, ending: str) -> bool:
        """Remove what an earlier run wrote to OUT/NAME.ending; True if it was there. An input is
        left."""
        try:
            path = self.path(ending)
        except ValueError:
            return False
        if not path.is_file():
            return False
        path.unlink()
        return True

    def made(self) -> dict[str, Any]:
        """For records: what the outputs are made of, to be taken before it is read, and which.

        of: size and time of change of the file, of numbered images their sum and the latest; None
        for what is no file. Raises OSError if it is not there, ValueError as `numbered`.
        """
        files = [self.source.path] if self.source.path else []
        if self.source.feed == "sequence":
            files = numbered(self.source.address)
        facts = [path.stat() for path in files]
        size = sum(fact.st_size for fact in facts)
        latest = max((fact.st_mtime_ns for fact in facts), default=0)
        kinds = [kind for kind in KINDS if kind in self.kinds]
        return {
            "of": {"bytes": size, "modified_ns": latest} if facts else None,
            "saved": [f"map of {self.palette}" if kind == "map" else kind for kind in kinds],
        }


def real_place(path: Path) -> Path:
    """Where a file of this path lies, links in its folder followed."""
    return path.parent.resolve() / path.name


def save_image(ranking: Ranking, photo: np.ndarray, target: Target) -> None:
    """Write the pictures asked for, and remove those of objects that only an earlier run found.
    photo: (h, w, 3) uint8 RGB."""
    if "overlay" in target.kinds:
        write_picture(target.path("overlay.jpg"), to_bgr(ranking.draw(photo)))
    if "map" in target.kinds:
        write_picture(target.path("map.png"), ranking.rank_map(target.palette))
    for item in ranking.objects:
        if "masks" in target.kinds:
            mask = item.mask.view(np.uint8) * 255
            write_picture(target.path(f"mask{item.rank}.png"), mask)
        if "crops" in target.kinds and item.area > 0:
            write_picture(target.path(f"crop{item.rank}.png"), cut_out(photo, item))
        elif "crops" in target.kinds:
            target.remove(f"crop{item.rank}.png")
    for kind in {"masks", "crops"} & set(target.kinds):
        rank = len(ranking.objects) + 1
        while target.remove(f"{kind[:-1]}{rank}.png"):
            rank += 1


def clear_masks(target: Target) -> None:
    """Remove the masks that an earlier run wrote of a video: it may have had other frames."""
    folder = target.out / f"{target.source.name}.masks"
    for name in os.listdir(folder) if folder.is_dir() else ():
        if re.fullmatch(r"[0-9]{6,}\.mask[1-9][0-9]*\.png", name):
            target.remove(f"masks/{name}")


def cut_out(photo: np.ndarray, item: RankedObject) -> np.ndarray:
    """The object's box, transparent where the mask is not: (box height, box width, 4) BGRA."""
    x0, y0, x1, y1 = item.box
    cut = cv2.cvtColor(photo[y0:y1, x0:x1], cv2.COLOR_RGB2BGRA)
    cut[:, :, 3] = item.mask[y0:y1, x0:x1].view(np.uint8) * 255
    return cut


@contextmanager
def results_file(path: Path, model: Mapping[str, Any]) -> Iterator[Record]:
    """results.json: written image by image, in place when the run ends or on Ctrl-C."""
    with _text_file(path) as file:
        head = json.dumps({"schema": RESULTS_SCHEMA, "model": model})
        file.write(f'{head[:-1]}, "images": [')
        before = "\n"

        def record(image: Mapping[str, Any]) -> None:
            nonlocal before
            file.write(before + json.dumps(image))
            before = ",\n"

        try:
            yield record
        finally:
            file.write("\n]}\n")


@contextmanager
def lines_file(path: Path) -> Iterator[Record]:
    """JSON lines, one per frame, each written out at once."""
    with _text_file(path) as file:

        def record(frame: Mapping[str, Any]) -> None:
            file.write(json.dumps(frame) + "\n")
            file.flush()

        yield record


@contextmanager
def video_file(path: Path, rate: float, size: tuple[int, int]) -> Iterator[Frame]:
    """An MP4 to write (h, w, 3) uint8 RGB frames of `size` (width, height) to.

    H.264 where PyAV is installed, else MPEG-4 Part 2 by OpenCV. Raises OSError if it cannot be
    written, in whole.
    """
    writer = h264.h264_writer if h264.is_installed() else _mpeg4_writer
    with (
        whole_file(path, keep_interrupted=True) as temporary,
        writer(temporary, rate, size) as write,
    ):
        yield write


@contextmanager
def _mpeg4_writer(path: Path, rate: float, size: tuple[int, int]) -> Iterator[Frame]:
    """As `h264_writer`, but an odd side loses a pixel. OpenCV would only log what it could not
    write: here it is an OSError."""
    name = ffmpeg_name(path)
    writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    frames = 0

    def write(picture: np.ndarray) -> None:
        nonlocal frames
        writer.write(to_bgr(picture))
        frames += 1

    try:
        if not writer.isOpened():
            raise OSError(f"OpenCV cannot write an mp4v video of {size[0]}×{size[1]} here")
        yield write
    finally:
        writer.release()
    written = cv2.VideoCapture(name).get(cv2.CAP_PROP_FRAME_COUNT)
    if written != frames:
        raise OSError(f"only {written:.0f} of {frames} frames were written: is the disk full?")


@contextmanager
def _text_file(path: Path) -> Iterator[TextIO]:
    with (
        whole_file(path, keep_interrupted=True) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        yield file


def forget(_: Any) -> None:
    """In place of a file that was not asked for."""


def to_bgr(image: np.ndarray) -> np.ndarray:
    """RGB to OpenCV's channel order."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Grey, BGR or BGRA in the format of the suffix, whole or not at all. Raises ValueError as
    `encode_picture` and OSError."""
    write_whole(path, encode_picture(path.suffix, pixels))


def encode_picture(suffix: str, pixels: np.ndarray) -> bytes:
    """Grey, BGR or BGRA in the format of the suffix. Raises InputError for what it cannot hold."""
    high, wide = pixels.shape[:2]
    if suffix == ".jpg" and max(high, wide) > JPEG_SIDE_PX:
        raise InputError(
            f"a JPEG, as the overlay is, has at most {JPEG_SIDE_PX:,} pixels a side, not "
            f"{wide}×{high}: ask for the map and json alone"
        )
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == ".jpg" else []
    done, data = cv2.imencode(suffix, pixels, options)
    if not done:
        raise InputError(f"OpenCV cannot encode a {suffix} of shape {pixels.shape}")
    return data.tobytes()
