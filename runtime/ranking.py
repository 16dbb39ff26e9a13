"""What a user gets: ranked objects with their masks, and what can be made of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import cv2
import numpy as np

from dsgnn.runtime import rle
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.pictures import encode_picture, to_bgr, write_picture
from dsgnn.runtime.draw import draw_heat, draw_objects
from dsgnn.runtime.errors import DataError, InputError, OptionError
from dsgnn.runtime.framing import Aspect, Box, Looks, crop_box, looks_of
from dsgnn.runtime.images import ImageSource, read_image
from dsgnn.runtime.letterbox import shrunk

if TYPE_CHECKING:
    from supervision import Detections

ASSR_GREYS = (255, 229, 204, 178, 153)  # rank 1, 2, … of the ASSR ground-truth maps
PALETTES = ("assr", "irsr")
# The pictures of a photo, and what their files are called after its name. {rank} stands for the
# rank of an object: each object has a file of its own then.
PICTURES = {
    "overlay": "overlay.jpg",
    "map": "map.png",
    "heat": "heat.jpg",
    "masks": "mask{rank}.png",
    "crops": "crop{rank}.png",
}
SAVED = (*PICTURES, "json")  # what `Ranking.save` can write
SHOWN_SIDE_PX = 960  # longest side of the picture that a notebook shows
SOFT = 0.002  # width of a crop's soft edge, as a share of the photo's size (h·w)^½


@dataclass(frozen=True, eq=False)
class RankedObject:
    """One salient object.

    rank: 1 = most salient. saliency: the score that orders objects of one photo (any range, not
    comparable across models). score: object probability, 0…1. box: (x0, y0, x1, y1) pixels,
    x1 and y1 exclusive; zeros when the mask is empty. mask: (h, w) bool. area: the mask's share
    of the photo, 0…1. query: the network's query that found it (evaluation follows its order).
    identity: in video, the number the object keeps from frame to frame, from 1 in the order of
    appearance; None in photos. attention: the share of people's looks that fall on the visible part
    of the mask, 0…1, where the smaller object takes what two share; None where the artifact does
    not tell.
    Raises ValueError when these do not fit together: a mistake of the program that makes it, not of
    a photo.
    """

    rank: int
    saliency: float
    score: float
    box: Box
    mask: np.ndarray = field(repr=False)
    area: float
    query: int
    identity: int | None = None
    attention: float | None = None

    def __post_init__(self) -> None:
        if self.mask.ndim != 2 or self.mask.dtype != bool:
            raise ValueError(f"mask must be (h, w) bool, got {self.mask.shape} {self.mask.dtype}")
        h, w = self.mask.shape
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 <= x1 <= w and 0 <= y0 <= y1 <= h):
            raise ValueError(f"box must be (x0, y0, x1, y1) inside a {w}×{h} photo, got {self.box}")
        if self.rank < 1 or self.query < 0 or not 0 <= self.area <= 1:
            raise ValueError(
                "expected rank ≥ 1, query ≥ 0 and area within 0…1, got "
                f"rank {self.rank}, query {self.query}, area {self.area}"
            )
        if self.attention is not None and not 0 <= self.attention <= 1:
            raise ValueError(f"attention must be within 0…1, got {self.attention}")

    def crop(self, image: ImageSource, soft_px: float | None = None) -> np.ndarray:
        """Cut the object out of its photo: (box height, box width, 4) uint8 RGBA.

        image: the photo, as a path, encoded bytes or a (h, w, 3) uint8 RGB array. Alpha is 0
        outside the mask, and inside it rises from 0 at the outline to 255 within about soft_px
        pixels, so that nothing of the background is seen; where the photo's edge cuts the object it
        stays 255. soft_px: 0 cuts hard; None = 0.2% of the photo's size, at least 1. Raises what
        `read_image` raises, OptionError for a photo of another size or a soft_px below 0.
        """
        h, w = self.mask.shape
        if soft_px is not None and not soft_px >= 0:
            raise OptionError(f"soft_px must be at least 0, got {soft_px}")
        photo = _of_size(image, h, w)
        soft = max(1.0, SOFT * (h * w) ** 0.5) if soft_px is None else soft_px
        x0, y0, x1, y1 = self.box
        cut = np.empty((y1 - y0, x1 - x0, 4), np.uint8)
        cut[..., :3] = photo[y0:y1, x0:x1]
        cut[..., 3] = self.mask[y0:y1, x0:x1].view(np.uint8) * 255
        if soft and cut.size:
            margin = int(np.ceil(2 * soft))
            top, left = max(0, y0 - margin), max(0, x0 - margin)
            around = self.mask[top : y1 + margin, left : x1 + margin].astype(np.float32)
            # Half of a blur lies outside of a straight outline: twice the rest rises from 0 there.
            blurred = cv2.GaussianBlur(around, (0, 0), soft / 2, borderType=cv2.BORDER_REPLICATE)
            inside = blurred[y0 - top : y1 - top, x0 - left : x1 - left]
            alpha = np.clip(2 * inside - 1, 0, 1) * cut[..., 3]
            cut[..., 3] = np.rint(alpha)
        return cut


@dataclass(frozen=True, eq=False)
class Ranking:
    """The salient objects of one photo, most salient first; none is a valid answer.

    height, width: the photo's size, pixels. objects: ranks 1, 2, …, N in this order.
    timings_ms: milliseconds per stage ("decode", "preprocess", "inference", "postprocess"), as far
    as they were measured. attention: where people look, (gh, gw) float32 of a coarse grid over the
    photo, sum 1; None where the artifact has no such output. The grid begins at the photo's top
    left corner; its last row and column may reach beyond the photo. attention_cell_px: height and
    width of one cell of it in pixels; None = the grid spans the photo. image: the photo, (h, w, 3)
    uint8 RGB, which the methods draw on; None where it is not known. A Ranker gives the very array
    that it was given. file: the photo's path, where the Ranker was given one.

    It is a sequence of its objects: `for item in ranking`, `ranking[0]`, `len(ranking)`.
    Raises ValueError when the objects are not of one photo or are out of order: like those of
    RankedObject, a mistake of the program that makes it.
    """

    height: int
    width: int
    objects: tuple[RankedObject, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict, repr=False)
    attention: np.ndarray | None = field(default=None, repr=False)
    attention_cell_px: tuple[float, float] | None = field(default=None, repr=False)
    image: np.ndarray | None = field(default=None, repr=False)
    file: str | None = None

    def __post_init__(self) -> None:
        ranks = [item.rank for item in self.objects]
        if ranks != list(range(1, len(ranks) + 1)):
            raise ValueError(f"objects must have ranks 1…{len(ranks)} in order, got {ranks}")
        for item in self.objects:
            if item.mask.shape != (self.height, self.width):
                raise ValueError(
                    f"every mask must have the photo's size ({self.height}, {self.width}), got "
                    f"{item.mask.shape} for rank {item.rank}"
                )

    def __str__(self) -> str:
        """A line for the photo and one for each object, for a person to read."""
        lines = [f"Ranking of {self.width}×{self.height} pixels, {len(self.objects)} objects"]
        for item in self.objects:
            looks = "" if item.attention is None else f"{item.attention:.0%} of looks, "
            lines.append(f"{item.rank}. {looks}{item.area:.0%} of the photo, box {item.box}")
        return "\n".join(lines)

    def rank_map(self, palette: str = "assr") -> np.ndarray:
        """Paint the ranks as greys: (h, w) uint8, 0 = background, brighter = more salient.

        palette "assr": 255 229 204 178 153 for ranks 1…5, 153 beyond (the ASSR ground truth);
        "irsr": (N + 1 − rank) / N of 255. Where masks overlap the more salient object is on top.
        Raises OptionError for another palette.
        """
        if palette not in PALETTES:
            raise OptionError(f"palette must be one of {', '.join(PALETTES)}, got {palette!r}")
        grey = np.zeros((self.height, self.width), np.uint8)
        total = len(self.objects)
        for item in reversed(self.objects):
            if palette == "assr":
                level = ASSR_GREYS[min(item.rank, len(ASSR_GREYS)) - 1]
            else:
                level = round(255 * (total + 1 - item.rank) / total)
            x0, y0, x1, y1 = item.box
            grey[y0:y1, x0:x1][item.mask[y0:y1, x0:x1]] = level
        return grey

    def __len__(self) -> int:
        return len(self.objects)

    def __iter__(self) -> Iterator[RankedObject]:
        return iter(self.objects)

    @overload
    def __getitem__(self, index: int) -> RankedObject: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RankedObject, ...]: ...
    def __getitem__(self, index: int | slice) -> RankedObject | tuple[RankedObject, ...]:
        """The object at a place, from 0: `ranking[0]` has rank 1."""
        return self.objects[index]

    def draw(self, image: ImageSource | None = None) -> np.ndarray:
        """The photo with its objects tinted, outlined and numbered: (h, w, 3) uint8 RGB.

        image: a path, encoded bytes or a (h, w, 3) uint8 RGB array of this ranking's size, which is
        left unchanged; None = the ranking's own photo. Raises what `read_image` raises, and
        OptionError for another size and where the photo is not known.
        """
        return draw_objects(self._photo(image), self.objects)

    @property
    def focus(self) -> tuple[float, float]:
        """The point (x, y) that a picture should be framed around, 0…1 of width and height.

        It is what thumbor calls the focal point and imgix fp-x and fp-y; `Looks.focus` defines it.
        For a known aspect `crop_box` is better: a window need not have its focus in the middle.
        """
        return self.looks.focus()

    def crop_box(
        self, aspect: Aspect | str | tuple[float, float], keep: int | Collection[int] | None = None
    ) -> Box:
        """Where to crop the photo to an aspect: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.

        The box is the largest one of this aspect, to the pixel's rounding, and lies inside the
        photo where it keeps most of what people look at; the search is exact. aspect: "9:16" or
        (9, 16), width to height. keep: ranks of objects that must not be cut at any price, such as
        1 or (1, 2), the first ones before others where not all of them fit; where one alone does
        not fit, the part of it that is looked at most is kept. Without it this is done for the
        first object unless it costs more than 2% of the looks; () keeps as many looks as can be.
        Raises OptionError for another form of aspect.
        """
        return crop_box(self.looks, Aspect.of(aspect), self.objects, keep)

    def attention_in(self, region: Sequence[float] | np.ndarray) -> float:
        """The share of people's looks that a region gets, 0…1, such as a logo, or a crop.

        region: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; or a mask, (h, w) bool. Where the
        artifact has no attention map, the ranked objects stand in for it (see `looks_of`), and the
        share is a rough guess. Raises OptionError for another form.
        """
        return self.looks.share(region)

    def heat_map(self, image: ImageSource | None = None) -> np.ndarray:
        """The photo under a map of where people look, with a legend in words: (h, w, 3) uint8 RGB.

        The colours are those of the map "inferno", whose brightness grows evenly with the looks
        (Smith and van der Walt, 2015). image: as for `draw`. Raises what `draw` raises, and
        OptionError where the artifact has no attention map.
        """
        if self.attention is None:
            raise OptionError(
                "a heat map needs an artifact with an attention map, and this one has none: use "
                "the bundled model, or export a network that was trained with one"
            )
        looks = self.looks
        return draw_heat(self._photo(image), looks.grid, looks.rows, looks.columns)

    def to_supervision(self) -> Detections:
        """The objects as a Detections of the library supervision, which must be installed.

        Boxes, masks, scores as `confidence`, identities of a video as `tracker_id`, and in `data`
        the ranks, saliencies and shares of looks, in the order of the ranks.
        """
        from supervision import Detections

        if not self.objects:
            return Detections.empty()
        items = self.objects
        known = items[0].identity is not None
        return Detections(
            xyxy=np.array([item.box for item in items], np.float32),
            mask=np.stack([item.mask for item in items]),
            confidence=np.array([item.score for item in items], np.float32),
            class_id=np.zeros(len(items), int),
            tracker_id=np.array([item.identity for item in items]) if known else None,
            data={
                "rank": np.array([item.rank for item in items]),
                "saliency": np.array([item.saliency for item in items]),
                "attention": np.array([item.attention for item in items], np.float64),
            },
        )

    @cached_property
    def looks(self) -> Looks:
        """Where people look; see dsgnn.runtime.framing."""
        attention, cell_px = self.attention, self.attention_cell_px
        return looks_of(self.height, self.width, self.objects, attention, cell_px)

    def save(
        self,
        folder: str | Path,
        kinds: Collection[str] = ("overlay", "json"),
        image: ImageSource | None = None,
        name: str | None = None,
    ) -> list[Path]:
        """Write what `dsgnn-run --save` writes of one photo; returns the files.

        folder: made if missing. kinds: some of "overlay" (NAME.overlay.jpg), "map" (NAME.map.png),
        "heat" (NAME.heat.jpg), "masks" (NAME.mask1.png, …), "crops" (NAME.crop1.png, …) and "json"
        (NAME.json, one image of results.json, which `from_dict` reads). image: as for `draw`. name:
        None = the photo's own without its suffix, or "photo" where it has none. Files of these
        names are replaced; every file appears whole or not at all. Raises what `draw` and
        `heat_map` raise, OptionError for another kind, and OSError.
        """
        if isinstance(kinds, str):
            kinds = kinds.split(",")
        if unknown := [kind for kind in kinds if kind not in SAVED]:
            raise OptionError(f"kinds must be some of {', '.join(SAVED)}, got {', '.join(unknown)}")
        own = image if isinstance(image, str | Path) else self.file
        stem = Path(own).stem if name is None and own else name or "photo"
        out = Path(folder)
        pictures = list(self.pictures(kinds, image))  # all of them before a file is written
        out.mkdir(parents=True, exist_ok=True)
        written = {out / f"{stem}.{ending}": pixels for ending, pixels in pictures}
        for path, pixels in written.items():
            write_picture(path, pixels)
        if "json" not in kinds:
            return list(written)
        facts = {"file": self.file or stem, **self.to_dict()}
        write_whole(out / f"{stem}.json", (json.dumps(facts, indent=2) + "\n").encode())
        return [*written, out / f"{stem}.json"]

    def pictures(
        self, kinds: Collection[str], image: ImageSource | None = None, palette: str = "assr"
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The pictures that `save` and `dsgnn-run` write: the ending of each file's name, and its
        pixels, grey, BGR or BGRA.

        kinds: some of PICTURES; others are passed over. An object whose mask is empty has no crop.
        image: as for `draw`. palette: as for `rank_map`. Raises what `draw` and `heat_map` raise.
        """
        photo = self._photo(image) if {"overlay", "heat", "crops"} & set(kinds) else None
        if "overlay" in kinds:
            yield PICTURES["overlay"], to_bgr(self.draw(photo))
        if "map" in kinds:
            yield PICTURES["map"], self.rank_map(palette)
        if "heat" in kinds:
            yield PICTURES["heat"], to_bgr(self.heat_map(photo))
        for item in self.objects:
            if "masks" in kinds:
                yield PICTURES["masks"].format(rank=item.rank), item.mask.view(np.uint8) * 255
            if photo is not None and "crops" in kinds and item.area > 0:
                cut = cv2.cvtColor(item.crop(photo), cv2.COLOR_RGBA2BGRA)
                yield PICTURES["crops"].format(rank=item.rank), cut

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the drawn photo, or the rank map where the photo is not known."""
        picture = self.rank_map() if self.image is None else to_bgr(self.draw())
        h, w = shrunk(self.height, self.width, SHOWN_SIDE_PX)
        return encode_picture(".png", cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA))

    def _photo(self, image: ImageSource | None) -> np.ndarray:
        """The photo to draw on. Raises what `read_image` raises, and OptionError."""
        source = self.image if image is None else image
        if source is None:
            raise OptionError("this ranking does not hold its photo: give the photo")
        return _of_size(source, self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """One image of `results.json` (schema dsgnn.results/1) without its file name.

        "bbox" is [x, y, width, height] in pixels, "area" the mask's share of the photo, and
        "segmentation" a COCO run-length encoding that pycocotools reads. "query" lets an evaluation
        count overlapping objects in the network's order. Objects of a video also have "identity",
        and those of an artifact that knows people's attention have "attention".
        """
        return {
            "width": self.width,
            "height": self.height,
            "objects": [
                {
                    "rank": item.rank,
                    **({} if item.identity is None else {"identity": item.identity}),
                    "saliency": item.saliency,
                    "score": item.score,
                    **({} if item.attention is None else {"attention": item.attention}),
                    "bbox": _xywh(item.box),
                    "area": item.area,
                    "query": item.query,
                    "segmentation": rle.encode(item.mask),
                }
                for item in self.objects
            ],
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Ranking:
        """A ranking from one image of `results.json`, what `to_dict` gave.

        facts: also a server's image, a line of a video's frames and a row of Parquet. Boxes and
        areas are those of the masks. Raises DataError for another form, and InputError for an image
        that was not ranked.
        """
        if facts.get("error"):
            raise InputError(f"the image was not ranked: {facts['error']}")
        try:
            height, width = int(facts["height"]), int(facts["width"])
            entries = sorted(facts["objects"], key=lambda entry: entry["rank"])
            objects = tuple(_object(entry, height, width) for entry in entries)
            return cls(height, width, objects, file=facts.get("file"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"expected one image of a results.json, with width, height and objects: {error!r}"
            ) from error


def _object(entry: Mapping[str, Any], height: int, width: int) -> RankedObject:
    size = list(entry["segmentation"]["size"])
    if size != [height, width]:  # before anything of the other size is made
        raise DataError(f"a mask has size {size}, its photo {[height, width]}")
    mask = rle.decode(entry["segmentation"])
    x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
    return RankedObject(
        rank=entry["rank"],
        saliency=float(entry["saliency"]),
        score=float(entry.get("score", 1.0)),
        box=(x, y, x + w, y + h),
        mask=mask,
        area=cv2.countNonZero(mask.view(np.uint8)) / (height * width),
        query=entry.get("query", entry["rank"] - 1),
        identity=entry.get("identity"),
        attention=entry.get("attention"),
    )


def _of_size(image: ImageSource, height: int, width: int) -> np.ndarray:
    """Read a photo. Raises what `read_image` raises, and OptionError for another size."""
    photo = read_image(image)
    if photo.shape[:2] != (height, width):
        raise OptionError(
            f"the ranking is of a photo of (height, width) = ({height}, {width}), got an image of "
            f"{photo.shape[:2]}"
        )
    return photo


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]
