"""Folders of which it is known what people look at: read, split, checked and measured."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from dsgnn import cli
from dsgnn.data import open_data
from dsgnn.data.binary import binary_split, read_binary
from dsgnn.data.check import check_folder, splits_of
from dsgnn.data.gaze import gaze_split
from dsgnn.data.people import open_people, split_of
from dsgnn.evaluation import gaze, loop
from dsgnn.runtime import rle
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.errors import DataError, OptionError

H, W = 20, 40
NAMES = [f"photo{i}.png" for i in range(30)]


def write_photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((H, W, 3), 90, np.uint8))


def mask_of(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((H, W), bool)
    mask[y : y + h, x : x + w] = True
    return mask


LARGE, SMALL = mask_of(0, 0, 12, 20), mask_of(18, 8, 4, 4)


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    """Thirty photos; two viewers look at the small object, and one of them at the large one."""
    entries = []
    for i, name in enumerate(NAMES):
        write_photo(tmp_path / "images" / name)
        first = [[20.0, 10.0, 100]] * 4
        entries.append(
            {
                "file_name": name,
                "width": W,
                "height": H,
                "source": "one" if i % 2 else "other",
                "dev": i == 0,
                "viewers": [first, [*first, [5.0, 5.0, 100]]],
            }
        )
    (tmp_path / "fixations.json").write_text(json.dumps({"images": entries}))
    return tmp_path


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    for name in NAMES:
        write_photo(tmp_path / "images" / name)
        path = tmp_path / "masks" / Path(name).with_suffix(".bmp")
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), LARGE * np.uint8(255))
    return tmp_path


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    """COCO form. In the first photo the file has ranks, in the second fixations only, and of the
    third nothing is known."""
    for number in (1, 2, 3):
        write_photo(tmp_path / "images" / f"{number}.png")
    segmentations = [rle.encode(mask) for mask in (LARGE, SMALL)]
    counts = {1: [(2, None), (1, None)], 2: [(None, 4), (None, 40)], 3: [(None, None)] * 2}
    annotations = []
    for image, values in counts.items():
        for segmentation, (rank, fixations) in zip(segmentations, values, strict=True):
            entry = {"image_id": image, "category_id": 1, "segmentation": segmentation}
            annotations.append(entry | {"human_rank": rank} | {"fixations": fixations})
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "width": W, "height": H, "human": n == 2}
            | ({"fixations": 50} if n == 2 else {})
            for n in (1, 2, 3)
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def predictions(path: Path, names: list[str], masks: list[np.ndarray], best: int = 0) -> Path:
    """The masks in each photo, `best` ranked first."""
    objects = [
        {"saliency": float(i == best), "segmentation": rle.encode(mask)}
        for i, mask in enumerate(masks)
    ]
    images = [{"file": name, "width": W, "height": H, "objects": objects} for name in names]
    path.write_text(json.dumps({"schema": RESULTS_SCHEMA, "images": images}))
    return path


def test_each_photo_is_in_one_split(looks: Path) -> None:
    parts = {split: open_people(looks, split) for split in ("train", "val", "test", "all")}
    assert all(parts.values())
    names = [photo.path.name for part in ("train", "val", "test") for photo in parts[part]]
    assert sorted(names) == sorted(NAMES)
    kept = next(photo for photo in parts["all"] if photo.dev)
    assert gaze_split(kept.path.name) != "test" and split_of(kept) == "test"
    with pytest.raises(OptionError, match="split must be one of .* got 'train\\+val'"):
        open_people(looks, "train+val")


def test_folders_that_are_of_no_form(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data at"):
        open_people(tmp_path / "nowhere", "all")
    with pytest.raises(DataError, match="is of no known form; expected one of\n  fixations"):
        open_people(tmp_path, "all")


def test_ranked_objects_are_measured_elsewhere(looks: Path) -> None:
    with pytest.raises(DataError, match="holds no ranked objects"):
        loop.evaluate(None, str(looks), predictions=looks / "results.json", if_none="all")


def test_fixations_are_samples_to_train_on(looks: Path) -> None:
    """Attention is known, objects are not; what is kept for other purposes is left out."""
    train = open_data(looks, "train")
    assert [photo.path.name for photo in train.photos] == [
        photo.path.name for photo in open_people(looks, "all") if photo.may_train
    ]
    sample = train[0]
    assert len(sample.masks) == 0 and (sample.foreground == -1).all()
    assert sample.attention.shape == (3, 5) and sample.attention.sum() == pytest.approx(1)
    points = train.photos[0].points
    y, x = np.unravel_index(sample.attention.argmax(), (3, 5))
    assert np.abs(points - (8 * x + 4, 8 * y + 4)).max(1).min() <= 8  # people looked there
    with pytest.raises(OptionError, match="split must be one of"):
        open_data(looks, "all")


def test_the_parts_of_a_mask_are_objects_to_train_on(tmp_path: Path) -> None:
    """Ranked by predicted looks; a speck and a mask in many parts are no objects."""
    speck = mask_of(36, 1, 1, 1)
    many = np.zeros((H, W), bool)
    many[::4, ::8] = True
    names = {split: [] for split in ("train", "val", "test")}
    for number in range(200):
        names[binary_split(f"{number}.png")].append(number)
    assert 2 <= len(names["val"]) <= 20 and 2 <= len(names["test"]) <= 20
    (tmp_path / "masks").mkdir()
    first, second = names["train"][:2]
    for number, mask in ((first, LARGE | SMALL | speck), (second, many)):
        write_photo(tmp_path / "images" / f"{number}.png")
        cv2.imwrite(str(tmp_path / "masks" / f"{number}.png"), 255 * mask.astype(np.uint8))
    with pytest.raises(OptionError, match="nothing in it says what people look at first"):
        open_data(tmp_path, "train")

    def middle(image: np.ndarray) -> np.ndarray:
        return np.array([[0, 0, 0, 0.5, 0.5, 0, 0, 0]], np.float32)

    samples = {s.name: s for s in open_data(tmp_path, "train", middle)}
    parts = samples[str(first)]
    np.testing.assert_array_equal(parts.masks, [SMALL, LARGE])
    assert parts.ranks.tolist() == [2, 1]
    assert (parts.foreground[speck] == -1).all() and (parts.foreground[LARGE | SMALL] == 1).all()
    assert (parts.foreground[~(LARGE | SMALL | speck)] == 0).all()
    scattered = samples[str(second)]
    assert len(scattered.masks) == 0 and ((scattered.foreground == 1) == many).all()


def test_measured_against_fixations(looks: Path, tmp_path: Path) -> None:
    found = predictions(tmp_path / "results.json", NAMES, [LARGE, SMALL], best=1)
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="these options are of a model"):
        gaze.evaluate(None, str(looks), predictions=found, split="all", device="cpu")
    with pytest.raises(OptionError, match="either a model or predictions"):
        gaze.evaluate(None, str(looks), split="all")
    result = gaze.evaluate(None, str(looks), predictions=found, split="all", out=out)
    assert (result["images"], result["objects"]) == (30, 2.0)
    pairs = result["figures"]["pairs"]
    assert [pairs[who]["value"] for who in ("model", "larger first")] == [1.0, 0.0]
    assert pairs["model"]["count"] == 30 and pairs["model"]["interval"] == [1.0, 1.0]
    # The first fixation of each viewer is left out: six on the small object, one on the large.
    assert result["figures"]["fixations"]["model"]["value"] == pytest.approx(1.0)
    assert result["by_source"]["one"]["images"] == 15
    assert "nss" not in result["figures"]  # predictions have no map
    shown = gaze.table(result)
    assert "pairs of objects in people's order" in shown and "30 pairs" in shown
    assert "one: 15 photos" in shown
    written = json.loads((out / "metrics.json").read_text())
    assert written["figures"] == result["figures"]
    rows = (out / "per_image.csv").read_text().splitlines()
    assert rows[0] == "name,objects,pairs,first,fixations" and rows[1] == "photo0,2,1.0,1.0,1.0"


def test_an_attention_map_is_measured_where_the_ranking_has_one(looks: Path) -> None:
    class Looking:
        """An empty ranking with a map that looks at the small object."""

        height, width, objects = H, W, ()
        attention = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32) / 2

    photos = open_people(looks, "all")
    measured = [figures for _, _, figures in gaze.measure_gaze(lambda sample: Looking(), photos)]
    figures = gaze.summarise_gaze(measured)
    assert figures["auc"]["model"]["value"] > 0.9 and figures["nss"]["model"]["value"] > 1
    assert set(figures["nss"]) == {
        "model",
        "a centre map",
        "one half of the viewers about the other",
    }


def test_measured_against_one_mask(binary: Path, tmp_path: Path) -> None:
    found = predictions(tmp_path / "results.json", NAMES, [LARGE])
    result = gaze.evaluate(None, str(binary), predictions=found, split="all")
    values = {name: rows["model"]["value"] for name, rows in result["figures"].items()}
    assert values == {"f_measure": 1.0, "mae": 0.0, "iou": 1.0, "nothing_found": 0.0}


def test_measured_against_ranks_of_people(ranked: Path, tmp_path: Path) -> None:
    found = predictions(tmp_path / "results.json", ["1.png", "2.png"], [LARGE, SMALL], best=1)
    result = gaze.evaluate(None, str(ranked), predictions=found, split="all")
    assert result["images"] == 2  # of the third nothing is known
    values = {
        name: (rows["model"]["value"], rows["model"]["count"])
        for name, rows in result["figures"].items()
    }
    # In the second photo 4 of 50 fixations are fewer than 5: the large object has no rank.
    assert values == {
        "pairs": (1.0, 2),
        "first": (1.0, 1),
        "sa_sor": (pytest.approx(1.0), 1),
        "sor": (pytest.approx(1.0), 2),
        "recall": (1.0, 3),
    }


def test_the_command(binary: Path, tmp_path: Path) -> None:
    found = str(predictions(tmp_path / "results.json", NAMES, [LARGE]))
    arguments = ["--predictions", found, "--data", str(binary), "--protocol", "gaze"]
    done = CliRunner().invoke(cli.evaluate, [*arguments, "--split", "all"])
    assert done.exit_code == 0
    assert "30 photos, protocol gaze" in done.output and "a box in the middle" in done.output
    done = CliRunner().invoke(cli.evaluate, [*arguments, "--split", "all", "--worst", "3"])
    assert done.exit_code == 2 and "--worst" in done.output


def test_ranks_of_people_in_samples(ranked: Path) -> None:
    from dsgnn.data.coco import CocoReader

    reader = CocoReader(ranked, ranks="human")
    assert (len(reader), reader.ranks_from) == (2, "people")
    np.testing.assert_array_equal(reader[0].masks, [SMALL, LARGE])
    assert reader[0].ranks.tolist() == [2, 1]
    np.testing.assert_array_equal(reader[1].masks, [SMALL])
    with pytest.raises(OptionError, match="nothing in it says"):  # of one photo
        CocoReader(ranked)

    def middle(image: np.ndarray) -> np.ndarray:
        return np.ones((1, 1), np.float32)

    assert [len(open_data(ranked, split, middle)) for split in ("train", "val", "all")] == [2, 0, 3]


def test_counts_of_fixations_must_fit(ranked: Path) -> None:
    content = json.loads((ranked / "instances.json").read_text())
    content["annotations"][2]["fixations"] = 51
    (ranked / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\[2\] has 51 fixations, .* 50 in all"):
        open_people(ranked, "all")


def test_masks_and_photos_belong_together(binary: Path) -> None:
    (binary / "masks" / "photo3.bmp").unlink()
    write_photo(binary / "masks" / "stray.png")
    with pytest.raises(DataError, match="photo3.png has no mask in masks/"):
        read_binary(binary)
    cv2.imwrite(str(binary / "masks" / "photo4.bmp"), np.zeros((H, W), np.uint8))
    cv2.imwrite(str(binary / "masks" / "photo5.bmp"), np.zeros((H, W + 1), np.uint8))
    (binary / "images" / "photo6.png").write_bytes(b"no image")
    problems = check_folder(str(binary), "all").problems
    assert len(problems) == 5
    for problem, text in zip(
        problems,
        (
            "photo3.png has no mask",
            "stray.png has no photo",
            "photo4.bmp: the mask is empty",
            "photo5.bmp has 41×20 pixels",
            "photo6.png",
        ),
        strict=True,
    ):
        assert text in problem


def test_the_check_knows_these_folders(looks: Path, ranked: Path) -> None:
    report = check_folder(str(looks), "all")
    assert report.problems == [] and report.sizes == {(H, W): 30}
    assert splits_of(str(looks))["all"] == 30
    content = json.loads((looks / "fixations.json").read_text())
    content["images"][4]["viewers"] = [[[20, 10, 1], [99, 99, 1]]]
    content["images"][5]["viewers"] = [[[20, 10, 1]]]
    (looks / "fixations.json").write_text(json.dumps(content))
    problems = check_folder(str(looks), "all").problems
    assert problems == [
        "photo4.png: all fixations lie outside of it",
        "photo5.png has no fixation that counts",
    ]
