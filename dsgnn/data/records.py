"""What the readers of ranked data sets share: an image's annotations, checked, and how to load it.

A reader knows a folder's files and turns entry number i into a `Record`; `RankedImages` makes that
a sequence of `Sample`. Annotations are read at once, pixels when an item is asked for.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import numpy as np

from dsgnn.data.polygons import segmentation_to_mask
from dsgnn.data.ranks import ANNOTATIONS
from dsgnn.data.sample import Sample
from dsgnn.runtime.disk.documents import read_document
from dsgnn.runtime.errors import DataError, InputError, OptionError
from dsgnn.runtime.photo.decoder import Decoders

SPLITS = ("train", "val", "test")


class Samples(Protocol):
    """What every data set is: it has a length, and numbers 0…len-1 (or from -1 down) give samples;
    larger ones raise IndexError, so that a `for` loop ends.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Record:
    """One image's annotations, pixels not read.

    image: the file. where: the file and entry these come from, for messages. objects: the salient
    ones only, {where: annotation with a `segmentation`}. saliency: one per object, larger = more
    salient, with neighbours `step` apart when none is missing. size: (h, w) if the file states it.
    Raises DataError for an object without a segmentation.
    """

    image: Path
    where: str
    objects: dict[str, Any]
    saliency: list[float]
    step: float = 1.0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for where, annotation in self.objects.items():
            field(annotation, "segmentation", (list, tuple, dict, np.ndarray), where)

    def read_image(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises DataError if the file is missing, broken or resized."""
        return read_photo(self.image, f"{self.where}: ", self.size)

    def draw(self, where: str, height: int, width: int) -> np.ndarray:
        """One of the objects as (height, width) bool. Raises DataError if it is broken."""
        try:
            return segmentation_to_mask(self.objects[where]["segmentation"], height, width)
        except DataError as error:
            raise DataError(f"{where}.segmentation: {error}") from None

    def load(self) -> Sample:
        """Read the image, draw the objects and close their ranks up to 1…G.

        Equal saliency (`dsgnn.data.check` reports it) is ordered as in the file.
        """
        image = self.read_image()
        height, width = image.shape[:2]
        masks = np.zeros((len(self.objects), height, width), bool)
        for mask, where in zip(masks, self.objects, strict=True):
            mask[:] = self.draw(where, height, width)
        order = np.argsort(np.array(self.saliency, np.float64), kind="stable")
        return Sample(image, masks, np.argsort(order) + 1, self.image.stem)


class RankedImages(ABC):
    """A split of a data set on disk; each sample is loaded when asked for.

    split: its name. palette: the one its MAE is published with. published_images: how many images
    the split should have, None where that was not published.
    """

    palette = "irsr"
    published_images: int | None = None

    def __init__(self, split: str, path: Path, entries: Sequence[Any], with_val: bool) -> None:
        """path: the file of annotations, for messages. entries: what it lists. with_val: val was
        published too. Where it was not, one training image in 20 is held out for it by its file
        name (`for_validation`), and both splits are of the same file."""
        self.split, self._path, self._entries = split, path, entries
        whole = with_val or split == "test"
        self._indices = [
            index
            for index, entry in enumerate(entries)
            if whole or for_validation(file_name(entry)) == (split == "val")
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def record(self, index: int) -> Record:
        """Entry number `index`, 0…len-1, checked. Raises DataError if it is broken."""
        entry = self._indices[index]
        return self._record(self._entries[entry], f"{self._path}: [{entry}]")

    @abstractmethod
    def _record(self, entry: Any, where: str) -> Record:
        """One entry, checked. where: its place, for messages."""

    def __getitem__(self, index: int) -> Sample:
        return self.record(range(len(self))[index]).load()


class Joined:
    """Several data sets after one another, such as train+val."""

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts
        self.palette = palette_of(parts[0])
        origins = dict.fromkeys(ranks_from(part) for part in parts)
        self.ranks_from = " and ".join(origins)
        self.starts = np.cumsum([0] + [len(part) for part in parts])  # and the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        part, index = self.place(range(len(self))[index])
        return self.parts[part][index]

    def place(self, index: int) -> tuple[int, int]:
        """Which part image number `index`, 0…len-1, is in, and its number there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])


class Subset:
    """Some images of a data set."""

    def __init__(self, data: Samples, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices
        self.palette = palette_of(data)
        self.ranks_from = ranks_from(data)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.data[self.indices[index]]


def read_photo(path: Path, where: str = "", size: tuple[int, int] | None = None) -> np.ndarray:
    """An image of a data set: (h, w, 3) uint8 RGB, decoded in a process that can be killed.

    where: what messages begin with. size: (h, w) that the annotations state, if they do. Raises
    DataError if the file is missing, broken or of another size.
    """
    try:
        image = _decoders(os.getpid())(path)
    except FileNotFoundError:
        raise DataError(f"{where}no image {path}; is the folder complete?") from None
    except (OSError, InputError) as error:
        raise DataError(f"{where}cannot read {path}: {error}") from error
    if size is not None and image.shape[:2] != size:
        raise DataError(
            f"{where}height and width are {size[0]} and {size[1]}, but {path} has "
            f"{image.shape[0]} and {image.shape[1]}; give the image that was annotated"
        )
    return image


@lru_cache(maxsize=1)
def _decoders(process: int) -> Decoders:
    """The decoding processes of this process, by its number: a forked one has its own."""
    return Decoders()


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for each photo: its stem, and where several share that, the folders they differ in.

    "a/1.jpg" and "b/1.jpg" are "a/1" and "b/1", and "b/2.jpg" is "2".
    """
    counts = Counter(path.stem for path in paths)
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return [
        path.stem if counts[path.stem] == 1 else path.relative_to(common).with_suffix("").as_posix()
        for path in paths
    ]


def ranks_from(data: Samples) -> str:
    """Where the ranks of a data set come from: one of the names in `dsgnn.data.ranks`."""
    return getattr(data, "ranks_from", ANNOTATIONS)


def palette_of(data: Samples) -> str:
    """The palette that the MAE of a data set is published with, see `dsgnn.metrics`."""
    return getattr(data, "palette", RankedImages.palette)


def for_validation(name: str) -> bool:
    """Whether a training image belongs to the validation split of sets published without one.

    One in 20, by a hash of the file name (no folder), so that it depends on nothing else.
    """
    return place_of(name, 20) == 0


def place_of(name: str, places: int) -> int:
    """One of so many places, 0 first, by a hash of a file's name and by nothing else."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % places


def check_split(split: str, splits: Iterable[str]) -> None:
    """Raise OptionError unless the split is one of those."""
    if split not in splits:
        raise OptionError(f"split must be one of {', '.join(splits)}, got {split!r}")


def read_json(path: Path, expected: type) -> Any:
    """Read a JSON file that holds a list or a dict.

    Raises FileNotFoundError, or DataError when it holds something else.
    """
    try:
        content = read_document(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}; is the folder complete?") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(content, expected):
        raise DataError(f"{path} must hold {_a(expected)}, got {_a(type(content))}")
    return content


def field(entry: Any, name: str, expected: type | tuple[type, ...], where: str) -> Any:
    """`entry[name]`, or a DataError that says what is wrong with it and where."""
    if not isinstance(entry, Mapping):
        raise DataError(f"{where} must be a dict with {name!r}, got {_a(type(entry))}")
    if name not in entry:
        raise DataError(f"{where} has no {name!r}, only {', '.join(map(repr, entry))}")
    value = entry[name]
    if not isinstance(value, expected):
        raise DataError(f"{where}.{name} must be {_a(expected)}, got {_a(type(value))}")
    return value


def objects(entry: Any, name: str, where: str) -> dict[str, Any]:
    """The annotations in the list `entry[name]`, by where each of them is."""
    return {f"{where}.{name}[{i}]": o for i, o in enumerate(field(entry, name, list, where))}


def number(value: Any, where: str) -> float:
    """A finite number as float, or a DataError."""
    try:
        finite = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        finite = False
    if not finite:
        raise DataError(f"{where} must be a finite number, got {repr(value)[:100]}")
    return float(value)


def numbers(values: Iterable[Any], where: str) -> list[float]:
    """Finite numbers as floats, or a DataError that says which is none."""
    return [number(value, f"{where}[{index}]") for index, value in enumerate(values)]


def whole_number(entry: Any, name: str, where: str, least: int | None = None) -> int:
    """The whole number `entry[name]`, or a DataError. least: no smaller one will do."""
    value = field(entry, name, object, where)
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or (least is not None and value < least):
        least_text = "" if least is None else f" from {least}"
        raise DataError(f"{where}.{name} must be a whole number{least_text}, got {value!r}")
    return int(value)


def inside(name: str, where: str) -> str:
    """The name of a file below a folder of the data set, or a DataError where it leads elsewhere.

    Annotations come from others; a name such as "../../x" would read what they should not reach.
    """
    path = PureWindowsPath(name)  # knows both kinds of slashes, and drives
    if not path.name or path.anchor or ".." in path.parts or "\0" in name:
        raise DataError(f"{where} names a file outside of the data set's folder: {name!r}")
    return name


def stated_size(entry: Mapping, where: str) -> tuple[int, int] | None:
    """(h, w) of an entry that has both."""
    if "height" not in entry or "width" not in entry:
        return None
    height, width = (number(entry[side], f"{where}.{side}") for side in ("height", "width"))
    return int(height), int(width)


def file_name(entry: Any) -> str:
    """The last part of an entry's file_name, whichever slashes it has; "" if there is none."""
    name = entry.get("file_name") if isinstance(entry, Mapping) else None
    return PureWindowsPath(name).name if isinstance(name, str) else ""


def _a(kinds: type | tuple[type, ...]) -> str:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return " or ".join(f"a {kind.__name__}" for kind in kinds)
