"""Composite scenes: deterministic, exact masks, an order by looks, splits kept apart."""

import pickle
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_folders import DOG, PERSON, even_looks, write_background

from dsgnn.data.coco import read_photos
from dsgnn.data.ranks import CLEAR, MIN_SHARE, shares_under
from dsgnn.runtime.photo.decoder import Decoders
from dsgnn.scenes import composite
from dsgnn.scenes.composite import ASPECTS, SHARES, TRAIN_SHARES, CompositeScenes, crop_photo
from dsgnn.scenes.material import held_out, image_files


def _same(a, b) -> bool:
    arrays = ("image", "masks", "ranks")
    return a.name == b.name and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)


def test_a_scene_is_the_same_whatever_was_made_before_it(scene_folders):
    first = CompositeScenes(even_looks, **scene_folders, size=96)
    made = {i: first.scene(i) for i in range(25)}
    second = CompositeScenes(even_looks, **scene_folders, size=96)
    for i in reversed(range(25)):
        assert _same(second.scene(i), made[i])
    third = pickle.loads(pickle.dumps(first))  # what a spawned worker gets
    assert _same(third.scene(24), made[24])


def test_seed_split_and_number_each_change_the_scene(scene_folders):
    scenes = CompositeScenes(even_looks, **scene_folders, size=64)
    other = CompositeScenes(even_looks, **scene_folders, size=64, seed=1)
    images = [sample.image for sample in (scenes[0], scenes[1], other[0])]
    for split in ("train", "test"):  # also where both have the same material
        images.append(CompositeScenes(even_looks, size=64, split=split)[0].image)
    for i, image in enumerate(images):
        for later in images[i + 1 :]:
            assert image.shape != later.shape or not np.array_equal(image, later)


def test_len_and_iteration_end_but_any_number_can_be_made():
    scenes = CompositeScenes(even_looks, size=32, length=3)
    assert len(scenes) == len(list(scenes)) == 3
    with pytest.raises(IndexError, match="scene 3 of 3"):
        scenes[3]
    assert scenes.scene(10**12).image.shape[2] == 3


def test_sizes_are_exact_or_the_longest_side(scene_folders):
    scenes = CompositeScenes(even_looks, **scene_folders, size=(48, 80))
    assert scenes[0].image.shape == (48, 80, 3)
    shapes = Counter(scenes.scene(i, size=96).image.shape[:2] for i in range(150))
    allowed = {(round(96 * h / max(w, h)), round(96 * w / max(w, h))) for w, h in ASPECTS}
    assert set(shapes) == allowed


def test_without_folders_everything_is_procedural():
    scenes = CompositeScenes(even_looks, size=64)
    samples = [scenes[i] for i in range(60)]
    kinds = Counter(s.name.split("-")[-1] for s in samples)
    assert set(kinds) == {"procedural", "empty"}
    assert {len(s.ranks) for s in samples} >= {0, 1, 2}
    assert all(s.image.std() > 0 for s in samples)


@pytest.mark.parametrize(("split", "shares"), [("test", SHARES), ("train", TRAIN_SHARES)])
def test_kinds_of_scenes_come_in_their_shares(scene_folders, split, shares):
    assert sum(shares.values()) == pytest.approx(1)
    scenes = CompositeScenes(even_looks, **scene_folders, size=32, split=split)
    kinds = Counter(scenes[i].name.split("-")[-1] for i in range(500))
    for kind, share in shares.items():
        assert kinds[kind] / 500 == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("degrees", [-14.0, 3.0, 9.0])
def test_masks_turn_with_their_photo(scene_folders, degrees):
    photo = read_photos(scene_folders["coco"])[0]  # a red person on grey noise
    for seed in range(6):
        rng = np.random.default_rng(seed)
        image, masks, _ = crop_photo(rng, photo.read(), photo, (150, 200), 0.5, degrees)
        rng = np.random.default_rng(seed)
        straight = crop_photo(rng, photo.read(), photo, (150, 200), 0.5)[0]
        assert not np.array_equal(image, straight)
        red = image[..., 0].astype(int) - image[..., 1] > 95
        assert len(masks) == 1 and image.shape == (150, 200, 3)
        assert (red & masks[0]).sum() > 0.96 * (red | masks[0]).sum()
        assert image.min() > 20, "no black corner"


def test_at_most_max_objects_and_none_in_empty_scenes(scene_folders):
    scenes = CompositeScenes(even_looks, **scene_folders, size=64, max_objects=2)
    counts = [(len(s.ranks), s.name) for s in (scenes[i] for i in range(150))]
    assert {n for n, _ in counts} == {0, 1, 2}
    assert all(n == 0 for n, name in counts if name.endswith("empty"))


def test_the_place_in_the_list_does_not_tell_the_rank(scene_folders):
    scenes = CompositeScenes(even_looks, **scene_folders, size=64)
    pairs = [s.ranks.tolist() for s in (scenes[i] for i in range(300)) if len(s.ranks) == 2]
    assert 0.3 < np.mean([ranks == [2, 1] for ranks in pairs]) < 0.7


def looks_at_the_left(image):
    """Stands for a network: the further to the left, the more is looked at."""
    looks = np.repeat(np.linspace(1, 0.2, 16, dtype=np.float32)[None], 12, 0)
    return looks / looks.sum()


def test_pasted_objects_are_ordered_by_their_looks_and_clearly(scene_folders, monkeypatch):
    """With the frame's colours left alone what predicts the looks can be asked again."""
    monkeypatch.setattr(composite, "develop", lambda rng, image, strength: image)
    scenes = CompositeScenes(
        looks_at_the_left, scene_folders["cutouts"], scene_folders["backgrounds"], size=160
    )
    several = by_size = 0
    for i in range(150):
        sample = scenes[i]
        if not len(sample.masks):
            continue
        shares = shares_under(looks_at_the_left(sample.image), sample.masks)
        ordered = shares[np.argsort(sample.ranks)]
        assert (np.diff(ordered) >= CLEAR - 1e-6).all()
        assert (shares >= MIN_SHARE + CLEAR - 1e-6).all()
        assert (sample.masks.mean((1, 2)) >= 0.003).all()
        np.testing.assert_array_equal(sample.attention, looks_at_the_left(sample.image))
        several += len(shares) > 1
        areas = sample.masks.sum((1, 2))[np.argsort(sample.ranks)]
        by_size += bool((np.diff(areas) >= 0).all())
    assert several > 20 and by_size < 150 - 5


def test_photo_scenes_carry_the_masks_of_the_photo(scene_folders, monkeypatch):
    monkeypatch.setattr(composite, "develop", lambda rng, image, strength: image)
    scenes = CompositeScenes(even_looks, coco=scene_folders["coco"], size=128)
    seen = 0
    for i in range(80):
        sample = scenes[i]
        if not sample.name.endswith("photo"):
            continue
        for mask in sample.masks:
            colour = np.median(sample.image[mask], axis=0)
            assert np.abs(colour - PERSON).max() < 3 or np.abs(colour - DOG).max() < 3
            by_colour = np.abs(sample.image.astype(int) - colour).max(-1) < 60
            assert (mask & by_colour).sum() / (mask | by_colour).sum() > 0.93
            seen += 1
    assert seen > 30


def test_train_and_test_share_no_file_and_leave_none_out(scene_folders, monkeypatch):
    read: list[str] = []
    original = cv2.imread
    monkeypatch.setattr(
        cv2, "imread", lambda p, *a: (read.append(Path(p).name), original(p, *a))[1]
    )
    decode = Decoders.__call__
    monkeypatch.setattr(
        Decoders, "__call__", lambda self, p: (read.append(p.name), decode(self, p))[1]
    )
    used = {}
    for split in ("train", "test"):
        read.clear()
        scenes = CompositeScenes(even_looks, **scene_folders, split=split, size=32)
        for i in range(250):
            scenes[i]
        used[split] = set(read)
    assert not used["train"] & used["test"]
    assert used["train"] | used["test"] == {
        p.name for folder in scene_folders.values() for p in image_files(folder)
    }
    assert {n for n in used["test"] if n[0].isdigit()} == {"0.png", "5.png"}


def test_wrong_arguments_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'val\''):
        CompositeScenes(even_looks, split="val")
    with pytest.raises(ValueError, match="max_objects must be 1…8, got 9"):
        CompositeScenes(even_looks, max_objects=9)
    with pytest.raises(FileNotFoundError, match="no images"):
        CompositeScenes(even_looks, cutouts=tmp_path)
    write_background(tmp_path / "opaque.png", 0)
    split = "test" if held_out("opaque") else "train"
    with pytest.raises(ValueError, match=r"no file falls into the \w+ split"):
        CompositeScenes(even_looks, cutouts=tmp_path, split="train" if split == "test" else "test")
    with pytest.raises(ValueError, match=r"opaque\.png: a cut-out must be an 8-bit RGBA image"):
        CompositeScenes(even_looks, cutouts=tmp_path, split=split).library.cutout(0)
    cv2.imwrite(str(tmp_path / "opaque.png"), np.zeros((9, 9, 4), np.uint8))
    with pytest.raises(ValueError, match="transparent everywhere"):
        CompositeScenes(even_looks, cutouts=tmp_path, split=split).library.cutout(0)


def test_what_people_notice_without_ranking_it_is_left_open(scene_folders) -> None:
    """As in photos: neither an object nor background, and everything else is one of the two."""
    scenes = CompositeScenes(even_looks, **scene_folders)
    seen = Counter()
    for number in range(60):
        sample = scenes.scene(number, (96, 128))
        seen.update(np.unique(sample.foreground).tolist())
        assert (sample.foreground[sample.masks.any(0)] == 1).all()
        assert not (sample.foreground[~sample.masks.any(0)] == 1).any()
    assert min(seen[-1], seen[0], seen[1]) > 3


def test_predicted_looks_order_the_objects(scene_folders) -> None:
    """Its shares decide what is salient, in which order, and what is taken off as unclear."""
    scenes = CompositeScenes(even_looks, **scene_folders)
    assert scenes.ranks_from == "predicted looks" and scenes.max_objects == 8
    counts = Counter()
    for number in range(60):
        sample = scenes.scene(number, (96, 128))
        areas = sample.masks.sum((1, 2))[np.argsort(-sample.ranks)]
        assert (np.diff(areas) <= 0).all()
        counts[len(areas)] += 1
        if "cutouts" in sample.name and len(areas) > 1:
            # What was pasted is clear: neighbours differ by .02 of the looks or more, and all the
            # looks together are half, shared by these and by clutter.
            shares = 0.5 * areas / areas.sum()
            assert (-np.diff(shares) >= 0.02 - 1e-9).all()
    assert sum(count for objects, count in counts.items() if objects >= 2) >= 10
    same = CompositeScenes(even_looks, **scene_folders).scene(7, (96, 128))
    np.testing.assert_array_equal(same.image, scenes.scene(7, (96, 128)).image)
