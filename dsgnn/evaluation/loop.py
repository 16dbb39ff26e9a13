"""Measure a checkpoint, an exported artifact or anybody's predictions on a data set.

Whatever made the predictions, they pass through the same letterbox, post-processing and measures.
Only checkpoints need PyTorch. Predictions are taken in the order of the queries, as the published
evaluation does (it matters where masks overlap).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from dsgnn.data import open_data
from dsgnn.data.polygons import segmentation_to_mask
from dsgnn.data.records import Samples, ranks_from
from dsgnn.data.sample import Sample
from dsgnn.metrics import image_metrics, summarise
from dsgnn.runtime.artifact import sha256_of
from dsgnn.runtime.disk.files import write_whole
from dsgnn.runtime.disk.outputs import RESULTS_SCHEMA, results_file
from dsgnn.runtime.letterbox import Fixed, LongestSide, Rule, letterbox
from dsgnn.runtime.postprocess import postprocess
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.ranking import RankedObject, Ranking

if TYPE_CHECKING:
    from dsgnn.model import DSGNN

Rank = Callable[[Sample], Ranking]
Facts = Mapping[str, Any]  # the `model` entry of results.json
# How the figures are shown: name, heading, what the mean is over.
FIGURES = (
    ("sa_sor", "SA-SOR", "images"),
    ("sor", "SOR", "images"),
    ("mae", "MAE", "images"),
    ("recall", "recall at IoU 0.5", "objects"),
    ("matched_iou", "IoU of those found", "objects"),
    ("f_measure", "F-measure", "images"),
    ("false_objects", "false objects", "images"),
    ("false_objects_on_empty", "false objects, empty images", "images"),
)


def evaluate(
    model: Path | None,
    data: str,
    *,
    predictions: Path | None = None,
    split: str = "test",
    protocol: str = "dsgnn",
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    worst: int = 0,
    if_none: str = "all",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure one split of a data set: `dsgnn.metrics.summarise`, with `model` and `data`.

    model: a checkpoint (.safetensors) or an artifact; or predictions: a results.json. data, split:
    as for `dsgnn.data.open_data`. size: (height, width), a checkpoint sees photos as an artifact of
    that size does. if_none: what an image gives when no score passes; the published code gives
    "all". out: folder for metrics.json, per_image.csv, results.json (the predictions) and worst/,
    the `worst` images by SA-SOR beside the truth. Raises ValueError, OSError, BackendError for what
    does not fit, is missing or damaged.
    """
    if (model is None) == (predictions is None):
        raise ValueError("give either a model or --predictions, not both")
    if worst and out is None:
        raise ValueError("the worst images are drawn into a folder: give --out too")
    if predictions is not None:
        if (size, if_none, backend, device, threads) != (None, "all", "auto", "auto", None):
            raise ValueError(
                "predictions are measured as they are: leave out --size, --if-none, --backend, "
                "--device and --threads, or give a model"
            )
        rank, facts = predictions_ranker(predictions)
    else:
        assert model is not None
        rank, facts = open_model(model, size, if_none, backend, device, threads)
    samples = open_data(data, split)
    if not len(samples):
        raise ValueError(f"{data} has no images in its split {split}")
    palette = getattr(samples, "palette", "irsr")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if out is not None and predictions is None:
            record = stack.enter_context(results_file(out / "results.json", facts))
            rank = _recorded(rank, record)
        images = measure(rank, samples, protocol=protocol, palette=palette, progress=True)
    origin = ranks_from(samples)
    figures = {"model": dict(facts), "data": {"spec": data, "split": split, "ranks": origin}}
    figures |= summarise(images, protocol, palette)
    if out is not None:
        brief = {name: value for name, value in figures.items() if name != "per_image"}
        write_whole(out / "metrics.json", (json.dumps(brief, indent=1) + "\n").encode())
        _write_csv(out / "per_image.csv", images)
        _draw_worst(out / "worst", rank, samples, images, worst)
    return figures


def measure(
    rank: Rank,
    samples: Samples,
    indices: Iterable[int] | None = None,
    protocol: str = "dsgnn",
    palette: str = "assr",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """`image_metrics` of the samples (of these indices), each with its `name`.

    rank: called once per sample. progress: show a bar on terminals. ValueError names the image.
    """
    from tqdm import tqdm

    chosen = range(len(samples)) if indices is None else indices
    images = []
    for index in tqdm(chosen, unit="image", disable=None if progress else True):
        sample = samples[index]
        try:
            masks, scores = in_query_order(rank(sample))
            figures = image_metrics(sample.masks, sample.ranks, masks, scores, protocol, palette)
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error
        images.append({"name": sample.name, **figures})
    return images


def in_query_order(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """A ranking's masks (P, h, w) bool and saliencies (P,), by query."""
    objects = sorted(ranking.objects, key=lambda item: item.query)
    masks = np.zeros((len(objects), ranking.height, ranking.width), bool)
    for mask, item in zip(masks, objects, strict=True):
        mask[:] = item.mask
    return masks, np.array([item.saliency for item in objects])


def model_ranker(model: DSGNN, rule: Rule | None = None, if_none: str = "all") -> Rank:
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
        saliency, score, masks = (
            x[0].float().cpu().numpy() for x in (output.saliency, output.score, output.masks)
        )
        return postprocess(saliency, score, masks, geometry, model.config.threshold, if_none)

    return rank


def open_model(
    path: Path,
    size: tuple[int, int] | None = None,
    if_none: str = "all",
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> tuple[Rank, Facts]:
    """Rank with the checkpoint or artifact at `path`; arguments as for `evaluate`."""
    if path.suffix in (".pth", ".pt"):
        raise ValueError(f"{path.name}: convert published weights first, with dsgnn-convert")
    if path.suffix != ".safetensors":
        if size is not None:
            raise ValueError(f"--size is for checkpoints: {path.name} has its own input size")
        ranker = Ranker(path, backend, device, threads, if_none=if_none)
        return lambda sample: ranker(sample.image), ranker.describe()

    import torch

    from dsgnn.training.parallel import choose_device
    from dsgnn.weights.checkpoint import load_checkpoint

    if backend != "auto":
        raise ValueError(f"--backend is for exported artifacts, {path.name} is a checkpoint")
    where = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    model, weights = load_checkpoint(path)
    rule: Rule = LongestSide(model.config.size) if size is None else Fixed(*size)
    if isinstance(rule, Fixed) and (rule.height % 32 or rule.width % 32):
        raise ValueError(f"--size must be multiples of 32, got {rule.height}x{rule.width}")
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
        "input": str(rule),
    }
    return model_ranker(model.to(where), rule, if_none), facts


def predictions_ranker(path: Path) -> tuple[Rank, Facts]:
    """Look predictions up in a results.json, by the photo's name without folder and suffix.

    Objects need `saliency` and `segmentation`; they count in the order of their `query`, or of the
    file where they have none. Raises ValueError for another form, and for photos that are not in
    the file or have another size there.
    """
    by_name: dict[str, list[Any]] = {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["schema"] != RESULTS_SCHEMA:
            raise ValueError(f"expected schema {RESULTS_SCHEMA}, got {content['schema']!r}")
        for entry in content["images"]:
            for name in {entry["file"], Path(entry["file"]).stem}:
                by_name.setdefault(name, []).append(entry)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results.json of dsgnn ({error!r})") from None

    def rank(sample: Sample) -> Ranking:
        found = by_name.get(sample.name, [])
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} images of {path} have this name, expected one; rank the whole "
                "split, or give --split the one that was ranked"
            )
        entry = found[0]
        if "error" in entry:
            raise ValueError(f"{path} has no ranking of it, only: {entry['error']}")
        try:
            size, expected = (entry["height"], entry["width"]), sample.image.shape[:2]
            if size != expected:  # before anything of the other size is made
                raise ValueError(f"height and width are {size}, of the photo {expected}")
            return _ranking(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error!r}") from error

    return rank, content.get("model", {})


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


def _recorded(rank: Rank, record: Callable[[Mapping[str, Any]], None]) -> Rank:
    """Also write each ranking down, once."""
    seen = set()

    def rank_and_record(sample: Sample) -> Ranking:
        ranking = rank(sample)
        if sample.name not in seen:
            seen.add(sample.name)
            record({"file": sample.name, **ranking.to_dict()})
        return ranking

    return rank_and_record


def table(figures: Mapping[str, Any]) -> str:
    """The figures for a terminal: each with what it is a mean over, then by number of objects."""
    lines = [
        f"{figures['data']['spec']} {figures['data']['split']}: {figures['images']} images, "
        f"protocol {figures['protocol']}, palette {figures['palette']}"
    ]
    if if_none := figures.get("model", {}).get("if_none"):
        lines.append(f"  where nothing passes the threshold, {if_none} of the queries count")
    if figures["data"].get("ranks") == "written rule":
        lines.append("  true ranks come from the rule of dsgnn.data.saliency, not from people")
    for name, heading, over in FIGURES:
        if figures[name] is not None:
            lines.append(f"  {heading:<28}{figures[name]:7.4f}  {figures['used'][name]:6} {over}")
    lines.append(f"{'objects':>9}{'images':>8}{'SA-SOR':>8}{'SOR':>8}{'MAE':>8}{'recall':>8}")
    for count, part in figures["by_objects"].items():
        values = (part[name] for name in ("sa_sor", "sor", "mae", "recall"))
        cells = "".join("       -" if v is None else f"{v:8.4f}" for v in values)
        lines.append(f"{count:>9}{part['images']:>8}{cells}")
    return "\n".join(lines)


def _write_csv(path: Path, images: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    if images:
        writer = csv.DictWriter(text, images[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(images)
    write_whole(path, text.getvalue().encode())


def _draw_worst(
    folder: Path, rank: Rank, samples: Samples, images: list[dict[str, Any]], count: int
) -> None:
    """The images of lowest SA-SOR: the truth on the left, the prediction on the right."""
    ranked = [i for i, image in enumerate(images) if image["sa_sor"] is not None]
    ranked.sort(key=lambda i: images[i]["sa_sor"])
    for place, index in enumerate(ranked[:count], start=1):
        folder.mkdir(exist_ok=True)
        sample = samples[index]
        pictures = [truth(sample).draw(sample.image), rank(sample).draw(sample.image)]
        captions = ["truth", f"predicted: SA-SOR {images[index]['sa_sor']:.2f}"]
        bars = []
        for picture, caption in zip(pictures, captions, strict=True):
            bar = np.full((24, picture.shape[1], 3), 24, np.uint8)
            cv2.putText(bar, caption, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
            bars.append(np.vstack([bar, picture]))
        both = cv2.cvtColor(np.hstack(bars), cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", both)[1].tobytes()
        write_whole(folder / f"{place:02d}-{sample.name}.jpg", data)
