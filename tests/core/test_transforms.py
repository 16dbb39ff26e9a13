"""Augmentation: masks follow the image, vanished objects go, ranks close up, sizes fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsgnn.data.sample import Sample
from dsgnn.data.transforms import augment, collate, example
from dsgnn.runtime.letterbox import LongestSide, letterbox


def coloured(h: int = 60, w: int = 80) -> Sample:
    """Three blocks whose colour tells which they are: red 60, 120, 180."""
    image = np.zeros((h, w, 3), np.uint8)
    masks = np.zeros((3, h, w), bool)
    masks[0, 5:25, 5:25] = masks[1, 30:55, 10:40] = masks[2, 10:50, 50:75] = True
    for i, mask in enumerate(masks):
        image[mask] = (60 * (i + 1), 0, 255)
    return Sample(image, masks, np.array([2, 3, 1]), "coloured")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["jitter", "flip"])
def test_masks_follow_the_image_and_ranks_close_up(kind):
    sample, looked_at, vanished, flipped = coloured(), 0, 0, 0
    for seed in range(80):
        item = augment(sample, kind, 64, generator(seed))
        if len(item.masks) and item.masks.sum((1, 2)).min() < 40:
            continue  # too small to have a colour of its own
        looked_at += 1
        red = item.image[0].float()
        # which of the three blocks each mask shows, told by its colour inside the outline
        kept = [round(red[mask].median().item() / 60) - 1 for mask in item.masks.bool()]
        assert kept == sorted(set(kept))
        assert item.ranks.argsort().tolist() == sample.ranks[kept].argsort().tolist()
        assert sorted(item.ranks.tolist()) == list(range(1, len(kept) + 1))
        for mask, (x0, y0, x1, y1) in zip(item.masks, item.boxes.int().tolist(), strict=True):
            assert mask.any()
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[:, x0].any() and mask[:, x1 - 1].any()
            assert mask[y0].any() and mask[y1 - 1].any()
        blue = (item.image[2] > 200) & (item.image[0] < 255)
        inside = item.masks.any(0) if len(kept) else torch.zeros_like(blue)
        outline = (blue != inside).float().mean()  # resizing blurs the edges only
        assert outline < 0.05
        vanished += len(kept) < 3
        if {0, 2} <= set(kept):
            left, right = (item.boxes[kept.index(i), 0] for i in (0, 2))
            flipped += bool(left > right)
    assert looked_at > 25
    assert (vanished > 5) == (kind == "jitter")
    assert 20 < flipped < 60 if kind == "flip" else flipped > 5


def test_jitter_covers_its_range_and_gives_squares():
    sample = coloured()
    scales = []
    for seed in range(200):
        item = augment(sample, "jitter", 64, generator(seed))
        assert item.image.shape == (3, 64, 64) and item.masks.shape[1:] == (64, 64)
        padding = (item.image == 128).all(0)
        width = int((~padding).any(0).sum())
        assert not padding[:, :width].all(0).any()  # padded right and bottom only
        if width < 64:
            scales.append(width / 64)
    assert min(scales) < 0.2 and 0.4 < len(scales) / 200 < 0.6  # half of 0.1…2.0 is below 1


def test_flip_sees_the_pixels_of_the_letterbox():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    sample = coloured()
    smooth = np.kron(small, np.ones((5, 5, 1), np.uint8))
    sample = Sample(smooth, sample.masks, sample.ranks, "smooth")
    expected, _ = letterbox(smooth, LongestSide(96))
    for seed in range(20):
        item = augment(sample, "flip", 96, generator(seed))
        assert item.image.shape == (3, *expected.shape[:2])
        same = np.abs(item.image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
        if same:
            break
    assert same


def test_foreground_and_attention_follow_the_image():
    """Where a sample knows them; the blocks' colours say where they went."""
    sample = coloured()
    foreground = sample.masks.any(0).astype(np.int8)
    foreground[:, 45:] = -1
    looks = np.zeros((6, 8), np.float32)
    looks[1, 1] = 1  # on the first block, which lies in the upper left
    sample = replace(sample, foreground=foreground, attention=looks)
    sides = set()
    for seed in range(12):
        item = augment(sample, "flip", 160, generator(seed))
        assert item.foreground.shape == (1, *item.image.shape[1:])
        assert item.attention.shape == (15, 20) and item.attention.sum() == pytest.approx(1)
        found = item.foreground[0]
        assert (found[item.masks[:2].any(0)] == 1).all()
        assert ((found[:120] == -1).float().mean() - 35 / 80).abs() < 0.02
        y, x = divmod(int(item.attention.argmax()), 20)
        assert item.masks[0, 8 * y + 4, 8 * x + 4]
        sides.add(x < 10)
    assert sides == {True, False}
    batch = collate([item, example(coloured())])
    assert batch.targets[0].attention.shape == (16, 20) == batch.targets[1].attention.shape
    assert batch.targets[1].attention.sum() == 0
    assert (batch.targets[0].foreground[120:] == 0).all()


def test_a_part_of_a_photo_keeps_what_is_left_of_its_objects():
    sample = replace(coloured(), attention=np.full((6, 8), 1 / 48, np.float32))
    parts = cut = 0
    for seed in range(80):
        item = augment(sample, "photo", 80, generator(seed))
        assert sorted(item.ranks.tolist()) == list(range(1, len(item.ranks) + 1))
        parts += bool(item.attention.sum() == 0)  # of a part nobody knows what is looked at
        cut += bool((item.foreground[0] == -1).any())
        assert not (item.masks.any(0) & (item.foreground[0] == -1)).any()
    assert 8 < parts < 40 and cut >= 1


def test_colours_change_a_little_and_masks_do_not():
    item, plain = (augment(coloured(), kind, 80, generator(3)) for kind in ("photo", "flip"))
    assert item.masks.shape == plain.masks.shape or len(item.masks) < 3
    different = (item.image.float() - plain.image.float()).abs().mean()
    assert 0 < different < 60


def test_the_same_generator_gives_the_same_example():
    first, second = (augment(coloured(), "jitter", 64, generator(7)) for _ in range(2))
    assert torch.equal(first.image, second.image) and torch.equal(first.masks, second.masks)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match='must be "jitter", "flip" or "photo", got \'rotate\''):
        augment(coloured(), "rotate", 64, generator(0))


def test_collate_pads_right_and_bottom_with_grey():
    empty = Sample(np.full((20, 30, 3), 7, np.uint8), np.zeros((0, 20, 30), bool),
                   np.zeros(0, np.int64), "empty")  # fmt: skip
    batch = collate([example(coloured()), example(empty)])
    assert batch.images.shape == (2, 64, 96, 3) and batch.images.dtype == torch.uint8
    assert (batch.images[1, :20, :30] == 7).all()
    assert (batch.images[1, 20:] == 128).all() and (batch.images[1, :, 30:] == 128).all()
    masks = batch.targets[0].masks  # 60×80 drawn, padded to multiples of 32
    assert torch.equal(masks[:, :60, :80], torch.from_numpy(coloured().masks))
    assert not masks[:, 60:].any() and not masks[:, :, 80:].any()
    assert batch.targets[1].masks.shape == (0, 64, 96)
    assert batch.targets[0].ranks.tolist() == [2, 3, 1]
    assert batch.names == ["coloured", "empty"]
