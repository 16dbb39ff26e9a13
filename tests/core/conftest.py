"""Networks and data small enough to train in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from data_folders import write_assr, write_irsr, write_scene_folders, write_sifr

from dsgnn.config import CONFIGS, Config
from dsgnn.data.sample import Sample
from dsgnn.data.transforms import ImageTruth


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Sums must not depend on how many threads the machine has, and small networks gain nothing
    from more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Config:
    """The published form, two layers and 32 channels."""
    return replace(
        CONFIGS["r50-assr"], name="tiny", backbone="resnet18",
        backbone_options={"channels": (8, 16, 16, 32), "layers": (1, 1, 1, 1)},
        size=64, width=32, encoder_layers=1, layers=2, feedforward=32, queries=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small() -> Config:
    """The published form, several layers of each kind."""
    return replace(
        CONFIGS["r50-assr"], name="small", backbone="resnet18",
        backbone_options={"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1)},
        width=32, encoder_layers=2, layers=3, feedforward=64,
    )  # fmt: skip


@pytest.fixture
def config(request: pytest.FixtureRequest) -> Config:
    """nano, or the fixture that a test is parametrised with by its name."""
    return CONFIGS["nano"] if request.param == "nano" else request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tiny_nano() -> Config:
    """nano's form: convolutions, peaks, no texture branch."""
    return replace(
        CONFIGS["nano"], name="tiny-nano", width=32, layers=1, feedforward=32, size=64, queries=3,
        backbone="resnet18", frozen_norm=False, frozen=(),
        backbone_options={"channels": (8, 16, 16, 32), "layers": (1, 1, 1, 1)},
    )  # fmt: skip


def blocks(number: int, objects: int) -> Sample:
    """Bright blocks on a dim noisy ground, 64×96; the largest is the most salient."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
    masks = np.zeros((objects, 64, 96), bool)
    for i, mask in enumerate(masks):
        side = 8 + 6 * i
        y = int(rng.integers(0, 64 - side))
        mask[y : y + side, 32 * i : 32 * i + side] = True
        image[mask] = rng.integers(120, 255, 3)
    return Sample(image, masks, np.arange(1, objects + 1), f"blocks{number}")


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Six images with 2, 3, 1, 2, 3 and 1 objects."""
    return [blocks(number, (2, 3, 1)[number % 3]) for number in range(6)]


@pytest.fixture
def truths() -> list[ImageTruth]:
    """Three images, 64×64, with two objects, one object and none."""
    masks = torch.zeros(2, 64, 64)
    masks[0, 10:40, 10:40], masks[1, 30:60, 20:60] = 1, 1
    return [
        ImageTruth(masks, torch.tensor([2.0, 1.0])),
        ImageTruth(masks[:1].flip(-1), torch.ones(1)),
        ImageTruth(masks[:0], torch.zeros(0)),
    ]


@pytest.fixture
def half_known() -> ImageTruth:
    """A square is annotated; of the right half of the picture, 64×64, nothing is known."""
    masks = torch.zeros(1, 64, 64)
    masks[0, 8:24, 8:24] = 1
    foreground = (masks[0] > 0).to(torch.int8)
    foreground[:, 32:] = -1
    return ImageTruth(masks, torch.ones(1), foreground)


@pytest.fixture
def assr(tmp_path: Path, samples: list[Sample]) -> Path:
    """The samples in ASSR's form: four to train on, two for each of val and test."""
    root = tmp_path / "assr"
    parts = {"train": samples[:4], "val": samples[3:5], "test": samples[:2]}
    for split, chosen in parts.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "rank_order" / split).mkdir(parents=True)
        entries = []
        for sample in chosen:
            path = root / "images" / split / f"{sample.name}.jpg"
            cv2.imwrite(str(path), cv2.cvtColor(sample.image, cv2.COLOR_RGB2BGR))
            boxes = [cv2.boundingRect(mask.view(np.uint8)) for mask in sample.masks]
            entries.append(
                {
                    "img": sample.name,
                    "object_data": [
                        {
                            "bbox": [x, y, x + w, y + h],
                            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        }
                        for x, y, w, h in boxes
                    ],
                }
            )
            order = {"rank_order": (0.5 + sample.ranks / 10).tolist()}
            (root / "rank_order" / split / f"{sample.name}.json").write_text(json.dumps(order))
        (root / f"obj_seg_data_{split}.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def published_assr(tmp_path: Path) -> Path:
    return write_assr(tmp_path / "ASSR")


@pytest.fixture
def published_irsr(tmp_path: Path) -> Path:
    return write_irsr(tmp_path / "IRSR")


@pytest.fixture
def published_sifr(tmp_path: Path) -> Path:
    return write_sifr(tmp_path / "SIFR")


@pytest.fixture(scope="session")
def scene_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Material for composite scenes: the arguments `cutouts`, `backgrounds` and `coco`."""
    return write_scene_folders(tmp_path_factory.mktemp("material"))
