"""Material for composite scenes: what a folder of cut-outs, of backgrounds or of photos gives.

Any folder of RGBA images is a folder of cut-outs (the sub-folder names the kind, such as
`animals/birds`), any folder of images one of backgrounds. Every file is held out for testing or
not by its name alone (`held_out`), so that a split never changes when files are added.

    python -m dsgnn.data.material OUT /usr/share/tuxpaint/stamps /usr/share/wallpapers …

collects what is usable from folders of installed packages, as `OUT/cutouts` and
`OUT/backgrounds`; the bundled model used the Debian packages named in `DEBIAN_PACKAGES`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import cv2
import numpy as np

from dsgnn.data.coco import Photo

DEBIAN_PACKAGES = [
    "tuxpaint-stamps-default",
    "plasma-workspace-wallpapers",
    "mate-backgrounds",
    "gnome-backgrounds",
    "mypaint-data-extras",
    "ukui-wallpapers",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
CUTOUT_PX = 384  # longest side kept
BACKGROUND_PX = 768

# Drawings, writing and things nobody would paste, by a part of the path.
DROPPED_FOLDERS = {"cartoon", "symbols", "naturalforces", "flags", "screenshots", "abstract"}
# Photographs of one main object, and drawings that pass for photographs: useless as backgrounds.
DROPPED_BACKGROUNDS = [
    "Picture_0B*",
    "Picture_1A*",
    "friends_by*",
    "free_by*",
    "Kleiber*",
    "LadyBird*",
    "Kite*",
    "Elephants*",
    "pixels-*",
    "SafeLanding*",
    "Autumn*",
    "Float-into*",
    "calla*",
    "goldfish*",
    "the-mouse*",
    "TwoWings*",
    "Garden*",
    "YellowFlower*",
    "FreshFlower*",
    "seeding_by*",
    "greentock*",
    "Aqua.*",
    "licorice-*",
    "FallenLeaf*",
    "Patak*",
    "Altai*",
    "MilkyWay*",
    "ColorfulCups*",
    "Dragonfly*",
    "Wine_by*",
]


def held_out(name: str) -> bool:
    """Whether the file of this name (no folder, no suffix) belongs to the test split: one in five.

    COCO photo ids use `id % 5 == 0` instead.
    """
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


@dataclass(frozen=True)
class Cutout:
    """One object with alpha. rgba: (h, w, 4) uint8, colours multiplied by alpha, so that it can be
    resized and blurred as it is. cut: which of the left, top, right and bottom edges cut the
    object in its photo, so must lie on the frame's edge.
    """

    rgba: np.ndarray
    kind: str
    cut: tuple[bool, bool, bool, bool] = (False, False, False, False)


def image_files(folder: Path | str) -> list[Path]:
    """Every image below a folder, sorted. Raises FileNotFoundError when there is none."""
    files = sorted(
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )
    if not files:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_cutout(path: Path, kind: str) -> Cutout:
    """Read an RGBA image at most `CUTOUT_PX` long, cropped to where it is not transparent.

    Raises ValueError when the file is not an image with an alpha channel or is all transparent.
    """
    bgra = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.dtype != np.uint8 or bgra.ndim != 3 or bgra.shape[2] != 4:
        raise ValueError(f"{path}: a cut-out must be an 8-bit RGBA image")
    x, y, w, h = cv2.boundingRect((bgra[..., 3] > 127).view(np.uint8))
    if w == 0:
        raise ValueError(f"{path}: the image is transparent everywhere")
    rgba = cv2.cvtColor(bgra[y : y + h, x : x + w], cv2.COLOR_BGRA2RGBA)
    return Cutout(_shrink(premultiplied(rgba), CUTOUT_PX), kind)


def premultiplied(rgba: np.ndarray) -> np.ndarray:
    """Multiply the colours of (h, w, 4) uint8 by its alpha."""
    alpha = rgba[..., 3:]
    colours = rgba[..., :3].astype(np.uint16) * alpha // 255
    return np.dstack([colours.astype(np.uint8), alpha])


def read_background(path: Path) -> np.ndarray:
    """Read an image as (h, w, 3) uint8 RGB, at most `BACKGROUND_PX` long."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise ValueError(f"{path}: not a readable image")
    return cv2.cvtColor(_shrink(bgr, BACKGROUND_PX), cv2.COLOR_BGR2RGB)


def photo_cutouts(photo: Photo, image: np.ndarray, min_px: int = 64) -> Iterator[Cutout]:
    """The well visible objects of a photo, feathered: at least min_px² in area, in one piece, not
    covered by others along more than 15% of their outline, cut by at most one edge of the photo.
    """
    h, w = image.shape[:2]
    masks = [instance.draw((h, w)).view(np.uint8) for instance in photo.instances]
    count = sum(masks, np.zeros((h, w), np.uint8))
    for i, instance in enumerate(photo.instances):
        if len(instance.parts) != 1 or cv2.countNonZero(masks[i]) < min_px**2:
            continue
        x, y, bw, bh = cv2.boundingRect(masks[i])
        cut = (x <= 2, y <= 2, x + bw >= w - 2, y + bh >= h - 2)
        ring = cv2.dilate(masks[i], np.ones((9, 9), np.uint8)) - masks[i]
        covered = cv2.countNonZero(ring * (count - masks[i]))
        if sum(cut) > 1 or covered > 0.15 * cv2.countNonZero(ring):
            continue
        # The outline is drawn a little too wide: go in a pixel, then soften, but not at a cut.
        inner = cv2.erode(masks[i], np.ones((3, 3), np.uint8))
        alpha = cv2.GaussianBlur(
            inner * np.float32(255), (0, 0), 1.0, None, 0, cv2.BORDER_REPLICATE
        )
        window = slice(y, y + bh), slice(x, x + bw)
        rgba = np.dstack([image[window], alpha[window].astype(np.uint8)])
        yield Cutout(_shrink(premultiplied(rgba), CUTOUT_PX), instance.kind, cut)


def empty_region(
    photo: Photo, image: np.ndarray, rng: np.random.Generator, min_px: int = 128
) -> np.ndarray | None:
    """A random part of a photo with no annotated object in it, at least min_px square, or None."""
    h, w = image.shape[:2]
    taken = np.zeros((h, w), bool)
    for instance in photo.instances:
        taken |= instance.draw((h, w))
    sums = cv2.integral(taken.view(np.uint8))
    best = None
    for _ in range(60):
        ch, cw = (int(rng.integers(min_px, side + 1)) if side > min_px else side for side in (h, w))
        y, x = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        objects = sums[y + ch, x + cw] - sums[y, x + cw] - sums[y + ch, x] + sums[y, x]
        if objects == 0 and min(ch, cw) >= min_px and (best is None or ch * cw > best.size // 3):
            best = image[y : y + ch, x : x + cw]
    return best


def collect(sources: Iterable[Path | str], out: Path | str) -> tuple[int, int]:
    """Pick cut-outs and backgrounds out of folders of mixed images and write them below `out`.

    Cut-outs are 8-bit RGBA images with 10-97% opaque pixels; backgrounds are opaque, at least
    512 px long. Both must be photographic: few flat pixels (|Laplacian| < ½ resp. ≤ 1 on less than
    18% of a cut-out, 55% of a background). Links, drawings (`DROPPED_FOLDERS`) and photos of one
    main object (`DROPPED_BACKGROUNDS`) are left out. Returns the numbers written.
    """
    out = Path(out)
    counts = [0, 0]
    seen: set[str] = set()
    for source in map(Path, sources):
        for path in image_files(source):
            folders = path.relative_to(source).parts[:-1]
            name = _package_name(path)
            mirror = path.stem.endswith("_mirror")
            if path.is_symlink() or mirror or DROPPED_FOLDERS & set(folders) or name in seen:
                continue
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if image is None or image.dtype != np.uint8 or image.ndim != 3:
                continue
            if image.shape[2] == 4 and _is_photographic_cutout(image):
                target = out / "cutouts" / Path(*folders) / f"{name}.png"
                image = _shrink_rgba(image)
            elif _is_photographic_background(image, name):
                target = out / "backgrounds" / f"{name}.jpg"
                image = _shrink(image[..., :3], BACKGROUND_PX)
            else:
                continue
            seen.add(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(target), image):
                raise OSError(f"{target}: could not be written")
            counts[target.suffix == ".jpg"] += 1
    return counts[0], counts[1]


def _package_name(path: Path) -> str:
    """File name without suffix; KDE wallpapers are named by the folder above `contents`."""
    parts = path.parts
    return parts[parts.index("contents") - 1] if "contents" in parts else path.stem


def _flat_share(bgr: np.ndarray, where: np.ndarray, limit: float) -> float:
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).astype(np.float32)
    return float((np.abs(cv2.Laplacian(grey, cv2.CV_32F))[where] < limit).mean())


def _is_photographic_cutout(bgra: np.ndarray) -> bool:
    opaque = float((bgra[..., 3] > 127).mean())
    small = _shrink(bgra, 192)
    inside = cv2.erode((small[..., 3] > 200).view(np.uint8), np.ones((5, 5))) > 0
    return (
        min(bgra.shape[:2]) >= 64
        and 0.1 < opaque < 0.97
        and cv2.countNonZero(inside.view(np.uint8)) >= 50
        and _flat_share(small[..., :3], inside, 0.5) < 0.18
    )


def _is_photographic_background(image: np.ndarray, name: str) -> bool:
    if max(image.shape[:2]) < 512 or any(fnmatch(name, p) for p in DROPPED_BACKGROUNDS):
        return False
    if image.shape[2] == 4 and image[..., 3].min() < 255:
        return False
    small = _shrink(np.ascontiguousarray(image[..., :3]), 640)
    return _flat_share(small, np.ones(small.shape[:2], bool), 1.01) < 0.55


def _shrink(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _shrink_rgba(rgba: np.ndarray) -> np.ndarray:
    """Shrink with straight alpha kept free of the colours of transparent pixels."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    weighted = _shrink(np.dstack([rgba[..., :3] * alpha, rgba[..., 3]]), CUTOUT_PX)
    alpha = np.maximum(weighted[..., 3:] / 255, 1e-3)
    colours = np.clip(weighted[..., :3] / alpha, 0, 255)
    return np.rint(np.dstack([colours, weighted[..., 3]])).astype(np.uint8)


def _main() -> None:
    import click

    @click.command(help="Collect cut-outs and backgrounds from SOURCES into OUT.")
    @click.argument("out", type=click.Path(path_type=Path))
    @click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True))
    def command(out: Path, sources: tuple[str, ...]) -> None:
        cutouts, backgrounds = collect(sources, out)
        click.echo(f"{out}: {cutouts} cut-outs, {backgrounds} backgrounds")

    command()


if __name__ == "__main__":
    _main()
