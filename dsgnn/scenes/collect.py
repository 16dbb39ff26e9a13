"""Picking material for composite scenes out of folders of mixed images, such as installed packages.

    python -m dsgnn.scenes.collect OUT /usr/share/tuxpaint/stamps /usr/share/wallpapers …
    python -m dsgnn.scenes.collect OUT --masks duts

writes what is usable to `OUT/cutouts` and `OUT/backgrounds`; --masks takes the objects of photos
with one mask each (`dsgnn.data.binary`), of their training split only. The bundled model used DUTS
and the Debian packages `DEBIAN_PACKAGES`, whose images lie in `DEBIAN_FOLDERS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import click
import cv2
import numpy as np

from dsgnn.data.binary import binary_split, read_binary
from dsgnn.scenes.material import (
    BACKGROUND_PX,
    CUTOUT_PX,
    image_files,
    mask_cutout,
    shrink,
    straight,
)

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
DEBIAN_FOLDERS = [
    "/usr/share/tuxpaint/stamps",
    "/usr/share/wallpapers",
    "/usr/share/backgrounds",
    "/usr/share/mypaint/backgrounds",
]

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
                image = shrink(image[..., :3], BACKGROUND_PX)
            else:
                continue
            seen.add(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(target), image):
                raise OSError(f"{target}: could not be written")
            counts[target.suffix == ".jpg"] += 1
    return counts[0], counts[1]


def collect_objects(folder: Path, out: Path) -> int:
    """Cut out the objects of photos with one mask each, and write them below `out/cutouts`.

    folder: as for `dsgnn.data.binary`; only the photos of its training split are used, and of these
    the ones whose mask is one part that no edge cuts. Returns the number written. Raises DataError
    for a broken photo or mask.
    """
    target = out / "cutouts" / "salient"
    written = 0
    for photo in read_binary(folder):
        if binary_split(photo.path.name) != "train":
            continue
        image = photo.read()
        cutout = mask_cutout(image, photo.read_mask(image.shape[:2]))
        if cutout is None:
            continue
        path = target / f"{photo.path.stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), cv2.cvtColor(straight(cutout.rgba), cv2.COLOR_RGBA2BGRA)):
            raise OSError(f"{path}: could not be written")
        written += 1
    return written


def _package_name(path: Path) -> str:
    """File name without suffix; KDE wallpapers are named by the folder above `contents`."""
    parts = path.parts
    return parts[parts.index("contents") - 1] if "contents" in parts else path.stem


def _flat_share(bgr: np.ndarray, where: np.ndarray, limit: float) -> float:
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).astype(np.float32)
    return float((np.abs(cv2.Laplacian(grey, cv2.CV_32F))[where] < limit).mean())


def _is_photographic_cutout(bgra: np.ndarray) -> bool:
    opaque = float((bgra[..., 3] > 127).mean())
    small = shrink(bgra, 192)
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
    small = shrink(np.ascontiguousarray(image[..., :3]), 640)
    return _flat_share(small, np.ones(small.shape[:2], bool), 1.01) < 0.55


def _shrink_rgba(rgba: np.ndarray) -> np.ndarray:
    """Shrink with straight alpha kept free of the colours of transparent pixels."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    weighted = shrink(np.dstack([rgba[..., :3] * alpha, rgba[..., 3]]), CUTOUT_PX)
    return straight(weighted)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, type=click.Path(exists=True))
@click.option(
    "--masks",
    metavar="FOLDER",
    type=click.Path(exists=True, path_type=Path),
    help="Photos with one binary mask each, whose objects are cut out.",
)
def main(out: Path, sources: tuple[str, ...], masks: Path | None) -> None:
    """Collect cut-outs and backgrounds from SOURCES into OUT."""
    if not sources and masks is None:
        raise click.UsageError("give SOURCES, or --masks, or both")
    cutouts, backgrounds = collect(sources, out)
    if masks is not None:
        cutouts += collect_objects(masks, out)
    click.echo(f"{out}: {cutouts} cut-outs, {backgrounds} backgrounds")


if __name__ == "__main__":
    main()
