"""How far ranked objects and attention maps agree with people (numpy and OpenCV only).

Truth is where people looked. The **share of looks** of an object is the part of all fixations that
fall on its visible mask, where the smaller object takes what two share (`dsgnn.data.gaze`).

Each measure stands beside baselines: what other orders of the very same objects would get, what
other maps would get, and, where viewers are told apart, what one half of them says about the other.

- `pairs`: of the pairs of objects of one photo whose true shares differ by `CLEAR` or more, the
  part that is in people's order. A tie counts as half.
- `first`: whether the object ranked first is the one that people look at most, over the photos
  with two objects or more.
- `fixations`: the part of the fixations that fall on the objects found, beside the part of the
  photo that these objects cover.
- `nss`: the attention map, brought to mean 0 and standard deviation 1 over the photo's pixels, at
  the fixations, on average (Peters et al., Vision Research 2005).
- `auc`: the probability that the map is higher at a fixation than at a pixel of the photo drawn at
  random, where a tie counts as half. This is the area under the ROC curve.
- `sa_sor`, `sor`: as `dsgnn.metrics` computes them under the protocol `dsgnn`, with the objects
  that people ranked as the ground truth.
- `recall`: the part of the objects ranked by people that a found object overlaps with an IoU of
  0.5 or more, one to one, beside the same of all annotated objects.
- `f_measure` (beta² = 0.3), `mae`, `iou`: of the union of all found objects against one binary
  mask, as a mean over photos. Where nothing is found F is 0. `nothing_found` is the part of such
  photos. Beside these stands what a box in the middle of the photo would get.

A photo's result has, for each measure and for whoever is measured (`MODEL` or a baseline), a sum
and how many things it is a sum over. The figure of a set is the ratio of both after adding up over
the photos, so its interval comes from drawing photos again with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dsgnn.data.ranks import CLEAR, inside, share_of_looks
from dsgnn.metrics import BETA2, image_metrics, match_masks
from dsgnn.runtime.errors import OptionError

MODEL = "model"
LARGER, CENTRAL = "larger first", "nearer to the centre first"
HALF = "one half of the viewers about the other"
AREA, ANNOTATED = "their area", "of all annotated objects"
CENTRE_MAP, MIDDLE_BOX = "a centre map", "a box in the middle"

# What each measure is called, and what it is a mean over.
FIGURES = {
    "pairs": ("pairs of objects in people's order", "pairs"),
    "first": ("first object is people's first", "photos"),
    "fixations": ("fixations on the objects found", "photos"),
    "nss": ("NSS of the attention map", "photos"),
    "auc": ("AUC of the attention map", "photos"),
    "sa_sor": ("SA-SOR", "photos"),
    "sor": ("SOR", "photos"),
    "recall": ("recall of ranked objects", "objects"),
    "f_measure": ("F-measure of the union", "photos"),
    "mae": ("MAE of the union", "photos"),
    "iou": ("IoU of the union", "photos"),
    "nothing_found": ("photos with nothing found", "photos"),
}
CENTRE_SPREAD = 0.25  # standard deviation of the centre map, in widths and heights of the photo
VIEWERS_SPREAD = 0.03  # that of the map of one half's fixations, in longest sides: about 1 degree
RESAMPLES = 2000

Tally = tuple[float, int]  # a sum, and how many things it is a sum over
PhotoFigures = dict[str, dict[str, Tally]]  # by measure, and by who is measured


def looks_figures(
    points: np.ndarray,
    viewers: Sequence[np.ndarray],
    masks: np.ndarray,
    saliency: np.ndarray,
    attention: np.ndarray | None = None,
) -> PhotoFigures:
    """Measure the objects found in one photo, and the attention map, against fixations.

    points: (N, 2), x and y in pixels of the photo. viewers: the same fixations, one (n, 2) array
    for each person, or empty where persons are not told apart. masks: (P, h, w) bool, the objects
    found. saliency: (P,), larger = ranked before. attention: (gh, gw), a grid over the photo, not
    negative, or None. Returns `pairs`, `first`, `fixations`, and of a map `nss` and `auc`; a photo
    on which nobody looked gives no figure. Raises OptionError on other forms.
    """
    if not len(points):
        return {}
    shares = share_of_looks(points, masks)
    halves = [h for h in (_joined(viewers[::2]), _joined(viewers[1::2])) if len(h)]
    figures: PhotoFigures = {name: {} for name in ("pairs", "first")}
    for by, scores in _orders(masks, saliency).items():
        figures["pairs"][by] = _pairs(shares, scores)
        figures["first"][by] = _first(shares, scores)
    if len(halves) == 2:
        one, other = (share_of_looks(half, masks) for half in halves)
        both_ways = (one, other), (other, one)
        figures["pairs"][HALF] = _added([_pairs(*way) for way in both_ways])
        figures["first"][HALF] = _averaged([_first(*way) for way in both_ways])
    figures["fixations"] = {MODEL: (float(shares.sum()), 1), AREA: (float(masks.any(0).mean()), 1)}
    if attention is not None:
        figures |= _map_figures(points, halves, attention, masks.shape[1:])
    return figures


def ranked_figures(
    gt_masks: np.ndarray,
    human_ranks: np.ndarray,
    gt_shares: np.ndarray | None,
    masks: np.ndarray,
    saliency: np.ndarray,
) -> PhotoFigures:
    """Measure the objects found in one photo against annotated objects that people ranked.

    gt_masks: (G, h, w) bool, all annotated objects. human_ranks: (G,), 1 = most looked at, 0 = not
    ranked. gt_shares: (G,), their shares of looks, or None where only ranks are known; then all
    pairs of ranked objects count as clear. masks: (P, h, w) bool, the objects found, in the order
    of the queries. saliency: (P,), larger = ranked before.
    Returns `pairs` (of annotated objects that were found), `first`, `sa_sor`, `sor` and `recall`.
    Raises OptionError on other forms.
    """
    ranked = human_ranks > 0
    truth = human_ranks[ranked].max(initial=0) + 1 - human_ranks[ranked]  # larger = more looked at
    match = match_masks(gt_masks[ranked], masks)
    among_all = match_masks(gt_masks, masks)
    if gt_shares is None:
        known, found = truth.astype(np.float64), match
    else:
        known, found = gt_shares, among_all
    figures: PhotoFigures = {name: {} for name in ("pairs", "first", "sa_sor", "sor")}
    for by, scores in _orders(masks, saliency).items():
        figures["pairs"][by] = _pairs(known[found >= 0], scores[found[found >= 0]])
        if len(truth) >= 2:
            best = match[truth.argmax()]
            right = best >= 0 and scores[best] == scores.max()
            figures["first"][by] = float(right), 1
        measured = image_metrics(gt_masks[ranked], truth, masks, scores, palette="irsr")
        if measured["sa_sor"] is not None:
            figures["sa_sor"][by] = measured["sa_sor"], 1
        if measured["spearman"] is not None:
            figures["sor"][by] = (measured["spearman"] + 1) / 2, 1
    figures["recall"] = {
        MODEL: (int((match >= 0).sum()), len(match)),
        ANNOTATED: (int((among_all >= 0).sum()), len(among_all)),
    }
    return figures


def union_figures(truth: np.ndarray, masks: np.ndarray) -> PhotoFigures:
    """Measure the union of the objects found in one photo against one binary mask.

    truth: (h, w) bool. masks: (P, h, w) bool, the objects found; none is a valid answer.
    Returns `f_measure`, `mae`, `iou` and `nothing_found`. Raises OptionError on other forms.
    """
    if truth.dtype != bool or masks.dtype != bool or masks.shape[1:] != truth.shape:
        raise OptionError(
            f"expected a truth (h, w) bool and masks (P, h, w) bool of one size, got "
            f"{truth.shape} {truth.dtype} and {masks.shape} {masks.dtype}"
        )
    h, w = truth.shape
    box = np.zeros((h, w), bool)
    box[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    figures: PhotoFigures = {}
    for by, union in ((MODEL, masks.any(0)), (MIDDLE_BOX, box)):
        both, either = np.count_nonzero(union & truth), np.count_nonzero(union | truth)
        found, true = np.count_nonzero(union), np.count_nonzero(truth)
        weighed = BETA2 * true + found
        for name, value in (
            ("f_measure", (1 + BETA2) * both / weighed if weighed else 0.0),
            ("mae", (either - both) / truth.size),
            ("iou", both / either if either else 0.0),
            ("nothing_found", float(not found)),
        ):
            figures.setdefault(name, {})[by] = value, 1
    return figures


def summarise_gaze(photos: Sequence[PhotoFigures], seed: int = 0) -> dict[str, dict]:
    """The figures of a set: {measure: {who is measured: {"value", "interval", "count"}}}.

    photos: one result of the functions above for each photo. interval: the [2.5, 97.5] percentiles
    of the figure over `RESAMPLES` draws of as many photos with replacement. seed: of the draws.
    A measure that the model or all of its baselines lack is left out.
    """
    if not photos:
        return {}
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(photos), np.full(len(photos), 1 / len(photos)), RESAMPLES)
    figures = {}
    for name in FIGURES:
        measured = {who for photo in photos for who in photo.get(name, {})}
        rows = {}
        for who in sorted(measured, key=lambda who: (who != MODEL, who)):
            tallies = np.array([photo.get(name, {}).get(who, (0, 0)) for photo in photos])
            total, count = tallies.sum(0)
            if count:
                rows[who] = {
                    "value": float(total / count),
                    "interval": _interval(draws, tallies),
                    "count": int(count),
                }
        if MODEL in rows and len(rows) > 1:
            figures[name] = rows
    return figures


def _interval(draws: np.ndarray, tallies: np.ndarray) -> list[float]:
    """draws: (R, N) how often each photo is in a draw. tallies: (N, 2) sums and counts."""
    total, count = (draws @ tallies).T  # (R,), (R,)
    low, high = np.percentile(total[count > 0] / count[count > 0], [2.5, 97.5])
    return [float(low), float(high)]


def _orders(masks: np.ndarray, saliency: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by which the same objects can be ordered, larger = before."""
    h, w = masks.shape[1:]
    # An object whose mask is empty comes last: no point of a photo lies so far from its middle.
    areas, distances = np.zeros(len(masks)), np.full(len(masks), np.hypot(h, w))
    for g, mask in enumerate(masks):
        moments = cv2.moments(mask.view(np.uint8), binaryImage=True)
        if areas_g := moments["m00"]:
            x, y = moments["m10"] / areas_g + 0.5, moments["m01"] / areas_g + 0.5
            areas[g], distances[g] = areas_g, np.hypot(x - w / 2, y - h / 2)
    return {MODEL: saliency, LARGER: areas, CENTRAL: -distances}


def _pairs(truth: np.ndarray, scores: np.ndarray) -> Tally:
    i, j = np.triu_indices(len(truth), 1)
    gap = truth[i] - truth[j]
    clear = np.abs(gap) >= CLEAR - 1e-9  # shares are fractions: .06 - .04 is a little below .02
    agreement = np.sign(gap) * ((scores[i] > scores[j]) * 1.0 - (scores[i] < scores[j]))
    return float(((1 + agreement[clear]) / 2).sum()), int(clear.sum())


def _first(truth: np.ndarray, scores: np.ndarray) -> Tally:
    if len(truth) < 2 or truth.max() <= 0:
        return 0.0, 0
    return float((truth == truth.max())[scores == scores.max()].mean()), 1


def _added(tallies: Sequence[Tally]) -> Tally:
    return sum(total for total, _ in tallies), sum(count for _, count in tallies)


def _averaged(tallies: Sequence[Tally]) -> Tally:
    """One thing, whose value is the mean of these."""
    total, count = _added(tallies)
    return (total / count, 1) if count else (0.0, 0)


def _joined(viewers: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty((0, 2)), *viewers])


def _map_figures(
    points: np.ndarray, halves: Sequence[np.ndarray], attention: np.ndarray, size: tuple[int, int]
) -> PhotoFigures:
    h, w = size
    figures: PhotoFigures = {"nss": {}, "auc": {}}
    spread = cv2.resize(attention.astype(np.float64), (w, h), interpolation=cv2.INTER_LINEAR)
    for by, grid in ((MODEL, spread), (CENTRE_MAP, _centre_map(h, w))):
        figures["nss"][by], figures["auc"][by] = nss(grid, points), auc(grid, points)
    if len(halves) == 2:
        one, other = (_viewers_map(half, h, w) for half in halves)
        both_ways = (one, halves[1]), (other, halves[0])
        figures["nss"][HALF] = _averaged([nss(*way) for way in both_ways])
        figures["auc"][HALF] = _averaged([auc(*way) for way in both_ways])
    return figures


def nss(grid: np.ndarray, points: np.ndarray) -> Tally:
    """Normalised scanpath saliency of a map of the photo's size, (h, w), at points (N, 2).

    A map without differences has none, and points outside the photo do not count.
    """
    values, deviation = _at(grid, points), grid.std()
    if not len(values) or not deviation:
        return 0.0, 0
    return float((values.mean() - grid.mean()) / deviation), 1


def auc(grid: np.ndarray, points: np.ndarray) -> Tally:
    """Area under the ROC curve of a map of the photo's size, (h, w), at points (N, 2), against all
    pixels. Points outside the photo do not count."""
    values, pixels = _at(grid, points), np.sort(grid, axis=None)
    if not len(values):
        return 0.0, 0
    below, upto = (np.searchsorted(pixels, values, side) for side in ("left", "right"))
    return float(((below + upto) / 2).mean() / len(pixels)), 1


def _at(grid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The map's values at the points that lie in the photo."""
    h, w = grid.shape
    return grid[inside(points, w, h)]


def _centre_map(h: int, w: int) -> np.ndarray:
    y = ((np.arange(h) + 0.5) / h - 0.5)[:, None]
    x = ((np.arange(w) + 0.5) / w - 0.5)[None]
    return np.exp(-(x**2 + y**2) / (2 * CENTRE_SPREAD**2))


def _viewers_map(points: np.ndarray, h: int, w: int) -> np.ndarray:
    """Their fixations, blurred."""
    x, y = points.T
    counts, _, _ = np.histogram2d(y, x, bins=(h, w), range=((0, h), (0, w)))
    sigma = VIEWERS_SPREAD * max(h, w)
    return cv2.GaussianBlur(counts, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
