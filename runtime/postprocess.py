"""From the network's three outputs to ranked objects at the photo's own size.

Differs from upstream in one default: with no query above the threshold the ranking is empty
(`if_none="none"`: an empty scene is a valid answer); upstream returns every query (`"all"`).
"""

from __future__ import annotations

import cv2
import numpy as np

from dsgnn.runtime.letterbox import Geometry
from dsgnn.runtime.ranking import RankedObject, Ranking

STRIDE = 4  # the mask logits' stride in the network's input


def postprocess(
    saliency: np.ndarray,
    score: np.ndarray,
    masks: np.ndarray,
    geometry: Geometry,
    threshold: float,
    if_none: str = "none",
) -> Ranking:
    """Keep, order and upsample the objects of one photo.

    saliency: (Q,) float, orders the objects, any range. score: (Q,) float, object probability in
    0…1; queries with score > threshold are kept. masks: (Q, H/4, W/4) float logits over the padded
    input; positive = object. geometry: what `letterbox` returned for this photo.

    Equal saliencies keep the query order. An object whose mask comes out empty stays in the list
    (the published evaluation counts it), with box (0, 0, 0, 0) and area 0.
    Raises ValueError for shapes that do not fit together, values that are not finite, or another
    `if_none`.
    """
    check_if_none(if_none)
    queries = len(saliency)
    expected = (queries, geometry.padded[0] // STRIDE, geometry.padded[1] // STRIDE)
    if saliency.shape != (queries,) or score.shape != (queries,) or masks.shape != expected:
        raise ValueError(
            f"expected saliency ({queries},), score ({queries},) and masks {expected}, got "
            f"{saliency.shape}, {score.shape} and {masks.shape}"
        )
    if not (np.isfinite(saliency).all() and np.isfinite(score).all()):
        raise ValueError(
            "the network returned saliencies or scores that are not finite: the artifact is "
            "damaged or its precision overflows; export it again in fp32"
        )
    kept = np.flatnonzero(score > threshold)
    if not len(kept) and if_none == "all":
        kept = np.arange(queries)
    if not np.isfinite(masks[kept]).all():
        raise ValueError(
            "the network returned masks that are not finite: the artifact is damaged or its "
            "precision overflows; export it again in fp32"
        )
    order = kept[np.argsort(-saliency[kept], kind="stable")]
    h, w = geometry.original
    objects = []
    for rank, query in enumerate(order.tolist(), start=1):
        mask = upsample_mask(masks[query], geometry)
        x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
        objects.append(
            RankedObject(
                rank=rank,
                saliency=float(saliency[query]),
                score=float(score[query]),
                box=(x, y, x + width, y + height),
                mask=mask,
                area=cv2.countNonZero(mask.view(np.uint8)) / (h * w),
                query=query,
            )
        )
    return Ranking(h, w, tuple(objects))


def upsample_mask(logits: np.ndarray, geometry: Geometry) -> np.ndarray:
    """One query's logits (H/4, W/4) float to its mask (h, w) bool.

    Bilinear ×4 (half-pixel centres), crop the padding, bilinear to the photo's size, > 0. One mask
    at a time: the float intermediate of a 48-megapixel photo is 192 MB.
    """
    height, width = geometry.padded
    up = cv2.resize(
        np.asarray(logits, np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )  # (H, W)
    up = up[: geometry.resized[0], : geometry.resized[1]]
    if geometry.resized != geometry.original:
        h, w = geometry.original
        up = cv2.resize(up, (w, h), interpolation=cv2.INTER_LINEAR)
    return up > 0  # (h, w)


def check_if_none(if_none: str) -> None:
    """Raise ValueError unless `if_none` is "none" or "all"."""
    if if_none not in ("none", "all"):
        raise ValueError(f'if_none must be "none" or "all", got {if_none!r}')
