"""COCO-format instance files: polygons and run lengths, without pycocotools.

`read_photos` gives photos with their instances (kind and outline), for composing scenes;
`CocoReader` gives ranked `Sample`s. Ranks come from `visiting_order` where the annotations carry
it (COCO-format re-releases of ASSR and IRSR), with the object visited first as the most salient;
otherwise from the written rule of `dsgnn.data.saliency`.

`CocoReader` draws masks exactly as COCO's tools do. Scenes draw them with OpenCV (`Instance.draw`),
on any canvas and faster, up to one pixel of the border different.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.polygons import FARTHEST, segmentation_to_mask
from dsgnn.data.saliency import saliency_scores, salient_objects
from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import DataError

_SUBPIXEL_BITS = 4  # fillPoly takes fixed-point coordinates
_FINER = 4  # and fills a grid this many times finer
log = logging.getLogger("dsgnn")


@dataclass(frozen=True)
class Instance:
    """One object. segmentation: as in the file, for `dsgnn.data.polygons`. parts: its outlines,
    each some (N, 2) float32 XY rings in photo pixels; a part is filled by the even-odd rule (so a
    ring may be a hole), parts are united. visiting_order: lowest = looked at first, None where
    the file does not say.
    """

    kind: str
    segmentation: Any
    parts: tuple[tuple[np.ndarray, ...], ...]
    visiting_order: int | None = None

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in photo pixels."""
        points = np.concatenate([ring for rings in self.parts for ring in rings])
        return *points.min(0).tolist(), *points.max(0).tolist()

    @cached_property
    def area(self) -> float:
        """Area in square pixels of the photo: of each part the largest ring less the others."""
        areas = [[cv2.contourArea(ring) for ring in rings] for rings in self.parts]
        return sum(2 * max(part) - sum(part) for part in areas)

    def draw(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (1.0, 1.0),
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> np.ndarray:
        """Draw as (H, W) bool, size is (H, W); a point goes to point · scale + offset (XY)."""
        # fillPoly fills each pixel that the outline touches, which is half a pixel too much: so
        # fill a finer grid, where it is little, and look at the fine pixel next to each centre.
        stretch, shift = np.array(scale, np.float32), np.array(offset, np.float32)
        placed = [[ring * stretch + shift for ring in rings] for rings in self.parts]
        points = np.concatenate([ring for rings in placed for ring in rings])
        x0, y0 = np.clip(np.floor(points.min(0)).astype(int), 0, (size[1], size[0]))
        x1, y1 = np.clip(np.ceil(points.max(0)).astype(int), 0, (size[1], size[0]))
        canvas = np.zeros(size, bool)
        if x1 <= x0 or y1 <= y0:
            return canvas
        fine = np.zeros((_FINER * (y1 - y0), _FINER * (x1 - x0)), np.uint8)
        corner = np.array([x0, y0], np.float32)
        for rings in placed:
            fixed = [((r - corner) * _FINER - 0.5) * (1 << _SUBPIXEL_BITS) for r in rings]
            cv2.fillPoly(fine, [np.rint(r).astype(np.int32) for r in fixed], 1, 8, _SUBPIXEL_BITS)
        canvas[y0:y1, x0:x1] = fine[_FINER // 2 :: _FINER, _FINER // 2 :: _FINER]
        return canvas


@dataclass(frozen=True)
class Photo:
    """One photo of a COCO-format file, not read yet, without its crowd regions."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]

    def read(self) -> np.ndarray:
        """Read the photo: (height, width, 3) uint8 RGB. Raises DataError if that fails."""
        bgr = cv2.imread(str(self.path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise DataError(f"{self.path}: not a readable image; is the images folder complete?")
        if bgr.shape[:2] != (self.height, self.width):
            raise DataError(
                f"{self.path}: images[].width and height say {self.width}×{self.height}, the "
                f"file is {bgr.shape[1]}×{bgr.shape[0]}; resize one to the other"
            )
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def read_photos(source: Path | str, images: Path | str | None = None) -> list[Photo]:
    """Read a COCO-format file into photos sorted by id; pixels stay on disk.

    source: the JSON file, or a folder with `instances.json` in it. images: folder of the photos,
    by default `images/` beside the JSON file, or the JSON file's folder if there is none.
    Crowd regions (`iscrowd` 1) are left out. Raises DataError, naming file and field.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "instances.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a COCO JSON file or its folder") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if images is None:
        images = path.parent / "images" if (path.parent / "images").is_dir() else path.parent

    kinds = {
        _field(path, c, "id", int, f"categories[{i}]"): _field(
            path, c, "name", str, f"categories[{i}]"
        )
        for i, c in enumerate(_field(path, data, "categories", list, ""))
    }
    entries: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(_field(path, data, "images", list, "")):
        where = f"images[{i}]"
        number = _field(path, entry, "id", int, where)
        if number in entries:
            raise DataError(f"{path}: {where}.id {number} occurs twice")
        for key, kind in (("file_name", str), ("width", int), ("height", int)):
            _field(path, entry, key, kind, where)
        entries[number] = entry
    instances: dict[int, list[Instance]] = {number: [] for number in entries}
    for i, annotation in enumerate(_field(path, data, "annotations", list, "")):
        where = f"annotations[{i}]"
        number = _field(path, annotation, "image_id", int, where)
        if number not in entries:
            raise DataError(f"{path}: {where}.image_id {number} is not the id of any image")
        category = _field(path, annotation, "category_id", int, where)
        if category not in kinds:
            raise DataError(f"{path}: {where}.category_id {category} is not in categories")
        if annotation.get("iscrowd", 0):
            continue
        entry = entries[number]
        parts = _parts(path, annotation, where, (entry["height"], entry["width"]))
        order = annotation.get("visiting_order")
        if order is not None and (not isinstance(order, int) or isinstance(order, bool)):
            raise DataError(f"{path}: {where}.visiting_order must be a whole number, got {order!r}")
        instances[number].append(
            Instance(kinds[category], annotation["segmentation"], parts, order)
        )
    return [
        Photo(
            id=number,
            path=Path(images) / entry["file_name"],
            height=entry["height"],
            width=entry["width"],
            instances=tuple(instances[number]),
        )
        for number, entry in sorted(entries.items())
    ]


class CocoReader:
    """The photos of a COCO-format file as ranked samples, read lazily, sorted by id.

    source, images: as for `read_photos`. ranks: "visiting_order" (DataError where no annotation
    has it or two of a photo share it; objects without it are clutter), "rule", or None to take
    the former if the file has it, and otherwise the rule, which is logged. `by_rule`: whether they
    come from the rule. A sample without a salient object has G = 0.
    """

    def __init__(
        self, source: Path | str, images: Path | str | None = None, ranks: str | None = None
    ) -> None:
        if ranks not in (None, "rule", "visiting_order"):
            raise ValueError(f'ranks must be "rule", "visiting_order" or None, got {ranks!r}')
        self.photos = read_photos(source, images)
        visited = any(_first_to_last(photo) for photo in self.photos)
        if ranks == "visiting_order" and not visited:
            raise DataError(f'{source}: no annotations[].visiting_order; use ranks="rule"')
        self.ranks = ranks or ("visiting_order" if visited else "rule")
        self.by_rule = self.ranks == "rule"
        if ranks is None and self.by_rule:
            log.warning(
                "%s: there is no annotations[].visiting_order, so ranks come from the written rule "
                "of dsgnn.data.saliency, not from people",
                source,
            )
        for photo in self.photos if self.ranks == "visiting_order" else ():
            orders = [i.visiting_order for i in _first_to_last(photo)]
            if len(set(orders)) < len(orders):
                raise DataError(
                    f"{source}: annotations[].visiting_order of image {photo.id} must differ, "
                    f"got {orders}"
                )

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        image = photo.read()
        instances = photo.instances if self.by_rule else _first_to_last(photo)
        size = photo.height, photo.width
        masks = stack_masks([segmentation_to_mask(i.segmentation, *size) for i in instances], size)
        if self.by_rule:
            scores = saliency_scores(image, masks, [i.kind for i in instances])
            masks = masks[salient_objects(scores, masks.mean((1, 2)))]
        return Sample(image, masks, np.arange(len(masks), 0, -1), photo.path.stem)


def _first_to_last(photo: Photo) -> list[Instance]:
    visited = [(i.visiting_order, i) for i in photo.instances if i.visiting_order is not None]
    return [instance for _, instance in sorted(visited, key=lambda pair: pair[0])]


def stack_masks(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Stack (H, W) bool masks to (G, H, W), also when there are none. size is (H, W)."""
    return np.stack(masks) if masks else np.zeros((0, *size), bool)


def _field(path: Path, holder: Any, key: str, kind: type, where: str) -> Any:
    name = f"{where}.{key}" if where else key
    if not isinstance(holder, dict) or key not in holder:
        raise DataError(f"{path}: {name} is missing")
    if not isinstance(holder[key], kind):
        raise DataError(f"{path}: {name} must be {kind.__name__}, got {type(holder[key]).__name__}")
    return holder[key]


def _parts(
    path: Path, annotation: dict[str, Any], where: str, size: tuple[int, int]
) -> tuple[tuple[np.ndarray, ...], ...]:
    name = f"{where}.segmentation"
    outline: Any = annotation.get("segmentation")
    runs = outline if isinstance(outline, list) else [outline]
    if runs and all(isinstance(run, dict) for run in runs):
        try:
            mask = segmentation_to_mask(outline, *size)
        except ValueError as error:
            raise DataError(f"{path}: {name}: {error}") from None
        if not mask.any():
            raise DataError(f"{path}: {name} marks no pixel; remove the annotation")
        return (_rings(mask),)
    if isinstance(outline, list) and outline:
        for k, polygon in enumerate(outline):
            numbers = isinstance(polygon, list) and all(
                isinstance(v, int | float) and abs(v) <= FARTHEST for v in polygon
            )
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise DataError(
                    f"{path}: {name}[{k}] must be finite x, y pairs of three points or more, none "
                    f"beyond ±{FARTHEST} pixels, got {str(polygon)[:60]}"
                )
        return tuple((np.asarray(p, np.float32).reshape(-1, 2),) for p in outline)
    raise DataError(f"{path}: {name} must be a list of polygons or run lengths, got {outline!r}")


def _rings(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rings which, filled by the even-odd rule, give the mask (h, w) back: pixel borders, found as
    contours of a grid twice as fine, whose pixel centres lie at a quarter of the way inside.
    """
    fine = np.ascontiguousarray(mask).view(np.uint8).repeat(2, 0).repeat(2, 1)
    rings, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return tuple((ring.reshape(-1, 2).astype(np.float32) + 0.5) / 2 for ring in rings)
