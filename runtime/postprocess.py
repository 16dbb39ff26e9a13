"""From the network's outputs to ranked objects at the photo's own size.

One default differs from upstream: with no query above the threshold the ranking is empty
(`if_none="none"`), because an empty scene is a valid answer. Upstream returns every query, as
`if_none="all"` does.
"""

from __future__ import annotations

from math import ceil, floor

import cv2
import numpy as np

from dsgnn.runtime.attention import attention_shares, cell_size, crop_attention
from dsgnn.runtime.errors import ArtifactError, OptionError
from dsgnn.runtime.framing import Box
from dsgnn.runtime.letterbox import Geometry
from dsgnn.runtime.ranking import RankedObject, Ranking

STRIDE = 4  # the mask logits' stride in the network's input
SPECK = 0.02  # a part of a mask with less than this of the largest part's pixels is a speck
SHORT_LABELS = 1 << 15  # parts that labels of 16 bits tell apart, with room for odd sides


def postprocess(
    saliency: np.ndarray,
    score: np.ndarray,
    masks: np.ndarray,
    geometry: Geometry,
    threshold: float,
    if_none: str = "none",
    attention: np.ndarray | None = None,
    order: str = "saliency",
    specks: str = "keep",
    nms_iou: float = 1.0,
) -> Ranking:
    """Keep, order and upsample the objects of one photo.

    saliency: (Q,) float, orders the objects, any range. score: (Q,) float, object probability in
    0…1; queries with score > threshold are kept. masks: (Q, H/4, W/4) float logits over the padded
    input; positive = object. geometry: what `letterbox` returned for this photo. attention:
    (gh, gw) float over the padded input, where people look; None = the network does not tell.
    order: "saliency", or "attention" = by each object's share of it, which then is its saliency.
    specks: "keep" masks as they are, as published, or "drop" their `without_specks`. nms_iou: of
    two objects above the threshold whose masks have a larger IoU, only the one with the higher
    score stays, see `without_repeats`; 1 = all stay, as published.

    Equal objects keep the query order. An object whose mask comes out empty stays in the list (the
    published evaluation counts it), with box (0, 0, 0, 0) and area 0.
    Raises ArtifactError for shapes that do not fit together and values that are not finite, and
    OptionError for another `if_none` or `specks`.
    """
    check_choices(if_none, specks)
    queries = len(saliency)
    expected = (queries, geometry.padded[0] // STRIDE, geometry.padded[1] // STRIDE)
    if saliency.shape != (queries,) or score.shape != (queries,) or masks.shape != expected:
        raise ArtifactError(
            f"expected saliency ({queries},), score ({queries},) and masks {expected}, got "
            f"{saliency.shape}, {score.shape} and {masks.shape}"
        )
    _check_finite("saliencies or scores", saliency, score)
    kept = np.flatnonzero(score > threshold)
    _check_finite("masks", masks[kept])
    kept = without_repeats(masks, score, kept, nms_iou)
    if not len(kept) and if_none == "all":
        kept = np.arange(queries)
        _check_finite("masks", masks)
    h, w = geometry.original
    enlarged = None if geometry.resized == geometry.original else np.empty((h, w), np.float32)
    upsampled = [_upsample(masks[query], geometry, specks, enlarged) for query in kept]
    enlarged = None  # its memory is free for what follows
    found, boxes = [mask for mask, _ in upsampled], [box for _, box in upsampled]
    ordering, shares, grid, cell_px = saliency[kept], None, None, None
    if attention is not None:
        grid = crop_attention(attention, geometry)
        cell_px = cell_size(attention.shape, geometry)
        shares = attention_shares(grid, attention.shape, found, geometry, boxes)
        ordering = shares if order == "attention" else ordering
    objects = []
    for rank, index in enumerate(np.argsort(-ordering, kind="stable").tolist(), start=1):
        mask, query = found[index], int(kept[index])
        x0, y0, x1, y1 = boxes[index]
        objects.append(
            RankedObject(
                rank=rank,
                saliency=float(ordering[index]),
                score=float(score[query]),
                box=boxes[index],
                mask=mask,
                area=int(np.count_nonzero(mask[y0:y1, x0:x1])) / (h * w),
                query=query,
                attention=None if shares is None else float(shares[index]),
            )
        )
    return Ranking(h, w, tuple(objects), attention=grid, attention_cell_px=cell_px)


def without_repeats(
    masks: np.ndarray, score: np.ndarray, kept: np.ndarray, nms_iou: float
) -> np.ndarray:
    """Non-maximum suppression: of the queries `kept`, those that repeat none of a higher score.

    masks: (Q, H/4, W/4) float logits, compared at this resolution. score: (Q,) float; of equal ones
    the first query goes first. kept: (K,) int64, ascending, as is what is returned. A query repeats
    another when the IoU of their masks is above nms_iou; empty masks repeat nothing.
    """
    if nms_iou >= 1 or len(kept) < 2:
        return kept
    positive = (masks[kept] > 0).reshape(len(kept), -1).astype(np.float32)
    shared = positive @ positive.T  # (K, K) pixels; float32 is exact up to 16 million
    areas = shared.diagonal()
    repeats = shared > nms_iou * (areas[:, None] + areas - shared)
    stays: list[int] = []
    for index in np.argsort(-score[kept], kind="stable").tolist():
        if not repeats[index, stays].any():
            stays.append(index)
    return kept[np.sort(stays)]


def _check_finite(what: str, *values: np.ndarray) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise ArtifactError(
            f"the network returned {what} that are not finite: the artifact is damaged or its "
            "precision overflows; export it again in fp32"
        )


def _upsample(
    logits: np.ndarray, geometry: Geometry, specks: str, enlarged: np.ndarray | None
) -> tuple[np.ndarray, Box]:
    """One query's logits (H/4, W/4) float to its mask (h, w) bool and the mask's box.

    Bilinear ×4 (half-pixel centres), crop the padding, drop specks if asked to, bilinear to the
    photo's size, > 0. enlarged: room for the last of these, (h, w) float32; None where the photo
    has the size of the network's input. All masks of a photo share it, because the floats of one
    mask of 48 megapixels take 192 MB. What is far from the object is never touched in its mask, so
    that it takes no memory.
    """
    height, width = geometry.padded
    up = cv2.resize(
        np.asarray(logits, np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )  # (H, W)
    up = up[: geometry.resized[0], : geometry.resized[1]]
    if specks == "drop":
        up = without_specks(up)
    mask = up > 0
    box = _bounds(mask)
    if enlarged is None:
        return mask, box
    h, w = geometry.original
    mask = np.zeros((h, w), bool)
    if not any(box):
        return mask, box
    cv2.resize(up, (w, h), dst=enlarged, interpolation=cv2.INTER_LINEAR)
    x0, x1 = _reach(box[0], box[2], geometry.resized[1], w)
    y0, y1 = _reach(box[1], box[3], geometry.resized[0], h)
    near = np.greater(enlarged[y0:y1, x0:x1], 0, out=mask[y0:y1, x0:x1])
    return mask, _bounds(near, x0, y0)


def _bounds(mask: np.ndarray, left: int = 0, top: int = 0) -> Box:
    """The box of a mask that begins at (left, top); zeros if it is empty."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return 0, 0, 0, 0
    return left + x, top + y, left + x + width, top + y + height


def _reach(start: int, end: int, coarse: int, fine: int) -> tuple[int, int]:
    """Where the pixels from `start` to `end` of a side may show when it is resized from `coarse` to
    `fine` pixels: the first pixel and the end."""
    scale = fine / coarse
    first, last = floor((start - 0.5) * scale - 0.5), ceil((end + 0.5) * scale - 0.5)
    return max(0, first), min(fine, last + 1)


def without_specks(logits: np.ndarray) -> np.ndarray:
    """Logits of a mask, (H, W) float, without stray specks far smaller than the object.

    A connected part of what is positive is a speck when it has less than `SPECK` of the pixels of
    the largest part; pixels that touch at a corner are connected. Its logits become negative.
    """
    positive = (logits > 0).view(np.uint8)
    x, y, width, height = cv2.boundingRect(positive)  # only the box is searched
    if not width:  # OpenCV crashes on an empty picture
        return logits
    box = np.s_[y : y + height, x : x + width]
    # At most every second pixel of every second row begins a part: fewer labels are found faster.
    labelling = cv2.CV_16U if width * height < 4 * SHORT_LABELS else cv2.CV_32S
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        positive[box], connectivity=8, ltype=labelling
    )
    if count <= 2:  # the background and one part
        return logits
    areas = stats[:, cv2.CC_STAT_AREA]
    small = areas < SPECK * areas[1:].max()
    small[0] = False
    if not small.any():
        return logits
    cleaned = logits.copy()
    cleaned[box] = np.where(small[labels], -np.abs(logits[box]), logits[box])
    return cleaned


def check_choices(if_none: str, specks: str) -> None:
    """Raise OptionError unless `if_none` is "none" or "all", and `specks` is "drop" or "keep"."""
    if if_none not in ("none", "all"):
        raise OptionError(f'if_none must be "none" or "all", got {if_none!r}')
    if specks not in ("drop", "keep"):
        raise OptionError(f'specks must be "drop" or "keep", got {specks!r}')
