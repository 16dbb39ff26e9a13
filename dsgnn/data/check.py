"""What is wrong with a data set, all of it, before hours of training find out one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from dsgnn.data.records import Joined, RankedImages, Record, Samples
from dsgnn.data.sample import Sample
from dsgnn.runtime.errors import DataError


def check_data(
    data: Samples, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> list[str]:
    """List the problems of a split, one message each, naming file and field; none: an empty list.

    data: what `dsgnn.data.open_data` gives. progress: wraps the image numbers, such as `tqdm`.
    Reads every image. Found: no images or a number other than the published one, names that occur
    twice, broken annotations, missing or unreadable or resized images, broken segmentations,
    objects without a pixel, tied ranks, gaps in the ranks.
    """
    whole = data if isinstance(data, Joined) else Joined([data])
    problems = [problem for part in whole.parts for problem in _count_problems(part)]
    seen: dict[str, str] = {}
    for number in progress(range(len(whole))):
        part, index = whole.place(number)
        problems += _image_problems(whole.parts[part], index, seen)
    return problems


def _count_problems(data: Samples) -> Iterator[str]:
    if not len(data):
        yield f"{type(data).__name__}: there are no images in this split"
    elif isinstance(data, RankedImages) and data.published_images not in (None, len(data)):
        yield (
            f"{type(data).__name__}, split {data.split}: {len(data)} images, "
            f"{data.published_images} were published; is the download complete?"
        )


def _image_problems(data: Samples, index: int, seen: dict[str, str]) -> Iterator[str]:
    if not isinstance(data, RankedImages):  # these readers check when they are opened
        try:
            sample = data[index]
        except (ValueError, OSError) as error:
            yield str(error)
            return
        yield from _name_problems(sample.name, f"image {index}", seen)
        yield from _empty_objects(sample)
        return
    try:
        record = data.record(index)
    except DataError as error:
        yield str(error)
        return
    yield from _name_problems(record.image.stem, record.where, seen)
    yield from _rank_problems(record)
    try:
        height, width = record.read_image().shape[:2]
    except DataError as error:
        yield str(error)
        return
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


def _empty_objects(sample: Sample) -> Iterator[str]:
    for number, mask in enumerate(sample.masks):
        if not mask.any():
            yield f"{sample.name}: object {number} covers no pixel"


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
