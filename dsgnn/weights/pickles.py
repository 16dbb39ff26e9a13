"""Tensors out of the pickle files of `torch.save`, without running or importing what they name.

`torch.load(weights_only=True)` refuses a whole file for one unknown object in its metadata; with
`weights_only=False` and a careful unpickler it still starts TorchScript archives, and the old
format can make it write files. So the two formats are read here: names in the file are never
imported, five have a meaning (`_Unpickler.find_class`) and all others give an inert object.

- archive (torch 1.6 and newer): a zip of ROOT/data.pkl, the pickle, and ROOT/data/KEY, the numbers
- stream (older, and what published checkpoints often are): the pickles of a magic number, a
  protocol, facts about the system, the content and the keys; then of each key count and numbers
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from dsgnn.pickled import check_pickle
from dsgnn.runtime.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _Stored(NamedTuple):
    """A tensor as the pickle describes it; its numbers lie elsewhere in the file."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands in for any object of an unknown class: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    __setstate__ = __setitem__ = append = extend = add = __init__


class _Dict(dict):
    """For OrderedDict. The state of the pickled one (its attributes) is left out."""

    def __setstate__(self, state: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Everything a pickle can call comes from `find_class`: here it makes values, no more.

    storages: key → those the pickle referred to.
    """

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known = {
            ("collections", "OrderedDict"): _Dict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
        }
        return known.get((module, name), _Inert)

    # Methods, not functions: a pickle can set attributes of a function, not of a bound method.
    def _tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Stored:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        return _Stored(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def persistent_load(self, saved: Any) -> Any:
        kind, *data = saved
        if kind not in ("storage", b"storage") or len(data) < 4:
            return _Inert()
        dtype, key, _, numel, *view = data
        if not isinstance(dtype, torch.dtype) or any(v is not None for v in view):
            raise pickle.UnpicklingError("a storage of a kind that checkpoints do not have")
        self.storages[str(key)] = storage = _Storage(dtype, str(key), int(numel))
        return storage


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint: of its "state_dict", or of the file where it is a bare mapping.

    Anything else in the file (metadata, optimiser state) is passed over. Returns name → tensor on
    the CPU, in the file's dtypes. Raises CheckpointError for files that are missing, damaged or
    something else, and where the mapping holds no tensors or not only tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0)
            if head.startswith(b"PK"):
                return _read_archive(path, file)
            if head.startswith(b"\x80"):
                return _read_stream(path, file)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: not a PyTorch checkpoint, or damaged or cut short; download it again "
            f"({type(error).__name__}: {error})"
        ) from None
    raise CheckpointError(f"{path}: {_what_it_is(head)}")


def _what_it_is(head: bytes) -> str:
    """Why a file with these first bytes is no PyTorch checkpoint."""
    if not head:
        return "is empty; download it again"
    if head.lstrip().startswith(b"<"):
        return (
            "is a web page saved under this name, not a checkpoint; open it in a browser to see "
            "what the server wanted, and download the file itself"
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the checkpoint; fetch it with `git lfs pull`"
    if head[8:9] == b"{":
        return (
            "is a safetensors file, not a published .pth; if dsgnn wrote it, it is converted "
            "already: use it as it is"
        )
    return f"is not a PyTorch checkpoint (it starts with {head[:8]!r})"


def _state(path: Path, content: Any) -> dict[str, _Stored]:
    """The named tensors in what a pickle held."""
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    names = state if isinstance(state, dict) else {}
    tensors = {k: v for k, v in names.items() if isinstance(v, _Stored)}
    if not tensors:
        found = ", ".join([str(k) for k in names][:5]) or "none"
        raise CheckpointError(
            f'{path}: holds no tensors under "state_dict" (names found: {found}); it was saved '
            "by something else than the published training"
        )
    if others := [k for k in names if k not in tensors]:
        raise CheckpointError(
            f"{path}: {len(others)} of {len(names)} entries are no plain tensors: "
            f"{', '.join(str(k) for k in others[:5])}"
        )
    return tensors


def _materialise(
    stored: Mapping[str, _Stored], numbers: Callable[[_Storage], bytes]
) -> dict[str, Tensor]:
    """Read each storage once and view it as the tensors that lie in it."""
    flat: dict[_Storage, Tensor] = {}
    tensors = {}
    for name, (storage, offset, size, stride) in stored.items():
        if storage not in flat:
            data = bytearray(numbers(storage))
            flat[storage] = (
                torch.frombuffer(data, dtype=storage.dtype)
                if data
                else torch.empty(0, dtype=storage.dtype)
            )
        tensors[name] = flat[storage].as_strided(size, stride, offset)
    return tensors


def _read_archive(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "constants.pkl" in entries:
            raise CheckpointError(
                f"{path}: is a TorchScript archive, which is a program; a checkpoint is needed"
            )
        if "data.pkl" not in entries:
            raise CheckpointError(
                f"{path}: is a zip archive but no PyTorch checkpoint; if the checkpoint lies in "
                "it, unpack it first"
            )
        packed = (name for name, info in entries.items() if info.compress_type)
        if name := next(packed, None):  # a small file could claim all memory
            raise CheckpointError(
                f"{path}: {name} is compressed, which torch.save never does; load and save "
                "the file with PyTorch first, if you trust it"
            )
        order = entries.get("byteorder")
        _require_little(path, order is None or archive.read(order) == b"little")

        def numbers(storage: _Storage) -> bytes:
            entry = entries[f"data/{storage.key}"]
            if entry.file_size != storage.nbytes:
                raise EOFError(f"storage {storage.key} should have {storage.numel} numbers")
            return archive.read(entry)

        pickled = archive.read(entries["data.pkl"])
        check_pickle(pickled)
        state = _state(path, _Unpickler(io.BytesIO(pickled)).load())
        return _materialise(state, numbers)


def _read_stream(path: Path, file: IO[bytes]) -> dict[str, Tensor]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = check_pickle(data)
        if _Unpickler(file).load() != MAGIC:
            raise CheckpointError(f"{path}: is a pickle, but was not written by torch.save")
        for _ in range(4):
            end = check_pickle(data, end)
    if _Unpickler(file).load() != PROTOCOL:
        raise CheckpointError(f"{path}: is a pickle, but was not written by torch.save")
    _require_little(path, _Unpickler(file).load()["little_endian"])
    unpickler = _Unpickler(file)
    state = _state(path, unpickler.load())
    end = path.stat().st_size
    starts: dict[str, int] = {}
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        starts[key] = file.tell()
        if numel != storage.numel or starts[key] + storage.nbytes > end:
            raise EOFError(f"storage {key} should have {storage.numel} numbers")
        file.seek(storage.nbytes, 1)

    def numbers(storage: _Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return _materialise(state, numbers)


def _require_little(path: Path, little_endian: bool) -> None:
    if not little_endian:
        raise CheckpointError(
            f"{path}: was saved on a big-endian machine; load and save it with PyTorch first"
        )
