"""What dsgnn-check finds in a data set."""

from click.testing import CliRunner
from data_folders import (
    MIDDLE,
    box,
    coco_json,
    edit_json,
    even_looks,
    three_objects,
    write_image,
    write_json,
)

from dsgnn.cli import check
from dsgnn.data import open_data
from dsgnn.data.check import check_data
from dsgnn.data.sifr import SifrReader


def problems(data):
    return check_data(data).problems


def test_nothing_wrong(published_assr, published_irsr, published_sifr):
    for root in (published_assr, published_irsr, published_sifr):
        for split in ("train", "val", "test"):
            assert problems(open_data(root, split)) == []


def test_a_number_of_images_other_than_the_published_one_is_a_remark(
    published_assr, published_irsr, published_sifr
):
    """A folder of one's own in a published form is as good as any."""
    counts = {"train": (2, 7646), "val": (1, 1436), "test": (1, 2418)}
    for split, (images, published) in counts.items():
        report = check_data(open_data(published_assr, split))
        assert report.problems == [] and report.images == images
        text = f"ASSR: {images} images in the split {split}, {published} were published"
        assert report.remarks[0].startswith(text)
    remarks = check_data(open_data(published_assr, "train+val")).remarks
    assert ["train" in remarks[0], "val" in remarks[1]] == [True, True]
    remarks = check_data(open_data(published_irsr, "test")).remarks
    assert remarks[0].startswith("IRSR: 2 images in the split test, 2929")
    for root, split in ((published_irsr, "train"), (published_sifr, "test")):
        assert check_data(open_data(root, split)).remarks == ["ranks come from annotations"]


def test_the_command_lists_problems_and_says_what_a_trainer_needs(published_assr, published_sifr):
    done = CliRunner().invoke(check, [str(published_assr), "--split", "train"])
    assert done.exit_code == 0 and done.stdout == ""
    assert "2 images in the split train, 7646 were published" in done.stderr
    assert "objects per image: 2.00 on average (objects: images) 2: 2" in done.stderr
    assert "width×height in pixels: 16×12: 2" in done.stderr
    assert "images of each split: train 2, val 1, test 1" in done.stderr
    assert "2 images, 0 problems" in done.stderr
    (published_sifr / "test" / "rgb" / "000000000060.jpg").unlink()
    done = CliRunner().invoke(check, [str(published_sifr), "--split", "test"])
    assert done.exit_code == 1 and "no image" in done.stdout
    done = CliRunner().invoke(check, [str(published_assr / "nowhere")])
    assert done.exit_code == 2 and "no data at" in done.output


def test_all_problems_are_listed(published_assr):
    path = published_assr / "obj_seg_data_train.json"

    def spoil(entries):
        objects = entries[0]["object_data"]
        objects[0]["segmentation"] = [[1, 2]]
        objects[2]["segmentation"] = box(100, 100, 5, 5)
        entries.append({"img": "103", "object_data": three_objects()})
        entries.append({"img": "104"})
        entries.append(entries[1])

    edit_json(path, spoil)
    (published_assr / "images" / "train" / "102.jpg").unlink()
    write_json(
        published_assr / "rank_order" / "train" / "102.json", {"rank_order": [0.8, 0.8, 1.0]}
    )
    write_json(
        published_assr / "rank_order" / "train" / "103.json", {"rank_order": [0.7, 0.8, 1.0]}
    )
    (published_assr / "images" / "train" / "103.jpg").write_bytes(b"not an image")
    found = problems(open_data(published_assr, "train"))
    expected = [
        "[0].object_data[0].segmentation: polygon 0: expected x and y",
        "[0].object_data[2].segmentation: covers no pixel of the 16x12 image",
        "[1]: tied ranks [0.8, 0.8, 1.0]",
        f"[1]: no image {published_assr / 'images' / 'train' / '102.jpg'}",
        "[2]: gaps in the ranks [0.7, 0.8, 1.0], expected steps of 0.1",
        f"[2]: cannot read {published_assr / 'images' / 'train' / '103.jpg'}",
        "[3] has no 'object_data'",
        f"[4]: the image 102 occurs twice, first at {path}: [1]",
    ]
    for problem, text in zip(found, expected, strict=False):
        assert problem.startswith(f"{path}: {text}")
    assert len(found) == len(expected) + 2  # and entry 4 has the mistakes of entry 1


def test_resized_images_and_masks_of_another_size(published_sifr):
    write_image(published_sifr / "test" / "rgb" / "000000000060.jpg", size=(24, 32))
    edit_json(
        published_sifr / "test" / "test_annotations.json",
        lambda e: e[1]["annotations"][0].update(
            segmentation={"size": [24, 32], "counts": [768]}, gt_rank=5
        ),
    )
    found = problems(open_data(published_sifr, "test"))
    assert "[0]: height and width are 12 and 16, but" in found[0]
    assert "[1]: gaps in the ranks [0.0, 5.0]" in found[1]
    assert "[1].annotations[0].segmentation: run-length mask of size [24, 32]" in found[2]
    assert len(found) == 3


def test_ties_and_gaps_are_closed_up(published_sifr):
    def spoil(entries):
        objects = entries[0]["annotations"]
        objects.append({"bbox": [0] * 4, "segmentation": box(*MIDDLE), "gt_rank": 7})
        objects[0]["gt_rank"] = objects[1]["gt_rank"] = 2

    edit_json(published_sifr / "test" / "test_annotations.json", spoil)
    assert SifrReader(published_sifr, "test")[0].ranks.tolist() == [1, 2, 3]


def test_coco_and_composite_sets_are_checked_too(tmp_path):
    write_image(tmp_path / "images" / f"{40:012d}.jpg")
    write_json(tmp_path / "instances.json", coco_json([40, 41]))
    found = problems(open_data(tmp_path, "all"))
    assert len(found) == 1 and "000000000041.jpg" in found[0]
    report = check_data(open_data("composite:3", "train", even_looks))
    assert report.problems == [] and sum(report.objects.values()) == 3


def test_what_has_no_ranks_is_checked_without_them(tmp_path):
    """All but the ranks; with a teacher these too."""
    write_image(tmp_path / "images" / f"{40:012d}.jpg")
    content = coco_json([40, 41])
    for annotation in content["annotations"]:
        del annotation["visiting_order"]
    write_json(tmp_path / "instances.json", content)
    done = CliRunner().invoke(check, [str(tmp_path), "--split", "all"])
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 1
    assert "there are no ranks: " in done.stderr and "objects per image" not in done.stderr
    assert "width×height in pixels: 16×12: 1" in done.stderr
    assert "--teacher nano predicts them" in done.stderr
    done = CliRunner().invoke(check, [str(tmp_path), "--split", "all", "--teacher", "nano"])
    assert done.exit_code == 1 and "ranks come from predicted looks" in done.stderr
    assert "--teacher nano" not in done.stderr
    assert "objects per image: " in done.stderr


def test_coco_images_of_one_name_and_empty_splits_are_told(tmp_path):
    """Predictions are matched by the name, which has its folder where several have it."""
    content = coco_json([40, 41])
    for photo, folder in zip(content["images"], "ab", strict=True):
        photo["file_name"] = f"{folder}/1.jpg"
        (tmp_path / "images" / folder).mkdir(parents=True)
        write_image(tmp_path / "images" / folder / "1.jpg")
    write_json(tmp_path / "instances.json", content)
    assert problems(open_data(tmp_path, "all")) == []
    content["images"][1]["file_name"] = "a/1.jpg"
    write_json(tmp_path / "instances.json", content)
    (found,) = problems(open_data(tmp_path, "all"))
    assert "occurs twice, first at image 0" in found
    write_json(tmp_path / "instances.json", {**content, "images": [], "annotations": []})
    assert problems(open_data(tmp_path, "all")) == ["COCO: there are no images in this split"]


def test_progress_sees_every_image(published_assr):
    seen = []

    def progress(numbers):
        for number in numbers:
            seen.append(number)
            yield number

    check_data(open_data(published_assr, "train+val"), progress)
    assert seen == [0, 1, 2]


def test_a_bug_ends_the_command_with_its_traceback(published_assr, monkeypatch):
    """numpy raises ValueError for a bug of ours, which is no wrong use."""

    def broken(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr("dsgnn.data.check.check_folder", broken)
    done = CliRunner().invoke(check, [str(published_assr)])
    assert type(done.exception) is ValueError and "broadcast" not in done.output
