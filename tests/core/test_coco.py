"""COCO-format files: outlines, run lengths, ranks, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from data_folders import even_looks

from dsgnn import cli
from dsgnn.data import open_data
from dsgnn.data.coco import CocoReader, read_photos
from dsgnn.data.polygons import segmentation_to_mask
from dsgnn.evaluation.loop import evaluate
from dsgnn.evaluation.table import table
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.errors import DataError, OptionError
from dsgnn.runtime.ranker import BUNDLED

H, W = 60, 80
SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 40.0, 10.0, 40.0]]
OTHER = [[50.0, 20.0, 70.0, 20.0, 70.0, 50.0, 50.0, 50.0]]


def _annotation(segmentation=SQUARE, **fields):
    return {
        "id": 1, "image_id": 7, "category_id": 1, "segmentation": segmentation, **fields
    }  # fmt: skip


def _data(*annotations):
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": W, "height": H}],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dining table"}],
        "annotations": list(annotations),
    }


def _write(folder: Path, data) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    image = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "images" / "a.png"), image)
    (folder / "instances.json").write_text(json.dumps(data))
    return folder


def _counts(mask: np.ndarray) -> list[int]:
    """Run lengths the slow and obvious way."""
    runs, value, length = [], False, 0
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    return [*runs, length]


def test_photos_are_rgb_and_sorted_by_id(tmp_path):
    data = _data(_annotation())
    data["images"].append({"id": 3, "file_name": "a.png", "width": W, "height": H})
    photos = read_photos(_write(tmp_path, data))
    assert [photo.id for photo in photos] == [3, 7]
    assert [len(photo.instances) for photo in photos] == [0, 1]
    bgr = cv2.imread(str(tmp_path / "images" / "a.png"))
    assert np.array_equal(photos[0].read(), bgr[..., ::-1])
    assert photos[1].instances[0].box == (10, 10, 30, 40)
    assert photos[1].instances[0].area == 600


def test_a_json_file_and_an_images_folder_may_be_given(tmp_path):
    _write(tmp_path, _data(_annotation()))
    (tmp_path / "instances.json").rename(tmp_path / "other.json")
    (tmp_path / "images").rename(tmp_path / "jpg")
    assert len(CocoReader(tmp_path / "other.json", tmp_path / "jpg", even_looks)[0].ranks) == 1


def test_crowds_are_left_out(tmp_path):
    photos = read_photos(_write(tmp_path, _data(_annotation(), _annotation(iscrowd=1))))
    assert len(photos[0].instances) == 1


def test_drawn_outlines_differ_from_the_exact_masks_by_their_border_only(tmp_path):
    corners = [[12.3, 5.1, 61.7, 14.9, 70.2, 51.4, 33.3, 30.8, 9.9, 55.5], [2.0, 2, 8, 2, 5, 9]]
    instance = read_photos(_write(tmp_path, _data(_annotation(corners))))[0].instances[0]
    drawn, exact = instance.draw((H, W)), segmentation_to_mask(corners, H, W)
    border = cv2.morphologyEx(exact.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    assert exact.sum() > 800
    assert not ((drawn ^ exact) & ~border).any()


def test_outlines_are_drawn_on_any_canvas(tmp_path):
    instance = read_photos(_write(tmp_path, _data(_annotation())))[0].instances[0]
    drawn = instance.draw((60, 40), scale=(2.0, 1.5), offset=(-20.0, 0.0))
    expected = np.zeros((60, 40), bool)
    expected[15:60, 0:40] = True  # x 10…30 → 0…40, y 10…40 → 15…60
    assert (drawn ^ expected).sum() <= 40


@pytest.mark.parametrize("hole", [False, True])
def test_run_lengths_are_read_and_drawn_exactly(tmp_path, hole):
    mask = np.zeros((H, W), bool)
    mask[5:40, 8:60] = True
    mask[15:25, 20:30] = not hole
    mask[18:20, 23:26] = True  # an island in the hole
    rle = {"size": [H, W], "counts": _counts(mask)}
    reader = CocoReader(_write(tmp_path, _data(_annotation(rle))), ranks=even_looks)
    assert np.array_equal(reader.photos[0].instances[0].draw((H, W)), mask)
    assert np.array_equal(reader[0].masks[0], mask)


def test_a_list_of_run_lengths_is_their_union_as_in_cocos_tools(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    masks = np.zeros((2, H, W), bool)
    masks[0, 5:40, 8:60] = masks[1, 30:55, 40:78] = True
    runs = [{"size": [H, W], "counts": _counts(mask)} for mask in masks]
    expected = coco.decode(coco.merge(coco.frPyObjects(runs, H, W))).astype(bool)
    reader = CocoReader(_write(tmp_path, _data(_annotation(runs))), ranks=even_looks)
    assert np.array_equal(reader[0].masks, [expected])
    assert np.array_equal(reader.photos[0].instances[0].draw((H, W)), expected)


def test_the_object_visited_first_is_the_most_salient_one(tmp_path, caplog):
    third = [[40.0, 2.0, 44.0, 2.0, 44.0, 8.0]]
    folder = _write(
        tmp_path,
        _data(
            _annotation(SQUARE, visiting_order=3),
            _annotation(OTHER, visiting_order=1),
            _annotation(third),  # never visited: clutter
        ),
    )
    sample = CocoReader(folder)[0]
    assert sample.name == "a"
    best = sample.masks[sample.ranks.tolist().index(2)]
    assert sorted(sample.ranks.tolist()) == [1, 2]
    assert np.array_equal(best, segmentation_to_mask(OTHER, H, W))
    assert not caplog.records


def test_without_ranks_a_network_has_to_give_them(tmp_path):
    """Refused without one, by the reader and by each command, which names its option."""
    folder = _write(tmp_path, _data(_annotation(SQUARE), _annotation(OTHER)))
    with pytest.raises(OptionError, match="nothing in it says what people") as error:
        CocoReader(folder)
    assert error.value.about == ("predict_looks",) and str(folder) in str(error.value)
    assert CocoReader(folder, ranks=even_looks)[0].ranks.tolist() == [2, 1]
    results = tmp_path / "results.json"
    nothing = {"file": "a.png", "height": H, "width": W, "objects": []}
    results.write_text(json.dumps({"schema": RESULTS_SCHEMA, "images": [nothing]}))
    arguments = ["--data", str(folder), "--split", "all", "--predictions", str(results)]
    done = CliRunner().invoke(cli.evaluate, arguments)
    assert done.exit_code == 2 and "(see --teacher)" in " ".join(done.output.split())
    done = CliRunner().invoke(cli.train, ["--config", "nano", "--data", str(folder), "--out", "x"])
    assert done.exit_code == 2 and "(see --teacher)" in " ".join(done.output.split())
    done = CliRunner().invoke(cli.evaluate, [*arguments, "--teacher", "nano"])
    assert done.exit_code == 0, done.output
    assert "the true ranks are predicted by nano.onnx, sha256 " in done.output


@pytest.mark.parametrize(("teacher", "ranks"), [(BUNDLED, "predicted looks"),
                                                (None, "annotations")])  # fmt: skip
def test_an_evaluation_says_where_the_true_ranks_come_from(tmp_path, teacher, ranks):
    folder = _write(tmp_path, _data(_annotation(visiting_order=1)))
    nothing = {"file": "a.png", "height": H, "width": W, "objects": []}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"schema": RESULTS_SCHEMA, "images": [nothing]}))
    split = "train+val"
    figures = evaluate(None, str(folder), predictions=results, split=split, teacher=teacher)
    facts = {"spec": str(folder), "split": split, "ranks": ranks}
    told = f"nano.onnx, sha256 {sha256_of(BUNDLED)[:12]}"
    assert figures["data"] == facts | ({"teacher": told} if teacher else {})
    said = f"the true ranks are predicted by {told}, not by people"
    assert (said in table(figures)) == (teacher is not None)


def test_looks_may_be_nowhere_on_an_object(tmp_path):
    looks = np.zeros((H, W), np.float32)
    looks[:, 60:] = 1
    (sample,) = CocoReader(_write(tmp_path, _data(_annotation())), ranks=lambda _: looks)
    assert sample.masks.shape == (0, H, W) and sample.ranks.shape == (0,)


def test_an_order_may_be_demanded(tmp_path):
    folder = _write(tmp_path, _data(_annotation()))
    with pytest.raises(DataError, match=r"there is no annotations\[\]\.visiting_order"):
        CocoReader(folder, ranks="visiting_order")
    with pytest.raises(ValueError, match="ranks must be one of .*got 'rule'"):
        CocoReader(folder, ranks="rule")


def _broken(change):
    data = _data(_annotation())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("annotations"), r"instances\.json has no 'annotations'"),
        (lambda d: d.update(images={}), r"instances\.json\.images must be a list, got a dict"),
        (lambda d: d["images"][0].pop("width"), r"images\[0\] has no 'width'"),
        (lambda d: d["images"].append(d["images"][0]), r"images\[1\]\.id 7 occurs twice"),
        (
            lambda d: d["categories"][1].update(name=5),
            r"categories\[1\]\.name must be a str, got a int",
        ),
        (lambda d: d["annotations"][0].update(image_id=8), r"annotations\[0\]\.image_id 8 is not"),
        (lambda d: d["annotations"][0].update(category_id=9), r"\.category_id 9 is not in categ"),
        (lambda d: d["annotations"][0].pop("segmentation"), r"segmentation must be a list of poly"),
        (
            lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
            r"annotations\[0\]\.segmentation\[0\] must be finite x, y pairs of three points",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation=[[1, 2, 3, float("nan"), 5, 6]]),
            r"segmentation\[0\] must be finite",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation=[[0, 0, 1e9, 0, 4, 4]]),
            r"segmentation\[0\] must be .* none beyond ±100000 pixels, got \[0, 0, 1000000000.0",
        ),
        (
            lambda d: d["annotations"][0].update(
                segmentation=[{"size": [H, W], "counts": [H * W]}, {"size": [H, W], "counts": [9]}]
            ),
            r"annotations\[0\]\.segmentation: the runs .* must add up to 4800, got 9",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [H, W], "counts": [5, 5]}),
            r"annotations\[0\]\.segmentation: the runs .* must add up to 4800, got 10",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [W, H], "counts": [1]}),
            r"annotations\[0\]\.segmentation: .*\[80, 60\]",
        ),
        (
            lambda d: d["annotations"][0].update(segmentation={"size": [H, W], "counts": [H * W]}),
            r"annotations\[0\]\.segmentation marks no pixel",
        ),
        (
            lambda d: d["annotations"][0].update(visiting_order="first"),
            r"annotations\[0\]\.visiting_order must be a whole number, got 'first'",
        ),
    ],
)
def test_mistakes_name_the_file_and_the_field(tmp_path, change, message):
    folder = _write(tmp_path, _broken(change))
    with pytest.raises(DataError, match=message) as caught:
        read_photos(folder)
    assert str(folder / "instances.json") in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "a\0.png", ""]
)
def test_a_file_name_stays_in_the_folder(tmp_path, name):
    folder = _write(tmp_path, _broken(lambda d: d["images"][0].update(file_name=name)))
    with pytest.raises(DataError, match=r"images\[0\]\.file_name names a file outside"):
        read_photos(folder)
    data = _data(_annotation())
    data["images"][0]["file_name"] = "some/folder/a.png"
    assert read_photos(_write(tmp_path, data))[0].path == folder / "images/some/folder/a.png"


def test_json_nested_without_end_is_refused_in_words(tmp_path):
    (tmp_path / "instances.json").write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(DataError, match=r"instances\.json: not JSON \(it is nested too deeply\)"):
        read_photos(tmp_path)


def test_all_faults_of_a_file_are_listed(tmp_path):
    def spoil(data):
        data["images"].append({"id": 8, "file_name": "b.png", "width": 0, "height": H})
        data["annotations"] += [
            _annotation(category_id=9),
            _annotation([[1, 2]]),
            _annotation(OTHER),
        ]

    folder = _write(tmp_path, _broken(spoil))
    problems = []
    (photo,) = read_photos(folder, problems=problems)
    assert len(photo.instances) == 2
    path = folder / "instances.json"
    for problem, text in zip(
        problems,
        (
            "images[1].width must be a whole number from 1, got 0",
            "annotations[1].category_id 9 is not in categories",
            "annotations[2].segmentation[0] must be finite",
        ),
        strict=True,
    ):
        assert problem.startswith(f"{path}: {text}")
    done = CliRunner().invoke(cli.check, [str(folder)])
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 3


def test_a_set_without_validation_says_what_to_do(tmp_path):
    folder = _write(tmp_path, _data(_annotation(visiting_order=1)))
    done = CliRunner().invoke(cli.check, [str(folder)])
    assert done.exit_code == 0 and "dsgnn-train needs --val none" in done.stderr
    trained = Path("last.safetensors")
    step = cli._next_step(trained, str(folder), "none", None)
    assert "not trained on: dsgnn-eval last.safetensors --data FOLDER" in step
    data = json.loads((folder / "instances.json").read_text())
    (folder / "val.json").write_text(json.dumps(data))
    done = CliRunner().invoke(cli.check, [str(folder), "--split", "val"])
    assert done.exit_code == 0 and "--val none" not in done.stderr
    step = cli._next_step(trained, str(folder), "val", Path("t.onnx"))
    assert step.endswith(f"--data {folder} --split val --teacher t.onnx")
    step = cli._next_step(trained, str(folder), "val", BUNDLED)  # what `nano` stands for
    assert step.endswith("--split val --teacher nano")
    photo = {"file_name": "a.png", "width": W, "height": H, "points": [[5, 5]], "dev": True}
    gaze = tmp_path / "gaze"
    (gaze / "images").mkdir(parents=True)
    (folder / "images" / "a.png").rename(gaze / "images" / "a.png")
    (gaze / "fixations.json").write_text(json.dumps({"images": [{**photo, "source": "mine"}]}))
    step = cli._next_step(trained, str(gaze), "none", None)
    assert step.endswith(f"--data {gaze} --split test --protocol gaze")


def test_the_bundled_model_is_measured_by_its_name(tmp_path):
    folder = _write(tmp_path, _data(_annotation(visiting_order=1)))
    named, path = (
        CliRunner().invoke(cli.evaluate, [model, "--data", str(folder), "--split", "all"])
        for model in ("nano", str(BUNDLED))
    )
    assert named.exit_code == 0 and "SA-SOR" in named.output, named.output
    assert named.output == path.output


def test_predicted_looks_give_the_ranks(tmp_path):
    """Whatever the file says; what draws too few looks is left open, or background."""
    third = [[40.0, 2.0, 48.0, 2.0, 48.0, 8.0]]
    annotations = [_annotation(s, visiting_order=i) for i, s in enumerate((SQUARE, OTHER, third))]
    folder = _write(tmp_path, _data(*annotations))
    seen = []

    drawn = [segmentation_to_mask(s, H, W) for s in (SQUARE, OTHER, third)]

    def predict_looks(image):
        seen.append(image.shape)
        looks = np.zeros((H, W))
        for mask, share in zip(drawn, shares, strict=True):
            looks[mask] = share / mask.sum()
        looks[~np.any(drawn, 0)] = (1 - sum(shares)) / (~np.any(drawn, 0)).sum()
        return looks.astype(np.float32)

    shares = [0.2, 0.5, 0.02]
    reader = CocoReader(folder, ranks=predict_looks)
    sample = reader[0]
    assert seen == [(H, W, 3)] and reader.ranks_from == "predicted looks"
    assert sample.foreground is not None and (sample.foreground[drawn[2]] == -1).all()
    assert (sample.foreground[drawn[0] | drawn[1]] == 1).all()
    assert (sample.foreground[~np.any(drawn, 0)] == 0).all()
    shares = [0.2, 0.5, 0.001]
    again = reader[0]
    assert again.foreground is not None and (again.foreground[drawn[2]] == 0).all()
    shares = [0.2, 0.5, 0.02]
    expected = [segmentation_to_mask(s, H, W) for s in (OTHER, SQUARE)]
    np.testing.assert_array_equal(sample.masks, expected)
    assert sample.ranks.tolist() == [2, 1]
    (opened,) = open_data(folder, "all", predict_looks)
    assert opened.ranks.tolist() == [2, 1]


def test_where_not_all_is_annotated_nothing_is_background(tmp_path):
    """A photo that is not complete, and a region with a crowd."""
    data = _data(_annotation(SQUARE), _annotation(OTHER, iscrowd=1))
    looks = np.full((4, 4), 1 / 16, np.float32)
    square, crowd = (segmentation_to_mask(s, H, W) for s in (SQUARE, OTHER))
    (sample,) = CocoReader(_write(tmp_path, data), ranks=lambda image: looks)
    assert sample.foreground is not None and (sample.foreground[crowd & ~square] == -1).all()
    assert (sample.foreground[~crowd & ~square] == 0).all()
    data["images"][0]["complete"] = False
    (sample,) = CocoReader(_write(tmp_path, data), ranks=lambda image: looks)
    assert sample.foreground is not None and (sample.foreground[~square] == -1).all()
    assert (sample.foreground[square] == 1).all()


def test_broken_data_is_no_wrong_use_of_the_commands(tmp_path):
    folder = str(_write(tmp_path, _broken(lambda d: d["annotations"][0].update(image_id=8))))
    done = CliRunner().invoke(cli.check, [folder])
    assert done.exit_code == 1 and "annotations[0].image_id 8 is not" in done.stdout
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"schema": RESULTS_SCHEMA, "images": []}))
    arguments = ["--predictions", str(results), "--data", folder, "--split", "all"]
    done = CliRunner().invoke(cli.evaluate, arguments)
    assert done.exit_code == 1 and "annotations[0].image_id 8 is not" in done.output


def test_a_shared_visiting_order_is_refused(tmp_path):
    data = _data(_annotation(SQUARE, visiting_order=1), _annotation(OTHER, visiting_order=1))
    with pytest.raises(DataError, match=r"visiting_order of image 7 must differ, got \[1, 1\]"):
        CocoReader(_write(tmp_path, data))


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"instances\.json: no such file; give a COCO JSON"):
        read_photos(tmp_path)
    (tmp_path / "instances.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_photos(tmp_path)
    folder = _write(tmp_path, _data(_annotation()))
    (folder / "images" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read .*a\.png: "):
        CocoReader(folder, ranks=even_looks)[0]
    cv2.imwrite(str(folder / "images" / "a.png"), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"height and width are 60 and 80, but .*a\.png has 10 and 20; give"
    ):
        CocoReader(folder, ranks=even_looks)[0]
