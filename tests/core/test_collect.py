"""`python -m dsgnn.scenes.collect`: which files of a folder become material, and in what form."""

import subprocess
import sys

import cv2
import numpy as np
from data_folders import even_looks, write_background, write_cutout

from dsgnn.data.binary import binary_split
from dsgnn.scenes import collect
from dsgnn.scenes.composite import CompositeScenes


def test_collecting_takes_photographs_and_leaves_drawings(tmp_path):
    source = tmp_path / "share"
    write_cutout(source / "animals" / "birds" / "crow.png", 1)
    write_cutout(source / "animals" / "cartoon" / "duck.png", 2)
    flat = np.full((96, 96, 4), 200, np.uint8)
    flat[:20, :, 3] = 0
    cv2.imwrite(str(source / "animals" / "flat.png"), flat)
    write_background(source / "Meadow" / "contents" / "images" / "800x600.jpg", 3)
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
