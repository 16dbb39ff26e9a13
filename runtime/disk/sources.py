"""What a run ranks, and under which names its outputs go.

An output is named after its input: `photo.jpg` gives `photo.overlay.jpg`; under a folder that was
given as a source the sub-folders are kept. Inputs of one run that would share a name keep their
suffix (`photo.jpg.overlay.jpg`, `photo.png.overlay.jpg`), and then as many parent folders as it
takes to tell them apart (`a/photo.jpg.overlay.jpg`). Letter case and Unicode form do not tell
names apart, as on many disks they do not. Which input comes first makes no difference.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from io import BytesIO
from pathlib import Path, PurePath
from typing import BinaryIO

from dsgnn.runtime.disk import signatures
from dsgnn.runtime.errors import InputError, OptionError

STDIN = "-"
LIST_SUFFIX = ".txt"
SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
NUMBERED = re.compile(r"%(0\d+)?d")
# What is taken from folders. What a file is, its content says, or else its suffix.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".avi", ".divx", ".mkv", ".webm", ".ivf", ".y4m"),
    *(".mpg", ".mpeg", ".mpe", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".mxf", ".dv"),
    *(".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogm", ".rm", ".rmvb"),
    *(".h264", ".264", ".h265", ".265", ".hevc"),
)
# HEIC and JPEG XL too, to be named as unreadable and not passed over.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".tif", ".tiff", ".gif"),
    *(".bmp", ".dib", ".jp2", ".pbm", ".pgm", ".ppm", ".pnm", ".heic", ".heif", ".jxl"),
)


@dataclass(frozen=True)
class Source:
    """One image or video to rank.

    path: absolute, or None if it is no file. shown: its name in messages and results. depth: its
    plain name is made of so many last parts of the path. name: what its outputs are called, without
    a suffix, relative to the output folder. problem: why it cannot be ranked; empty if it can.
    feed: "camera", "url", "raw" (frames on standard input) or "sequence"; empty for a file, and for
    an image on standard input. address: where the feed comes from, which is a number, a URL (with
    its password, which `shown` leaves out) or a pattern.
    """

    path: Path | None
    shown: str
    depth: int = 1
    name: str = ""
    problem: str = ""
    feed: str = ""
    address: str = ""

    @cached_property
    def is_video(self) -> bool:
        """Whether it is ranked as a video, which an animation is too.

        The content of a file or of standard input decides, or the suffix where the content is of
        no known kind or cannot be read.
        """
        if self.feed:
            return True
        kind = _kind(self.path)
        suffix = self.path.suffix.lower() if self.path else ""
        return kind in ("animation", "video", "sound") or (not kind and suffix in VIDEO_SUFFIXES)

    @property
    def is_live(self) -> bool:
        """Whether it goes on until somebody stops it, as far as its name tells."""
        return self.feed == "camera" or self.address.startswith(("rtsp", "rtmp", "udp", "srt"))


@dataclass(frozen=True)
class Found:
    """What `find_sources` gives.

    sources: in the order of the arguments, the files of a folder sorted, and none twice.
    passed_over: how many files in folders were left out, because their suffix is neither an image's
    nor a video's or because they are pipes or devices.
    """

    sources: tuple[Source, ...]
    passed_over: int

    def __str__(self) -> str:
        found = sum(not source.problem for source in self.sources)
        text = f"photos and videos found: {found:,}"
        if self.passed_over:
            text += f"; passed over as neither image nor video: {self.passed_over:,}"
        return text


def find_sources(arguments: Iterable[str], out: Path, raw: bool = False) -> Found:
    """Find the sources that a person names, and name their outputs.

    An argument is a file, a folder, a glob pattern, numbered images as one video ("shot%04d.png"),
    "-" for standard input, a camera's number, a URL, or a .txt file with one of all these on each
    line ("#" begins a comment; names of files are relative to the list's folder). If there is a
    file of just that name, it is what is meant. Folders are searched with their sub-folders; hidden
    files and linked folders are left out, and so they are where a pattern has "**". What lies in
    `out` is never taken from a folder or a pattern. raw: standard input holds frames, not an image.
    An argument that leads to nothing becomes a source with a problem.

    Raises OptionError if `out` itself is given as a source, or if there is raw and no "-"; OSError
    and InputError for a list that cannot be read or names nothing.
    """
    sources: list[Source] = []
    passed_over = 0
    names = _listed(arguments)
    if raw and STDIN not in names:
        raise OptionError(f"raw frames come on standard input: give {STDIN} as a source")
    for argument in names:
        if "\0" in argument:
            problem = "a name cannot hold the character of code 0"
            sources.append(Source(None, argument, problem=problem))
        elif argument == STDIN:
            sources.append(Source(None, "stdin", feed="raw" if raw else ""))
        elif feed := _feed(argument):
            sources.append(feed)
        else:
            paths = _matches(argument, out)
            if not paths:
                problem = f"nothing matches the pattern (what lies in {out} is not taken)"
                sources.append(Source(_absolute(argument), argument, problem=problem))
            for path in paths:
                more, others = _expand(path, out)
                sources += more
                passed_over += others
    once: dict[tuple[Path | None, str], Source] = {}
    for source in sources:
        key = (source.path, source.address)
        depth = max(source.depth, once.get(key, source).depth)
        once[key] = replace(once.get(key, source), depth=depth)
    return Found(name_outputs(list(once.values())), passed_over)


def standard_input() -> BinaryIO:
    """The bytes of standard input. Raises InputError where there is none."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    return sys.stdin.buffer


def _kind(path: Path | None) -> str:
    """What a file, or standard input for None, holds; "" if that cannot be told without reading on
    in a pipe."""
    try:
        if path is not None:
            if not path.is_file():
                return ""
            with path.open("rb") as file:
                return signatures.kind(file)
        stream = standard_input()
        if stream.seekable():
            return signatures.kind(stream)
        return signatures.kind(BytesIO(stream.peek(1))) if hasattr(stream, "peek") else ""
    except (AttributeError, OSError, InputError):
        return ""


def numbered(pattern: str) -> list[Path]:
    """The files of a pattern such as shot%04d.png, by number. Raises InputError if there are none,
    or two of one number (shot1.png and shot0001.png)."""
    path = Path(pattern)
    before, _, after = NUMBERED.sub("\0", path.name, count=1).partition("\0")
    shape = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    numbers: dict[int, Path] = {}
    for found in map(Path, sorted(glob.glob(f"{glob.escape(str(path.parent))}/*"))):
        if match := shape.fullmatch(found.name):
            number = int(match[1])
            if number in numbers:
                names = f"{numbers[number].name} and {found.name}"
                raise InputError(f"{names} are both number {number}")
            numbers[number] = path.parent / found.name
    if not numbers:
        raise InputError("no file has a name of this pattern")
    return [numbers[number] for number in sorted(numbers)]


def video_source(argument: str | os.PathLike[str] | int) -> Source:
    """One video by its path, camera number, URL or pattern. Raises FileNotFoundError."""
    name = str(argument) if isinstance(argument, int) else os.fspath(argument)
    feed = _feed(name)
    if feed is None and not os.path.isfile(name):
        raise FileNotFoundError(f"there is no video file {name}")
    return feed or Source(_absolute(name), name)


def _listed(arguments: Iterable[str]) -> list[str]:
    """The arguments, with the lines of a list in place of its name. Raises OSError for a list that
    cannot be read, and InputError for one that names nothing or is no text."""
    all_of_them: list[str] = []
    for argument in arguments:
        is_list = argument.lower().endswith(LIST_SUFFIX) and os.path.isfile(argument)
        if not is_list or _kind(Path(argument)):  # a photo may be called .txt
            all_of_them.append(argument)
            continue
        lines = _text(argument).splitlines()
        names = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
        if not names:
            raise InputError(f"the list {argument} names no source")
        all_of_them += (_beside(argument, name) for name in names)
    return all_of_them


def _text(path: str) -> str:
    """The text of a list, in UTF-8, or in UTF-16 or UTF-32 where its first bytes say so (as
    PowerShell writes them). Raises OSError, and InputError for what is no such text."""
    data = Path(path).read_bytes()
    marks = {
        codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is its beginning
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    coding = next((marks[mark] for mark in marks if data.startswith(mark)), None)
    try:
        return data.decode(coding) if coding else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the list {path} is no whole {error.encoding.upper()} text: save it as UTF-8"
        ) from None


def _beside(listed: str, name: str) -> str:
    """What a line of a list means: names of files and patterns are relative to the list."""
    path = os.path.join(os.path.dirname(listed), name)
    elsewhere = name == STDIN or "://" in name or name.isdecimal()
    return name if elsewhere and not ("\0" not in path and os.path.lexists(path)) else path


def _feed(argument: str) -> Source | None:
    """A camera, a URL or numbered images, if the argument is one of these and no file has its
    name."""
    if os.path.lexists(argument):
        return None
    if argument.isdecimal():
        problem = "" if len(argument) <= 3 else "there is no camera of such a number"
        return Source(None, f"camera {argument}", problem=problem, feed="camera", address=argument)
    scheme, separator, rest = argument.partition("://")
    if separator and scheme.lower() in SCHEMES:
        host, slash, place = rest.partition("/")
        shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"
        return Source(None, shown, feed="url", address=argument)
    if NUMBERED.search(os.path.basename(argument)):
        return Source(None, argument, feed="sequence", address=argument)
    return None


def _matches(argument: str, out: Path) -> list[str]:
    """The files and folders that a pattern stands for, without those in `out`. Anything that is no
    pattern stands for itself."""
    if os.path.lexists(argument) or not glob.has_magic(argument):
        return [argument]
    path = PurePath(argument)
    found = dict.fromkeys(_walk(path.anchor, path.parts[bool(path.anchor) :]))
    return [match for match in found if not _real(match).is_relative_to(_real(out))]


def _walk(folder: str, parts: tuple[str, ...]) -> Iterator[str]:
    """The paths below a folder that match the parts of a pattern, sorted by name.

    A part that is a name there stands for itself, brackets or not. "**" stands for a folder and all
    folders below it but for hidden and linked ones, so that a link to a parent adds nothing.
    """
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    path = os.path.join(folder, part)
    if part != "**" and (os.path.lexists(path) or not glob.has_magic(part)):
        if os.path.lexists(path):
            yield from _walk(path, rest)
        return
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:
        return
    if part == "**" and (folder or rest):
        yield from _walk(folder, rest)
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if part == "**" and entry.is_dir(follow_symlinks=False):
            yield from _walk(path, parts)
        elif part == "**" and not rest and not os.path.isdir(path):
            yield path
        elif part != "**" and fnmatch(entry.name, part):
            yield from _walk(path, rest)


def _real(path: str | Path) -> Path:
    """A path with its links followed. One that leads to itself stays as it is."""
    return Path(os.path.realpath(path))


def _expand(argument: str, out: Path) -> tuple[list[Source], int]:
    """The sources one existing or missing path stands for, and how many files it passed over."""
    if not os.path.isdir(argument):
        problem = "" if os.path.exists(argument) else "there is no such file or folder"
        if problem and "://" in argument:
            problem = f"an address of this kind cannot be read: expected {', '.join(SCHEMES)}"
        if Path(argument).is_fifo() and argument.lower().endswith(VIDEO_SUFFIXES):
            problem = "it is a pipe: hand a video that comes through one to standard input"
        return [Source(_absolute(argument), argument, problem=problem)], 0
    if _real(argument) == _real(out):
        raise OptionError(
            f"the output folder {out} is also a source, so the next run would rank this run's "
            "pictures: give the outputs a folder of their own"
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
            if not name.startswith(".") and _real(Path(folder, name)) != _real(out)
        )
        for name in sorted(names):
            if name.startswith("."):
                continue
            shown = os.path.join(folder, name)
            known = Path(name).suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
            # A pipe or a device would be waited for; a broken link is named.
            if not known or (os.path.exists(shown) and not os.path.isfile(shown)):
                passed_over += 1
                continue
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
    """The name of a source's outputs.

    detail: 0 gives the plain name and 1 adds the suffix; each further step adds a parent folder.
    Past the root, where names differ by letter case alone, a hash of the path is added.
    """
    if source.path is None:
        plain = _plain_name(source)
        alone = detail == 0 or not source.address
        return plain if alone else f"{plain}-{_digest(source.address)}"
    parts = source.path.parts[1:]  # without the root
    depth = source.depth + max(0, detail - 1)
    name = PurePath(*parts[-depth:])
    if detail == 0:
        return name.with_suffix("").as_posix()
    if depth > len(parts) + 1:  # one step later, as the others may go on to longer names
        return f"{name.as_posix()}-{_digest(str(source.path))}"
    return name.as_posix()


def _plain_name(source: Source) -> str:
    """The plain name of what is no file: "stdin", "camera0", "cam.local-live", or "shots" for
    shots/%04d.png."""
    if source.feed == "sequence":
        stem = NUMBERED.sub("", Path(source.address).stem).strip(" ._-")
        return stem or _absolute(source.address).parent.name or "sequence"
    text = source.shown.partition("://")[2].partition("?")[0] or source.shown.replace(" ", "")
    return re.sub(r"[^\w.]+", "-", text).strip("-.") or "stream"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))
