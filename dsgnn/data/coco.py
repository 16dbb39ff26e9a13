"""COCO-format instance files: polygons and run lengths, without pycocotools.

`read_photos` gives photos with their instances (kind and outline), for composing scenes;
`CocoReader` gives ranked `Sample`s. Ranks come from `visiting_order` where the annotations carry
it (COCO-format re-releases of ASSR and IRSR), with the object visited first as the most salient;
otherwise from the written rule of `dsgnn.data.saliency`.

`CocoReader` draws masks exactly as COCO's tools do. Scenes draw them with OpenCV (`Instance.draw`),
on any canvas and a hundred times faster, but up to half a pixel wider.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.polygons import segmentation_to_mask
from dsgnn.data.saliency import saliency_scores, salient_objects
from dsgnn.data.sample import Sample

_SUBPIXEL_BITS = 4  # fillPoly takes fixed-point coordinates


class CocoError(ValueError):
    """An annotation file does not hold what the format says; names the file and the field."""


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
        """Area of the parts in square pixels of the photo, holes taken off roughly."""
        return sum(2 * cv2.contourArea(max(rings, key=len)) - sum(map(cv2.contourArea, rings))
                   for rings in self.parts)  # fmt: skip

    def draw(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (1.0, 1.0),
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> np.ndarray:
        """Draw as (H, W) bool, size is (H, W); a point goes to point · scale + offset (XY)."""
        canvas = np.zeros(size, np.uint8)
        factor = np.float32(1 << _SUBPIXEL_BITS)
        for rings in self.parts:
            # Pixel i spans i…i+1 in COCO and is centred on i in OpenCV.
            points = [
                np.rint((ring * np.float32(scale) + np.float32(offset) - 0.5) * factor)
                for ring in rings
            ]
            cv2.fillPoly(canvas, [p.astype(np.int32) for p in points], 1, shift=_SUBPIXEL_BITS)
        return canvas.view(bool)


@dataclass(frozen=True)
class Photo:
    """One photo of a COCO-format file, not read yet. Crowd regions are kept apart."""

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]

    def read(self) -> np.ndarray:
        """Read the photo: (height, width, 3) uint8 RGB. Raises CocoError if that fails."""
        bgr = cv2.imread(str(self.path), cv2.IMREAD_COLOR)
        if bgr is None:
            raise CocoError(f"{self.path}: not a readable image; is the images folder complete?")
        if bgr.shape[:2] != (self.height, self.width):
            raise CocoError(
                f"{self.path}: images[].width and height say {self.width}×{self.height}, the "
                f"file is {bgr.shape[1]}×{bgr.shape[0]}; resize one to the other"
            )
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def read_photos(source: Path | str, images: Path | str | None = None) -> list[Photo]:
    """Read a COCO-format file into photos sorted by id; pixels stay on disk.

    source: the JSON file, or a folder with `instances.json` in it. images: folder of the photos,
    by default `images/` beside the JSON file, or the JSON file's folder if there is none.
    Crowd regions (`iscrowd` 1) are left out. Raises CocoError, naming file and field.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "instances.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CocoError(f"{path}: no such file; give a COCO JSON file or its folder") from None
    except ValueError as error:
        raise CocoError(f"{path}: not JSON ({error})") from None
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
            raise CocoError(f"{path}: {where}.id {number} occurs twice")
        for key, kind in (("file_name", str), ("width", int), ("height", int)):
            _field(path, entry, key, kind, where)
        entries[number] = entry
    instances: dict[int, list[Instance]] = {number: [] for number in entries}
    for i, annotation in enumerate(_field(path, data, "annotations", list, "")):
        where = f"annotations[{i}]"
        number = _field(path, annotation, "image_id", int, where)
        if number not in entries:
            raise CocoError(f"{path}: {where}.image_id {number} is not the id of any image")
        category = _field(path, annotation, "category_id", int, where)
        if category not in kinds:
            raise CocoError(f"{path}: {where}.category_id {category} is not in categories")
        if annotation.get("iscrowd", 0):
            continue
        entry = entries[number]
        parts = _parts(path, annotation, where, (entry["height"], entry["width"]))
        order = annotation.get("visiting_order")
        if order is not None and (not isinstance(order, int) or isinstance(order, bool)):
            raise CocoError(f"{path}: {where}.visiting_order must be a whole number, got {order!r}")
        instances[number].append(
            Instance(kinds[category], annotation["segmentation"], parts, order)
        )
    return [
        Photo(
            number, Path(images) / e["file_name"], e["height"], e["width"],
            tuple(instances[number]),
        )
        for number, e in sorted(entries.items())
    ]  # fmt: skip


class CocoReader(Sequence[Sample]):
    """The photos of a COCO-format file as ranked samples, read lazily, sorted by id.

    source, images: as for `read_photos`. ranks: "visiting_order" (CocoError where no annotation
    has it; objects without it are clutter), "rule", or None to take the former if the file has
    it. With the rule, samples without a salient object have G = 0.
    """

    def __init__(
        self, source: Path | str, images: Path | str | None = None, ranks: str | None = None
    ) -> None:
        if ranks not in (None, "rule", "visiting_order"):
            raise ValueError(f'ranks must be "rule", "visiting_order" or None, got {ranks!r}')
        self.photos = read_photos(source, images)
        visited = any(i.visiting_order is not None for p in self.photos for i in p.instances)
        if ranks == "visiting_order" and not visited:
            raise CocoError(f'{source}: no annotations[].visiting_order; use ranks="rule"')
        self.ranks = ranks or ("visiting_order" if visited else "rule")

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        image = photo.read()
        size = image.shape[:2]
        if self.ranks == "visiting_order":
            seen = [i for i in photo.instances if i.visiting_order is not None]
            first = sorted(seen, key=lambda i: i.visiting_order)
            if len({i.visiting_order for i in seen}) < len(seen):
                raise CocoError(f"{photo.path.name}: two annotations share a visiting_order")
            masks = stack_masks([segmentation_to_mask(i.segmentation, *size) for i in first], size)
        else:
            masks = stack_masks(
                [segmentation_to_mask(i.segmentation, *size) for i in photo.instances], size
            )
            scores = saliency_scores(image, masks, [i.kind for i in photo.instances])
            masks = masks[salient_objects(scores, masks.mean((1, 2)))]
        return Sample(image, masks, np.arange(len(masks), 0, -1), photo.path.stem)


def stack_masks(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Stack (H, W) bool masks to (G, H, W), also when there are none. size is (H, W)."""
    return np.stack(masks) if masks else np.zeros((0, *size), bool)


def _field(path: Path, holder: Any, key: str, kind: Any, where: str) -> Any:
    name = f"{where}.{key}" if where else key
    if not isinstance(holder, dict) or key not in holder:
        raise CocoError(f"{path}: {name} is missing")
    if not isinstance(holder[key], kind):
        raise CocoError(f"{path}: {name} must be {_names(kind)}, got {type(holder[key]).__name__}")
    return holder[key]


def _names(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def _parts(
    path: Path, annotation: dict[str, Any], where: str, size: tuple[int, int]
) -> tuple[tuple[np.ndarray, ...], ...]:
    name = f"{where}.segmentation"
    outline = annotation.get("segmentation")
    if isinstance(outline, list) and outline:
        for k, polygon in enumerate(outline):
            numbers = isinstance(polygon, list) and all(
                isinstance(v, (int, float)) for v in polygon
            )
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise CocoError(
                    f"{path}: {name}[{k}] must be x, y pairs of at least three points, got "
                    f"{len(polygon) if isinstance(polygon, list) else polygon!r} values"
                )
        return tuple((np.asarray(p, np.float32).reshape(-1, 2),) for p in outline)
    if isinstance(outline, dict):
        if outline.get("size") != list(size):
            raise CocoError(
                f"{path}: {name}.size must be [height, width] = {list(size)}, got "
                f"{outline.get('size')}"
            )
        try:
            mask = segmentation_to_mask(outline, *size)
        except ValueError as error:
            raise CocoError(f"{path}: {name}: {error}") from None
        return _outline_of(mask)
    raise CocoError(f"{path}: {name} must be a list of polygons or run lengths, got {outline!r}")


def _outline_of(mask: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    """Rings of pixel centres which, filled by the even-odd rule, give the mask back."""
    padded = np.ascontiguousarray(mask).view(np.uint8)
    rings, _ = cv2.findContours(padded, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return (tuple(ring.reshape(-1, 2).astype(np.float32) + 0.5 for ring in rings),)
