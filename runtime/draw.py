"""Paint a ranking over its photo: tinted masks, outlines and numbers, warm = looked at first.
Or where people look, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np

# RGB by rank, from warm to cool. Ranks beyond the last share its colour.
RANK_COLOURS = (
    (255, 59, 48),
    (255, 149, 0),
    (255, 214, 10),
    (52, 199, 89),
    (0, 188, 212),
    (64, 123, 255),
    (138, 92, 246),
    (214, 82, 188),
)
DARK, WHITE = (24, 24, 24), (255, 255, 255)
DIM = 0.6  # brightness left to what is in no object
TINT = 0.35  # share of the rank's colour inside a mask
LABEL_CELLS = 192  # labels are placed on a map whose longest side has this many cells
SHIFT = 4  # OpenCV draws circles in 1/16 pixel
HEAT = 0.8  # how far the colour of the most looks covers the photo
LEGEND = "fewer looks", "more looks"


class Drawable(Protocol):
    """What is drawn of an object; see dsgnn.runtime.ranking.RankedObject."""

    @property
    def rank(self) -> int: ...
    @property
    def box(self) -> tuple[int, int, int, int]: ...
    @property
    def mask(self) -> np.ndarray: ...
    @property
    def area(self) -> float: ...


def draw_objects(image: np.ndarray, objects: Sequence[Drawable]) -> np.ndarray:
    """A new (h, w, 3) uint8 RGB picture; strokes and numbers scale with the photo.

    image: (h, w, 3) uint8 RGB, left unchanged. objects: most salient first, with masks of the
    photo's size. The less salient are painted first, so that the more salient are on top. A photo
    with a side under 38 pixels has no room for numbers and gets only colours.
    """
    h, w = image.shape[:2]
    canvas = cv2.convertScaleAbs(image, alpha=DIM)
    stroke = max(1, round(0.0035 * (h * w) ** 0.5))
    shown = [item for item in objects if item.area > 0]
    for item in reversed(shown):
        _tint(canvas, image, item)
        _outline(canvas, item, stroke)
    radius = min(max(9.0, 0.03 * (h * w) ** 0.5), 0.16 * min(h, w))
    if radius >= 6:
        centres = _label_centres(shown, h, w)
        for item, centre in zip(reversed(shown), reversed(centres), strict=True):
            _label(canvas, str(item.rank), _colour(item), _inside(centre, radius, h, w), radius)
    return canvas


def draw_heat(
    image: np.ndarray, grid: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """A new (h, w, 3) uint8 RGB picture: the photo in grey under the colours of the looks.

    image: (h, w, 3) uint8 RGB, left unchanged. grid: (gh, gw), the looks of each cell. rows,
    columns: the edges of the cells in pixels, (gh + 1,) and (gw + 1,). The more looks a place gets,
    the brighter and the less transparent is its colour. A photo too small for the legend has none.
    """
    h, w = image.shape[:2]
    density = (grid / np.maximum(np.outer(np.diff(rows), np.diff(columns)), 1e-9)).astype(
        np.float32
    )
    level = density / max(float(density.max()), 1e-30)
    # Between the middles of the cells the level changes evenly.
    shift = np.array([[columns[1], 0, columns[1] / 2 - 0.5], [0, rows[1], rows[1] / 2 - 0.5]])
    spread = cv2.warpAffine(
        (255 * level).astype(np.float32), shift, (w, h), borderMode=cv2.BORDER_REPLICATE
    ).astype(np.uint8)
    ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO)
    colours = cv2.LUT(cv2.merge([spread] * 3), ramp.reshape(1, 256, 3)[..., ::-1])
    cover = cv2.LUT(spread, (HEAT * 255 * (np.arange(256) / 255) ** 0.6).astype(np.uint8)[None])
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    part = cv2.merge([cover] * 3)
    heated = cv2.add(
        cv2.multiply(colours, part, scale=1 / 255), cv2.multiply(grey, 255 - part, scale=1 / 255)
    )
    _legend(heated, ramp.reshape(256, 3)[:, ::-1])
    return heated


def _legend(canvas: np.ndarray, ramp: np.ndarray) -> None:
    """A bar of the colours in the bottom left corner, between the two words of LEGEND."""
    h, w = canvas.shape[:2]
    scale = 0.0011 * (h * w) ** 0.5
    font, thick = cv2.FONT_HERSHEY_DUPLEX, max(1, round(1.2 * scale))
    sizes = [cv2.getTextSize(word, font, scale, thick)[0] for word in LEGEND]
    high, gap = sizes[0][1], max(2, round(10 * scale))
    long = round(120 * scale)
    wide = sizes[0][0] + long + sizes[1][0] + 4 * gap
    if scale < 0.25 or wide + 2 * gap > w or 5 * gap + high > h:
        return
    x, y = gap, h - high - 3 * gap
    canvas[y : y + high + 2 * gap, x : x + wide] //= 4
    bar = ramp[np.linspace(0, 255, long).astype(int)]
    start = x + gap
    for word, (length, _) in zip(LEGEND, sizes, strict=True):
        cv2.putText(canvas, word, (start, y + gap + high), font, scale, WHITE, thick, cv2.LINE_AA)
        start += length + gap
        if word == LEGEND[0]:
            canvas[y + gap : y + gap + high, start : start + long] = bar
            start += long + gap


def _colour(item: Drawable) -> tuple[int, int, int]:
    return RANK_COLOURS[min(item.rank, len(RANK_COLOURS)) - 1]


def _tint(canvas: np.ndarray, image: np.ndarray, item: Drawable) -> None:
    x0, y0, x1, y1 = item.box
    levels = np.arange(256, dtype=np.float32)[None, :, None]
    table = levels * (1 - TINT) + np.array(_colour(item), np.float32) * TINT  # (1, 256, 3)
    tinted = cv2.LUT(image[y0:y1, x0:x1], table.round().astype(np.uint8))
    cv2.copyTo(tinted, item.mask[y0:y1, x0:x1].view(np.uint8), canvas[y0:y1, x0:x1])


def _outline(canvas: np.ndarray, item: Drawable, stroke: int) -> None:
    """A line of the object's colour on a dark edge, so that it shows on any background."""
    x0, y0, x1, y1 = item.box
    grey = item.mask[y0:y1, x0:x1].view(np.uint8)
    outlines, _ = cv2.findContours(grey, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
    # Corners closer together than a fraction of the stroke do not show, but cost most of the time.
    outlines = [cv2.approxPolyDP(line, 0.25 * stroke, closed=True) for line in outlines]
    if stroke > 1:
        cv2.drawContours(canvas, outlines, -1, DARK, 2 * stroke, cv2.LINE_AA)
    cv2.drawContours(canvas, outlines, -1, _colour(item), stroke, cv2.LINE_AA)


def _label_centres(shown: list[Drawable], h: int, w: int) -> list[tuple[float, float]]:
    """For each object an (x, y) deep inside its visible part, near the middle of it."""
    scale = min(1.0, LABEL_CELLS / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    top = np.zeros(size[::-1], np.int32)  # rank on top, 0 = none
    small = [
        cv2.resize(item.mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
        for item in shown
    ]
    for item, cells in zip(reversed(shown), reversed(small), strict=True):
        top[cells] = item.rank
    centres: list[tuple[float, float]] = []
    for item, cells in zip(shown, small, strict=True):
        visible = top == item.rank
        place = visible if visible.any() else cells
        if place.any():
            bordered = cv2.copyMakeBorder(place.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
            depth = cv2.distanceTransform(bordered, cv2.DIST_L2, 3)[1:-1, 1:-1]
            deep = np.argwhere(depth >= 0.9 * depth.max())  # many cells in a long object
            middle = np.argwhere(place).mean(axis=0)
            row, column = deep[((deep - middle) ** 2).sum(axis=1).argmin()].tolist()
            centres.append(((column + 0.5) * w / size[0], (row + 0.5) * h / size[1]))
        else:  # too small for the map
            x0, y0, x1, y1 = item.box
            centres.append(((x0 + x1) / 2, (y0 + y1) / 2))
    return centres


def _inside(centre: tuple[float, float], radius: float, h: int, w: int) -> tuple[float, float]:
    """Move a label so that its disc and ring lie within the photo."""
    margin = 1.2 * radius
    return (
        min(max(centre[0], margin), w - margin),
        min(max(centre[1], margin), h - margin),
    )


def _label(
    canvas: np.ndarray,
    text: str,
    colour: tuple[int, int, int],
    centre: tuple[float, float],
    radius: float,
) -> None:
    """A disc of the rank's colour in a white ring, with the number in its middle."""
    fixed = (round(centre[0] * 2**SHIFT), round(centre[1] * 2**SHIFT))
    for fill, size in ((DARK, 1.2), (WHITE, 1.12), (colour, 0.94)):
        reach = round(size * radius * 2**SHIFT)
        cv2.circle(canvas, fixed, reach, fill, cv2.FILLED, cv2.LINE_AA, SHIFT)
    font, thickness = cv2.FONT_HERSHEY_DUPLEX, max(1, round(radius / 8))
    (_, unit), _ = cv2.getTextSize("8", font, 1, 1)
    scale = 1.1 * radius / unit / (1 if len(text) == 1 else 1.4)
    # The number is written once aside, so that its ink is centred, not the box of the font.
    side = int(4 * radius) + 8
    ink = np.zeros((side, side), np.uint8)
    cv2.putText(ink, text, (side // 4, 3 * side // 4), font, scale, 255, thickness, cv2.LINE_AA)
    x, y, width, height = cv2.boundingRect(ink)
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    origin = (
        round(centre[0] - width / 2) + side // 4 - x,
        round(centre[1] - height / 2) + 3 * side // 4 - y,
    )
    cv2.putText(
        canvas, text, origin, font, scale, DARK if bright else WHITE, thickness, cv2.LINE_AA
    )
