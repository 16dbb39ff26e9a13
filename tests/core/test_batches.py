"""What is trained on: epochs, mixtures, scenes, seeds, and looks that are kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import even_looks

from dsgnn.config import CONFIGS
from dsgnn.data.transforms import ImageTruth
from dsgnn.runtime.errors import DataError, OptionError
from dsgnn.teacher.looks import KeptLooks
from dsgnn.training.batches import Epochs, Mixture, load
from dsgnn.training.loop import RunOptions
from dsgnn.training.peaks import seed_centres
from dsgnn.training.recipe import (
    NANO,
)
from dsgnn.training.run import DataSplits, train_on


def test_epochs_see_every_sample_once_each_time_round_in_another_order(samples):
    source = Epochs(samples, "flip", seed=3)
    rounds = [[source.example(6 * r + i, 64).name for i in range(6)] for r in range(4)]
    assert all(sorted(names) == sorted(s.name for s in samples) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    again = Epochs(samples, "flip", seed=3)
    for number in (20, 3, 11):
        first, second = source.example(number, 64), again.example(number, 64)
        assert first.name == second.name and torch.equal(first.image, second.image)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no images to train on"):
        Epochs([], "flip", seed=0)


def test_scenes_are_seen_time_after_time_in_another_order_for_another_seed(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("dsgnn.training.run.train", lambda *arguments: given.append(arguments))

    splits = DataSplits(("composite:2",), validation=None, predict_looks=even_looks)
    for seed in range(4):
        train_on(splits, CONFIGS["nano"], NANO, tmp_path, RunOptions(), seed)
    names = [[source.example(i, 96).name for i in range(4)] for _, source, *_ in given]
    assert len({tuple(order) for order in names}) > 1
    assert all(len(set(order[:2])) == len(set(order[2:])) == 2 for order in names)
    example = given[0][1].example(0, 96)
    assert example.attention.sum() == pytest.approx(1) or example.attention.sum() == 0  # a part
    assert given[0][0].data == {
        "split": "train",
        "val": "none",
        "training images": 2,
        "validation images": 0,
    }


def test_a_broken_annotation_arrives_as_it_was_raised_from_a_worker_too():
    class Broken:
        def example(self, number, size):
            raise DataError("labels.json: [3].segmentation is no polygon")

    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^labels.json: \[3\].segmentation is no polygon$"):
            next(load(Broken(), iter([[(0, 64)]]), workers))


def test_half_the_images_are_seeded_from_their_objects(samples):
    targets = [ImageTruth(torch.from_numpy(s.masks), torch.from_numpy(s.ranks).float())
               for s in samples]  # fmt: skip
    forced = 0
    for seed in range(40):
        cells = seed_centres(targets, 2, torch.Generator().manual_seed(seed))
        assert cells.shape == (6, 2)
        for row, target in zip(cells.tolist(), targets, strict=True):
            forced += row != [-1, -1]
            for cell, mask in zip(row, target.masks, strict=False):
                y, x = divmod(cell, 96 // 8)
                assert cell == -1 or mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].any()
    assert 80 < forced < 160


def test_a_mixture_draws_each_source_by_its_share() -> None:
    class Numbered:
        def __init__(self, name: str):
            self.name, self.asked = name, []

        def example(self, number: int, size: int) -> str:
            self.asked.append(number)
            return f"{self.name} {number} {size}"

    often, seldom = Numbered("often"), Numbered("seldom")
    mixture = Mixture([often, seldom], [3, 1], seed=4)
    drawn = [mixture.example(number, 64) for number in range(2000)]
    assert 1400 < len(often.asked) < 1600 and len(often.asked) + len(seldom.asked) == 2000
    # a source's own numbers rise with the examples drawn from it, so that each epoch comes in turn
    assert often.asked == sorted(often.asked) and seldom.asked == sorted(seldom.asked)
    assert 1490 < often.asked[-1] < 1500 and 490 < seldom.asked[-1] < 500
    assert drawn[7] == mixture.example(7, 64)
    other = Mixture([Numbered("often"), Numbered("seldom")], [3, 1], seed=5)
    assert [other.example(number, 64) for number in range(50)] != drawn[:50]
    for shares in ([], [1], [1, 0]):
        with pytest.raises(OptionError, match="a share above 0 for each of 2 data sets"):
            Mixture([often, seldom], shares, seed=0)


def test_predicted_looks_are_kept(tmp_path: Path) -> None:
    asked = []

    def predict(image: np.ndarray) -> np.ndarray:
        asked.append(image)
        return np.array([[0.75, 0.25]], np.float32)

    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for _ in range(2):
        kept = KeptLooks(predict, tmp_path)
        np.testing.assert_allclose(kept(image), [[0.75, 0.25]], rtol=1e-3)
    assert len(asked) == 1
    kept(image.reshape(4, 2, 3))  # the same bytes, another photo
    assert len(asked) == 2
