"""Composite scenes: deterministic, exact masks, an order by looks, splits kept apart."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from data_folders import even_looks

from dsgnn.data.binary import binary_split
from dsgnn.data.coco import read_photos
from dsgnn.data.ranks import CLEAR, MIN_SHARE, shares_under
from dsgnn.data.records import for_validation
from dsgnn.runtime.photo.decoder import Decoders
from dsgnn.scenes import collect, composite, material
from dsgnn.scenes.composite import ASPECTS, SHARES, TRAIN_SHARES, CompositeScenes, crop_photo
from dsgnn.scenes.material import Cutout, empty_region, held_out, photo_cutouts, premultiplied
from dsgnn.scenes.paint import Layer, flatten, make_layer

RED, GREEN = (220, 30, 30), (30, 200, 60)


def _cutout_file(path: Path, seed: int) -> None:
    """A textured disc: photographic by the rules of `collect`."""
    rng = np.random.default_rng(seed)
    bgra = np.zeros((96, 96, 4), np.uint8)
    bgra[..., :3] = rng.integers(0, 256, 3) // 2 + rng.integers(0, 90, (96, 96, 1))
    cv2.circle(alpha := np.zeros((96, 96), np.uint8), (48, 48), 40, 255, -1)
    bgra[..., 3] = alpha
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), bgra)


def _background_file(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    noise = rng.integers(-6, 7, (384, 512, 3))
    image = cv2.resize(small, (512, 384), interpolation=cv2.INTER_CUBIC) + noise
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Ten cut-outs and backgrounds; ten photos of a red person, half of them with a green dog."""
    root = tmp_path_factory.mktemp("material")
    for i in range(20):
        _cutout_file(root / "cutouts" / ("animals", "food")[i % 2] / f"cut{i}.png", i)
        _background_file(root / "backgrounds" / f"back{i}.jpg", 100 + i)
    (root / "coco" / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(10):
        image = np.random.default_rng(i).integers(90, 110, (240, 320, 3), dtype=np.uint8)
        boxes = [(100, 60, 190, 200, 1, RED)] + [(20, 30, 90, 110, 2, GREEN)] * (i % 2)
        for x0, y0, x1, y1, category, colour in boxes:
            image[y0:y1, x0:x1] = colour
            polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
            annotations.append(
                {"image_id": i, "category_id": category, "segmentation": [polygon], "iscrowd": 0}
            )
        cv2.imwrite(str(root / "coco" / "images" / f"{i}.png"), image[..., ::-1])
        images.append({"id": i, "file_name": f"{i}.png", "width": 320, "height": 240})
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco" / "instances.json").write_text(json.dumps(data))
    return {name: root / name for name in ("cutouts", "backgrounds", "coco")}


def _same(a, b) -> bool:
    return (
        a.name == b.name
        and np.array_equal(a.image, b.image)
        and np.array_equal(a.masks, b.masks)
        and np.array_equal(a.ranks, b.ranks)
    )


def test_a_scene_is_the_same_whatever_was_made_before_it(folders):
    first = CompositeScenes(even_looks, **folders, size=96)
    made = {i: first.scene(i) for i in range(25)}
    second = CompositeScenes(even_looks, **folders, size=96)
    for i in reversed(range(25)):
        assert _same(second.scene(i), made[i])
    third = pickle.loads(pickle.dumps(first))  # what a spawned worker gets
    assert _same(third.scene(24), made[24])


def test_seed_split_and_number_each_change_the_scene(folders):
    scenes = CompositeScenes(even_looks, **folders, size=64)
    other = CompositeScenes(even_looks, **folders, size=64, seed=1)
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


def test_sizes_are_exact_or_the_longest_side(folders):
    scenes = CompositeScenes(even_looks, **folders, size=(48, 80))
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
def test_kinds_of_scenes_come_in_their_shares(folders, split, shares):
    assert sum(shares.values()) == pytest.approx(1)
    scenes = CompositeScenes(even_looks, **folders, size=32, split=split)
    kinds = Counter(scenes[i].name.split("-")[-1] for i in range(500))
    for kind, share in shares.items():
        assert kinds[kind] / 500 == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("degrees", [-14.0, 3.0, 9.0])
def test_masks_turn_with_their_photo(folders, degrees):
    photo = read_photos(folders["coco"])[0]  # a red person on grey noise
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


def test_at_most_max_objects_and_none_in_empty_scenes(folders):
    scenes = CompositeScenes(even_looks, **folders, size=64, max_objects=2)
    counts = [(len(s.ranks), s.name) for s in (scenes[i] for i in range(150))]
    assert {n for n, _ in counts} == {0, 1, 2}
    assert all(n == 0 for n, name in counts if name.endswith("empty"))


def test_the_place_in_the_list_does_not_tell_the_rank(folders):
    scenes = CompositeScenes(even_looks, **folders, size=64)
    pairs = [s.ranks.tolist() for s in (scenes[i] for i in range(300)) if len(s.ranks) == 2]
    assert 0.3 < np.mean([ranks == [2, 1] for ranks in pairs]) < 0.7


def looks_at_the_left(image):
    """Stands for a network: the further to the left, the more is looked at."""
    looks = np.repeat(np.linspace(1, 0.2, 16, dtype=np.float32)[None], 12, 0)
    return looks / looks.sum()


def test_pasted_objects_are_ordered_by_their_looks_and_clearly(folders, monkeypatch):
    """With the frame's colours left alone what predicts the looks can be asked again."""
    monkeypatch.setattr(composite, "develop", lambda rng, image, strength: image)
    scenes = CompositeScenes(
        looks_at_the_left, folders["cutouts"], folders["backgrounds"], size=160
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


def _disc() -> Cutout:
    cv2.circle(alpha := np.zeros((64, 64), np.uint8), (32, 32), 30, 255, -1)
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Cutout(premultiplied(np.dstack([colours, alpha])), "animals")


def test_photo_scenes_carry_the_masks_of_the_photo(folders, monkeypatch):
    monkeypatch.setattr(composite, "develop", lambda rng, image, strength: image)
    scenes = CompositeScenes(even_looks, coco=folders["coco"], size=128)
    seen = 0
    for i in range(80):
        sample = scenes[i]
        if not sample.name.endswith("photo"):
            continue
        for mask in sample.masks:
            colour = np.median(sample.image[mask], axis=0)
            assert np.abs(colour - RED).max() < 3 or np.abs(colour - GREEN).max() < 3
            by_colour = np.abs(sample.image.astype(int) - colour).max(-1) < 60
            assert (mask & by_colour).sum() / (mask | by_colour).sum() > 0.93
            seen += 1
    assert seen > 30


def test_train_and_test_share_no_file_and_leave_none_out(folders, monkeypatch):
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
        scenes = CompositeScenes(even_looks, **folders, split=split, size=32)
        for i in range(250):
            scenes[i]
        used[split] = set(read)
    assert not used["train"] & used["test"]
    assert used["train"] | used["test"] == {
        p.name for folder in folders.values() for p in material.image_files(folder)
    }
    assert {n for n in used["test"] if n[0].isdigit()} == {"0.png", "5.png"}


def test_one_file_in_five_is_held_out_by_name_for_ever():
    assert 0.17 < np.mean([held_out(f"name{i}") for i in range(3000)]) < 0.23
    names = ("lion", "tiger", "bear", "pig", "cow", "goat")
    assert [name for name in names if held_out(name)] == ["pig", "cow"]


def test_layers_paste_exactly_and_hide_what_lies_behind():
    background = np.full((40, 60, 3), 100, np.uint8)
    before = np.zeros((40, 60), bool)
    before[0:20, 0:20] = True
    alpha = np.zeros((20, 30), np.float32)
    alpha[5:, :] = 1.0
    alpha[4, :] = 0.5  # not above one half: not the object's
    alpha[3, :] = 0.51
    behind = Layer(alpha[..., None] * np.float32(RED), alpha, 10, 10, 0.0, 30.0)
    full = np.ones((10, 10), np.float32)
    front = Layer(full[..., None] * np.float32(GREEN), full, 35, 20, 0.0, 30.0)
    image, (old, first, second) = flatten(background, [before], [behind, front])

    expected = np.zeros((40, 60), bool)
    expected[15:30, 10:40] = expected[13, 10:40] = True
    expected[20:30, 35:45] = False
    assert np.array_equal(first, expected)
    assert second.sum() == 100 and second[20:30, 35:45].all()
    assert np.array_equal(old, before & ~expected)
    assert (image[second] == GREEN).all() and (image[20, 12] == RED).all()
    assert (image[14, 20] == np.rint((np.array(RED) + 100) / 2)).all()
    assert (image[35:] == 100).all() and (background == 100).all() and before.sum() == 400


def test_shadows_darken_and_belong_to_nobody():
    background = np.full((60, 60, 3), 200, np.uint8)
    alpha = np.ones((20, 20), np.float32)
    layer = Layer(alpha[..., None] * np.float32(RED), alpha, 20, 20, 0.5, 40.0)
    image, (mask,) = flatten(background, [], [layer])
    assert mask.sum() == 400 and (image[mask] == RED).all()
    assert (image[~mask] <= 200).all() and image[41, 30].max() < 200 and image[5, 5].min() == 200


def test_an_object_cut_in_its_photo_is_cut_by_the_frame():
    background = np.full((80, 100, 3), 90, np.uint8)
    opaque = np.full((50, 30, 4), 255, np.uint8)
    for seed in range(20):
        cut = Cutout(opaque, "person", (False, False, False, True))
        layer = make_layer(np.random.default_rng(seed), background, cut, 40.0, np.array([50, 20]))
        assert layer is not None and layer.alpha[-1].max() > 0.9
        assert layer.y + layer.alpha.shape[0] == 80
        side = Cutout(opaque, "person", (True, False, False, False))
        layer = make_layer(np.random.default_rng(seed), background, side, 40.0, np.array([50, 40]))
        assert layer is not None and (layer.x == 0 or layer.x + layer.alpha.shape[1] == 100)


def test_what_lies_outside_the_frame_is_not_pasted():
    background = np.full((80, 100, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    assert make_layer(rng, background, _disc(), 40.0, np.array([-60.0, 40])) is None
    layer = make_layer(rng, background, _disc(), 140.0, np.array([50.0, 40]))
    assert layer is not None and layer.alpha.shape == (80, 100)
    # 300 px of object, of which the frame would show an eighth
    assert make_layer(rng, background, _disc(), 300.0, np.array([50.0, 40])) is None


def test_copies_leave_out_the_small_the_cut_and_the_covered(tmp_path):
    def square(x0, y0, x1, y1):
        return [[x0, y0, x1, y0, x1, y1, x0, y1]]

    whole, small = square(20, 20, 120, 120), square(130, 10, 170, 50)
    corner, left = square(260, 200, 320, 240 + 60), square(0, 150, 80, 235)
    covered, coverer = square(150, 100, 250, 180), square(150, 90, 250, 100)
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 320, "height": 300}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": s}
            for s in (whole, small, corner, left, covered, coverer)
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    image = np.random.default_rng(0).integers(0, 256, (300, 320, 3), dtype=np.uint8)
    cutouts = list(photo_cutouts(read_photos(tmp_path)[0], image))
    assert [(c.rgba.shape[:2], c.cut) for c in cutouts] == [
        ((100, 100), (False, False, False, False)),
        ((85, 80), (True, False, False, False)),
    ]
    first = cutouts[0].rgba
    assert np.array_equal(first[50, 50, :3], image[70, 70]) and first[50, 50, 3] == 255
    assert first[0, 50, 3] < 255  # feathered,
    assert cutouts[1].rgba[40, 0, 3] == 255  # but not where the photo cut it


def test_empty_regions_hold_no_object(folders):
    for photo in read_photos(folders["coco"]):
        region = empty_region(photo, photo.read(), np.random.default_rng(0), min_px=40)
        assert region is not None and min(region.shape[:2]) >= 40
        assert (np.abs(region.astype(int) - 100) <= 10).all()


def test_wrong_arguments_and_files_are_named(tmp_path, folders):
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'val\''):
        CompositeScenes(even_looks, split="val")
    with pytest.raises(ValueError, match="max_objects must be 1…8, got 9"):
        CompositeScenes(even_looks, max_objects=9)
    with pytest.raises(FileNotFoundError, match="no images"):
        CompositeScenes(even_looks, cutouts=tmp_path)
    _background_file(tmp_path / "opaque.png", 0)
    split = "test" if held_out("opaque") else "train"
    with pytest.raises(ValueError, match=r"no file falls into the \w+ split"):
        CompositeScenes(even_looks, cutouts=tmp_path, split="train" if split == "test" else "test")
    with pytest.raises(ValueError, match=r"opaque\.png: a cut-out must be an 8-bit RGBA image"):
        CompositeScenes(even_looks, cutouts=tmp_path, split=split).library.cutout(0)
    cv2.imwrite(str(tmp_path / "opaque.png"), np.zeros((9, 9, 4), np.uint8))
    with pytest.raises(ValueError, match="transparent everywhere"):
        CompositeScenes(even_looks, cutouts=tmp_path, split=split).library.cutout(0)


def test_collecting_takes_photographs_and_leaves_drawings(tmp_path):
    source = tmp_path / "share"
    _cutout_file(source / "animals" / "birds" / "crow.png", 1)
    _cutout_file(source / "animals" / "cartoon" / "duck.png", 2)
    flat = np.full((96, 96, 4), 200, np.uint8)
    flat[:20, :, 3] = 0
    cv2.imwrite(str(source / "animals" / "flat.png"), flat)
    _background_file(source / "Meadow" / "contents" / "images" / "800x600.jpg", 3)
    cv2.imwrite(str(source / "plain.jpg"), np.full((600, 800, 3), 128, np.uint8))
    (source / "link.jpg").symlink_to(source / "Meadow" / "contents" / "images" / "800x600.jpg")

    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsgnn.scenes.collect", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 cut-outs, 1 backgrounds" in done.stdout
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*"))
    assert written == ["backgrounds/Meadow.jpg", "cutouts/animals/birds/crow.png"]
    crow = cv2.imread(str(out / written[1]), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(
        crow[..., 3],
        cv2.imread(str(source / "animals/birds/crow.png"), cv2.IMREAD_UNCHANGED)[..., 3],
    )
    assert len(collect.DEBIAN_PACKAGES) == 8


def test_objects_are_cut_out_of_photos_with_one_mask(tmp_path):
    """Whole ones alone, of training photos alone; the colours are the photo's."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "duts" / folder).mkdir(parents=True)
    pictures = {}
    for number in range(60):
        pictures[number] = rng.integers(0, 256, (160, 200, 3), dtype=np.uint8)
        mask = np.zeros((160, 200), np.uint8)
        mask[30:120, 0 if number % 3 == 1 else 40 : 150] = 255
        if number % 3 == 2:  # two parts
            mask[60:80] = 0
        cv2.imwrite(str(tmp_path / f"duts/images/{number}.png"), pictures[number])
        cv2.imwrite(str(tmp_path / f"duts/masks/{number}.png"), mask)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsgnn.scenes.collect", str(out), "--masks"]
    done = subprocess.run([*command, str(tmp_path / "duts")], capture_output=True, text=True)
    written = {int(path.stem) for path in (out / "cutouts" / "salient").iterdir()}
    assert written == {n for n in range(0, 60, 3) if binary_split(f"{n}.png") == "train"}
    assert f"{len(written)} cut-outs, 0 backgrounds" in done.stdout and 10 < len(written) < 20
    for number in written:
        rgba = cv2.imread(str(out / f"cutouts/salient/{number}.png"), cv2.IMREAD_UNCHANGED)
        assert rgba.shape == (90, 110, 4)
        assert np.array_equal(rgba[5:-5, 5:-5, :3], pictures[number][35:115, 45:145])
        assert (rgba[5:-5, 5:-5, 3] == 255).all() and rgba[0, 50, 3] < 255
    assert CompositeScenes(even_looks, out / "cutouts").scene(3).image.any()


def test_photos_for_choosing_or_not_fully_annotated_are_not_trained_on(folders, tmp_path):
    shutil.copytree(folders["coco"] / "images", tmp_path / "images")
    data = json.loads((folders["coco"] / "instances.json").read_text())
    data["images"][1]["held_out"] = True
    data["images"][2]["complete"] = False
    data["images"][3]["human"] = True
    (tmp_path / "instances.json").write_text(json.dumps(data))
    kept = {1, 2, 3, 0, 5} | {n for n in range(10) if for_validation(f"{n}.png")}
    photos = material.Library(None, None, tmp_path / "instances.json", "train").photos
    assert {photo.id for photo in photos} == set(range(10)) - kept


def test_what_people_notice_without_ranking_it_is_left_open(folders) -> None:
    """As in photos: neither an object nor background, and everything else is one of the two."""
    scenes = CompositeScenes(even_looks, **folders)
    seen = Counter()
    for number in range(60):
        sample = scenes.scene(number, (96, 128))
        seen.update(np.unique(sample.foreground).tolist())
        assert (sample.foreground[sample.masks.any(0)] == 1).all()
        assert not (sample.foreground[~sample.masks.any(0)] == 1).any()
    assert min(seen[-1], seen[0], seen[1]) > 3


def test_predicted_looks_order_the_objects(folders) -> None:
    """Its shares decide what is salient, in which order, and what is taken off as unclear."""
    scenes = CompositeScenes(even_looks, **folders)
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
    same = CompositeScenes(even_looks, **folders).scene(7, (96, 128))
    np.testing.assert_array_equal(same.image, scenes.scene(7, (96, 128)).image)
