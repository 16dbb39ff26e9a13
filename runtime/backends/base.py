"""What every backend is: declared tensors, one call, and an end."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import numpy as np

from dsgnn.runtime.errors import BackendError

CUDA_GRAPH = "-cuda-graph"  # ends the name of a backend that replays CUDA graphs


@dataclass(frozen=True)
class TensorSpec:
    """A declared input or output. shape: None = any size."""

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...]

    def accepts(self, dtype: np.dtype, shape: tuple[int | None, ...]) -> bool:
        """Whether a tensor of this dtype and shape fits; an unknown side (None) fits any."""
        sides = zip(self.shape, shape, strict=False)
        fits = all(None in (own, got) or own == got for own, got in sides)
        return fits and dtype == self.dtype and len(shape) == len(self.shape)

    def __str__(self) -> str:
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        return f"{self.dtype} ({sides})"


class Backend(ABC):
    """A loaded artifact. `infer` may be called from several threads at once.

    name: one of BACKENDS. device: "cpu" or "cuda:N". threads: of one call on a CPU. max_batch: the
    largest batch of one call; None = what the input declares. picked: one sentence that says what
    is used, and why if `auto` chose it. on_cpu: operators that a GPU's library left to the CPU, and
    how many of each; none of them takes time, or the file would be refused. inputs, outputs: what
    the graph declares.
    """

    name: str
    device: str
    threads: int
    picked: str
    max_batch: int | None = None
    on_cpu: Mapping[str, int] = MappingProxyType({})
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    _closed = False

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch: every declared input by name in, every declared output by name out.

        Raises BackendError if a name, dtype or shape is not the declared one, if the library fails,
        and after `close`.
        """
        if self._closed:
            raise BackendError(f"{self.name} was closed: open the artifact again")
        declared = {spec.name: spec for spec in self.inputs}
        if feeds.keys() != declared.keys():
            raise BackendError(f"expected inputs {sorted(declared)}, got {sorted(feeds)}")
        for name, spec in declared.items():
            value = feeds[name]
            if not spec.accepts(value.dtype, value.shape):
                raise BackendError(
                    f"input {name}: expected {spec}, got {value.dtype} {value.shape}"
                )
        try:
            return self._infer(feeds)
        except Exception as error:  # the libraries' errors share no base class
            raise BackendError(f"{self.name} failed: {error}") from error

    def close(self) -> None:
        """Give back memory, threads and connections; a second call does nothing.

        No other thread may be inside `infer`. What was asked before keeps its results.
        """
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def _infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    @abstractmethod
    def _release(self) -> None:
        """Let go of what the library holds. Called once."""


def parse_device(device: str) -> tuple[bool, int]:
    """ "auto", "cpu", "cuda" or "cuda:N" → (CUDA was asked for, GPU index). Raises BackendError."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise BackendError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    return device.startswith("cuda"), int(match[1] or 0)
