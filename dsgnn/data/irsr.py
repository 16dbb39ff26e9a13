"""IRSR (Liu et al., TPAMI 2021): objects ranked by their saliency relative to each other.

    Annotations/{split}.pkl       [{"file_name", "rank": [one per object, 0 = least salient],
                                    "annotations": [{"bbox", "bbox_mode", "segmentation"}, …]}, …]
    Images/{split}/rgb/{file name}   (`image` in place of `rgb` in some copies)

for train and test. file_name has the authors' folders before it. There is no published validation
split: one training image in 20 is held out by its file name.

A pickle is a program. These are run by `load_plain_pickle`, which has no operations but making
plain containers, numbers, strings and numpy arrays of numbers.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dsgnn.data.records import (
    SPLITS,
    RankedImages,
    Record,
    check_split,
    field,
    file_name,
    numbers,
    objects,
    stated_size,
)
from dsgnn.pickled import check_pickle
from dsgnn.runtime.errors import DataError

PUBLISHED_IMAGES = {"test": 2929}


class IrsrReader(RankedImages):
    """One split of IRSR: train (without the images held out), val (those) or test.

    root: the folder with the files above. Raises OptionError for another split, FileNotFoundError
    when the split's annotations are not there, DataError when they are broken or hold
    anything but plain values.
    """

    def __init__(self, root: Path | str, split: str) -> None:
        check_split(split, SPLITS)
        folder = "test" if split == "test" else "train"
        self.published_images = PUBLISHED_IMAGES.get(split)
        images = Path(root) / "Images" / folder
        self._images = images / "image" if (images / "image").is_dir() else images / "rgb"
        path = Path(root) / "Annotations" / f"{folder}.pkl"
        entries = load_plain_pickle(path)
        if not isinstance(entries, list):
            raise DataError(f"{path} must hold a list, got a {type(entries).__name__}")
        super().__init__(split, path, entries, with_val=False)

    def _record(self, entry: Any, where: str) -> Record:
        field(entry, "file_name", str, where)
        found = objects(entry, "annotations", where)
        ranks = numbers(field(entry, "rank", (list, tuple, np.ndarray), where), f"{where}.rank")
        if len(ranks) != len(found):
            raise DataError(
                f"{where}: rank has {len(ranks)} numbers, annotations {len(found)} objects; "
                "they must be one to one"
            )
        return Record(
            image=self._images / file_name(entry),
            where=where,
            objects=found,
            saliency=ranks,
            size=stated_size(entry, where),
        )


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle of plain containers, numbers, strings and numpy arrays of those.

    Raises FileNotFoundError; DataError for anything else in it, before it is made or called.
    """
    try:
        data = path.read_bytes()
        check_pickle(data)
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no {path}; is the folder complete?") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: not a pickle of plain values ({error})") from error


class _PlainUnpickler(pickle.Unpickler):
    """Resolves names to the functions below only; whatever else a pickle names is an error."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}; only plain containers, numbers, strings and numpy "
                "arrays are admitted"
            ) from None


class _Dtype:
    """Stands for `numpy.dtype` in a pickle. Only numbers, truth values and text; never objects."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufSU":
            raise pickle.UnpicklingError(f"a numpy array of {self.dtype} is not admitted")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array under construction, filled from bytes only."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        state = (1, shape, kind.dtype, bool(fortran), _bytes(content))
        super().__setstate__(state)


def _new_array(*_: Any) -> np.ndarray:
    return np.empty(0, np.uint8).view(_Array)


def _scalar(kind: _Dtype, content: bytes | str) -> Any:
    return np.frombuffer(_bytes(content), kind.dtype)[0]


def _bytes(content: Any) -> bytes:
    """What Python 2 wrote as bytes is read as text, one character a byte (encoding="latin1")."""
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _from_buffer(content: Any, kind: _Dtype, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 protocols write bytes. The encoding is always this one."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not admitted")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # before protocol 3
    ("collections", "OrderedDict"): dict,
}
