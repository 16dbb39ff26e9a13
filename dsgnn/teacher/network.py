"""The gaze network: a photo in, the probability that a look falls into each of its cells out.

An ImageNet backbone gives maps at strides 8, 16 and 32. Each is projected to a common width, the
coarser two are brought to stride 8, and all are summed with one vector for the whole photo. Two
convolutions read one logit per cell from the sum. A learned map per data set is added, because
people look at the centre more often than anything in the photo explains, and how much more depends
on how the looks were recorded. A softmax over the cells follows.

The first stages of the backbone (strides 2 to 8) keep their ImageNet weights, so that training can
compute them once per photo. Batch normalisation inside the backbone keeps its ImageNet statistics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dsgnn.model import normalise
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.errors import CheckpointError, OptionError
from dsgnn.weights.checkpoint import read_safetensors

SCHEMA = "dsgnn.teacher/1"
STRIDE = 8  # photo pixels, after resizing, along each side of a cell
FROZEN_STAGES = 3  # of the backbone, up to stride 8


@dataclass(frozen=True)
class GazeConfig:
    """What makes one gaze network.

    backbone: name of a timm EfficientNet. size: longest side in pixels to which photos are resized.
    width: channels of the readout. prior: (rows, columns) of the learned centre maps. sources: the
    data sets that have one each; the first one's is used for photos of no known source.
    """

    backbone: str = "efficientnet_lite2"
    size: int = 448
    width: int = 96
    dropout: float = 0.2
    prior: tuple[int, int] = (9, 12)
    sources: tuple[str, ...] = ("OSIE", "EyeCrowd", "SALICON")

    @property
    def name(self) -> str:
        return f"the gaze network on {self.backbone}"


class GazeNetwork(nn.Module):
    """Gaze over the cells of photos of one size.

    Letters: B batch, (H, W) the photos' size in pixels, (h, w) their cells: H / 8, W / 8. Raises
    OptionError for a backbone that is none of timm's EfficientNets.
    """

    def __init__(self, config: GazeConfig) -> None:
        super().__init__()
        self.config = config
        if not config.backbone.startswith("efficientnet") or not timm.is_model(config.backbone):
            raise OptionError(
                f"backbone {config.backbone!r} must be one of timm's EfficientNets, such as "
                "efficientnet_lite2"
            )
        # Any, as its attributes are not in PyTorch's types.
        body: Any = timm.create_model(config.backbone, features_only=True, out_indices=(2, 3, 4))
        self.backbone = nn.ModuleDict({"body": body})
        self.early = [body.conv_stem, body.bn1, *body.blocks[:FROZEN_STAGES]]
        for module in self.early:
            module.requires_grad_(False)
        # The stages whose ends are the maps of strides 8, 16 and 32, counted from the first.
        self.taps = [info["module"].split(".")[1] for info in body.feature_info.get_dicts()]
        width, channels = config.width, body.feature_info.channels()
        self.drop = nn.Dropout2d(config.dropout)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)
        self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.context = nn.Linear(channels[-1], width)
        self.readout = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 1, 1),
        )  # fmt: skip
        self.priors = nn.Parameter(torch.zeros(len(config.sources), *config.prior))

    def train(self, mode: bool = True) -> GazeNetwork:
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised → (B, C, h, w), what the frozen stages make of them."""
        with torch.no_grad():
            x = images
            for module in self.early:
                x = module(x)
        return x

    def read(self, features: Tensor, sources: Tensor) -> Tensor:
        """The trained part.

        features: (B, C, h, w) of `features`. sources: (B,) int64, places in `config.sources`.
        Returns (B, h, w) logarithms of probabilities, whose exponentials sum to 1.
        """
        x, maps = features, [features]
        body: Any = self.backbone["body"]
        for number, stage in enumerate(body.blocks[FROZEN_STAGES:], FROZEN_STAGES):
            x = stage(x)
            if str(number) in self.taps:
                maps.append(x)
        size = features.shape[-2:]
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        total = self.context(maps[-1].mean((2, 3)))[:, :, None, None]
        for project, x in zip(self.projections, maps, strict=True):
            x = project(self.drop(x))
            total = total + F.interpolate(x, size, mode="bilinear", align_corners=False)
        priors = F.interpolate(
            self.priors[sources][:, None], size, mode="bicubic", align_corners=False
        )
        logits = self.readout(total) + priors  # (B, 1, h, w)
        return logits.flatten(1).log_softmax(1).view(-1, *size)

    def forward(self, images: Tensor, sources: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised. sources: (B,) → (B, h, w) logarithms, see `read`."""
        return self.read(self.features(images), sources)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """image: (h, w, 3) → its longest side `size`, both sides whole numbers of cells."""
    h, w = image.shape[:2]
    scale = size / max(h, w) / STRIDE
    rows, columns = (max(1, round(side * scale)) for side in (h, w))
    shrinks = scale * STRIDE < 1
    return cv2.resize(
        image, (columns * STRIDE, rows * STRIDE),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )  # fmt: skip


class Teacher(nn.Module):
    """One gaze network or several whose predictions are averaged.

    members: the networks; each has its own backbone and size.
    """

    def __init__(self, members: Sequence[GazeNetwork]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def networks(self) -> list[GazeNetwork]:
        return [member for member in self.members if isinstance(member, GazeNetwork)]

    @torch.no_grad()
    def predict(
        self, image: np.ndarray, source: str | None = None, flip: bool = True
    ) -> np.ndarray:
        """Where people look on one photo: (gh, gw) float32 that sums to 1.

        image: (h, w, 3) uint8 RGB. source: the data set whose centre map is used; by default each
        member's first. flip: average with the prediction for the mirrored photo. The grid is the
        first member's; it covers the whole photo and nothing else. Raises OptionError for a source
        that a member does not know.
        """
        self.eval()
        maps: list[Tensor] = []
        for network in self.networks:
            config = network.config
            if source is not None and source not in config.sources:
                raise OptionError(
                    f"source {source!r} is unknown; the teacher has {', '.join(config.sources)}"
                )
            place = torch.tensor([0 if source is None else config.sources.index(source)])
            photo = torch.from_numpy(resize(image, config.size))[None]
            pixels = normalise(photo).to(memory_format=torch.channels_last)
            found = network(pixels, place).exp()
            if flip:
                found = (found + network(pixels.flip(3), place).exp().flip(2)) / 2
            if maps:
                found = F.interpolate(
                    found[None], maps[0].shape[1:], mode="bilinear", align_corners=False
                )[0]
            maps.append(found / found.sum())
        total = torch.stack(maps).mean(0)[0]
        return (total / total.sum()).numpy()


def save_teacher(path: Path, teacher: Teacher, half: bool = True) -> None:
    """Write a teacher, whole or not at all: the tensors, and the members' configurations in the
    file's metadata. half: floats in 16 bits, half the size."""
    header = {"schema": SCHEMA, "members": json.dumps([asdict(m.config) for m in teacher.networks])}
    tensors = {
        name: (value.half() if half and value.is_floating_point() else value).cpu().contiguous()
        for name, value in teacher.state_dict().items()
    }
    write_whole(path, save(tensors, metadata=header))


def load_teacher(path: Path) -> Teacher:
    """A teacher in eval mode, in 32 bits, from `save_teacher`.

    Raises CheckpointError when the file is missing, damaged or no teacher.
    """
    header, tensors = read_safetensors(path)
    if header.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema is {header.get('schema')!r}, expected {SCHEMA!r}; a teacher is "
            "written by dsgnn.teacher"
        )
    try:
        configs = [
            GazeConfig(**member | {name: tuple(member[name]) for name in ("prior", "sources")})
            for member in json.loads(header["members"])
        ]
        teacher = Teacher([GazeNetwork(config) for config in configs])
    except Exception as error:  # the backbone's name reaches timm, which may raise anything
        raise CheckpointError(f"{path}: its configuration cannot be used: {error}") from None
    try:
        teacher.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return teacher.to(memory_format=torch.channels_last).eval()
