"""From a `Sample` to what the network trains on: augmentation and batches (needs PyTorch).

Differs from upstream: after flip, jitter and crop an object that left the picture is dropped and
the ranks of the others closed up, so that they stay a permutation of 1…G; resizing is bilinear
without antialiasing, as the letterbox of the runtime does it, so training and deployment see the
same pixels. "jitter" trains on crops without an object as empty scenes, where upstream draws
another sample; "flip" pads as at test time (IRSR's photos to 480×640), where upstream pads to
640×640.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as F

from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import PAD, LongestSide

ATTENTION_STRIDE = 8  # pixels of a cell of the attention map
PART = 0.25  # of the photos are replaced by a part of them
VISIBLE = 0.3  # of an object that must be left in a part
JITTER = (0.1, 2.0)  # range of large-scale jitter (Ghiasi et al., CVPR 2021)
FILL = {tv_tensors.Image: PAD, tv_tensors.Mask: 0}


@dataclass(frozen=True)
class Example:
    """One training image. image: (3, H, W) uint8 RGB. masks: (G, H, W) bool. ranks: (G,) int64, a
    permutation of 1…G, G = most salient. name: of its sample. foreground: (1, H, W) int8 as in
    `Sample`, 0 in the padding. attention: (H/8, W/8) float with sum 1, or all zeros where it is not
    known."""

    image: Tensor
    masks: Tensor
    ranks: Tensor
    name: str
    foreground: Tensor
    attention: Tensor

    @property
    def boxes(self) -> Tensor:
        """(G, 4) float x0, y0, x1, y1 in pixels, x1 and y1 exclusive: what the masks cover."""
        if not len(self.masks):
            return torch.zeros(0, 4)
        return masks_to_boxes(self.masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])


@dataclass(frozen=True)
class ImageTruth:
    """The true objects of one image, at the size that the network sees, padding included.

    masks: (G, H, W) bool or float. ranks: (G,) float, larger = more salient, 1…G. foreground:
    (H, W) int8 as in `Sample`; None = what no mask covers is nothing. attention: (H/8, W/8) as in
    `Example`.
    """

    masks: Tensor
    ranks: Tensor
    foreground: Tensor | None = None
    attention: Tensor | None = None

    def to(self, device: torch.device) -> ImageTruth:
        """The same on another device."""
        given = {name: part for name, part in vars(self).items() if part is not None}
        return ImageTruth(**{name: part.to(device) for name, part in given.items()})


@dataclass(frozen=True)
class Examples:
    """A batch. images: (B, H, W, 3) uint8 RGB, smaller ones padded right and bottom with 128.
    targets: the true objects of each. names: of the samples."""

    images: Tensor
    targets: list[ImageTruth]
    names: list[str]


def example(sample: Sample) -> Example:
    """A sample as it is."""
    foreground = sample.foreground
    if foreground is None:
        foreground = np.asarray(sample.masks.any(0), np.int8)
    attention = np.zeros((1, 1), np.float32) if sample.attention is None else sample.attention
    return Example(
        tv_tensors.Image(torch.from_numpy(sample.image).permute(2, 0, 1)),
        tv_tensors.Mask(torch.from_numpy(sample.masks)),
        torch.from_numpy(sample.ranks),
        sample.name,
        tv_tensors.Mask(torch.from_numpy(foreground)[None]),
        _cells(torch.from_numpy(attention), sample.image.shape[:2]),
    )


def _cells(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid over a photo of this size (height, width) → its stride-8 cells, with the same sum."""
    rows, columns = (-(-side // ATTENTION_STRIDE) for side in size)
    cells = functional.interpolate(
        attention[None, None], (rows, columns), mode="bilinear", align_corners=False
    )[0, 0]
    total = cells.sum()
    return cells / total if total > 0 else cells


def augment(sample: Sample, kind: str, size: int, generator: torch.Generator) -> Example:
    """Flip half of the samples; then by `kind`, the `augmentation` of a configuration:

    "photo": change brightness, contrast and colours a little and take a part of one photo in four,
    then as "flip".

    "jitter": scale the longest side to `size` × 0.1…2.0, crop at random to at most size × size, pad
    right and bottom to size × size. "flip": scale the longest side to `size`, pad to a multiple of
    32, as the letterbox does.
    """
    item = example(sample)
    if kind == "photo":
        item = replace(item, image=_developed(item.image, generator))
        if _uniform(generator) < PART:
            item = _part(item, generator)
    layers, attention = [item.image, item.masks, item.foreground], item.attention
    if _uniform(generator) < 0.5:
        layers, attention = [F.horizontal_flip(x) for x in layers], attention.flip(-1)
    h, w = item.image.shape[-2:]
    if kind == "jitter":
        low, high = JITTER
        longest = max(1, round(size * (low + (high - low) * _uniform(generator))))
        resized = LongestSide(longest).geometry(h, w).resized
        h, w = resized
        top, left = (int(_uniform(generator) * (max(0, side - size) + 1)) for side in (h, w))
        window = top, left, min(h, size), min(w, size)
        layers = [F.crop(_resize(x, resized), *window) for x in layers]
        attention = torch.zeros(1, 1)  # what people look at in a part is not known
        padded = size, size
    elif kind in ("flip", "photo"):
        geometry = LongestSide(size).geometry(h, w)
        layers = [_resize(x, geometry.resized) for x in layers]
        attention = _cells(attention, geometry.resized)
        padded = geometry.padded
    else:
        raise OptionError(f'augmentation must be "jitter", "flip" or "photo", got {kind!r}')
    image, masks, foreground = (_pad(x, padded) for x in layers)
    return _without_vanished(Example(image, masks, item.ranks, item.name, foreground, attention))


def collate(examples: Sequence[Example]) -> Examples:
    """Stack examples of any sizes, padded to the largest height and width, multiples of 32."""
    height, width = (-(-max(x.image.shape[side] for x in examples) // 32) * 32 for side in (1, 2))
    images = torch.stack([_pad(x.image, (height, width)).as_subclass(Tensor) for x in examples])
    return Examples(
        images.permute(0, 2, 3, 1).contiguous(),  # (B, H, W, 3)
        [
            ImageTruth(
                _pad(x.masks, (height, width)).as_subclass(Tensor),
                x.ranks.float(),
                _pad(x.foreground, (height, width)).as_subclass(Tensor)[0],
                _pad_cells(x.attention, (height, width)),
            )
            for x in examples
        ],
        [x.name for x in examples],
    )


def _uniform(generator: torch.Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _developed(image: Tensor, generator: torch.Generator) -> Tensor:
    """Another brightness, contrast, saturation and hue."""
    factor = lambda reach: 1 + reach * (2 * _uniform(generator) - 1)  # noqa: E731
    image = F.adjust_brightness(image, factor(0.25))
    image = F.adjust_contrast(image, factor(0.25))
    image = F.adjust_saturation(image, factor(0.3))
    return F.adjust_hue(image, factor(0.02) - 1)


def _part(item: Example, generator: torch.Generator) -> Example:
    """A window of 60% to 100% of the height and the width.

    An object of which little is left is no object any more, and not background either. What people
    look at in a part is not known.
    """
    h, w = item.image.shape[-2:]
    high, wide = (max(1, int(side * (0.6 + 0.4 * _uniform(generator)))) for side in (h, w))
    top, left = (
        int(_uniform(generator) * (side - kept + 1)) for side, kept in ((h, high), (w, wide))
    )
    image, masks, foreground = (
        F.crop(x, top, left, high, wide) for x in (item.image, item.masks, item.foreground)
    )
    left_over = masks.flatten(1).sum(1) >= VISIBLE * item.masks.flatten(1).sum(1)  # (G,)
    foreground[:, masks[~left_over].any(0)] = -1
    ranks = _closed_up(item.ranks[left_over])
    kept = tv_tensors.Mask(masks[left_over])
    return Example(image, kept, ranks, item.name, foreground, torch.zeros(1, 1))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear for an image, nearest for masks (v2 chooses by the type)."""
    return F.resize(x, list(size), antialias=False)


def _pad_cells(attention: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros right and bottom, up to the cells of a frame (height, width)."""
    rows, columns = (side // ATTENTION_STRIDE for side in size)
    bottom, right = rows - attention.shape[0], columns - attention.shape[1]
    return functional.pad(attention, (0, right, 0, bottom))


def _pad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Right and bottom to (height, width)."""
    bottom, right = (wanted - side for wanted, side in zip(size, x.shape[-2:], strict=True))
    return F.pad(x, [0, 0, right, bottom], fill=FILL[type(x)]) if bottom or right else x


def _without_vanished(item: Example) -> Example:
    seen = item.masks.flatten(1).any(1)  # (G,)
    masks, ranks = tv_tensors.Mask(item.masks[seen]), _closed_up(item.ranks[seen])
    return replace(item, masks=masks, ranks=ranks)


def _closed_up(ranks: Tensor) -> Tensor:
    """Different numbers → 1…G in the same order."""
    return ranks.argsort().argsort() + 1
