"""Paint a ranking over its photo: tinted masks, outlines, numbers and shares, warm = first.
Or where people look, as a heat map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from dsgnn.runtime.attention import percent
from dsgnn.runtime.framing import Placed
from dsgnn.runtime.letterbox import shrunk

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
FONT = cv2.FONT_HERSHEY_DUPLEX
BAND_PX = 1 << 17  # pixels of a photo that are worked on at a time
PLATE = 0.78  # half the height of a plate, as a part of the disc's radius
LETTERS = 0.9  # the height of the letters on a plate, as a part of the disc's radius


@dataclass(frozen=True)
class _Badge:
    """Where an object's number and share are written, in pixels.

    centre: (x, y) of the disc with the number. radius: of that disc. text: of the plate beside it,
    "" where there is none. width: of that text. side: of the disc that the plate is on, 1 = right,
    -1 = left.
    """

    centre: tuple[float, float]
    radius: float
    text: str = ""
    width: int = 0
    side: int = 1

    @property
    def plate(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of what is beyond the disc; a point without a text."""
        x, y = self.centre
        if not self.text:
            return x, y, x, y
        near, far = 1.12 * self.radius, 2.07 * self.radius + self.width
        x0, x1 = sorted((x + self.side * near, x + self.side * far))
        return x0, y - PLATE * self.radius, x1, y + PLATE * self.radius

    def fits(self, w: int, others: Sequence[_Badge]) -> bool:
        """Whether the plate lies within a photo of this width, and on no disc or plate of these."""
        x0, y0, x1, y1 = self.plate
        taken = [other.plate for other in others]
        for other in others:
            (x, y), reach = other.centre, 1.2 * other.radius
            taken.append((x - reach, y - reach, x + reach, y + reach))
        free = all(x1 <= a0 or x0 >= a1 or y1 <= b0 or y0 >= b1 for a0, b0, a1, b1 in taken)
        return x0 >= 0 and x1 <= w and free


def draw_objects(image: np.ndarray, objects: Sequence[Placed]) -> np.ndarray:
    """A new (h, w, 3) uint8 RGB picture; strokes and numbers scale with the photo.

    image: (h, w, 3) uint8 RGB, left unchanged. objects: most salient first, with masks of the
    photo's size. The less salient are painted first, so that the more salient are on top. A photo
    with a side under 38 pixels has no room for numbers and gets only colours.

    Beside the number stands the object's share of looks where that is known and there is room. An
    object that has an identity, as in video, goes without: from frame to frame it would flicker.
    """
    h, w = image.shape[:2]
    canvas = cv2.convertScaleAbs(image, alpha=DIM)
    stroke = max(1, round(0.0035 * (h * w) ** 0.5))
    shown = [item for item in objects if item.area > 0]
    for item in reversed(shown):
        _tint(canvas, image, item)
        _outline(canvas, item, stroke)
    radius = min(max(9.0, 0.034 * (h * w) ** 0.5), 0.16 * min(h, w))
    if radius >= 6:
        badges = _badges(shown, radius, h, w)
        for item, badge in zip(reversed(shown), reversed(badges), strict=True):
            _write_share(canvas, badge, _colour(item))
        for item, badge in zip(reversed(shown), reversed(badges), strict=True):
            _write_number(canvas, str(item.rank), _colour(item), badge)
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
    )
    ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_INFERNO)
    covers = (HEAT * 255 * (np.arange(256) / 255) ** 0.6).astype(np.uint8)
    heated = np.empty_like(image)
    for rows_of in _bands(0, h, w):
        levels = cv2.merge([spread[rows_of].astype(np.uint8)] * 3)
        colours = cv2.LUT(levels, ramp.reshape(1, 256, 3)[..., ::-1])
        part = cv2.LUT(levels, covers[None])
        grey = cv2.cvtColor(cv2.cvtColor(image[rows_of], cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        heated[rows_of] = cv2.add(
            cv2.multiply(colours, part, scale=1 / 255),
            cv2.multiply(grey, 255 - part, scale=1 / 255),
        )
    _legend(heated, ramp.reshape(256, 3)[:, ::-1])
    return heated


def _legend(canvas: np.ndarray, ramp: np.ndarray) -> None:
    """A bar of the colours in the bottom left corner, between the two words of LEGEND."""
    h, w = canvas.shape[:2]
    scale = 0.0011 * (h * w) ** 0.5
    thick = max(1, round(1.2 * scale))
    sizes = [cv2.getTextSize(word, FONT, scale, thick)[0] for word in LEGEND]
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
        cv2.putText(canvas, word, (start, y + gap + high), FONT, scale, WHITE, thick, cv2.LINE_AA)
        start += length + gap
        if word == LEGEND[0]:
            canvas[y + gap : y + gap + high, start : start + long] = bar
            start += long + gap


def _colour(item: Placed) -> tuple[int, int, int]:
    return RANK_COLOURS[min(item.rank, len(RANK_COLOURS)) - 1]


def _tint(canvas: np.ndarray, image: np.ndarray, item: Placed) -> None:
    x0, y0, x1, y1 = item.box
    levels = np.arange(256, dtype=np.float32)[None, :, None]
    table = levels * (1 - TINT) + np.array(_colour(item), np.float32) * TINT  # (1, 256, 3)
    table = table.round().astype(np.uint8)
    for rows in _bands(y0, y1, x1 - x0):
        tinted = cv2.LUT(image[rows, x0:x1], table)
        cv2.copyTo(tinted, item.mask[rows, x0:x1].view(np.uint8), canvas[rows, x0:x1])


def _bands(top: int, bottom: int, width: int) -> Iterator[slice]:
    """The rows from `top` to `bottom` in bands of about BAND_PX pixels: what is made of a band on
    the way stays in the processor's cache."""
    high = max(1, BAND_PX // max(1, width))
    for start in range(top, bottom, high):
        yield slice(start, min(start + high, bottom))


def _outline(canvas: np.ndarray, item: Placed, stroke: int) -> None:
    """A line of the object's colour on a dark edge, so that it shows on any background."""
    x0, y0, x1, y1 = item.box
    grey = item.mask[y0:y1, x0:x1].view(np.uint8)
    outlines, _ = cv2.findContours(grey, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
    # Corners closer together than a fraction of the stroke do not show, but cost most of the time.
    outlines = [cv2.approxPolyDP(line, 0.25 * stroke, closed=True) for line in outlines]
    if stroke > 1:
        cv2.drawContours(canvas, outlines, -1, DARK, 2 * stroke, cv2.LINE_AA)
    cv2.drawContours(canvas, outlines, -1, _colour(item), stroke, cv2.LINE_AA)


def _label_centres(shown: list[Placed], h: int, w: int) -> list[tuple[float, float]]:
    """For each object an (x, y) deep inside its visible part, near the middle of it."""
    rows, columns = shrunk(h, w, LABEL_CELLS)
    top = np.zeros((rows, columns), np.int32)  # rank on top, 0 = none
    masks = (item.mask.view(np.uint8) for item in shown)
    nearest = cv2.INTER_NEAREST
    small = [cv2.resize(m, (columns, rows), interpolation=nearest).astype(bool) for m in masks]
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
            centres.append(((column + 0.5) * w / columns, (row + 0.5) * h / rows))
        else:  # too small for the map
            x0, y0, x1, y1 = item.box
            centres.append(((x0 + x1) / 2, (y0 + y1) / 2))
    return centres


def _inside(centre: tuple[float, float], radius: float, h: int, w: int) -> tuple[float, float]:
    """Move a label so that its disc and ring lie within the photo."""
    margin = 1.2 * radius
    return min(max(centre[0], margin), w - margin), min(max(centre[1], margin), h - margin)


def _badges(shown: list[Placed], radius: float, h: int, w: int) -> list[_Badge]:
    """One for each object. The first share that has room for it says of what it is. A share that
    has no room is left out; of two that would lie on each other, the less salient object's."""
    badges = [
        _Badge(_inside(centre, radius, h, w), radius) for centre in _label_centres(shown, h, w)
    ]
    scale, thickness = _lettering(LETTERS * radius)
    unit = " of looks"
    for number, item in enumerate(shown):
        if item.attention is None or item.identity is not None:
            continue
        share = percent(item.attention)
        others = badges[:number] + badges[number + 1 :]
        for text in dict.fromkeys((share + unit, share)):
            width = cv2.getTextSize(text, FONT, scale, thickness)[0][0]
            sides = [replace(badges[number], text=text, width=width, side=side) for side in (1, -1)]
            if fitting := [badge for badge in sides if badge.fits(w, others)]:
                badges[number] = fitting[0]
                unit = "" if text.endswith(unit) else unit
                break
    return badges


def _lettering(height: float) -> tuple[float, int]:
    """Scale and thickness of the font for figures of this height in pixels."""
    (_, unit), _ = cv2.getTextSize("8", FONT, 1, 1)
    return height / unit, max(1, round(height / 9))


def _write_share(canvas: np.ndarray, badge: _Badge, colour: tuple[int, int, int]) -> None:
    """A dark plate that starts behind the disc, with the share in white."""
    if not badge.text:
        return
    x0, y0, x1, y1 = badge.plate
    half = (y1 - y0) / 2
    start, end = (badge.centre[0], x1 - half) if badge.side > 0 else (badge.centre[0], x0 + half)
    middle = (y0 + y1) / 2
    for fill, reach in ((colour, half), (DARK, half - max(1.0, 0.09 * badge.radius))):
        first, last = ((round(x * 2**SHIFT), round(middle * 2**SHIFT)) for x in (start, end))
        cv2.line(canvas, first, last, fill, max(1, round(2 * reach)), cv2.LINE_AA, SHIFT)
    scale, thickness = _lettering(LETTERS * badge.radius)
    (_, height), _ = cv2.getTextSize("8", FONT, scale, thickness)
    left = x0 + (0.38 if badge.side > 0 else 0.55) * badge.radius
    origin = round(left), round(middle + height / 2)
    cv2.putText(canvas, badge.text, origin, FONT, scale, WHITE, thickness, cv2.LINE_AA)


def _write_number(
    canvas: np.ndarray, text: str, colour: tuple[int, int, int], badge: _Badge
) -> None:
    """A disc of the rank's colour in a white ring, with the number in its middle."""
    centre, radius = badge.centre, badge.radius
    fixed = (round(centre[0] * 2**SHIFT), round(centre[1] * 2**SHIFT))
    for fill, size in ((DARK, 1.2), (WHITE, 1.12), (colour, 0.94)):
        reach = round(size * radius * 2**SHIFT)
        cv2.circle(canvas, fixed, reach, fill, cv2.FILLED, cv2.LINE_AA, SHIFT)
    scale, _ = _lettering(1.1 * radius / (1 if len(text) == 1 else 1.4))
    thickness = max(1, round(radius / 8))
    # The number is written once aside, so that its ink is centred, not the box of the font.
    side = int(4 * radius) + 8
    ink = np.zeros((side, side), np.uint8)
    cv2.putText(ink, text, (side // 4, 3 * side // 4), FONT, scale, 255, thickness, cv2.LINE_AA)
    x, y, width, height = cv2.boundingRect(ink)
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140
    origin = (
        round(centre[0] - width / 2) + side // 4 - x,
        round(centre[1] - height / 2) + 3 * side // 4 - y,
    )
    cv2.putText(
        canvas, text, origin, FONT, scale, DARK if bright else WHITE, thickness, cv2.LINE_AA
    )
