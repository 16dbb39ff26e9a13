"""Made-up scenes with exact masks, ranked by where a network expects people to look.

    scenes = CompositeScenes(predict_looks, "material/cutouts", "material/backgrounds", "photos")
    scenes[7]                          # a Sample, the same one for ever
    scenes.scene(7, size=(192, 256))   # scene number 7 on another canvas

Kinds of scenes, and the share of each (`SHARES`, and `TRAIN_SHARES` with more of what is hard;
what needs a folder that was not given is left out and the rest scaled up, so without folders
everything is procedural):

    photo       a COCO photo as it is: random crop (`ZOOMED` of them onto one object, so that
                it fills or exceeds the frame), flip, jitter; for training some are turned a little
    cutouts     1 to 8 cut-outs tried, and some clutter on a background
    copies      objects copied out of COCO photos, on backgrounds and `ONTO_PHOTO` onto others
    procedural  shapes and cut-outs on textures
    empty       nothing salient: a background or part of a photo, often with clutter

Everything in a scene has its share of the predicted looks (`dsgnn.data.ranks`), whether it was
pasted as an object, pasted as clutter, or was in the photo before; nothing is salient for having
been pasted. What draws less than `MIN_SHARE` is clutter, and so is what is hidden by more than 60%;
clutter that draws `NOTICED` or more may be found or not.
A pasted object is taken off again where its place is not clear, because its share lies within
`CLEAR` of the next one's or of the limit of clutter, so that the order can be learnt. Objects of
photos stay and are ordered however close they are.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from dsgnn.data.coco import Photo, stack_masks
from dsgnn.data.ranks import (
    CLEAR,
    MAX_OBJECTS,
    MIN_AREA,
    MIN_SHARE,
    NOTICED,
    PREDICTED,
    PredictLooks,
    most_looked_at,
    shares_under,
)
from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import OptionError
from dsgnn.scenes import procedural
from dsgnn.scenes.material import FURNITURE, Cutout, Library, resized
from dsgnn.scenes.paint import Layer, develop, flatten, make_layer

SHARES = {"photo": 0.35, "cutouts": 0.25, "copies": 0.22, "procedural": 0.10, "empty": 0.08}
TRAIN_SHARES = {"photo": 0.4, "cutouts": 0.14, "copies": 0.36, "procedural": 0.02, "empty": 0.08}
ASPECTS = {(1, 1): 0.3, (4, 3): 0.3, (3, 4): 0.12, (3, 2): 0.13, (2, 3): 0.05, (16, 9): 0.1}
ZOOMED = {"train": 0.25, "test": 0.5}  # share of "photo" that are set on one object
ONTO_PHOTO = {"train": 0.7, "test": 0.4}  # share of "copies" that are pasted onto another photo
MIN_VISIBLE = 0.4  # share of an object that must not be hidden for it to be salient

Size = int | tuple[int, int]
Crop = tuple[np.ndarray, list[np.ndarray], list[float]]


class CompositeScenes:
    """Scenes, each a function of (seed, split, number), of the files in the folders, and of what
    predicts the looks.

    predict_looks: gives the objects their shares of looks. cutouts: folder of RGBA images, which
    may have folders in it. backgrounds: folder of images. coco: folder with `instances.json` and
    `images/`, or such a file. Any of the three may be None. split: "train" or "test"; a fifth of
    the files by name (`held_out`) and the COCO photos whose id is divisible by 5 belong to "test".
    size: longest side in pixels, aspect at random, or (H, W). max_objects: salient ones of a scene
    at most. length: what `len` says; `scene` takes any number. Decoded files are kept in memory.
    Raises OptionError for wrong arguments, DataError for a split with no file in it or for the
    JSON.
    """

    ranks_from = PREDICTED

    def __init__(
        self,
        predict_looks: PredictLooks,
        cutouts: Path | str | None = None,
        backgrounds: Path | str | None = None,
        coco: Path | str | None = None,
        split: str = "train",
        size: Size = 256,
        seed: int = 0,
        max_objects: int = MAX_OBJECTS,
        length: int = 10_000,
    ) -> None:
        if split not in ("train", "test"):
            raise OptionError(f'split must be "train" or "test", got {split!r}')
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise OptionError(f"max_objects must be 1…{MAX_OBJECTS}, got {max_objects}")
        self.predict_looks = predict_looks
        self.split, self.size, self.seed, self.length = split, size, seed, length
        self.max_objects = max_objects
        self.library = library = Library(cutouts, backgrounds, coco, split)
        people = [
            any(x.kind == "person" for x in library.photos[i].instances) for i in library.sources
        ]
        weights = 1.0 + np.array(people, float)
        self._source_weights = weights / weights.sum() if len(weights) else weights
        material = {
            "photo": library.photos,
            "cutouts": library.cutout_files,
            "copies": library.sources,
        }
        wanted = TRAIN_SHARES if split == "train" else SHARES
        self._kinds = [kind for kind in wanted if material.get(kind, True)]
        shares = np.array([wanted[kind] for kind in self._kinds])
        self._shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return self.scene(index)

    def scene(self, number: int, size: Size | None = None) -> Sample:
        """Make the scene of this number, from 0 on. size: as for the class, by default its own."""
        rng = np.random.default_rng([self.seed, self.split == "test", number])
        frame = _frame(rng, self.size if size is None else size)
        kind = self._kinds[rng.choice(len(self._kinds), p=self._shares)]
        if kind == "photo":
            image, outlines, full = self._crop(rng, frame, zoom=ZOOMED[self.split])
            masks, looks = stack_masks(outlines, frame), self.predict_looks(image)
            shares = shares_under(looks, masks)
            salient = self._salient(shares, masks, full, len(masks), self.max_objects)[0]
        else:
            image, masks, looks, shares, salient = self._compose(rng, kind, frame)
        foreground = np.zeros(frame, np.int8)
        for mask, share in zip(masks, shares, strict=True):
            foreground[mask] = -1 if share >= NOTICED else 0  # -1: it may be found or not
        foreground[masks[salient].any(0)] = 1
        as_it_is = kind == "photo" and self.split == "test"
        image = develop(rng, image, 0.6 if as_it_is else 1.0)
        counting_up = np.arange(len(salient), 0, -1)
        order = rng.permutation(len(salient))  # the place in the list must not tell the rank
        name = f"{self.split}-{number:07d}-{kind}"
        return Sample(image, masks[salient][order], counting_up[order], name, foreground, looks)

    def _compose(
        self, rng: np.random.Generator, kind: str, frame: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """Paste objects, and take off those that have no clear place.

        Returns the picture, the visible masks (G, H, W) of all that is in it, the predicted looks,
        each object's share of them (G,), and which objects are salient, most looked at first.
        """
        present: list[np.ndarray] = []
        full: list[float] = []
        if kind == "copies" and rng.random() < ONTO_PHOTO[self.split]:
            background, present, full = self._crop(rng, frame, zoom=0.0)
        else:
            background = self._any_background(rng, frame, kind)
        layers = self._layers(rng, kind, background, len(present))
        limit = 0 if kind == "empty" else self.max_objects
        while True:
            image, visible = flatten(background, present, layers)
            areas = full + [float((layer.alpha > 0.5).sum()) for layer in layers]
            masks, looks = stack_masks(visible, frame), self.predict_looks(image)
            shares = shares_under(looks, masks)
            salient, unclear = self._salient(shares, masks, areas, len(present), limit)
            if not unclear:
                return image, masks, looks, shares, salient
            layers = [x for i, x in enumerate(layers, len(present)) if i not in unclear]

    def _salient(
        self,
        shares: np.ndarray,
        masks: np.ndarray,
        full: list[float],
        movable: int,
        limit: int,
    ) -> tuple[list[int], set[int]]:
        """Salient objects, most looked at first, and those from index `movable` on to be taken off.

        shares: (G,) of the looks. masks: (G, H, W). full: the area of each object in pixels if
        nothing hid it. limit: salient objects at most.
        """
        pixels = np.array([cv2.countNonZero(m.view(np.uint8)) for m in masks], float)
        areas = pixels / np.prod(masks.shape[1:])
        areas[pixels < MIN_VISIBLE * np.array(full)] = 0
        salient = most_looked_at(shares, areas, limit).tolist()
        unclear = {
            i
            for i in range(movable, len(masks))
            if areas[i] >= MIN_AREA and shares[i] >= MIN_SHARE - CLEAR and i not in salient
        }
        unclear |= {i for i in salient if i >= movable and shares[i] < MIN_SHARE + CLEAR}
        for first, second in zip(salient, salient[1:], strict=False):
            if shares[first] - shares[second] < CLEAR:
                # Either will do; the lower one first, as its place in the order is the less sure.
                pasted = [i for i in (second, first) if i >= movable]
                unclear |= set(pasted[:1]) if not {first, second} & unclear else set()
        return salient, unclear

    def _layers(
        self, rng: np.random.Generator, kind: str, background: np.ndarray, present: int
    ) -> list[Layer]:
        """Objects and clutter to paste, back to front."""
        h, w = background.shape[:2]
        layers: list[Layer] = []
        big = kind != "empty" and rng.random() < 0.25
        count = int(rng.choice(8, p=(0.12, 0.14, 0.14, 0.14, 0.12, 0.12, 0.11, 0.11))) + 1
        if kind == "empty":
            count = 0
        elif big:
            count = 1 if rng.random() < 0.6 else int(rng.integers(2, 4))
        elif present:
            count = int(rng.integers(1, 3))
        perspective = rng.random() < 0.7
        for n in range(count):
            if big and n == 0:  # fills the frame or is cut by it
                long_px = rng.uniform(0.6, 1.4) * max(h, w)
                centre = rng.normal(0.5, 0.15, 2) * (w, h)
            else:
                x, foot = np.clip(rng.normal(0.5, 0.25), 0.05, 0.95), rng.uniform(0.2, 0.95)
                near = 0.55 + 0.75 * foot if perspective else 1.0
                long_px = np.exp(rng.uniform(np.log(0.2), np.log(0.85))) * near * min(h, w)
                centre = np.array([x * w, foot * h - 0.3 * long_px])
            layer = make_layer(rng, background, self._object(rng, kind), long_px, centre)
            if layer is not None and not _crowded(layer, layers):
                layers.append(layer)
        for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.55 else 0):
            faint = rng.random() < 0.7
            long_px = np.exp(rng.uniform(np.log(0.05), np.log(0.22))) * min(h, w)
            centre = rng.uniform(0, 1, 2) * (w, h)
            layer = make_layer(rng, background, self._object(rng, kind), long_px, centre, faint)
            if layer is not None:
                layers.append(layer)
        return sorted(layers, key=lambda layer: layer.base)

    def _object(self, rng: np.random.Generator, scene: str) -> Cutout:
        """A cut-out that suits this kind of scene. Now and then it is of another kind, so that an
        object's kind does not give away the scene's."""
        copied = 0.5 if self.split == "train" and self.library.cutout_files else 0.85
        wanted = {"cutouts": 0.05, "copies": copied, "procedural": 0.1, "empty": 0.5}[scene]
        draw = rng.random()
        if self.library.sources and draw < wanted:
            index = int(rng.choice(len(self.library.sources), p=self._source_weights))
            copies = self.library.copies(self.library.sources[index])
            if copies:
                people = np.array([3.0 if c.kind == "person" else 1.0 for c in copies])
                return copies[int(rng.choice(len(copies), p=people / people.sum()))]
        if self.library.cutout_files and rng.random() < (0.4 if scene == "procedural" else 0.93):
            return self.library.cutout(int(rng.integers(len(self.library.cutout_files))))
        return procedural.shape(rng)

    def _crop(self, rng: np.random.Generator, frame: tuple[int, int], zoom: float) -> Crop:
        index = int(rng.integers(len(self.library.photos)))
        photo, image = self.library.photos[index], self.library.photo(index)
        turn = self.split == "train" and rng.random() < 0.5
        return crop_photo(rng, image, photo, frame, zoom, rng.normal(0, 6) if turn else 0.0)

    def _any_background(
        self, rng: np.random.Generator, frame: tuple[int, int], kind: str
    ) -> np.ndarray:
        """A background of size frame (H, W): a file, an empty part of a photo, or a texture."""
        # Photos hold things worth a look that nobody annotated: rarely call a part of one empty.
        from_photo, from_file = {
            "procedural": (0.1, 0.15),
            "empty": (0.2, 0.65),
        }.get(kind, (0.5, 0.5))
        draw = rng.random()
        chosen = None
        if self.library.photos and draw < from_photo:
            chosen = self.library.empty(int(rng.integers(len(self.library.photos))))
        files = self.library.background_files
        if chosen is None and files and draw < from_photo + from_file:
            chosen = self.library.background(int(rng.integers(len(files))))
        if chosen is None:
            return procedural.texture(rng, frame)
        h, w = chosen.shape[:2]
        scale = min(h / frame[0], w / frame[1]) * rng.uniform(0.45, 1)
        ch, cw = max(1, int(frame[0] * scale)), max(1, int(frame[1] * scale))
        y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        part = chosen[y : y + ch, x : x + cw]
        if rng.random() < 0.5:
            part = cv2.flip(part, 1)
        part = resized(part, frame, scale > 1)
        if rng.random() < 0.2:  # out of focus
            part = cv2.GaussianBlur(part, (0, 0), rng.uniform(0.8, 3))
        return part


def _frame(rng: np.random.Generator, size: Size) -> tuple[int, int]:
    """Canvas (H, W): as given, or of a random aspect with this longest side."""
    if not isinstance(size, int):
        return int(size[0]), int(size[1])
    w, h = list(ASPECTS)[rng.choice(len(ASPECTS), p=list(ASPECTS.values()))]
    return round(size * h / max(w, h)), round(size * w / max(w, h))


def _crowded(layer: Layer, others: list[Layer]) -> bool:
    """Whether the box of a layer lies by more than 40% on, or under, one of the others."""
    h, w = layer.alpha.shape
    for other in others:
        oh, ow = other.alpha.shape
        high = min(layer.y + h, other.y + oh) - max(layer.y, other.y)
        wide = min(layer.x + w, other.x + ow) - max(layer.x, other.x)
        if high > 0 and wide > 0 and high * wide > 0.4 * min(h * w, oh * ow):
            return True
    return False


def _turning(degrees: float, frame: tuple[int, int]) -> np.ndarray | None:
    """(2, 3) matrix that turns a frame (H, W) about its middle and fills it; None for none."""
    if not degrees:
        return None
    h, w = frame
    sine, cosine = np.sin(np.radians(abs(degrees))), np.cos(np.radians(degrees))
    fill = cosine + sine * max(h / w, w / h)
    return cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), degrees, fill)


def crop_photo(
    rng: np.random.Generator,
    image: np.ndarray,
    photo: Photo,
    frame: tuple[int, int],
    zoom: float,
    turn: float = 0.0,
) -> Crop:
    """A random window of a photo, flipped or not, resized to frame (H, W), with its objects.

    zoom: share of windows set on one larger object, which then takes 45 to 130% of the frame.
    turn: degrees by which the window is turned about its middle, and enlarged to have no corners.
    Returns the picture, visible masks, and the areas in pixels that MIN_VISIBLE refers to.
    """
    h, w = image.shape[:2]
    aspect = frame[1] / frame[0]
    boxes = [instance.box for instance in photo.instances]
    large = [
        box
        for box, instance in zip(boxes, photo.instances, strict=True)
        if instance.area > 0.01 * h * w and instance.kind not in FURNITURE
    ]
    if large and rng.random() < zoom:
        x0, y0, x1, y1 = large[int(rng.integers(len(large)))]
        fill = rng.uniform(0.45, 1.3)
        ch = max((y1 - y0) / fill, (x1 - x0) / fill / aspect, 80)
        away = rng.normal(0, 0.12, 2) * ch * (aspect, 1)
        middle = (x0 + x1) / 2 + away[0], (y0 + y1) / 2 + away[1]
    else:
        ch = min(h, w / aspect) * rng.uniform(0.6, 1.05)
        middle = rng.uniform(0.3, 0.7) * w, rng.uniform(0.3, 0.7) * h
    # Frame and photo differ in shape: a window may be stretched by up to 15%, no more.
    ch, cw = min(ch, h), min(ch * aspect, w)
    ch, cw = min(ch, 1.15 * cw / aspect), min(cw, 1.15 * ch * aspect)
    x = float(np.clip(middle[0] - cw / 2, 0, w - cw))
    y = float(np.clip(middle[1] - ch / 2, 0, h - ch))
    x, y, cw, ch = int(x), int(y), max(1, int(cw)), max(1, int(ch))
    sx, sy = frame[1] / cw, frame[0] / ch
    part = image[y : y + ch, x : x + cw]
    part = resized(part, frame, sx < 1)
    turned = _turning(turn, frame)
    if turned is not None:
        part = cv2.warpAffine(
            part, turned, frame[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
    masks, full = [], []
    for instance, box in zip(photo.instances, boxes, strict=True):
        if box[2] <= x or box[0] >= x + cw or box[3] <= y or box[1] >= y + ch:
            continue
        mask = instance.draw(frame, (sx, sy), (-x * sx, -y * sy))
        if turned is not None:
            warped = cv2.warpAffine(
                mask.view(np.uint8), turned, frame[::-1], flags=cv2.INTER_NEAREST
            )
            mask = warped.view(bool)
        pixels = cv2.countNonZero(mask.view(np.uint8))
        if pixels == 0:
            continue
        masks.append(mask)
        # A piece of an object at the edge of the window is no object, unless it is large.
        whole = instance.area * sx * sy
        full.append(0.5 * whole if pixels < 0.1 * mask.size else float(pixels))
    if rng.random() < 0.5:
        part = cv2.flip(part, 1)
        masks = [cv2.flip(mask.view(np.uint8), 1).view(bool) for mask in masks]
    return part, masks, full
