"""What a run writes: the kinds of output, what their files are called, and their writers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.runtime.disk.durable import record_file
from dsgnn.runtime.disk.files import ffmpeg_name, whole_file, write_whole
from dsgnn.runtime.disk.pictures import encode_picture, to_bgr, write_picture
from dsgnn.runtime.disk.sources import Source, numbered
from dsgnn.runtime.errors import InputError, OptionError
from dsgnn.runtime.framing import Aspect, Aspects, crop_to, frames_entry
from dsgnn.runtime.ranking import PICTURES, Ranking
from dsgnn.runtime.video import h264

RESULTS_SCHEMA = "dsgnn.results/1"

Record = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class OutputKind:
    """One kind of output.

    shows: for a person. photo: the ending of its file after the photo's name, one of PICTURES.
    video: the endings of its files after a video's name. run: its one file for all photos of a run.

    `Ranking.pictures` makes the files of photos and `save_image` writes them;
    dsgnn.runtime.video.to_files writes those of videos, `results_file` and dsgnn.runtime.run.sheet
    those of a run.
    """

    shows: str
    photo: str = ""
    video: tuple[str, ...] = ()
    run: str = ""


TABLE = {
    "overlay": OutputKind(
        "objects tinted, outlined and numbered", PICTURES["overlay"], video=("overlay.mp4",)
    ),
    "map": OutputKind("ranks as greys", PICTURES["map"], video=("map.mp4",)),
    "heat": OutputKind("where people look, as colours", PICTURES["heat"]),
    "masks": OutputKind(
        "one picture per object, 1 = most salient",
        PICTURES["masks"],
        video=("masks/{frame:06d}.mask{rank}.png",),
    ),
    "crops": OutputKind("objects cut out, transparent around them", PICTURES["crops"]),
    "json": OutputKind(
        "ranks, boxes and masks; which object held rank 1 for how long",
        video=("frames.jsonl", "summary.json"),
        run="results.json",
    ),
    "sheet": OutputKind("all photos ranked on one page", run="sheet.jpg"),
}
KINDS = tuple(TABLE)
VIDEO_KINDS = tuple(name for name, kind in TABLE.items() if kind.video)


def parse_kinds(text: str) -> tuple[str, ...]:
    """ "overlay,json" to its kinds. Raises OptionError for one that is not in KINDS."""
    kinds = tuple(part.strip() for part in text.split(","))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise OptionError(
            f"expected some of {','.join(KINDS)}, got {', '.join(map(repr, unknown))}"
        )
    return kinds


def table_for_people() -> str:
    """What photo.jpg and clip.mp4 give, a line for each kind and each file."""
    lines = []
    for name, kind in TABLE.items():
        photo = kind.run or f"photo.{_first(kind.photo)}"
        lines.append(f"  {name:8} {photo:18} {kind.shows}")
        lines += (f"  {'':8} clip.{_first(ending)}" for ending in kind.video)
    return "\n".join(lines)


def _first(ending: str) -> str:
    """The first file's ending, and dots where each object has a file."""
    return ending.format(frame=0, rank=1) + (" …" if "{" in ending else "")


def make_folder(out: Path) -> None:
    """Make the output folder. Raises OSError if it cannot be made or written to."""
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"the output folder {out} cannot be written to")


@dataclass(frozen=True)
class OutputFiles:
    """Where the outputs of one source go, and which kinds of output it has.

    out: the output folder. kinds: some of KINDS. palette: of the map. inputs: `real_place` of
    every file that the run reads; none of them may be written over. aspects: of the frames that it
    is cropped to. fit: see `dsgnn.runtime.framing.crop_to`.
    """

    out: Path
    source: Source
    kinds: Collection[str]
    palette: str
    inputs: frozenset[Path]
    aspects: Aspects = ()
    fit: str = "crop"

    def path(self, ending: str) -> Path:
        """OUT/NAME.ending, with its folder made. Raises InputError if it must not be written."""
        path = self.out / f"{self.source.name}.{ending}"
        if not path.parent.resolve().is_relative_to(self.out.resolve()):
            raise InputError(f"its output {path} would leave the output folder through a link")
        if real_place(path) in self.inputs:
            raise InputError(
                f"its output {path} is one of the inputs: choose another output folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self, ending: str) -> bool:
        """Remove what an earlier run wrote to OUT/NAME.ending; True if it was there. An input is
        left."""
        try:
            path = self.path(ending)
        except InputError:
            return False
        if not path.is_file():
            return False
        path.unlink()
        return True

    def made(self) -> dict[str, Any]:
        """What a record says of how the outputs were made. Take it before the source is read.

        `of` has the size and the time of change of the source's file; of numbered images it has the
        sum of their sizes and the latest time; it is None for what is no file. `saved` lists the
        kinds of output. Raises OSError if the file is not there, and InputError as `numbered`.
        """
        files = [self.source.path] if self.source.path else []
        if self.source.feed == "sequence":
            files = numbered(self.source.address)
        facts = [path.stat() for path in files]
        size = sum(fact.st_size for fact in facts)
        latest = max((fact.st_mtime_ns for fact in facts), default=0)
        kinds = [kind for kind in KINDS if kind in self.kinds]
        saved = [f"map of {self.palette}" if kind == "map" else kind for kind in kinds]
        saved += [f"{aspect} by {self.fit}" for aspect in self.aspects]
        return {"of": {"bytes": size, "modified_ns": latest} if facts else None, "saved": saved}

    def crop_ending(self, aspect: Aspect) -> str:
        """The ending of the file that is the source cropped to an aspect: "9x16.jpg"."""
        return f"{aspect.name}.{'mp4' if self.source.is_video else 'jpg'}"


def real_place(path: Path) -> Path:
    """Where a file of this path lies, with the links in its folder followed."""
    return Path(os.path.realpath(path.parent), path.name)


def save_image(ranking: Ranking, photo: np.ndarray, out: OutputFiles) -> None:
    """Write the pictures asked for, and remove those of objects that only an earlier run found.
    photo: (h, w, 3) uint8 RGB."""
    written = set()
    for ending, pixels in ranking.pictures(out.kinds, photo, out.palette):
        write_picture(out.path(ending), pixels)
        written.add(ending)
    for kind in (TABLE[name] for name in out.kinds if "{rank}" in TABLE[name].photo):
        for rank in count(1):
            ending = kind.photo.format(rank=rank)
            if ending not in written and not out.remove(ending) and rank > len(ranking):
                break


def save_crops(ranking: Ranking, photo: np.ndarray, out: OutputFiles) -> dict[str, Any]:
    """Write the photo cropped to the aspects asked for, and return what its record says of it.

    photo: (h, w, 3) uint8 RGB. Raises OSError, and InputError as `encode_picture`.
    """
    if not out.aspects:
        return {}
    looks, objects = ranking.looks, ranking.objects
    crops = {aspect: crop_to(looks, aspect, objects, out.fit) for aspect in out.aspects}
    for aspect, crop in crops.items():
        jpeg = encode_picture(".jpg", to_bgr(crop.picture(photo)))
        write_whole(out.path(out.crop_ending(aspect)), jpeg)
    return frames_entry(looks, crops)


def clear_masks(out: OutputFiles) -> None:
    """Remove the masks that an earlier run wrote of a video: it may have had other frames."""
    folder = out.out / f"{out.source.name}.masks"
    for name in os.listdir(folder) if folder.is_dir() else ():
        if re.fullmatch(r"[0-9]{6,}\.mask[1-9][0-9]*\.png", name):
            out.remove(f"masks/{name}")


def results_file(path: Path, model: Mapping[str, Any]) -> AbstractContextManager[Record]:
    """results.json: every image is kept as it comes, see `record_file`, and the file is put in
    place when the block ends, also by Ctrl-C or an error."""
    return record_file(path, {"schema": RESULTS_SCHEMA, "model": dict(model)}, "images")


@contextmanager
def lines_file(path: Path) -> Iterator[Record]:
    """JSON lines, one per frame. Each is given to the system at once."""
    with (
        whole_file(path, keep_interrupted=True) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):

        def record(frame: Mapping[str, Any]) -> None:
            file.write(json.dumps(frame) + "\n")
            file.flush()

        yield record


@contextmanager
def video_file(
    path: Path, rate: float, size: tuple[int, int], sound: h264.Sound | None = None
) -> Iterator[h264.WriteFrame]:
    """An MP4 to write frames of `size` (width, height) to, each with its time, see `h264_writer`.

    It is H.264 where PyAV is installed, else MPEG-4 Part 2 by OpenCV, whose frames come at `rate`
    per second whatever their times, without sound. Raises OSError if not all of it can be written.
    """
    with whole_file(path, keep_interrupted=True) as temporary:
        if h264.is_installed():
            writing = h264.h264_writer(temporary, rate, size, sound)
        else:
            writing = _mpeg4_writer(temporary, rate, size)
        with writing as write:
            yield write


@contextmanager
def _mpeg4_writer(path: Path, rate: float, size: tuple[int, int]) -> Iterator[h264.WriteFrame]:
    """As `h264_writer`, but an odd side loses a pixel. What OpenCV could not write it would only
    log; here that is an OSError."""
    name = ffmpeg_name(path)
    writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    frames = 0

    def write(picture: np.ndarray, time_s: float, duration_s: float) -> None:
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


def forget(_: Any) -> None:
    """Keep no record, and know of none: for a run without them."""
