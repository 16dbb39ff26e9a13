"""What a run trains on: numbered examples from data sets, and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dsgnn.data.records import Samples
from dsgnn.data.transforms import Example, Examples, augment, collate
from dsgnn.runtime.errors import DataError, DsgnnError, OptionError

Key = tuple[int, int]  # number of an example, and its size in pixels


class ExampleSource(Protocol):
    """Training data: any number from 0 on → an example, always the same one."""

    def example(self, number: int, size: int) -> Example: ...


class Epochs:
    """The samples of a data set, shuffled anew each time round, and augmented.

    augmentation: as in `Config`. Raises DataError when there are no samples.
    """

    def __init__(self, samples: Samples, augmentation: str, seed: int):
        if not len(samples):
            raise DataError("there are no images to train on; is the split empty?")
        self.samples, self.augmentation, self.seed = samples, augmentation, seed
        self._epoch, self._order = -1, np.arange(0)

    def example(self, number: int, size: int) -> Example:
        epoch, place = divmod(number, len(self.samples))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        generator = torch.Generator().manual_seed(mix(self.seed, number))
        return augment(self.samples[self._order[place]], self.augmentation, size, generator)


class Mixture:
    """Examples of several sources, each drawn as often as its share says.

    shares: one for each source, of any sum. A number always gives the same example. Raises
    OptionError unless there is a source and each has a share above 0.
    """

    def __init__(self, sources: Sequence[ExampleSource], shares: Sequence[float], seed: int):
        if not sources or len(sources) != len(shares) or min(shares) <= 0:
            raise OptionError(f"expected a share above 0 for each of {len(sources)} data sets")
        self.sources, self.seed = sources, seed
        self.shares = np.array(shares, float) / sum(shares)

    def example(self, number: int, size: int) -> Example:
        random = np.random.default_rng(mix(11, self.seed, number))
        chosen = int(random.choice(len(self.sources), p=self.shares))
        return self.sources[chosen].example(int(number * self.shares[chosen]), size)


def load(source: ExampleSource, keys: Iterator[list[Key]], workers: int) -> Iterator[Examples]:
    """The batches of these keys, prepared ahead by `workers` processes (0: by this one, in time).

    Raises what the source raised, without a worker's traceback around it.
    """
    loader = DataLoader(
        _Numbered(source), batch_sampler=keys, num_workers=workers, collate_fn=_collate,
        worker_init_fn=_quiet_worker, prefetch_factor=4 if workers else None,
    )  # fmt: skip
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def mix(*numbers: int) -> int:
    """One seed of several numbers ≥ 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Numbered(Dataset):
    """Key → example, or the error that it gave."""

    def __init__(self, source: ExampleSource):
        self.source = source

    def __getitem__(self, key: Key) -> Example | Exception:
        try:
            return self.source.example(*key)
        except (DsgnnError, OSError) as error:
            return error


def _collate(examples: list[Example | Exception]) -> Examples | Exception:
    errors = [x for x in examples if isinstance(x, Exception)]
    return errors[0] if errors else collate([x for x in examples if isinstance(x, Example)])


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
