"""Material for scenes: which files are held out, and what photos with masks give."""

import json
import shutil

import numpy as np
from data_folders import box, write_json

from dsgnn.data.coco import read_photos
from dsgnn.data.records import for_validation
from dsgnn.scenes.material import Library, empty_region, held_out, photo_cutouts


def test_one_file_in_five_is_held_out_by_name_for_ever():
    assert 0.17 < np.mean([held_out(f"name{i}") for i in range(3000)]) < 0.23
    names = ("lion", "tiger", "bear", "pig", "cow", "goat")
    assert [name for name in names if held_out(name)] == ["pig", "cow"]


def test_copies_leave_out_the_small_the_cut_and_the_covered(tmp_path):
    whole, small = box(20, 20, 100, 100), box(130, 10, 40, 40)
    corner, left = box(260, 200, 60, 100), box(0, 150, 80, 85)
    covered, coverer = box(150, 100, 100, 80), box(150, 90, 100, 10)
    data = {
        "images": [{"id": 1, "file_name": "a.png", "width": 320, "height": 300}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": s}
            for s in (whole, small, corner, left, covered, coverer)
        ],
    }
    write_json(tmp_path / "instances.json", data)
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


def test_empty_regions_hold_no_object(scene_folders):
    for photo in read_photos(scene_folders["coco"]):
        region = empty_region(photo, photo.read(), np.random.default_rng(0), min_px=40)
        assert region is not None and min(region.shape[:2]) >= 40
        assert (np.abs(region.astype(int) - 100) <= 10).all()


def test_photos_for_choosing_or_not_fully_annotated_are_not_trained_on(scene_folders, tmp_path):
    shutil.copytree(scene_folders["coco"] / "images", tmp_path / "images")
    data = json.loads((scene_folders["coco"] / "instances.json").read_text())
    data["images"][1]["held_out"] = True
    data["images"][2]["complete"] = False
    data["images"][3]["human"] = True
    write_json(tmp_path / "instances.json", data)
    kept = {1, 2, 3, 0, 5} | {n for n in range(10) if for_validation(f"{n}.png")}
    photos = Library(None, None, tmp_path / "instances.json", "train").photos
    assert {photo.id for photo in photos} == set(range(10)) - kept
