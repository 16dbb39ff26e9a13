"""COCO-format instance files: polygons and run lengths, and whatever ranks the file holds.

`read_photos` gives photos with their instances (kind and outline), for composing scenes;
`CocoReader` gives ranked `Sample`s. Annotations may say in which order people look at the objects:

- `visiting_order`, the lowest was looked at first (COCO-format re-releases of ASSR and IRSR);
- `human_rank`, 1 = most looked at, null or absent for objects that are not ranked;
- `fixations`, how many of the fixations that the image's own `fixations` counts fell on the object.

Where none of these is given, ranks come from a `dsgnn.data.ranks.PredictLooks`.

`CocoReader` draws masks exactly as COCO's tools do. Scenes draw them with OpenCV (`Instance.draw`),
because that takes a quarter of the time; the result differs by one pixel of the border at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.polygons import FARTHEST, segmentation_to_mask
from dsgnn.data.ranks import (
    ANNOTATIONS,
    MIN_FIXATIONS,
    MIN_SHARE,
    PEOPLE,
    PREDICTED,
    PredictLooks,
    needed,
    taught,
)
from dsgnn.data.records import field, inside, read_json, read_photo, unique_names, whole_number
from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import DataError, OptionError

_SUBPIXEL_BITS = 4  # fillPoly takes fixed-point coordinates
_FINER = 4  # and fills a grid this many times finer


@dataclass(frozen=True)
class Instance:
    """One object. segmentation: as in the file, for `dsgnn.data.polygons`. parts: its outlines,
    each some (N, 2) float32 XY rings in photo pixels; a part is filled by the even-odd rule (so a
    ring may be a hole), parts are united. visiting_order: lowest = looked at first. human_rank: 1 =
    most looked at. fixations: how many of the photo's fell on it. Each of these is None where the
    file does not say.
    """

    kind: str
    segmentation: Any
    parts: tuple[tuple[np.ndarray, ...], ...]
    visiting_order: int | None = None
    human_rank: int | None = None
    fixations: int | None = None

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
    """One photo of a COCO-format file, not read yet, without its crowd regions.

    fixations: how many there were in all, None where the file does not say. held_out: the file
    keeps the photo from being trained on. human: it keeps the photo for measuring against people,
    so that nothing is trained or chosen on it. complete: all its objects are annotated; where they
    are not, what no mask covers may be anything. crowds: segmentations of regions with several
    objects that are not told apart.
    """

    id: int
    path: Path
    height: int
    width: int
    instances: tuple[Instance, ...]
    fixations: int | None = None
    held_out: bool = False
    human: bool = False
    complete: bool = True
    crowds: tuple[Any, ...] = ()

    @property
    def seen_by_people(self) -> bool:
        """Whether it is known how people look at each object."""
        return self.fixations is not None or any(i.human_rank is not None for i in self.instances)

    @cached_property
    def human_ranks(self) -> np.ndarray:
        """Ranks by people: (G,) int64, 1 = most looked at, 0 = not ranked.

        Where the file has fixations only, they order the objects, and those with fewer than
        `MIN_FIXATIONS` or less than `MIN_SHARE` of the photo's are not ranked.
        """
        ranks = np.array([i.human_rank or 0 for i in self.instances], np.int64)
        if ranks.any() or not self.fixations:
            return ranks
        counts = np.array([i.fixations or 0 for i in self.instances])
        looked_at = (counts >= MIN_FIXATIONS) & (counts >= MIN_SHARE * self.fixations)
        order = np.argsort(-counts, kind="stable")
        order = order[looked_at[order]]
        ranks[order] = np.arange(1, len(order) + 1)
        return ranks

    @property
    def shares(self) -> np.ndarray | None:
        """Shares of looks: (G,) float64 in 0…1, or None where the file counts no fixations."""
        if not self.fixations:
            return None
        return np.array([i.fixations or 0 for i in self.instances]) / self.fixations

    def masks(self) -> np.ndarray:
        """The instances as COCO's tools draw them: (G, height, width) bool."""
        size = self.height, self.width
        return stack_masks(
            [segmentation_to_mask(i.segmentation, *size) for i in self.instances], size
        )

    def known(self) -> np.ndarray:
        """Where an object that is there is annotated: (height, width) bool."""
        size = self.height, self.width
        known = np.full(size, self.complete)
        for crowd in self.crowds:
            known &= ~segmentation_to_mask(crowd, *size)
        return known

    def read(self) -> np.ndarray:
        """Read the photo: (height, width, 3) uint8 RGB. Raises DataError if that fails."""
        return read_photo(self.path, size=(self.height, self.width))


def read_photos(
    source: Path | str, images: Path | str | None = None, problems: list[str] | None = None
) -> list[Photo]:
    """Read a COCO-format file into photos sorted by id; pixels stay on disk.

    source: the JSON file, or a folder with `instances.json` in it. images: folder of the photos,
    by default `images/` beside the JSON file, or the JSON file's folder if there is none.
    problems: takes a message for each entry that is wrong, which is then left out; without it the
    first raises DataError. The messages name file and field. Crowd regions (`iscrowd` 1) are left
    out. Raises DataError for a file that is missing or not of this form at all.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "instances.json"
    try:
        content = read_json(path, dict)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a COCO JSON file or its folder") from None
    if images is None:
        images = path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    lists = {
        name: enumerate(field(content, name, list, f"{path}"))
        for name in ("categories", "images", "annotations")
    }

    kinds: dict[int, str] = {}
    for i, category in lists["categories"]:
        with _noted(problems):
            where = f"{path}: categories[{i}]"
            kinds[field(category, "id", int, where)] = field(category, "name", str, where)
    photos: dict[int, dict[str, Any]] = {}
    for i, entry in lists["images"]:
        with _noted(problems):
            where = f"{path}: images[{i}]"
            number = field(entry, "id", int, where)
            if number in photos:
                raise DataError(f"{where}.id {number} occurs twice")
            photos[number] = {
                "id": number,
                "path": Path(images)
                / inside(field(entry, "file_name", str, where), f"{where}.file_name"),
                "height": whole_number(entry, "height", where, least=1),
                "width": whole_number(entry, "width", where, least=1),
                "fixations": _optional(entry, "fixations", where),
                "held_out": entry.get("held_out") is True,
                "human": entry.get("human") is True,
                "complete": entry.get("complete") is not False,
            }
    instances: dict[int, list[Instance]] = {number: [] for number in photos}
    crowds: dict[int, list[Any]] = {number: [] for number in photos}
    for i, annotation in lists["annotations"]:
        with _noted(problems):
            where = f"{path}: annotations[{i}]"
            number = field(annotation, "image_id", int, where)
            if number not in photos:
                raise DataError(f"{where}.image_id {number} is not the id of any image")
            category = field(annotation, "category_id", int, where)
            if category not in kinds:
                raise DataError(f"{where}.category_id {category} is not in categories")
            if annotation.get("iscrowd", 0):
                crowds[number].append(annotation.get("segmentation"))
            else:
                instances[number].append(
                    _instance(annotation, where, kinds[category], photos[number])
                )
    return [
        Photo(**photos[number], instances=tuple(instances[number]), crowds=tuple(crowds[number]))
        for number in sorted(photos)
    ]


def _instance(annotation: dict[str, Any], where: str, kind: str, photo: dict[str, Any]) -> Instance:
    fixations = _optional(annotation, "fixations", where)
    if fixations is not None and (photo["fixations"] or -1) < fixations:
        raise DataError(
            f"{where} has {fixations} fixations, but the image it is on has "
            f"{photo['fixations']} in all; give images[].fixations, the number of all of them"
        )
    return Instance(
        kind,
        annotation.get("segmentation"),
        _parts(annotation, where, (photo["height"], photo["width"])),
        _optional(annotation, "visiting_order", where, least=None),
        _optional(annotation, "human_rank", where, least=1),
        fixations,
    )


class CocoReader:
    """The photos of a COCO-format file as ranked samples, read lazily, sorted by id.

    source, images, problems: as for `read_photos`. ranks: where the ranks come from.

    - "visiting_order": from the annotations. Objects without it are clutter.
    - "human": from the annotations' `human_rank` or `fixations`. Only the photos that people looked
      at are samples, as of the others nothing is known.
    - a `PredictLooks`: from the shares of the looks that it predicts, whatever the file says.
    - None: "visiting_order" where the file has it, and "human" where people looked at every photo.

    ranks_from: where they come from, in words. A sample without a salient object has G = 0.
    Raises OptionError for other ranks and where None finds no ranks, DataError where the file lacks
    these ranks or two objects of a photo share one.
    """

    def __init__(
        self,
        source: Path | str,
        images: Path | str | None = None,
        ranks: str | PredictLooks | None = None,
        problems: list[str] | None = None,
    ) -> None:
        known = ("visiting_order", "human")
        if isinstance(ranks, str) and ranks not in known:
            raise OptionError(f"ranks must be one of {', '.join(known)}, got {ranks!r}")
        self.photos = read_photos(source, images, problems)
        has = {
            "visiting_order": any(_visited(photo) for photo in self.photos),
            "human": any(photo.seen_by_people for photo in self.photos),
        }
        if isinstance(ranks, str) and not has[ranks]:
            lacking = {"human": "human_rank or annotations[].fixations"}.get(ranks, ranks)
            raise DataError(f"{source}: there is no annotations[].{lacking}")
        if ranks is None:
            has["human"] = all(photo.seen_by_people for photo in self.photos)
            ranks = next((name for name in known if has[name]), None)
        self.ranks = ranks or needed(None, source)
        origins = {"visiting_order": ANNOTATIONS, "human": PEOPLE}
        self.ranks_from = origins.get(str(self.ranks), PREDICTED)
        if self.ranks == "human":
            self.photos = [photo for photo in self.photos if photo.seen_by_people]
        self._names = unique_names([photo.path for photo in self.photos])
        for photo in self.photos:
            with _noted(problems):
                _check_order(f"{source}", photo)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        photo = self.photos[index]
        image, masks = photo.read(), photo.masks()
        if self.ranks == "visiting_order":
            order = np.array(_visited(photo), np.int64)
        elif self.ranks == "human":
            order = np.argsort(photo.human_ranks, kind="stable")
            order = order[photo.human_ranks[order] > 0]
        else:
            assert not isinstance(self.ranks, str)
            name = self._names[index]
            return taught(image, masks, self.ranks(image), name, photo.known() | masks.any(0))
        masks = masks[order]
        return Sample(image, masks, np.arange(len(masks), 0, -1), self._names[index])


def _visited(photo: Photo) -> list[int]:
    """Indices of the instances that were visited, the first visited first."""
    orders = enumerate(x.visiting_order for x in photo.instances)
    visited = {i: order for i, order in orders if order is not None}
    return sorted(visited, key=visited.__getitem__)


def _check_order(source: str, photo: Photo) -> None:
    for name in ("visiting_order", "human_rank"):
        values = [getattr(instance, name) for instance in photo.instances]
        given = [value for value in values if value is not None]
        if len(set(given)) < len(given):
            raise DataError(
                f"{source}: annotations[].{name} of image {photo.id} must differ, got {given}"
            )


@contextmanager
def _noted(problems: list[str] | None) -> Iterator[None]:
    """Note what is wrong and go on, where there is a list to note it in."""
    try:
        yield
    except DataError as error:
        if problems is None:
            raise
        problems.append(str(error))


def _optional(entry: Any, name: str, where: str, least: int | None = 0) -> int | None:
    """A whole number, or None where the entry has null or nothing."""
    return None if entry.get(name) is None else whole_number(entry, name, where, least)


def stack_masks(masks: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Stack (H, W) bool masks to (G, H, W), also when there are none. size is (H, W)."""
    return np.stack(masks) if masks else np.zeros((0, *size), bool)


def _parts(
    annotation: dict[str, Any], where: str, size: tuple[int, int]
) -> tuple[tuple[np.ndarray, ...], ...]:
    name = f"{where}.segmentation"
    outline: Any = annotation.get("segmentation")
    runs = outline if isinstance(outline, list) else [outline]
    if runs and all(isinstance(run, dict) for run in runs):
        try:
            mask = segmentation_to_mask(outline, *size)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        if not mask.any():
            raise DataError(f"{name} marks no pixel; remove the annotation")
        return (_rings(mask),)
    if isinstance(outline, list) and outline:
        for k, polygon in enumerate(outline):
            numbers = isinstance(polygon, list) and all(
                isinstance(v, int | float) and abs(v) <= FARTHEST for v in polygon
            )
            if not numbers or len(polygon) < 6 or len(polygon) % 2:
                raise DataError(
                    f"{name}[{k}] must be finite x, y pairs of three points or more, none "
                    f"beyond ±{FARTHEST} pixels, got {str(polygon)[:60]}"
                )
        return tuple((np.asarray(p, np.float32).reshape(-1, 2),) for p in outline)
    raise DataError(f"{name} must be a list of polygons or run lengths, got {outline!r}")


def _rings(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rings which, filled by the even-odd rule, give the mask (h, w) back: pixel borders, found as
    contours of a grid twice as fine, whose pixel centres lie at a quarter of the way inside.
    """
    fine = np.ascontiguousarray(mask).view(np.uint8).repeat(2, 0).repeat(2, 1)
    rings, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return tuple((ring.reshape(-1, 2).astype(np.float32) + 0.5) / 2 for ring in rings)
