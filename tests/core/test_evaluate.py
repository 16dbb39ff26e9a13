"""Evaluation: one figure for a checkpoint, its predictions and its export; honest errors."""

import csv
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dsgnn import cli
from dsgnn.config import CONFIGS
from dsgnn.data import open_data
from dsgnn.data.transforms import example
from dsgnn.evaluation.loop import evaluate, in_query_order, measure
from dsgnn.evaluation.rankers import (
    lanes_of,
    model_ranker,
    predictions_ranker,
    threads_of,
    truth,
)
from dsgnn.evaluation.table import table
from dsgnn.model import build_model, normalise
from dsgnn.runtime import rle
from dsgnn.runtime.cluster.parquet import Parts
from dsgnn.runtime.errors import DataError, DsgnnError, InputError
from dsgnn.runtime.letterbox import Fixed, LongestSide, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.runtime.ranking import RankedObject, Ranking
from dsgnn.training.loop import RunOptions, train
from dsgnn.training.recipe import Recipe, TrainingPlan
from dsgnn.training.run import DataSplits, train_on
from dsgnn.weights.checkpoint import save_checkpoint

FIGURES = ("mae", "sor", "sa_sor", "recall", "matched_iou", "f_measure", "used", "by_objects")


@pytest.fixture(scope="module")
def checkpoint(tiny_nano, samples, tmp_path_factory):
    """Trained until it finds most blocks."""

    class Source:
        def example(self, number, size):
            return example(samples[number % len(samples)])

    out = tmp_path_factory.mktemp("trained")
    recipe = Recipe(iterations=90, batch=3, points=256, learning_rate=3e-3, clip=5.0,
                    milestones=(), warmup=0.05)  # fmt: skip
    train(TrainingPlan(replace(tiny_nano, size=96), recipe), Source(), out)
    return out / "last.safetensors"


def same(first, second):
    assert [first[name] for name in FIGURES] == [second[name] for name in FIGURES]
    assert first["per_image"] == second["per_image"]


def test_a_checkpoint_and_its_predictions_have_the_same_figures(checkpoint, assr, tmp_path):
    for protocol in ("dsgnn", "official"):
        out = tmp_path / protocol
        figures = evaluate(checkpoint, str(assr), split="train", protocol=protocol, out=out)
        again = evaluate(None, str(assr), predictions=out / "results.json", split="train",
                         protocol=protocol)  # fmt: skip
        same(figures, again)
    assert figures["images"] == 4 and figures["recall"] > 0.5  # it did learn
    assert figures["model"]["config"] == "tiny-nano" and figures["palette"] == "assr"
    assert json.loads((out / "metrics.json").read_text())["sa_sor"] == figures["sa_sor"]
    with (out / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [image["name"] for image in figures["per_image"]]
    assert [float(r["mae"]) for r in rows] == [image["mae"] for image in figures["per_image"]]
    assert {row["sa_sor"] for row in rows if row["objects"] == "1"} == {""}


def test_figures_are_those_of_the_parts_put_together_by_hand(checkpoint, assr):
    from dsgnn.metrics import evaluate as metrics
    from dsgnn.weights.checkpoint import load_checkpoint

    model, _ = load_checkpoint(checkpoint)
    data = open_data(assr, "test")

    def by_hand():
        for sample in (data[i] for i in range(len(data))):
            padded, geometry = letterbox(sample.image, LongestSide(96))
            with torch.no_grad():
                out = model(normalise(torch.from_numpy(padded)[None]))
            parts = (x[0].numpy() for x in (out.saliency, out.score, out.masks))
            found = sorted(postprocess(*parts, geometry, 0.5, "all").objects, key=lambda x: x.query)
            masks = np.stack([item.mask for item in found])
            yield sample.masks, sample.ranks, masks, np.array([item.saliency for item in found])

    expected = metrics(by_hand(), palette="assr")
    figures = evaluate(checkpoint, str(assr))
    assert [figures[name] for name in FIGURES] == [expected[name] for name in FIGURES]


def test_a_checkpoint_and_its_export_have_the_same_figures_without_torch(
    checkpoint, assr, samples, tmp_path
):
    from dsgnn.export.onnx import export_onnx, read_source

    artifact = tmp_path / "tiny.onnx"
    export_onnx(read_source(checkpoint), artifact, [s.image for s in samples[:2]], (64, 96))
    figures = evaluate(checkpoint, str(assr), split="train", size=(64, 96))
    blocked = "import sys; sys.modules['torch'] = None\nfrom dsgnn.cli import evaluate; evaluate()"
    out = tmp_path / "out"
    command = [str(artifact), "--data", str(assr), "--split", "train", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", blocked, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = json.loads((out / "metrics.json").read_text())
    assert exported["model"]["backend"] == "onnxruntime"
    for name in ("mae", "sor", "sa_sor", "recall", "f_measure"):
        assert exported[name] == pytest.approx(figures[name], abs=0.002), name
    assert exported["used"] == figures["used"]


def test_predictions_count_in_the_order_of_the_queries(samples):
    mask = np.zeros((64, 96), bool)
    mask[:8, :8] = True
    box = (0, 0, 8, 8)
    objects = (
        RankedObject(1, 0.9, 0.8, box, mask, float(mask.mean()), query=2),
        RankedObject(2, 0.5, 0.8, box, mask, float(mask.mean()), query=0),
        RankedObject(3, 0.1, 0.8, box, mask, float(mask.mean()), query=1),
    )
    masks, scores = in_query_order(Ranking(64, 96, objects))
    assert scores.tolist() == [0.5, 0.1, 0.9] and masks.shape == (3, 64, 96)
    masks, scores = in_query_order(Ranking(64, 96, ()))
    assert masks.shape == (0, 64, 96) and scores.shape == (0,)


def results(samples, **changes):
    """A results.json of another method, which knows the truth."""
    images = [
        {"file": f"photos/{s.name}.jpg", "height": 64, "width": 96,
         "objects": [{"saliency": float(r), "segmentation": rle.encode(m)}
                     for m, r in zip(s.masks, s.ranks, strict=True)]}
        for s in samples
    ]  # fmt: skip
    return {"schema": "dsgnn.results/1", "model": {"name": "oracle"}, "images": images, **changes}


def test_the_truth_as_predictions_is_perfect(samples, assr, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(samples)))
    figures = evaluate(None, str(assr), predictions=path, split="train")
    assert figures["sa_sor"] == pytest.approx(1) and figures["sor"] == pytest.approx(1)
    assert figures["mae"] == 0 and figures["recall"] == 1 and figures["matched_iou"] == 1
    assert figures["model"] == {"name": "oracle"}
    (best,) = truth(samples[1]).objects[:1]
    assert best.rank == 1 and (best.mask == samples[1].masks[2]).all()


def test_predictions_may_be_what_a_cluster_wrote(samples, assr, tmp_path):
    """Parquet, of which a job writes several files; a row without a name is of no photo here."""
    entries = results(samples)["images"]
    for number, entry in enumerate(entries):
        entry |= {"table": None, "row": None, "error": None}
        for rank, item in enumerate(entry["objects"], start=1):
            item |= {"rank": rank, "score": 1.0, "bbox": [], "area": 0.1, "query": rank - 1}
        folder = tmp_path / ("all" if number % 2 else "half")
        folder.mkdir(exist_ok=True)
        with Parts(folder, {"name": "oracle"}, resume=True) as parts:
            parts.add(entry)
    nameless = dict.fromkeys((*entries[0],), None) | {"table": "t.parquet", "row": 0}
    for number in (0, 2, 4):
        with Parts(tmp_path / "all", {"name": "oracle"}, resume=True) as parts:
            parts.add(entries[number])
            parts.add(nameless | {"row": number})
    figures = evaluate(None, str(assr), predictions=tmp_path / "all", split="train")
    assert figures["sa_sor"] == pytest.approx(1) and figures["model"] == {"name": "oracle"}
    part = tmp_path / "half" / "part-00000.parquet"
    with pytest.raises(DataError, match="blocks1: 0 images of .*part-00000.parquet have this name"):
        evaluate(None, str(assr), predictions=part, split="train")


def test_a_file_of_no_predictions_shows_none_of_its_bytes(assr, tmp_path):
    secret = b"\xff\xfe\x00secret" * 50
    for name, content in (("a.json", secret), ("b.parquet", secret), ("c.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DsgnnError) as caught:
            evaluate(None, str(assr), predictions=tmp_path / name)
        said = str(caught.value)
        assert name in said and "secret" not in said and "\\x" not in said and len(said) < 300
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no part-"):
        evaluate(None, str(assr), predictions=tmp_path / "empty")


def test_predictions_that_do_not_fit_are_named(samples, assr, tmp_path):
    path = tmp_path / "results.json"

    def fails(content, message):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message):
            evaluate(None, str(assr), predictions=path, split="train")

    fails("{", "not a results.json of dsgnn")
    fails("[]", "not a results.json of dsgnn")
    fails(results(samples, schema="dsgnn.results/9"), "expected schema dsgnn.results/1, got")
    fails(results(samples, images=[{"height": 64}]), "not a results.json of dsgnn.*'file'")
    fails(results(samples, images=["blocks0.jpg"]), "not a results.json of dsgnn")
    fails(results(samples[:2]), r"blocks2: 0 images of .*results.json have this name")
    fails(results([*samples, samples[0]]), r"blocks0: 2 images of .* have this name")
    broken = results(samples)
    broken["images"][1]["error"] = "cannot be read"
    fails(broken, "blocks1: .*no ranking of it, only: cannot be read")
    broken = results(samples)
    del broken["images"][0]["objects"][0]["saliency"]
    fails(broken, "blocks0: .*'saliency'")
    broken = results(samples)
    broken["images"][0]["objects"][0]["segmentation"]["size"] = [64, 97]
    fails(broken, "blocks0: .*run-length mask of size")
    broken = results(samples)
    broken["images"][0]["height"] = 10**6
    fails(broken, r"blocks0: .*height and width are \(1000000, 96\), of the photo \(64, 96\)")


def test_predictions_are_measured_as_they_are(samples, assr, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(samples, model={"if_none": "none"})))
    figures = evaluate(None, str(assr), predictions=path, split="train")
    assert "where nothing passes the threshold, none of the queries count" in table(figures)
    for option in ({"size": (64, 96)}, {"if_none": "none"}, {"backend": "openvino"},
                   {"device": "cuda"}, {"threads": 1}):  # fmt: skip
        with pytest.raises(ValueError, match="these options are of a model"):
            evaluate(None, str(assr), predictions=path, split="train", **option)


def test_a_split_without_images_has_no_figures(checkpoint, assr, tiny_nano, samples, tmp_path):
    for split in ("val", "test"):
        (assr / f"obj_seg_data_{split}.json").write_text("[]")
    with pytest.raises(ValueError, match="has no images in its split test"):
        evaluate(checkpoint, str(assr))
    with pytest.raises(ValueError, match="no images to evaluate on"):
        plan = TrainingPlan(tiny_nano, Recipe())
        train(plan, None, tmp_path / "run", validation=open_data(assr, "val"))


def test_a_best_checkpoint_needs_something_to_order(tiny_nano, samples, tmp_path, caplog):
    class Source:
        def example(self, number, size):
            return example(samples[number % len(samples)])

    recipe = Recipe(iterations=1, batch=2, points=64, milestones=())
    for chosen, count in ((samples[2:3], 0), (samples[:2], 1)):
        out = tmp_path / str(count)
        train(TrainingPlan(tiny_nano, recipe), Source(), out, validation=chosen)
        assert len(list(out.glob("best.safetensors"))) == count
    said = [record for record in caplog.records if "two objects to order" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda", "cuda:3"])
def test_a_device_that_is_not_there_is_refused(device, checkpoint, assr, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    there = "must be auto, cpu, cuda or cuda:N" if device in ("gpu", "cuda:x") else "sees 0 GPUs"
    with pytest.raises(ValueError, match=there):
        evaluate(checkpoint, str(assr), device=device)
    with pytest.raises(ValueError, match=there):
        options = RunOptions(device=device)
        train_on(DataSplits((str(assr),)), CONFIGS["nano"], Recipe(), assr / "run", options)


def test_dots_in_names_do_not_mix_images_up(tmp_path, samples):
    first, second = (replace(s, name=f"photo.{i}") for i, s in enumerate(samples[:2]))
    content = results([first, second])
    for entry, sample in zip(content["images"], (first, second), strict=True):
        entry["file"] = sample.name
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    rank, _ = predictions_ranker(path)
    assert [image["recall"] if "recall" in image else image["matched"]
            for image in measure(rank, [first, second])] == [2, 3]  # fmt: skip


def test_two_images_of_one_stem_are_two(checkpoint, samples, tmp_path):
    """In folders of their own; their predictions are measured again as they were."""
    images, annotations = [], []
    for number, sample in enumerate(samples[:2]):
        name = f"{'ab'[number]}/1.png"
        path = tmp_path / "data" / "images" / name
        path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), sample.image[..., ::-1])
        images.append({"id": number, "file_name": name, "height": 64, "width": 96})
        for mask, rank in zip(sample.masks, sample.ranks, strict=True):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": 1,
                    "segmentation": rle.encode(mask),
                    "visiting_order": len(sample.ranks) - int(rank) + 1,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "data" / "instances.json").write_text(json.dumps(content))
    data, out = str(tmp_path / "data"), tmp_path / "out"
    figures = evaluate(checkpoint, data, split="all", out=out, worst=2)
    assert [image["name"] for image in figures["per_image"]] == ["a/1", "b/1"]
    rows = json.loads((out / "results.json").read_text())["images"]
    assert [row["file"] for row in rows] == ["a/1", "b/1"]
    assert len(list((out / "worst").iterdir())) == 2
    same(figures, evaluate(None, data, predictions=out / "results.json", split="all"))


def test_an_image_where_nothing_passes(tiny, samples):
    torch.manual_seed(0)
    model = build_model(replace(tiny, threshold=0.99))
    for if_none, count in (("all", 3), ("none", 0)):
        images = measure(model_ranker(model, if_none=if_none), samples[:2])
        assert [image["predictions"] for image in images] == [count, count]


def test_a_size_makes_a_checkpoint_see_what_a_static_artifact_sees(tiny, samples, monkeypatch):
    seen = []
    model = build_model(tiny)
    monkeypatch.setattr(model, "forward", lambda x: seen.append(tuple(x.shape)) or build(x))
    build = type(model).forward.__get__(model)
    model_ranker(model)(samples[0])
    model_ranker(model, Fixed(96, 128))(samples[0])
    assert seen == [(1, 3, 64, 64), (1, 3, 96, 128)]


def test_the_command(checkpoint, assr, tmp_path):
    out = tmp_path / "scores"
    command = [str(checkpoint), "--data", str(assr), "--out", str(out), "--worst", "5"]
    done = CliRunner().invoke(cli.evaluate, command)
    assert done.exit_code == 0, done.output
    figures = json.loads((out / "metrics.json").read_text())
    assert f"{figures['sa_sor']:.4f}" in done.output and "2 images" in done.output
    drawn = sorted((out / "worst").iterdir())
    assert [path.name[:3] for path in drawn] == ["01-", "02-"]
    picture = cv2.imread(str(drawn[0]))
    assert picture.shape == (64 + 24, 2 * 96, 3)
    rows = json.loads((out / "results.json").read_text())["images"]
    assert [row["file"] for row in rows] == ["blocks0", "blocks1"]  # once each, drawn or not

    def wrong(code, message, *arguments):
        done = CliRunner().invoke(cli.evaluate, [*arguments])
        assert done.exit_code == code and message in " ".join(done.output.split()), done.output
        assert "Traceback" not in done.output

    data = ("--data", str(assr))
    wrong(2, "give either a model or predictions", *data)
    wrong(2, "give either a model or predictions", *command[:3], "--predictions",
          str(out / "results.json"))  # fmt: skip
    wrong(2, "(see --out)", *command[:3], "--worst", "3")
    wrong(2, "expected HxW such as 448x576", *command[:3], "--size", "448")
    for size in ("100x96", "²x³"):
        wrong(2, f"multiples of 32, got {size}", *command[:3], "--size", size)
    wrong(2, "'none-such' is not one of 'auto', 'onnxruntime'", *command[:3], "--backend",
          "none-such")  # fmt: skip
    with pytest.raises(ValueError, match="size must be multiples of 32, got 100x96"):
        evaluate(checkpoint, str(assr), size=(100, 96))
    wrong(
        2,
        "only exported artifacts have a backend (see --backend)",
        *command[:3],
        "--backend",
        "openvino",
    )
    wrong(2, "split must be one of train, val, test", *command[:3], "--split", "trial")
    refused = {
        "old.pth": "convert published weights first",
        "x.onnx": "not an ONNX file",
        "x.engine": "keep x.engine.json with it",
    }
    for name, message in refused.items():
        (tmp_path / name).write_bytes(b"nothing")
        wrong(2, message, str(tmp_path / name), *data)
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    wrong(2, "not a safetensors file", str(tmp_path / "x.safetensors"), *data)
    next((assr / "images" / "test").iterdir()).unlink()
    wrong(1, "is the folder complete?", *command[:3])


def test_the_table_leaves_out_what_was_not_measured(samples):
    from dsgnn.metrics import summarise

    figures = summarise(measure(truth, samples[2:3]))
    text = table({"data": {"spec": "blocks", "split": "test"}, **figures})
    assert "SA-SOR   " not in text.split("objects")[0] and "blocks test: 1 images" in text
    assert text.splitlines()[-1].split() == ["1", "1", "-", "1.0000", "0.0000", "1.0000"]


def test_save_checkpoint_of_an_untrained_network_is_evaluated_too(tiny, assr, tmp_path):
    """The published form: texture branch, learned queries, deformable attention."""
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, build_model(tiny), weights="synthetic")
    figures = evaluate(path, str(assr), split="val", device="cpu", threads=1)
    assert figures["images"] == 2 and figures["model"]["weights"] == "synthetic"


@pytest.mark.parametrize("protocol", ["dsgnn", "official"])
def test_lanes_measure_the_same_in_the_same_order(samples, protocol):
    """The first ones take longest."""
    names = [sample.name for sample in samples]

    def slow(sample):
        time.sleep(0.02 * (len(names) - names.index(sample.name)))
        return truth(sample)

    told = {}
    for lanes in (1, 3):
        records = []
        images = measure(slow, samples, protocol=protocol, record=records.append, lanes=lanes)
        told[lanes] = images, records
    assert told[1] == told[3]
    assert [image["name"] for image in told[3][0]] == [record["file"] for record in told[3][1]]
    assert len(told[3][1]) == len(samples) and "segmentation" in told[3][1][0]["objects"][0]


def test_an_error_in_a_lane_names_the_image(samples):
    def fail(sample):
        raise InputError("it is torn")

    with pytest.raises(DataError, match=f"{samples[0].name}: it is torn"):
        measure(fail, samples, lanes=3)


def test_artifacts_have_lanes_and_the_rest_has_not(monkeypatch):
    monkeypatch.setattr("dsgnn.runtime.run.lanes.cores", lambda: 16)
    monkeypatch.setattr("dsgnn.runtime.run.lanes.memory_bytes", lambda: None)
    cpu, gpu = {"device": "cpu"}, {"device": "cuda:0"}
    model = Path("nano.onnx")
    assert threads_of(model, "auto", None, None) == 1 and lanes_of(model, cpu, 1, 1000) == 17
    assert threads_of(model, "auto", 4, None) == 4 and lanes_of(model, cpu, 4, 1000) == 5
    assert threads_of(model, "auto", None, 1) is None and lanes_of(model, gpu, 1, 1000) == 4
    for other in (None, Path("best.safetensors")):
        assert threads_of(other, "auto", None, None) is None and lanes_of(other, {}, None, 99) == 1
