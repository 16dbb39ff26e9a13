"""What is wrong with a data set, all of it, before hours of training find out one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dsgnn.data import open_data
from dsgnn.data.binary import BinaryPhoto
from dsgnn.data.gaze import GazePhoto
from dsgnn.data.people import MeasuredPhoto, only_measures, open_people
from dsgnn.data.ranks import PredictLooks
from dsgnn.data.records import Joined, RankedImages, Record, Samples, ranks_from
from dsgnn.runtime.errors import DataError, DsgnnError, OptionError

Progress = Callable[[Iterable[int]], Iterable[int]]  # wraps the image numbers, such as `tqdm`
COMMON_SIZES = 3  # how many of the commonest sizes are told


@dataclass(frozen=True)
class DataReport:
    """What a check found.

    problems: what is wrong, one message each, naming file and field. remarks: what may be as it is
    meant. images: how many were looked at. objects: how many of them have how many objects.
    sizes: how many have which (height, width) in pixels. lacks_ranks: whether there are none, and
    nothing predicts them.
    """

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    images: int = 0
    objects: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lacks_ranks: bool = False

    def facts(self) -> list[str]:
        """What whoever trains needs to know, one line each."""
        lines = []
        if self.objects:
            total = sum(count * images for count, images in self.objects.items())
            spread = ", ".join(f"{n}: {images}" for n, images in sorted(self.objects.items()))
            mean = total / sum(self.objects.values())
            lines.append(f"objects per image: {mean:.2f} on average (objects: images) {spread}")
        if self.sizes:
            common = self.sizes.most_common(COMMON_SIZES)
            shown = ", ".join(f"{w}×{h}: {images}" for (h, w), images in common)
            rest = len(self.sizes) - len(common)
            lines.append(
                f"width×height in pixels: {shown}" + (f", and {rest} other sizes" if rest else "")
            )
        return lines


def check_folder(
    spec: str, split: str, predict_looks: PredictLooks | None = None, progress: Progress = iter
) -> DataReport:
    """Check a split of whatever `dsgnn.data.open_data` or `dsgnn.data.people.open_people` opens.

    predict_looks: ranks the objects of data without ranks; where it would be needed and is missing,
    all but the ranks is checked. Reads every image. Raises what these functions raise where nothing
    could be looked at.
    """
    problems: list[str] = []
    if only_measures(spec):
        report = check_people(open_people(spec, split, problems), progress)
    else:
        try:
            data = open_data(spec, split, predict_looks, problems)
        except OptionError as error:
            if error.about != ("predict_looks",):
                raise
            problems.clear()
            report = check_data(open_data(spec, split, _everywhere, problems), progress)
            report.objects.clear()  # which of them are salient is not known
            report.remarks[-1] = f"there are no ranks: {error}"
            report = replace(report, lacks_ranks=True)
        else:
            report = check_data(data, progress)
    report.problems[:0] = problems
    return report


def splits_of(spec: str) -> dict[str, int]:
    """The splits that a data set has, and how many images each."""
    found = {}
    for split in ("train", "val", "test", "all"):
        try:
            if only_measures(spec):
                found[split] = len(open_people(spec, split, []))
            else:
                found[split] = len(open_data(spec, split, _everywhere, []))
        except (DsgnnError, FileNotFoundError):
            continue
    return found


def _everywhere(image: np.ndarray) -> np.ndarray:
    """Stands for predicted looks where the ranks do not matter."""
    return np.ones((1, 1), np.float32)


def check_data(data: Samples, progress: Progress = iter) -> DataReport:
    """Check the images of a split.

    data: what `dsgnn.data.open_data` gives. Reads every image. Problems are names that occur twice,
    broken annotations, missing or unreadable or resized images, broken segmentations, objects
    without a pixel, tied ranks, gaps in the ranks, and a split without images. A number of images
    other than the published one is a remark, as the folder may be one's own.
    """
    whole = data if isinstance(data, Joined) else Joined([data])
    report = DataReport([], [], len(whole))
    for part in whole.parts:
        _check_count(part, report)
    seen: dict[str, str] = {}
    for number in progress(range(len(whole))):
        place, index = whole.place(number)
        report.problems.extend(_image_problems(whole.parts[place], index, seen, report))
    report.remarks.append(f"ranks come from {ranks_from(data)}")
    return report


def check_people(photos: Sequence[MeasuredPhoto], progress: Progress = iter) -> DataReport:
    """Check photos of which it is known what people look at. Reads every photo and mask."""
    report = DataReport([], [], len(photos))
    if not photos:
        report.problems.append("there are no photos in this split")
    for number in progress(range(len(photos))):
        photo = photos[number]
        try:
            size = photo.read().shape[:2]
            report.sizes[size] += 1
            if isinstance(photo, BinaryPhoto) and not photo.read_mask(size).any():
                report.problems.append(f"{photo.mask}: the mask is empty")
        except DataError as error:
            report.problems.append(str(error))
            continue
        if isinstance(photo, GazePhoto):
            if not len(photo.points):
                report.problems.append(f"{photo.path.name} has no fixation that counts")
            elif not len(photo.points_inside):
                report.problems.append(f"{photo.path.name}: all fixations lie outside of it")
    return report


def _check_count(data: Samples, report: DataReport) -> None:
    if not len(data):
        report.problems.append(f"{_form(data)}there are no images in this split")
    elif isinstance(data, RankedImages) and data.published_images not in (None, len(data)):
        report.remarks.append(
            f"{_form(data)}{len(data)} images in the split {data.split}, "
            f"{data.published_images} were published; if this is a copy of the published data set, "
            "the download is not complete"
        )


def _form(data: Samples) -> str:
    """What a line about a part of the data begins with, such as "ASSR: "; "" for made-up scenes."""
    name, reader, _ = type(data).__name__.partition("Reader")
    return f"{name.upper()}: " if reader else ""


def _image_problems(
    data: Samples, index: int, seen: dict[str, str], report: DataReport
) -> Iterator[str]:
    """Also counts objects and sizes in the report."""
    if not isinstance(data, RankedImages):  # these readers check when they are opened
        try:
            sample = data[index]
        except (DsgnnError, OSError) as error:
            yield str(error)
            return
        report.objects[len(sample.masks)] += 1
        report.sizes[sample.image.shape[:2]] += 1
        yield from _name_problems(sample.name, f"image {index}", seen)
        for number, mask in enumerate(sample.masks):
            if not mask.any():
                yield f"{sample.name}: object {number} covers no pixel"
        return
    try:
        record = data.record(index)
    except DataError as error:
        yield str(error)
        return
    report.objects[len(record.objects)] += 1
    yield from _name_problems(record.image.stem, record.where, seen)
    yield from _rank_problems(record)
    try:
        height, width = record.read_image().shape[:2]
    except DataError as error:
        yield str(error)
        return
    report.sizes[height, width] += 1
    for where in record.objects:
        try:
            if not record.draw(where, height, width).any():
                yield f"{where}.segmentation: covers no pixel of the {width}x{height} image"
        except DataError as error:
            yield str(error)


def _name_problems(name: str, where: str, seen: dict[str, str]) -> Iterator[str]:
    """Results and predictions are told apart by the name alone."""
    if name in seen:
        yield f"{where}: the image {name} occurs twice, first at {seen[name]}"
    seen.setdefault(name, where)


def _rank_problems(record: Record) -> Iterator[str]:
    shown = sorted(record.saliency)
    steps = np.diff(np.array(shown) / record.step)
    if (np.abs(steps) < 1e-6).any():
        yield f"{record.where}: tied ranks {shown}; they are read in the order of the file"
    elif (np.abs(steps - 1) > 1e-6).any():
        yield (
            f"{record.where}: gaps in the ranks {shown}, expected steps of {record.step}; they are "
            "closed up when read"
        )
