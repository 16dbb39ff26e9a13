"""Where to look in a photo: its focus, the window to crop it to, the share of looks in a region.

All of it rests on where people look: the network's attention, a coarse grid over the photo. Inside
a cell attention is even, so a share of looks is an exact sum, of the grid and not of pixels. Where
the network does not tell, its ranked objects stand in: a part of the looks is shared out among
them, the first one getting most, and the rest lies around the middle of the photo.

The window of an aspect is the largest one that the photo has room for, so it can move along one
side only, and every position of it is compared. To crop by a map of attention, with no object cut
in two, is an old idea (Suh et al., Automatic Thumbnail Cropping, UIST 2003); the tools that people
use for it are thumbor, smartcrop and libvips. The figures below were chosen on the photos of
people's fixations that are not of the split "test"; `dsgnn-bench crops` measures what comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import cv2
import numpy as np

from dsgnn.runtime.attention import pixels_per_cell
from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.letterbox import shrunk

# What keeping the first object whole may cost, as a share of all looks. At any price it would cost
# so many looks on other things that the middle of the photo is often the better crop.
PRICE = 0.02
FOCUS_SPREAD = 0.25  # the focus is the peak of attention blurred so far, in longest sides
STAND_IN_CELLS = 64  # of the longest side, where objects stand in for attention
STAND_IN_CENTRE = 0.7  # the share of looks that then lies around the middle of the photo
CENTRE_SPREAD = 0.25  # standard deviation of that share, in widths and heights of the photo
NARROWEST = 100  # longer side ÷ shorter side of an aspect, at most

FITS = ("crop", "pad", "blur")
BLUR = 0.04  # standard deviation of the blur around a padded photo, in longest sides of the frame
DIM = 0.55  # brightness of what is blurred around a padded photo

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive


class Placed(Protocol):
    """What is needed of a ranked object, here and to draw it; see
    dsgnn.runtime.ranking.RankedObject."""

    @property
    def rank(self) -> int: ...
    @property
    def box(self) -> Box: ...
    @property
    def mask(self) -> np.ndarray: ...
    @property
    def area(self) -> float: ...
    @property
    def identity(self) -> int | None: ...
    @property
    def attention(self) -> float | None: ...


@dataclass(frozen=True)
class Aspect:
    """Width to height of a frame. `str` of it is "9:16", and `name` is "9x16" as in file names."""

    width: float
    height: float

    def __post_init__(self) -> None:
        sides = self.width, self.height
        if not all(isfinite(side) and side > 0 for side in sides):
            raise OptionError(f"both sides of an aspect must be above 0, got {self}")
        if max(sides) > NARROWEST * min(sides):
            raise OptionError(f"an aspect is at most {NARROWEST}:1, got {self}")

    @classmethod
    def of(cls, value: Aspect | str | tuple[float, float]) -> Aspect:
        """ "9:16", (9, 16) or an Aspect. Raises OptionError for anything else."""
        if isinstance(value, Aspect):
            return value
        if isinstance(value, str):
            parts = re.fullmatch(
                r"\s*(\d{1,5}(?:\.\d{1,4})?)[:x×](\d{1,5}(?:\.\d{1,4})?)\s*", value
            )
            if parts is None:
                raise OptionError(
                    f"expected an aspect as WIDTH:HEIGHT, such as 9:16, got {value!r}"
                )
            return cls(float(parts[1]), float(parts[2]))
        try:
            width, height = value
            return cls(float(width), float(height))
        except (TypeError, ValueError):
            raise OptionError(
                f'expected an aspect such as "9:16" or (9, 16), got {value!r}'
            ) from None

    def window(self, height: int, width: int) -> tuple[int, int]:
        """The largest (height, width) of this aspect, to the pixel's rounding, in a photo."""
        if width * self.height > height * self.width:
            return height, min(max(1, round(height * self.width / self.height)), width)
        return min(max(1, round(width * self.height / self.width)), height), width

    @property
    def name(self) -> str:
        return str(self).replace(":", "x")

    def __str__(self) -> str:
        return f"{self.width:.9g}:{self.height:.9g}"


Aspects = tuple[Aspect, ...]


def parse_aspects(text: str) -> Aspects:
    """ "1:1,16:9" to its aspects, each once. Raises OptionError as `Aspect.of`."""
    return tuple(dict.fromkeys(Aspect.of(part) for part in text.split(",")))


@dataclass(frozen=True, eq=False)
class Looks:
    """Where people look in one photo.

    height, width: the photo's size, pixels. grid: (gh, gw), the share of looks of each cell, sum 1.
    rows, columns: the edges of the cells in pixels, (gh + 1,) and (gw + 1,), from 0 to the photo's
    size. known: False where objects stand in for attention.
    """

    height: int
    width: int
    grid: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    known: bool

    def share(self, region: Sequence[float] | np.ndarray) -> float:
        """The share of looks in a region, 0…1.

        region: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive, of which the part outside the photo
        counts for nothing; or a mask, (h, w) bool. Raises OptionError for another form.
        """
        if isinstance(region, np.ndarray) and region.ndim == 2:
            return float(min(self._under(region).sum(), 1.0))
        if len(region) != 4 or not np.isfinite(np.asarray(region, np.float64)).all():
            raise OptionError(
                f"expected a box (x0, y0, x1, y1) or a mask (h, w) bool, got {region!r}"
            )
        x0, y0, x1, y1 = (float(side) for side in region)
        down = _covered(self.rows, y0, y1)
        return float(min(down @ self.grid @ _covered(self.columns, x0, x1), 1.0))

    def focus(self) -> tuple[float, float]:
        """The point (x, y) that a picture should be framed around, in 0…1 of width and height.

        It is the peak of attention after a wide blur, so it lies on what is looked at most, or
        between things of which a frame should hold several.
        """
        reach = FOCUS_SPREAD * max(self.height, self.width)
        sigmas = (reach / np.diff(edges).max() for edges in (self.columns, self.rows))
        x_sigma, y_sigma = (max(sigma, 1e-3) for sigma in sigmas)
        blurred = cv2.GaussianBlur(
            self._density(), (0, 0), x_sigma, sigmaY=y_sigma, borderType=cv2.BORDER_CONSTANT
        )
        row, column = np.unravel_index(int(blurred.argmax()), blurred.shape)
        x, y = self.columns[column : column + 2].mean(), self.rows[row : row + 2].mean()
        return float(x / self.width), float(y / self.height)

    def along(self, axis: int) -> np.ndarray:
        """The share of looks before each pixel of a side: (side + 1,), from 0 to 1.

        axis: 0 = along the width, 1 = along the height.
        """
        edges, side = (self.columns, self.width) if axis == 0 else (self.rows, self.height)
        sums = np.concatenate([[0.0], np.cumsum(self.grid.sum(axis))])
        return np.interp(np.arange(side + 1), edges, sums)

    def peak(self, mask: np.ndarray, axis: int) -> tuple[int, int]:
        """Where along a side a mask is looked at most: the first and the end pixel of one cell."""
        edges = self.columns if axis == 0 else self.rows
        cell = int(self._under(mask).sum(axis).argmax())
        return int(np.floor(edges[cell])), int(np.ceil(edges[cell + 1]))

    def to_dict(self) -> dict[str, Any] | None:
        """The map as a server's answer has it: its cells' edges in pixels and shares of looks."""
        if not self.known:
            return None
        return {
            "rows": self.rows.round(3).tolist(),
            "columns": self.columns.round(3).tolist(),
            "shares": self.grid.round(7).tolist(),
        }

    def _density(self) -> np.ndarray:
        """Looks per pixel: (gh, gw)."""
        sizes = (np.maximum(np.diff(edges), 1e-9) for edges in (self.rows, self.columns))
        return self.grid / np.outer(*sizes)

    def _under(self, mask: np.ndarray) -> np.ndarray:
        """The looks of each cell that fall on a mask: (gh, gw)."""
        if mask.shape != (self.height, self.width) or mask.dtype != bool:
            raise OptionError(
                f"a mask must be bool of the photo's size ({self.height}, {self.width}), got "
                f"{mask.shape} {mask.dtype}"
            )
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        if not width:
            return np.zeros_like(self.grid)
        inside = mask[y : y + height, x : x + width]
        return self._density() * pixels_per_cell(inside, self.rows - y, self.columns - x)


def looks_of(
    height: int,
    width: int,
    objects: Sequence[Placed],
    attention: np.ndarray | None,
    cell_px: tuple[float, float] | None,
) -> Looks:
    """Where people look: by the attention map of a ranking, or else by its objects.

    attention: (gh, gw), not negative, or None. cell_px: height and width of one of its cells in
    pixels of the photo; None = the grid spans the photo.
    """
    if attention is not None:
        grid = attention.astype(np.float64)
        cells = cell_px or (height / grid.shape[0], width / grid.shape[1])
        rows, columns = (
            np.minimum(np.arange(count + 1) * cell, side)
            for count, cell, side in zip(grid.shape, cells, (height, width), strict=True)
        )
        rows[-1], columns[-1] = height, width
        return Looks(height, width, grid / grid.sum(), rows, columns, True)
    gh, gw = shrunk(height, width, STAND_IN_CELLS)
    grid = np.zeros((gh, gw))
    for item in objects:
        small = cv2.resize(item.mask.view(np.uint8) * 255, (gw, gh), interpolation=cv2.INTER_AREA)
        grid += small / max(small.sum(dtype=np.float64), 1.0) / item.rank
    around = np.outer(_bell(gh), _bell(gw))
    if grid.any():
        around = STAND_IN_CENTRE * around + (1 - STAND_IN_CENTRE) * grid / grid.sum()
    rows, columns = np.linspace(0, height, gh + 1), np.linspace(0, width, gw + 1)
    return Looks(height, width, around, rows, columns, False)


def crop_box(
    looks: Looks,
    aspect: Aspect,
    objects: Sequence[Placed],
    keep: int | Collection[int] | None = None,
) -> Box:
    """The window of an aspect that keeps most looks: (x0, y0, x1, y1) in pixels, inside the photo.

    keep: ranks of objects that must not be cut, in the order in which they give way where not all
    of them fit; where one alone does not fit, the part of it that is looked at most is kept. None =
    the first object, but only if that costs at most `PRICE` of the looks, where the price is known.
    Ranks that no object has are passed over.
    """
    high, wide = aspect.window(looks.height, looks.width)
    axis = 0 if wide < looks.width else 1
    size, side = (wide, looks.width) if axis == 0 else (high, looks.height)
    sums = looks.along(axis)
    kept = sums[size:] - sums[: side + 1 - size]  # at every position of the window
    ranks = (1,) if keep is None else (keep,) if isinstance(keep, int) else tuple(keep)
    first, last = 0, side - size
    for item in (objects[rank - 1] for rank in ranks if 0 < rank <= len(objects)):
        if item.area > 0:
            low, end = item.box[axis], item.box[axis + 2]
            if end - low > size:
                low, end = looks.peak(item.mask, axis)
            if max(first, end - size) <= min(last, low):
                first, last = max(first, end - size), min(last, low)
    start = _most(kept, first, last)
    if keep is None and looks.known:
        freely = _most(kept, 0, side - size)
        start = freely if kept[freely] - kept[start] > PRICE else start
    if axis == 0:
        return start, 0, start + size, looks.height
    return 0, start, looks.width, start + size


@dataclass(frozen=True, eq=False)
class Cropped:
    """What of a photo is shown in a frame of an aspect.

    box: (x0, y0, x1, y1) in pixels, the part of the photo. attention: its share of looks, or None
    where the artifact does not tell. fit: "crop" where the box has the aspect; else "pad" or
    "blur", what fills the rest of the frame. size: (height, width) of the frame.
    """

    box: Box
    attention: float | None
    fit: str
    size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The entry in results.json; only a padded frame says more than its box."""
        attention = None if self.attention is None else round(self.attention, 4)
        entry = {"box": list(self.box), "attention": attention}
        return entry if self.fit == "crop" else {**entry, "fit": self.fit, "size": self.size[::-1]}

    def picture(self, photo: np.ndarray) -> np.ndarray:
        """The frame, (h, w, 3) uint8, of a photo of that form. A crop shares its memory."""
        x0, y0, x1, y1 = self.box
        part = photo[y0:y1, x0:x1]
        if self.fit == "crop":
            return part
        high, wide = self.size
        frame: np.ndarray = np.zeros((high, wide, 3), np.uint8)
        if self.fit == "blur":
            small = Aspect(wide, high).window(*part.shape[:2])
            y, x = (part.shape[0] - small[0]) // 2, (part.shape[1] - small[1]) // 2
            inner = part[y : y + small[0], x : x + small[1]]
            frame = cv2.resize(inner, (wide, high), interpolation=cv2.INTER_LINEAR)
            frame = cv2.GaussianBlur(frame, (0, 0), max(1.0, BLUR * max(high, wide)))
            frame = cv2.convertScaleAbs(frame, alpha=DIM)
        y, x = (high - part.shape[0]) // 2, (wide - part.shape[1]) // 2
        frame[y : y + part.shape[0], x : x + part.shape[1]] = part
        return frame


def crop_to(looks: Looks, aspect: Aspect, objects: Sequence[Placed], fit: str = "crop") -> Cropped:
    """Fit a photo into a frame of an aspect.

    fit: "crop" = `crop_box`; "pad" and "blur" keep the first object whole at any price: where it
    does not fit, the photo is cropped as little as that needs, and the rest of the frame is black,
    or the photo blurred. Raises OptionError for another fit.
    """
    if fit not in FITS:
        raise OptionError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
    box = crop_box(looks, aspect, objects, None if fit == "crop" else 1)
    x0, y0, x1, y1 = box
    used, size = "crop", (y1 - y0, x1 - x0)
    first = objects[0].box if objects and objects[0].area > 0 else box
    if fit != "crop" and (first[2] - first[0] > x1 - x0 or first[3] - first[1] > y1 - y0):
        used = fit
        if x1 - x0 < looks.width:
            box = first[0], 0, first[2], looks.height
        else:
            box = 0, first[1], looks.width, first[3]
        high, wide = box[3] - box[1], box[2] - box[0]
        higher = max(high, round(wide * aspect.height / aspect.width))
        size = higher, max(wide, round(high * aspect.width / aspect.height))
    return Cropped(box, looks.share(box) if looks.known else None, used, size)


def frames_entry(looks: Looks, crops: Mapping[Aspect, Cropped]) -> dict[str, Any]:
    """What an image of results.json says about its focus and crops, by the aspect's text."""
    entries = {str(aspect): crop.to_dict() for aspect, crop in crops.items()}
    return {"focus": [round(place, 4) for place in looks.focus()], "crops": entries}


def _most(kept: np.ndarray, first: int, last: int) -> int:
    """The best position from first to last; of equal ones that nearest to the middle."""
    part = kept[first : last + 1]
    best = first + np.flatnonzero(part >= part.max() - 1e-12)
    return int(best[np.abs(best - (len(kept) - 1) / 2).argmin()])


def _covered(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """The part of each cell of one side that lies between two places, 0…1."""
    inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return np.maximum(inside, 0) / np.maximum(np.diff(edges), 1e-9)


def _bell(cells: int) -> np.ndarray:
    places = (np.arange(cells) + 0.5) / cells - 0.5
    weights = np.exp(-(places**2) / (2 * CENTRE_SPREAD**2))
    return weights / weights.sum()
