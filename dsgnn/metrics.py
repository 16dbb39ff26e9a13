"""Measures of Salient Object Ranking: MAE, SOR, SA-SOR, and the quality of the masks (numpy only).

Published figures differ by the code that made them, so a protocol has a name: `dsgnn` is the
published DSGNN evaluation; `official` takes SA-SOR as the measure's authors compute it (Liu et al.,
TPAMI 2021) and all else from `dsgnn`. Ranks and scores count up: larger = more salient.

- Ranks of scores are minimum ranks: ties share the lower.
- SA-SOR: each ground truth takes its best-IoU prediction if IoU >= threshold. A prediction serves
  one ground truth, the one it overlaps best; the others that wanted it stay unmatched, with rank 0.
  A matched one gets the rank of its prediction's score among the matched predictions (in the order
  of the ground truths) and, only if there are more predictions than ground truths, the rest (in
  theirs); `dsgnn` cuts that list to the number of ground truths before ranking, `official` does
  not. Then Pearson's correlation with the true ranks; 0 where the predicted ranks are constant.
  Images with fewer than two objects, or with constant true ranks, are left out.
- SOR: prediction ranks are painted in prediction order, later over earlier. A ground truth counts
  if more than the threshold's share of its pixels is painted; its rank is the commonest painted
  one, of equally common ones the most salient. Spearman's rho over those that count: 1 where one
  counts, left out where none does or the ranks are constant. The figure is (mean rho + 1) / 2.
- MAE: mean absolute difference of two rank maps, each painted in index order with its own number of
  objects N. Palette `assr`: the grey number min(N - rank, 4) of 255 229 204 178 153, over 255;
  `irsr`: rank / N. Without objects a map is 0 everywhere.
- Quality of the masks: `recall` is the share of ground truths matched as for SA-SOR; `matched_iou`
  the mean IoU of those; `f_measure` that of "an object is here" per pixel (beta^2 = 0.3, Achanta et
  al., CVPR 2009), left out where both maps are empty; a false object is a prediction that serves no
  ground truth.

It is fast because no measure asks for more than how many pixels each combination of masks covers,
and a photo has a few dozen combinations.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dsgnn.runtime.errors import DataError, OptionError

PROTOCOLS = ("dsgnn", "official")
PALETTES = ("assr", "irsr")
ASSR_GREYS = np.array([255, 229, 204, 178, 153]) / 255  # most salient first
BETA2 = 0.3
STRIP = 1 << 16  # pixels worked on at a time: the masks of a strip stay in the processor's cache


def evaluate(
    samples: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    protocol: str = "dsgnn",
    palette: str = "assr",
    iou_threshold: float = 0.5,
) -> dict:
    """Measure a data set: `image_metrics` of every sample, then `summarise`.

    samples: any iterable of (gt_masks (G, h, w) bool, gt_ranks (G,), pred_masks (P, h, w) bool,
    pred_scores (P,)), G and P from 0 up; consumed one at a time.
    Returns the dict of `summarise`. Raises OptionError for an unknown protocol or palette, a
    threshold outside (0, 1], and DataError for a sample whose parts do not fit together (its number
    is named).
    """
    per_image = []
    for number, sample in enumerate(samples):
        try:
            if len(sample) != 4:
                raise DataError(f"expected masks, ranks, masks and scores, got {len(sample)} parts")
            gt_masks, gt_ranks, pred_masks, pred_scores = sample
            per_image.append(
                image_metrics(
                    gt_masks, gt_ranks, pred_masks, pred_scores, protocol, palette, iou_threshold
                )
            )
        except DataError as error:
            raise DataError(f"sample {number}: {error}") from error
    return summarise(per_image, protocol, palette, iou_threshold)


def image_metrics(
    gt_masks: np.ndarray,
    gt_ranks: np.ndarray,
    pred_masks: np.ndarray,
    pred_scores: np.ndarray,
    protocol: str = "dsgnn",
    palette: str = "assr",
    iou_threshold: float = 0.5,
) -> dict:
    """Measure one image.

    gt_masks: (G, h, w) bool. gt_ranks: (G,), 1 = least salient. pred_masks: (P, h, w) bool.
    pred_scores: (P,), larger = more salient. Masks may overlap.
    Returns plain numbers, None where a measure leaves this image out: mae, spearman (-1…1; SOR
    before it is averaged), sa_sor (-1…1), f_measure, objects (G), predictions (P), matched (ground
    truths with a prediction), matched_iou (mean over those), false_objects (P - matched).
    Raises ValueError when shapes, dtypes or values are not as above.
    """
    _check_options(protocol, palette, iou_threshold)
    gt_masks, gt_ranks = np.asarray(gt_masks), np.asarray(gt_ranks)
    pred_masks, pred_scores = np.asarray(pred_masks), np.asarray(pred_scores)
    _check_sample(gt_masks, gt_ranks, pred_masks, pred_scores)
    gt_ranks, pred_ranks = _minimum_ranks(gt_ranks), _minimum_ranks(pred_scores)

    gt, pred, pixels = _regions(gt_masks, pred_masks)  # (G, R), (P, R), (R,)
    gt_pixels = gt @ pixels  # (G,)
    iou = _iou(gt, pred, pixels)
    match = _match(iou, iou_threshold)
    matched = match >= 0

    gt_top, pred_top = _topmost(gt), _topmost(pred)  # (R,), (R,)
    seen = np.bincount(  # (G+1, P+1) pixels where that object and that prediction are on top
        gt_top * (len(pred) + 1) + pred_top, pixels, (len(gt) + 1) * (len(pred) + 1)
    ).reshape(len(gt) + 1, len(pred) + 1)
    painted = gt * pixels @ (pred_top[:, None] == np.arange(1, len(pred) + 1))  # (G, P)
    return {
        "mae": _mae(seen, _levels(gt_ranks, palette), _levels(pred_ranks, palette)),
        "spearman": _spearman(gt_ranks, gt_pixels, painted, pred_ranks, iou_threshold),
        "sa_sor": _sa_sor(match, gt_ranks, pred_scores, protocol),
        "f_measure": _f_measure(seen),
        "objects": len(gt_ranks),
        "predictions": len(pred_ranks),
        "matched": int(matched.sum()),
        "matched_iou": float(iou[matched, match[matched]].mean()) if matched.any() else None,
        "false_objects": len(pred_ranks) - int(matched.sum()),
    }


def match_masks(
    gt_masks: np.ndarray, pred_masks: np.ndarray, iou_threshold: float = 0.5
) -> np.ndarray:
    """Which prediction serves each ground truth, as for SA-SOR: (G,) int64, -1 where none does.

    gt_masks: (G, h, w) bool. pred_masks: (P, h, w) bool.
    """
    gt, pred, pixels = _regions(gt_masks, pred_masks)
    return _match(_iou(gt, pred, pixels), iou_threshold)


def summarise(
    per_image: Iterable[dict],
    protocol: str = "dsgnn",
    palette: str = "assr",
    iou_threshold: float = 0.5,
) -> dict:
    """Turn the results of `image_metrics`, from one process or many, into a data set's figures.

    Returns the options; `images`; mae, sor, sa_sor, recall, matched_iou, f_measure, false_objects
    (per image) and false_objects_on_empty (per image without ground truth), each None where nothing
    could be measured; `used`: how many each is a mean over (images; for recall and matched_iou
    objects); `by_objects`: {number of objects: the same figures and `used`}; `per_image`.
    """
    _check_options(protocol, palette, iou_threshold)
    per_image = list(per_image)
    groups: dict[int, list[dict]] = {}
    for image in per_image:
        groups.setdefault(image["objects"], []).append(image)
    return {
        "protocol": protocol,
        "palette": palette,
        "iou_threshold": iou_threshold,
        **_figures(per_image),
        "by_objects": {count: _figures(groups[count]) for count in sorted(groups)},
        "per_image": per_image,
    }


def _figures(per_image: list[dict]) -> dict:
    """The means over some images, and over how many."""

    def column(name: str) -> list[float]:
        return [image[name] for image in per_image if image[name] is not None]

    empty = [image["false_objects"] for image in per_image if image["objects"] == 0]
    objects, matched = sum(column("objects")), sum(column("matched"))
    iou = sum(i["matched"] * i["matched_iou"] for i in per_image if i["matched"])
    sums = {  # name: (sum, number of things summed)
        "mae": (sum(column("mae")), len(column("mae"))),
        "sor": (sum((rho + 1) / 2 for rho in column("spearman")), len(column("spearman"))),
        "sa_sor": (sum(column("sa_sor")), len(column("sa_sor"))),
        "recall": (matched, objects),
        "matched_iou": (iou, matched),
        "f_measure": (sum(column("f_measure")), len(column("f_measure"))),
        "false_objects": (sum(column("false_objects")), len(per_image)),
        "false_objects_on_empty": (sum(empty), len(empty)),
    }
    return {
        "images": len(per_image),
        **{name: total / count if count else None for name, (total, count) in sums.items()},
        "used": {name: count for name, (_, count) in sums.items()},
    }


def _regions(gt_masks: np.ndarray, pred_masks: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sort the pixels by which masks cover them.

    Returns gt (G, R) and pred (P, R), 1 where the mask covers the region, and the regions' pixels
    (R,), all float64 (exact for counts), so that sums over pixels are matrix products.
    """
    flat = [mask.reshape(-1).view(np.uint8) for masks in (gt_masks, pred_masks) for mask in masks]
    size = gt_masks.shape[1] * gt_masks.shape[2]
    groups = max(1, -(-len(flat) // 8))
    # Cut the image into runs of equal code: bit k of byte b is mask 8 b + k.
    starts, run_codes = [], []
    for begin in range(0, size, STRIP):
        strip = [mask[begin : begin + STRIP] for mask in flat]
        codes = np.zeros((groups, min(STRIP, size - begin)), np.uint8)
        changes = np.zeros(STRIP, bool)
        changes[0] = True
        for group, code in enumerate(codes):
            for mask in reversed(strip[8 * group : 8 * group + 8]):
                np.add(code, code, out=code)  # a shift by one bit, but vectorised
                np.bitwise_or(code, mask, out=code)
            changes[1 : len(code)] |= code[1:] != code[:-1]
        runs = _true(changes)
        starts.append(runs + begin)
        run_codes.append(codes[:, runs])
    codes = np.concatenate(run_codes, axis=1)  # (groups, runs)
    pixels = np.diff(np.concatenate(starts), append=size).astype(np.float64)
    if groups <= 2:  # few enough masks for a table of all codes: join the runs of each
        totals: np.ndarray = np.bincount(256 ** np.arange(groups) @ codes, pixels)
        found = np.flatnonzero(totals)
        codes, pixels = np.stack([found & 255, found >> 8])[:groups].astype(np.uint8), totals[found]
    cover = np.unpackbits(codes, axis=0, count=len(flat), bitorder="little").astype(np.float64)
    return cover[: len(gt_masks)], cover[len(gt_masks) :], pixels


def _true(flags: np.ndarray) -> np.ndarray:
    """np.flatnonzero for few among many, twice as fast: eight at a time.

    flags: (N,) bool, N a multiple of 8. Returns (number of True,) int64.
    """
    eights = flags.view(np.uint64)
    which = np.flatnonzero(eights != 0)
    inside = np.flatnonzero(eights[which].view(bool))
    return which[inside >> 3] << 3 | inside & 7


def _iou(gt: np.ndarray, pred: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """(G, P), from what `_regions` returns."""
    shared = gt * pixels @ pred.T  # (G, P) pixels in both
    union = (gt @ pixels)[:, None] + pred @ pixels - shared
    return shared / np.maximum(union, 1)  # two empty masks do not overlap


def _match(iou: np.ndarray, threshold: float) -> np.ndarray:
    """The prediction that serves each ground truth, -1 for none. iou: (G, P) -> (G,) int64."""
    if not iou.size:
        return np.full(len(iou), -1)
    # Of equals the last is taken, here and below, as the published code does.
    best = iou.shape[1] - 1 - iou[:, ::-1].argmax(1)
    overlap = iou[np.arange(len(iou)), best]
    match = np.where(overlap >= threshold, best, -1)
    for prediction in set(match[match >= 0].tolist()):
        rivals = np.flatnonzero(match == prediction)
        winner = rivals[len(rivals) - 1 - overlap[rivals][::-1].argmax()]
        match[rivals[rivals != winner]] = -1
    return match


def _sa_sor(
    match: np.ndarray, gt_ranks: np.ndarray, pred_scores: np.ndarray, protocol: str
) -> float | None:
    count = len(gt_ranks)
    if count < 2 or _constant(gt_ranks):
        return None
    matched = match[match >= 0]
    ranked = matched
    if len(pred_scores) > count:
        extra = np.setdiff1d(np.arange(len(pred_scores)), matched)
        ranked = np.concatenate([matched, extra])
    if protocol == "dsgnn":
        ranked = ranked[:count]
    predicted = np.zeros(count)
    predicted[match >= 0] = _minimum_ranks(pred_scores[ranked])[: len(matched)]
    return 0.0 if _constant(predicted) else _pearson(gt_ranks, predicted)


def _spearman(
    gt_ranks: np.ndarray,
    gt_pixels: np.ndarray,
    painted: np.ndarray,
    pred_ranks: np.ndarray,
    threshold: float,
) -> float | None:
    """Spearman's rho of one image. gt_pixels: (G,) in each ground truth; painted: (G, P) of those,
    where each prediction is on top.
    """
    ranks = np.arange(1, len(pred_ranks) + 1)
    votes = painted @ (pred_ranks[:, None] == ranks)  # (G, P) pixels at each rank: ties vote as one
    counted = votes.sum(1) > gt_pixels * threshold
    if not counted.any():
        return None
    commonest = len(ranks) - votes[counted][:, ::-1].argmax(1)  # of equals the most salient
    truth = gt_ranks[counted]
    if len(truth) == 1:
        return 1.0
    if _constant(truth) or _constant(commonest):
        return None
    return _pearson(_mean_ranks(truth), _mean_ranks(commonest))


def _levels(ranks: np.ndarray, palette: str) -> np.ndarray:
    """What each object is painted with, (N+1,); 0 comes first, for no object."""
    count = len(ranks)
    if palette == "assr":
        levels = ASSR_GREYS[np.minimum(count - ranks, len(ASSR_GREYS) - 1)]
    else:
        levels = ranks / max(count, 1)
    return np.concatenate([[0.0], levels])


def _mae(seen: np.ndarray, gt_levels: np.ndarray, pred_levels: np.ndarray) -> float:
    difference = np.abs(gt_levels[:, None] - pred_levels)  # (G+1, P+1)
    return float((seen * difference).sum() / seen.sum())


def _f_measure(seen: np.ndarray) -> float | None:
    truth, found, both = seen[1:].sum(), seen[:, 1:].sum(), seen[1:, 1:].sum()
    if not truth and not found:
        return None
    return float((1 + BETA2) * both / (BETA2 * truth + found))


def _topmost(cover: np.ndarray) -> np.ndarray:
    """Paint in index order: (N, R) -> (R,) int64, 1 + index of the last cover, 0 for none."""
    top = np.zeros(cover.shape[1])
    for index, row in enumerate(cover, 1):
        np.maximum(top, row * index, out=top)
    return top.astype(np.int64)


def _minimum_ranks(values: np.ndarray) -> np.ndarray:
    """1 = smallest; ties share the lowest of their ranks. (N,) -> (N,) int64.

    As `scipy.stats.rankdata` gives them, which the base install of these measures does not have.
    """
    return np.searchsorted(np.sort(values), values, side="left") + 1


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """1 = smallest; ties share the mean of their ranks. (N,) -> (N,) float64."""
    ordered = np.sort(values)
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (below + upto + 1) / 2


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _check_options(protocol: str, palette: str, iou_threshold: float) -> None:
    if protocol not in PROTOCOLS:
        raise OptionError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if palette not in PALETTES:
        raise OptionError(f"palette must be one of {', '.join(PALETTES)}, got {palette!r}")
    if not 0 < iou_threshold <= 1:
        raise OptionError(f"iou_threshold must be in (0, 1], got {iou_threshold}")


def _check_sample(
    gt_masks: np.ndarray, gt_ranks: np.ndarray, pred_masks: np.ndarray, pred_scores: np.ndarray
) -> None:
    for kind, masks, values, what in (
        ("gt", gt_masks, gt_ranks, "ranks"),
        ("pred", pred_masks, pred_scores, "scores"),
    ):
        if masks.dtype != bool or masks.ndim != 3 or values.shape != masks.shape[:1]:
            raise DataError(
                f"{kind}_masks must be (N, h, w) bool with {kind}_{what} (N,), got {masks.shape} "
                f"{masks.dtype} with {values.shape}"
            )
        if not np.isfinite(values).all():
            raise DataError(f"{kind}_{what} must be finite, got {values}")
    if gt_masks.shape[1:] != pred_masks.shape[1:]:
        raise DataError(
            f"masks must have one size: gt_masks are {gt_masks.shape[1:]}, pred_masks "
            f"{pred_masks.shape[1:]} (h, w); bring predictions to the photo's own size"
        )
    if not gt_masks.shape[1] * gt_masks.shape[2]:
        raise DataError(f"masks must have pixels, got (h, w) = {gt_masks.shape[1:]}")
