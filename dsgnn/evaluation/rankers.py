"""What gives the rankings that are measured: a network, an artifact, or a file of predictions.

Only checkpoints need PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dsgnn.data.polygons import segmentation_to_mask
from dsgnn.data.sample import Sample
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.backends import check_threads
from dsgnn.runtime.disk.documents import read_document
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA
from dsgnn.runtime.errors import CheckpointError, DataError, OptionError
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.ranking import RankedObject, Ranking
from dsgnn.runtime.run.lanes import lanes_for, threads_beside

if TYPE_CHECKING:
    from dsgnn.model import DSGNN

Rank = Callable[[Sample], Ranking]
Facts = Mapping[str, Any]  # the `model` entry of results.json


def model_ranker(
    model: DSGNN, rule: Rule | None = None, if_none: str = "all", specks: str = "keep"
) -> Rank:
    """Rank with a network in this process, in the mode and on the device it is.

    rule: of the letterbox, by default the longest side at the configuration's size.
    """
    import torch

    from dsgnn.model import normalise

    rule = rule or LongestSide(model.config.size)
    device = next(model.parameters()).device

    def rank(sample: Sample) -> Ranking:
        padded, geometry = letterbox(sample.image, rule)
        with torch.inference_mode():
            output = model(normalise(torch.from_numpy(padded)[None].to(device)))
        saliency, score, masks, *attention = (x[0].float().cpu().numpy() for x in output.answers())
        config = model.config
        return postprocess(
            saliency,
            score,
            masks,
            geometry,
            config.threshold,
            if_none,
            attention[0] if attention else None,
            config.order,
            specks,
            config.nms_iou,
        )

    return rank


def threads_of(
    model: Path | None, backend: str, threads: int | None, lanes: int | None
) -> int | None:
    """CPU threads of one inference: as asked, or few where artifacts rank side by side."""
    beside = _is_artifact(model) and lanes != 1
    return threads_beside(backend) if beside and threads is None else threads


def lanes_of(model: Path | None, facts: Facts, threads: int | None, images: int) -> int:
    """How many images to measure at once. One, except by artifacts: PyTorch uses all cores for one
    image, and predictions are only looked up."""
    return lanes_for(threads or 1, facts["device"], images) if _is_artifact(model) else 1


def _is_artifact(model: Path | None) -> bool:
    return model is not None and model.suffix not in (".safetensors", ".pth", ".pt")


def open_ranker(
    model: Path | None,
    predictions: Path | None,
    size: tuple[int, int] | None,
    if_none: str,
    specks: str,
    backend: str,
    device: str,
    threads: int | None,
    *,
    usual_if_none: str,
) -> tuple[Rank, Facts]:
    """What ranks: the model or the predictions, whichever is given.

    usual_if_none: what `if_none` is where nobody chose it. The other arguments are as for
    `open_model`. OptionError unless one is given, and for options of a model beside predictions.
    """
    if model is not None and predictions is None:
        return open_model(model, size, if_none, specks, backend, device, threads)
    if model is not None or predictions is None:
        raise OptionError("give either a model or predictions, and not both", "predictions")
    if (size, if_none, backend, device, threads) != (None, usual_if_none, "auto", "auto", None):
        raise OptionError(
            "predictions are measured as they are, and these options are of a model: leave them "
            "out, or give a model",
            "size",
            "if_none",
            "backend",
            "device",
            "threads",
        )
    return predictions_ranker(predictions)


def open_model(
    path: Path,
    size: tuple[int, int] | None = None,
    if_none: str = "all",
    specks: str = "keep",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> tuple[Rank, Facts]:
    """Rank with the checkpoint or artifact at `path`, and facts about it.

    Arguments as for `dsgnn.evaluation.loop.evaluate`. Raises OptionError for what does not go with
    such a file, CheckpointError, ArtifactError or BackendError for one that cannot be used.
    """
    if path.suffix in (".pth", ".pt"):
        raise CheckpointError(f"{path.name}: convert published weights first, with dsgnn-convert")
    if _is_artifact(path):
        if size is not None:
            raise OptionError(
                f"{path.name} has its own input size: only checkpoints take one", "size"
            )
        ranker = Ranker(path, backend, device, threads, if_none=if_none, specks=specks)
        return lambda sample: ranker(sample.image), ranker.describe()

    import torch

    from dsgnn.training.parallel import choose_device
    from dsgnn.weights.checkpoint import load_checkpoint

    if backend != "auto":
        raise OptionError(
            f"{path.name} is a checkpoint, which PyTorch runs: only exported artifacts have a "
            "backend",
            "backend",
        )
    where = choose_device(device)
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    model, weights = load_checkpoint(path)
    rule: Rule = LongestSide(model.config.size) if size is None else Fixed(*size)
    if isinstance(rule, Fixed) and (rule.height % 32 or rule.width % 32):
        raise OptionError(
            f"the size must be multiples of 32, got {rule.height}x{rule.width}", "size"
        )
    facts = {
        "file": path.name,
        "sha256": sha256_of(path),
        "status": "checkpoint",
        "config": model.config.name,
        "weights": weights,
        "precision": "fp32",
        "backend": "pytorch",
        "device": str(where),
        "threshold": model.config.threshold,
        "if_none": if_none,
        "specks": specks,
        "input": str(rule),
    }
    return model_ranker(model.to(where), rule, if_none, specks), facts


def predictions_ranker(path: Path) -> tuple[Rank, Facts]:
    """Look predictions up in a results.json or in a cluster's Parquet, by the photo's name without
    suffix, and without its folder where that is enough to tell it.

    path: the file, or a folder with part-*.parquet. Objects need `saliency` and `segmentation`.
    They count in the order of their `query`, or of the file where they have none. Raises DataError
    for another form, and for photos that are not in the file or have another size there.
    """
    by_name: dict[str, list[Any]] = {}
    entries, model = _predictions(path)
    try:
        for entry in entries:
            if entry["file"] is None:  # of a table that holds bytes and no names
                continue
            file = Path(entry["file"])
            for name in {entry["file"], file.with_suffix("").as_posix(), file.stem}:
                by_name.setdefault(name, []).append(entry)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a results.json of dsgnn ({error!r})") from None

    def rank(sample: Sample) -> Ranking:
        found = by_name.get(sample.name, [])
        if len(found) != 1:
            raise DataError(
                f"{len(found)} images of {path} have this name, expected one; rank the whole "
                "split, or measure the split that was ranked"
            )
        entry = found[0]
        if entry.get("error") is not None:
            raise DataError(f"{path} has no ranking of it, only: {entry['error']}")
        try:
            size, expected = (entry["height"], entry["width"]), sample.image.shape[:2]
            if size != expected:  # before anything of the other size is made
                raise DataError(f"height and width are {size}, of the photo {expected}")
            return _ranking(entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: {error!r}") from error

    return rank, model


def _predictions(path: Path) -> tuple[list[Any], Facts]:
    """The images of a results file, and what ranked them. Raises DataError for another form."""
    if path.is_dir() or path.suffix == ".parquet":
        from dsgnn.runtime.cluster.parquet import read_results

        return read_results(path)
    try:
        content = read_document(path)
        if content["schema"] != RESULTS_SCHEMA:
            raise DataError(f"expected schema {RESULTS_SCHEMA}, got {content['schema']!r}")
        return list(content["images"]), content.get("model", {})
    except UnicodeDecodeError:
        raise DataError(f"{path} is not a results.json of dsgnn: it is not text") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a results.json of dsgnn ({error!r})") from None


def _ranking(entry: Mapping[str, Any]) -> Ranking:
    """One image of a results.json."""
    h, w = entry["height"], entry["width"]
    masks = [segmentation_to_mask(item["segmentation"], h, w) for item in entry["objects"]]
    values = [
        (float(item["saliency"]), float(item.get("score", 1.0)), item.get("query", number))
        for number, item in enumerate(entry["objects"])
    ]
    return _ranked(h, w, masks, values)


def truth(sample: Sample) -> Ranking:
    """A sample's ground truth as a ranking."""
    values = [(float(rank), 1.0, number) for number, rank in enumerate(sample.ranks)]
    h, w = sample.image.shape[:2]
    return _ranked(h, w, list(sample.masks), values)


def _ranked(
    h: int, w: int, masks: Sequence[np.ndarray], values: Sequence[tuple[float, float, int]]
) -> Ranking:
    """masks: (h, w) bool. values: saliency, score and query of each."""
    objects = []
    order = sorted(range(len(masks)), key=lambda index: -values[index][0])
    for rank, index in enumerate(order, start=1):
        mask, (saliency, score, query) = masks[index], values[index]
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        box = (x, y, x + width, y + height)
        objects.append(RankedObject(rank, saliency, score, box, mask, float(mask.mean()), query))
    return Ranking(h, w, tuple(objects))
