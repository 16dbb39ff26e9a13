"""The definition of the measures read aloud, one mask and one pixel map at a time.

What `dsgnn.metrics` must equal; `benchmarks/metrics_cost.py` times the two against each other.
"""

import numpy as np
from scipy import stats


def naive_metrics(
    gt_masks, gt_ranks, pred_masks, pred_scores, protocol="dsgnn", palette="assr", threshold=0.5
):
    """mae, spearman, sa_sor, f_measure and matched of one image, as `image_metrics` has them."""
    gt_ranks, pred_ranks = minimum_ranks(gt_ranks), minimum_ranks(pred_scores)
    match = best_matches(gt_masks, pred_masks, threshold)
    return {
        "mae": np.abs(
            rank_map(gt_masks, gt_ranks, palette) - rank_map(pred_masks, pred_ranks, palette)
        ).mean(),
        "spearman": spearman(gt_masks, gt_ranks, pred_masks, pred_ranks, threshold),
        "sa_sor": sa_sor(match, gt_ranks, pred_scores, protocol),
        "f_measure": f_measure(gt_masks.any(0), pred_masks.any(0)),
        "matched": sum(prediction is not None for prediction in match),
    }


def minimum_ranks(values):
    return [sorted(values).index(value) + 1 for value in values]


def best_matches(gt_masks, pred_masks, threshold):
    iou = np.zeros((len(gt_masks), len(pred_masks)))
    for i, gt in enumerate(gt_masks):
        for j, pred in enumerate(pred_masks):
            union = np.logical_or(gt, pred).sum()
            iou[i, j] = np.logical_and(gt, pred).sum() / union if union else 0
    wanted = []
    for row in iou:
        best = max(range(len(row)), key=lambda j: (row[j], j), default=None)
        wanted.append(best if best is not None and row[best] >= threshold else None)
    for j in range(len(pred_masks)):
        rivals = [i for i, best in enumerate(wanted) if best == j]
        for i in rivals:
            if i != max(rivals, key=lambda i: (iou[i, j], i)):
                wanted[i] = None
    return wanted


def sa_sor(match, gt_ranks, pred_scores, protocol):
    if len(gt_ranks) < 2 or len(set(gt_ranks)) == 1:
        return None
    matched = [j for j in match if j is not None]
    scores = [pred_scores[j] for j in matched]
    if len(pred_scores) > len(gt_ranks):
        scores += [score for j, score in enumerate(pred_scores) if j not in matched]
    if protocol == "dsgnn":
        scores = scores[: len(gt_ranks)]
    ranks = iter(minimum_ranks(scores))
    predicted = [0 if j is None else next(ranks) for j in match]
    return stats.pearsonr(gt_ranks, predicted)[0] if len(set(predicted)) > 1 else 0.0


def spearman(gt_masks, gt_ranks, pred_masks, pred_ranks, threshold):
    painted = np.zeros(gt_masks.shape[1:], int)
    for mask, rank in zip(pred_masks, pred_ranks, strict=True):
        painted[mask] = rank
    truth, found = [], []
    for mask, rank in zip(gt_masks, gt_ranks, strict=True):
        there = painted[mask]
        there = there[there > 0]
        if len(there) > threshold * mask.sum():
            ranks, counts = np.unique(there, return_counts=True)
            truth.append(rank)
            found.append(ranks[counts == counts.max()].max())
    if len(truth) == 1:
        return 1.0
    if not truth or len(set(truth)) == 1 or len(set(found)) == 1:
        return None
    return stats.spearmanr(truth, found)[0]


def rank_map(masks, ranks, palette):
    image = np.zeros(masks.shape[1:])
    for mask, rank in zip(masks, ranks, strict=True):
        if palette == "assr":
            image[mask] = [255, 229, 204, 178, 153][min(len(ranks) - rank, 4)] / 255
        else:
            image[mask] = rank / len(ranks)
    return image


def f_measure(truth, found):
    if not truth.any() and not found.any():
        return None
    both = np.logical_and(truth, found).sum()
    if not both:
        return 0.0
    precision, recall = both / found.sum(), both / truth.sum()
    return 1.3 * precision * recall / (0.3 * precision + recall)
