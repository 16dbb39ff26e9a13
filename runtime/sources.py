"""What a run ranks, and under which names its outputs go.

An output is named after its input: `photo.jpg` gives `photo.overlay.jpg`; under a folder that was
given as a source the sub-folders are kept. Inputs of one run that would share a name keep their
suffix (`photo.jpg.overlay.jpg`, `photo.png.overlay.jpg`), and then as many parent folders as it
takes to tell them apart (`a/photo.jpg.overlay.jpg`). Letter case and Unicode form do not tell
names apart, as on many disks they do not. Which input comes first makes no difference.
"""

from __future__ import annotations

import glob
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

STDIN = "-"
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm"),
    *(".mpg", ".mpeg", ".wmv", ".flv", ".3gp"),
)
# What is taken from folders; HEIC too, to be named as unreadable and not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".tif", ".tiff", ".gif"),
    *(".bmp", ".dib", ".jp2", ".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif"),
)


@dataclass(frozen=True)
class Source:
    """One image or video to rank.

    path: absolute; None for standard input. shown: the name in messages and results. depth: how
    many last parts of the path make its plain name. name: of its outputs, relative to the output
    folder, without suffix. problem: why there is nothing to rank ("" = there is).
    """

    path: Path | None
    shown: str
    depth: int = 1
    name: str = ""
    problem: str = ""

    @property
    def is_video(self) -> bool:
        return self.path is not None and self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Found:
    """sources: in the order given, folders sorted, none twice. passed_over: files in folders that
    are neither images nor videos by their suffix."""

    sources: tuple[Source, ...]
    passed_over: int


def find_sources(arguments: Iterable[str], out: Path) -> Found:
    """Files, folders, glob patterns and "-" (standard input) to named sources.

    Folders are searched with their sub-folders, but for hidden files and linked folders.
    What lies in `out` is never taken from a folder or a pattern. An argument that leads to nothing
    becomes a source with a problem. Raises ValueError if `out` itself is given as a source.
    """
    sources: list[Source] = []
    passed_over = 0
    for argument in arguments:
        if argument == STDIN:
            sources.append(Source(None, "stdin"))
        elif not os.path.lexists(argument) and glob.has_magic(argument):
            matches = [
                match
                for match in sorted(glob.glob(argument, recursive=True))
                if not Path(match).resolve().is_relative_to(out.resolve())
            ]
            if not matches:
                problem = f"nothing matches the pattern (what lies in {out} is not taken)"
                sources.append(Source(_absolute(argument), argument, problem=problem))
            for match in matches:
                more, others = _expand(match, out)
                sources += more
                passed_over += others
        else:
            more, others = _expand(argument, out)
            sources += more
            passed_over += others
    once: dict[Path | None, Source] = {}
    for source in sources:
        depth = max(source.depth, once.get(source.path, source).depth)
        once[source.path] = replace(once.get(source.path, source), depth=depth)
    return Found(name_outputs(list(once.values())), passed_over)


def _expand(argument: str, out: Path) -> tuple[list[Source], int]:
    """The sources one existing or missing path stands for, and how many files it passed over."""
    if not os.path.isdir(argument):
        problem = "" if os.path.exists(argument) else "there is no such file or folder"
        return [Source(_absolute(argument), argument, problem=problem)], 0
    if Path(argument).resolve() == out.resolve():
        raise ValueError(
            f"the output folder {out} is also a source, so the next run would rank this run's "
            "pictures: give --out a folder of its own"
        )
    sources: list[Source] = []
    passed_over = 0

    def unreadable(error: OSError) -> None:
        folder = str(error.filename)
        sources.append(Source(_absolute(folder), folder, problem=error.strerror or str(error)))

    for folder, folders, names in os.walk(argument, onerror=unreadable):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(folder, name).resolve() != out.resolve()
        )
        for name in sorted(names):
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
                passed_over += 1
                continue
            shown = os.path.join(folder, name)
            depth = len(PurePath(os.path.relpath(shown, argument)).parts)
            sources.append(Source(_absolute(shown), shown, depth))
    if not sources:
        problem = "the folder holds no image or video"
        sources.append(Source(_absolute(argument), argument, problem=problem))
    return sources, passed_over


def name_outputs(sources: list[Source]) -> tuple[Source, ...]:
    """Give every source that can be ranked an output name that no other of the run has."""
    detail = {source: 0 for source in sources if not source.problem}
    while True:
        names = {source: _name(source, more) for source, more in detail.items()}
        keys = {s: unicodedata.normalize("NFC", name).casefold() for s, name in names.items()}
        taken = Counter(keys.values())
        if len(taken) == len(keys):
            return tuple(replace(source, name=names.get(source, "")) for source in sources)
        detail = {source: more + (taken[keys[source]] > 1) for source, more in detail.items()}


def _name(source: Source, detail: int) -> str:
    """detail 0: the plain name; 1: with its suffix; then one more parent folder each; past the
    root (names that differ in letter case only) with a hash of the path."""
    if source.path is None:
        return "stdin"
    parts = source.path.parts[1:]  # without the root
    depth = source.depth + max(0, detail - 1)
    name = PurePath(*parts[-depth:])
    if detail == 0:
        return name.with_suffix("").as_posix()
    if depth > len(parts) + 1:  # not at once: the others may go on to longer names
        digest = hashlib.sha256(os.fsencode(source.path)).hexdigest()[:8]
        return f"{name.as_posix()}-{digest}"
    return name.as_posix()


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))
