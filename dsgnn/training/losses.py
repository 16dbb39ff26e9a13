"""The training losses (DSGNN, section 3.5; Mask2Former, section 3.3).

O decoder outputs, B images, Q queries, G objects (padded to the most in the batch), P points,
N matched triples (output, image, object). Everything is computed for all outputs at once.

Differences from upstream: there are no loops over outputs, images or objects. All pairs of images
take part in the cross-image loss, where upstream takes the first two of a batch; its noise term is
identically zero and left out. Before the first decoder layer the queries do not depend on the
image, and the difference loss is 0 there instead of normalised rounding noise. `Criterion` also
serves the named options that are ours (peaks, balanced ranks, no texture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsgnn.config import Config
from dsgnn.data.transforms import ImageTruth
from dsgnn.graph import DomainOutput
from dsgnn.model import Output, TrainingOutput
from dsgnn.training.matching import (
    Matches,
    PaddedTruth,
    PointSampler,
    mask_costs,
    match,
    sample_objects,
    sample_points,
    unannotated,
)
from dsgnn.training.peaks import (
    attention_loss,
    dense_loss,
    distance_cost,
    heat_loss,
    object_centres,
)

POINTS = 12544


def class_loss(
    logits: Tensor, matched: Tensor, class_weights: Tensor, doubtful: Tensor | None = None
) -> Tensor:
    """Weighted cross-entropy, [object, none], by output. logits: (O, B, Q, 2) → (O,).

    doubtful: (O, B, Q) bool, queries that do not count unless they are matched, see `unannotated`.
    """
    labels = (matched < 0).long()  # 0 = object
    weights = class_weights[labels]
    if doubtful is not None:
        weights = weights * ~(doubtful & (matched < 0))
    ce = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
    total = weights.sum((1, 2)).clamp(min=1e-6)  # it is 0 where every query is doubtful
    return 2 * (weights * ce.view_as(weights)).sum((1, 2)) / total


def rank_loss(scores: Tensor, ranks: Tensor, balanced: bool) -> Tensor:
    """Pairwise logistic ranking loss. scores, ranks: (O, B, Q), ranks 0 = no object → (O,).

    Published form: pairs weigh |r_i - r_j| / W with W = Σ k (Q - k), so in an image of few objects
    nearly all the weight lies on pairs of object and none. Balanced: pairs of two objects, and
    pairs of object and none, are normalised apart (weights 2 and 0.5).
    """
    Q = scores.shape[-1]
    i, j = torch.triu_indices(Q, Q, 1, device=scores.device)
    gap = ranks[..., i] - ranks[..., j]  # (O, B, pairs)
    loss = F.softplus(-gap.sign() * (scores[..., i] - scores[..., j]))
    weight = gap.abs()
    if not balanced:
        W = sum(k * (Q - k) for k in range(Q))
        return 2 * (weight * loss).sum(-1).mean(-1) / W
    both = (ranks[..., i] > 0) & (ranks[..., j] > 0)

    def mean(chosen: Tensor) -> Tensor:
        w = weight * chosen
        return ((w * loss).sum(-1) / w.sum(-1).clamp(min=1)).mean(-1)

    return 2 * mean(both) + 0.5 * mean(~both)


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """1 - Pearson correlation over channels, mean over nodes. (O, ..., C) → (O,)."""
    f_s, f_t = (f - f.mean(-1, keepdim=True) for f in (f_s, f_t))
    return 1 - F.cosine_similarity(f_s, f_t, dim=-1).flatten(1).mean(1)


def difference_loss(f: Tensor, p: Tensor) -> Tensor:
    """Common and private parts should differ. (O, B, Q, C) each → (O,).

    Nodes that do not vary between images have no direction and count 0.
    """

    def unit(x: Tensor) -> Tensor:
        scale = x.norm(dim=2, keepdim=True)
        x = x - x.mean(1, keepdim=True)  # per node, over images
        norm = x.norm(dim=2, keepdim=True)  # along nodes
        return torch.where(norm > 1e-5 * scale, x / norm.clamp(min=1e-12), 0.0)

    return (unit(f).transpose(-1, -2) @ unit(p)).square().mean((1, 2, 3))


def restore_loss(restored: Tensor, encoded: Tensor) -> Tensor:
    """Mean squared error of what was put together again. (O, ...) each → (O,)."""
    return 0.05 * (restored - encoded).square().flatten(1).mean(1)


def cross_image_loss(task: Tensor, matches: Matches, ranks: Tensor, counts: Tensor) -> Tensor:
    """Objects of equal standing in two images should have similar task vectors.

    task: (O, B, Q, D), ranks: (B, G), counts: (B,) → (O,): 1 - cosine, mean over the
    k = min(n_0, n_1) most salient objects paired from the top, then over pairs of images. 0 when
    no two images of the batch have objects.
    """
    B, Q = task.shape[1:3]
    first, second = torch.triu_indices(B, B, 1, device=task.device)
    order = matches.ranks(ranks).argsort(dim=-1, descending=True, stable=True)  # (O, B, Q)
    top = task.gather(2, order[..., None].expand_as(task))
    similarity = F.cosine_similarity(top[:, first], top[:, second], dim=-1)  # (O, pairs, Q)
    k = torch.minimum(counts[first], counts[second]).clamp(max=Q)  # (pairs,)
    taken = torch.arange(Q, device=task.device) < k[:, None]
    each = ((1 - similarity) * taken).sum(-1) / k.clamp(min=1)  # (O, pairs)
    return each.sum(-1) / (k > 0).sum().clamp(min=1)


def mask_losses(
    masks: Tensor, truth: PaddedTruth, matches: Matches, points: PointSampler, total: Tensor
) -> dict[str, Tensor]:
    """Cross-entropy and dice of the matched masks on uncertain points, (O,) each.

    masks: (O, B, Q, h, w) logits. total: objects that the sums are divided by.
    """
    chosen = masks[matches.o, matches.b, matches.q][:, None]  # (N, 1, h, w)
    at = points.uncertain(chosen.detach())
    wanted = sample_objects(truth.masks[:, :, None], matches, at).squeeze(1)  # (N, P)
    logits = sample_points(chosen, at).squeeze(1)
    bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    p = logits.sigmoid()
    dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
    return {
        "shape_mask": 5 * matches.per_output(bce, total),
        "shape_dice": 5 * matches.per_output(dice, total),
    }


def texture_loss(
    textures: Tensor,
    images: Tensor,
    truth: PaddedTruth,
    matches: Matches,
    points: PointSampler,
    total: Tensor,
) -> Tensor:
    """Squared error of the matched texture maps to the masked image, summed over colours → (O,).

    textures: (O, B, Q, 3, h, w). images: (B, 3, H, W), as the network saw them.
    """
    at = points.uniform(len(matches.o), textures.device)
    pictures = truth.masks[:, :, None] * images[:, None].float()  # (B, G, 3, H, W)
    wanted = sample_objects(pictures, matches, at)
    got = sample_points(textures[matches.o, matches.b, matches.q].float(), at)  # (N, 3, P)
    return 5 * matches.per_output((got - wanted).square().sum(1).mean(1), total)


def domain_losses(graph: DomainOutput, truth: PaddedTruth, matches: Matches) -> dict[str, Tensor]:
    """What separates the domains: similarity, difference, reconstruction, cross-image; (O,) each.

    matches: of the graph head's fused classification.
    """
    by_output = _by_output(matches.object.shape[:2])
    fused_s, fused_t = by_output(graph.fused_s), by_output(graph.fused_t)
    task = by_output(graph.task)
    return {
        "domain_similarity": 2 * similarity_loss(fused_s, fused_t),
        "domain_difference_s": difference_loss(fused_s, by_output(graph.private_s)),
        "domain_restore_s": restore_loss(by_output(graph.restored_s), by_output(graph.encoded_s)),
        "domain_difference_t": difference_loss(fused_t, by_output(graph.private_t)),
        "domain_restore_t": restore_loss(by_output(graph.restored_t), by_output(graph.encoded_t)),
        "domain_cross_image": cross_image_loss(task, matches, truth.ranks, truth.counts),
    }


@dataclass(frozen=True)
class HeadOutput:
    """What one head says of the queries. class_logits: (O, B, Q, 2); ranks: (O, B, Q) scores."""

    class_logits: Tensor
    ranks: Tensor


def heads_of(out: TrainingOutput) -> dict[str, HeadOutput]:
    """The heads that are trained, in float32, by the names they have in `HEAD_TERMS`."""
    graph, by_output = out.graph, _by_output(out.masks.shape[:2])
    heads = {
        "shape": HeadOutput(out.class_s.float(), out.rank_s.float()),
        "graph": HeadOutput(by_output(graph.class_logits), by_output(graph.rank)),
    }
    if isinstance(graph, DomainOutput):
        assert out.class_t is not None and out.rank_t is not None
        heads["texture"] = HeadOutput(out.class_t.float(), out.rank_t.float())
        heads["graph_s"] = HeadOutput(by_output(graph.class_s), by_output(graph.rank_s))
        heads["graph_t"] = HeadOutput(by_output(graph.class_t), by_output(graph.rank_t))
    return heads


HEAD_TERMS = {
    "shape": ("shape_class", "shape_rank"),
    "graph": ("domain_class", "domain_rank"),
    "texture": ("texture_class", "texture_rank"),
    "graph_s": ("domain_class_s", "domain_rank_s"),
    "graph_t": ("domain_class_t", "domain_rank_t"),
}
"""What the class and rank losses of a head are called in the logs."""


class Criterion:
    """All losses of one batch.

    `Criterion(config)(output, images, targets)` → dict of weighted terms, each (O,) by decoder
    output (scalar terms are (1,)); their sum is the loss. After a call `matches` has the matching
    of each head.
    """

    def __init__(self, config: Config, points: int = POINTS):
        """points: P, how many the mask losses look at."""
        self.config = config
        self.points = points
        self.matches: dict[str, Matches] = {}

    def __call__(
        self,
        output: Output,
        images: Tensor,
        targets: Sequence[ImageTruth],
        points: Tensor | None = None,
        generator: torch.Generator | None = None,
        objects: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """output: with its training outputs. images: (B, 3, H, W), what the network saw.

        points: (P, 2) x, y in [0, 1], in place of the random points everywhere. generator: makes
        the random points repeatable. objects: what the losses summed over objects are divided by,
        by default the objects of the batch that can be matched (at most Q of an image); several
        processes give their mean. Raises ValueError without training outputs.
        """
        out = output.training
        if out is None:
            raise ValueError("the losses need model(images, training_outputs=True)")
        masks = out.masks.float()
        B, Q = masks.shape[1:3]
        truth = PaddedTruth.of(targets)
        where = PointSampler(self.points, points, generator)
        matchable = truth.matchable(Q) if objects is None else torch.as_tensor(objects)
        total = matchable.clamp(min=1)

        # one mask cost for all heads: every classification is matched on the shape masks
        cost = mask_costs(masks, truth, where.uniform(B, masks.device))  # (O, B, Q, G)
        terms: dict[str, Tensor] = {}
        doubtful = None
        if out.heat is not None and out.cells is not None and out.dense is not None:
            centres, coverage = object_centres(truth.masks)
            cost = cost + distance_cost(out.cells, coverage)
            heat = heat_loss(out.heat.float(), centres, coverage, truth, total)
            dense = dense_loss(out.dense.float(), truth.foreground)
            terms |= {"heat": heat[None], "dense": dense[None]}
            doubtful = unannotated(masks, truth)
        if out.attention is not None and truth.attention is not None:
            terms["attention"] = attention_loss(out.attention.float(), truth.attention)[None]

        heads = heads_of(out)
        found = match(cost, [head.class_logits for head in heads.values()], truth.counts)
        self.matches = matches = dict(zip(heads, found, strict=True))
        weights = torch.tensor(self.config.class_weights, device=masks.device)
        balanced = self.config.rank_loss == "balanced"
        for name, head in heads.items():
            class_term, rank_term = HEAD_TERMS[name]
            terms[class_term] = class_loss(
                head.class_logits, matches[name].object, weights, doubtful
            )
            ranks = matches[name].ranks(truth.ranks)
            terms[rank_term] = rank_loss(head.ranks, ranks, balanced)

        terms |= mask_losses(masks, truth, matches["shape"], where, total)
        if isinstance(out.graph, DomainOutput):
            assert out.textures is not None
            terms["texture_mse"] = texture_loss(
                out.textures, images, truth, matches["texture"], where, total
            )
            terms |= domain_losses(out.graph, truth, matches["graph"])
        return terms


def _by_output(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A function (O·B, ...) → (O, B, ...) in float32. shape: (O, B)."""
    return lambda x: x.float().unflatten(0, shape)
