"""A whole training run on a data set: what `dsgnn-train` calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsgnn.config import Config
from dsgnn.data import open_data
from dsgnn.data.ranks import PredictLooks
from dsgnn.data.records import Samples
from dsgnn.runtime.errors import OptionError
from dsgnn.training.batches import Epochs, ExampleSource, Mixture
from dsgnn.training.journal import curve
from dsgnn.training.loop import RunOptions, train
from dsgnn.training.parallel import join, leave, process
from dsgnn.training.recipe import Recipe, TrainingPlan
from dsgnn.training.state import BEST, LAST


@dataclass(frozen=True)
class DataSplits:
    """Data sets, what of them is trained on, and what is evaluated on.

    data: one or several, each as for `dsgnn.data.open_data`; the first is evaluated on. split,
    validation: as there; validation may be None. predict_looks: ranks what has no ranks of its own.
    shares: how often each data set is drawn, of any sum; by default by the square root of its size.
    Raises OptionError when the same split would serve both, or shares and data differ in number.
    """

    data: tuple[str, ...]
    split: str = "train"
    validation: str | None = "val"
    predict_looks: PredictLooks | None = None
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.validation in self.split.split("+"):
            raise OptionError(
                f"the split {self.validation} would be trained on too: evaluate on another one, "
                "or on none",
                "validation",
            )
        if self.shares and len(self.shares) != len(self.data):
            raise OptionError(
                f"there are {len(self.data)} data sets and {len(self.shares)} shares: give each "
                "data set its share, or none",
                "shares",
            )

    def open(self) -> tuple[list[Samples], Samples | None]:
        """The images to train on, of each data set, and those to evaluate on."""
        samples = [open_data(spec, self.split, self.predict_looks) for spec in self.data]
        if self.validation is None:
            return samples, None
        return samples, open_data(self.data[0], self.validation, self.predict_looks)


def train_on(
    splits: DataSplits,
    config: Config,
    recipe: Recipe,
    out: Path,
    options: RunOptions,
    seed: int = 0,
    amp: str = "off",
) -> Path | None:
    """Open the data, join the process group, train into the folder `out`, draw the curve.

    → the checkpoint to use: the best one, or the last one where none is known to be the best. In a
    process group only the first process gets it, the others None.

    options.device: "auto", "cpu", "cuda" or "cuda:N".
    seed, amp: as for `TrainingPlan`. Errors as for `train`, and DataError for broken data.
    """
    samples, validation = splits.open()
    facts = {
        "split": splits.split,
        "val": splits.validation or "none",
        "training images": sum(map(len, samples)),
        "validation images": len(validation or ()),
    }
    if splits.shares:
        facts["shares"] = list(splits.shares)
    names = " and ".join(Path(spec).name for spec in splits.data)
    plan = TrainingPlan(config, recipe, seed, amp, facts, f"{names} ({splits.split})")
    source = source_of(samples, config, seed, splits.shares)
    options = replace(options, device=join(str(options.device)))
    try:
        train(plan, source, out, options, validation)
        if process()[0] != 0:
            return None
        curve(out)
    finally:
        leave()
    return out / BEST if (out / BEST).is_file() else out / LAST


def source_of(
    data: Sequence[Samples], config: Config, seed: int, shares: Sequence[float] = ()
) -> ExampleSource:
    """Examples without end: the images of each data set time after time.

    shares: as in `DataSplits`.
    """
    sources = [Epochs(samples, config.augmentation, seed) for samples in data]
    if len(sources) == 1:
        return sources[0]
    return Mixture(sources, shares or [len(samples) ** 0.5 for samples in data], seed)
