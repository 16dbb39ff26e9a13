"""The written saliency rule: which objects of a photo are looked at first, without eye tracking.

A stand-in for human fixations, computable from the photo, the object masks and the kind of each
object alone. It orders composite scenes and COCO photos for training the bundled model; it is
not a model of human gaze and figures against it are figures against this rule.

The score of one object is a sum of terms, each in 0…1, times the points in `POINTS`:

    kind        what it is: `KIND_WEIGHTS` (people 1, animals .85, vehicles .55, … tables .05),
                counted in full from 2% of the frame on, below that by the square root of the
                area, as a kind has to be recognisable to attract
    size        sqrt(area share / 25%), no gain beyond 25% of the frame; for kinds below .4 in
                proportion less, as a table or a bed is large without being looked at
    contrast    distance in CIE Lab of the object's mean colour, plus half that of its spread,
                from a ring around it, full at 40 units; 0.5 where there is no ring
    centre      exp(-d² / 2·0.25²), d the distance of the mask's centroid from the middle of the
                frame, in frame widths and heights
    sharpness   mean |Laplacian| inside the mask over that of the photo, full at twice the photo's
    truncation  (negative) share of the box's outline that lies on the frame's edge, faded out
                with size: an object filling the frame is not marked down for it

so scores lie in 0…10. An object is salient if it covers at least 0.3% of the frame, scores at
least `THRESHOLD`, and at most `SPAN` less than the best; at most five are. The rest is clutter.
Why each term: people and animals, size, contrast, centre bias and sharpness are the classic
predictors of first fixations (Judd et al., ICCV 2009; Tatler, J. Vision 2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from dsgnn.data.ranks import MIN_AREA
from dsgnn.runtime.errors import OptionError

POINTS = {"kind": 3.5, "size": 2.5, "contrast": 1.5, "centre": 1.5, "sharpness": 1.0}
TRUNCATION_POINTS = 1.5
THRESHOLD = 4.0  # below this an object is clutter
SPAN = 3.0  # and so it is this far below the most salient one
MIN_GAP = 0.25  # adjacent scores closer than this are not learnable as an order
MAX_OBJECTS = 5
GRID_PX = 128  # longest side on which colours, rings and centroids are measured

_GROUPS = {
    1.00: "person people man woman child face",
    0.85: "bird cat dog horse sheep cow elephant bear zebra giraffe animal animals amphibians "
    "birds fish insects lizards mammals marsupials shellfish dinosaur",
    0.65: "teddy_bear airplane train boat bus motorcycle truck paratrooper toys",
    0.55: "bicycle car kite cake pizza hot_dog sandwich donut vehicles food dessert space "
    "seasonal flowers military_vehicles",
    0.45: "skateboard surfboard snowboard banana apple orange broccoli carrot fruit vegetables "
    "sports music umbrella frisbee sports_ball fire_hydrant stop_sign nuts hobbies clock "
    "mushrooms monuments clothes hats body_parts",
    0.40: "object cup wine_glass bottle vase laptop household dishes tools medical cell_phone "
    "suitcase backpack handbag electronics",
    0.30: "bowl tv toilet keyboard scissors hair_drier toothbrush microwave toaster remote mouse "
    "book tennis_racket baseball_bat baseball_glove tie skis parking_meter fork knife spoon "
    "plants potted_plant town roadsigns arttools utensils traffic_light",
    0.15: "chair oven sink refrigerator couch bench bed trees",
    0.05: "dining_table",
}
KIND_WEIGHTS = {name: weight for weight, names in _GROUPS.items() for name in names.split()}
UNKNOWN_KIND = "object"


def kind_weight(kind: str) -> float:
    """Weight in 0…1 of a kind such as "person" or "animals/birds"; unknown ones count as "object".

    Of a path the deepest part that is known decides. Spaces and underscores are the same.
    """
    for part in reversed(kind.lower().replace(" ", "_").split("/")):
        if part in KIND_WEIGHTS:
            return KIND_WEIGHTS[part]
    return KIND_WEIGHTS[UNKNOWN_KIND]


def saliency_scores(image: np.ndarray, masks: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Score every object by the rule of this module.

    image: (h, w, 3) uint8 RGB. masks: (G, h, w) bool, visible parts. kinds: G names.
    Returns (G,) float64 in 0…10; an empty mask scores 0. Raises OptionError on shapes that differ.
    """
    h, w = image.shape[:2]
    if masks.shape != (len(kinds), h, w):
        raise OptionError(
            f"masks must be ({len(kinds)}, {h}, {w}) for {len(kinds)} kinds and this image, "
            f"got {masks.shape}"
        )
    scale = min(1.0, GRID_PX / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    edges = np.abs(cv2.Laplacian(grey, cv2.CV_16S)).astype(np.float32)
    detail = np.asarray(cv2.resize(edges, size, interpolation=cv2.INTER_AREA))
    photo_detail = max(float(detail.mean()), 0.5)

    scores = np.zeros(len(kinds))
    for g, (mask, kind) in enumerate(zip(masks, kinds, strict=True)):
        grid = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        if not grid.any():
            continue
        terms, truncation = _terms(grid, lab, detail, photo_detail, kind)
        score = sum(POINTS[name] * value for name, value in terms.items())
        scores[g] = np.clip(score - TRUNCATION_POINTS * truncation, 0, 10)
    return scores


def _terms(
    grid: np.ndarray, lab: np.ndarray, detail: np.ndarray, photo_detail: float, kind: str
) -> tuple[dict[str, float], float]:
    """The five terms and the truncation of one object, all on the measuring grid (gh, gw)."""
    gh, gw = grid.shape
    pixels = cv2.countNonZero(grid)
    area = pixels / (gh * gw)
    size = min(1.0, (area / 0.25) ** 0.5)

    x, y, bw, bh = cv2.boundingRect(grid)
    radius = max(2, round(0.25 * pixels**0.5))
    top, left = max(0, y - radius), max(0, x - radius)
    window = slice(top, y + bh + radius), slice(left, x + bw + radius)
    mask = grid[window]
    near = cv2.dilate(mask, np.ones((2 * radius + 1, 1), np.uint8))
    near = cv2.dilate(near, np.ones((1, 2 * radius + 1), np.uint8))
    mean, spread = cv2.meanStdDev(lab[window], mask=mask)
    ring = near - mask
    if cv2.countNonZero(ring):
        ring_mean, ring_spread = cv2.meanStdDev(lab[window], mask=ring)
        distance = np.linalg.norm(mean - ring_mean) + 0.5 * np.linalg.norm(spread - ring_spread)
        contrast = min(1.0, float(distance) / 40)
    else:
        contrast = 0.5

    moments = cv2.moments(grid, binaryImage=True)
    dx = (moments["m10"] / pixels + 0.5) / gw - 0.5
    dy = (moments["m01"] / pixels + 0.5) / gh - 0.5
    sharpness = cv2.mean(detail[window], mask=mask)[0] / photo_detail
    touching = sum(map(cv2.countNonZero, (grid[:1], grid[-1:], grid[:, :1], grid[:, -1:])))
    terms = {
        "kind": kind_weight(kind) * min(1.0, (area / 0.02) ** 0.5),
        "size": size * min(1.0, kind_weight(kind) / KIND_WEIGHTS[UNKNOWN_KIND]),
        "contrast": contrast,
        "centre": float(np.exp(-(dx * dx + dy * dy) / (2 * 0.25**2))),
        "sharpness": min(1.0, sharpness / 2),
    }
    return terms, (1 - size) * min(1.0, touching / (bw + bh))


def salient_objects(scores: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Indices (int64) of the salient objects, most salient first, at most `MAX_OBJECTS`.

    scores: (G,) of `saliency_scores`. areas: (G,) visible share of the frame, 0…1. Empty when
    nothing passes.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[areas[order] >= MIN_AREA]
    if len(order) == 0:
        return order
    floor = max(THRESHOLD, scores[order[0]] - SPAN)
    return order[scores[order] >= floor][:MAX_OBJECTS]
