"""Matching and training losses (DSGNN, section 3.5; Mask2Former, section 3.3).

O decoder outputs, B images, Q queries, G objects (padded to the most in the batch), P points,
N matched triples (output, image, object). Everything is computed for all outputs at once.

Differences from upstream: no loops over outputs, images or objects; all pairs of images take part
in the cross-image loss (upstream: only the first two of a batch), whose noise term is identically
zero and left out; before the first decoder layer the queries do not depend on the image, and the
difference loss is 0 there instead of normalised rounding noise. `Criterion` also serves the named
options that are ours (peaks, balanced ranks, no texture).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dsgnn.config import Config
from dsgnn.graph import DomainOutput
from dsgnn.model import Output

POINTS = 12544
OVERSAMPLE, UNCERTAIN = 3, 0.75


@dataclass(frozen=True)
class Target:
    """One image's ground truth. masks: (G, H, W) bool or float, at the size the network sees,
    padding included. ranks: (G,) float, larger = more salient, 1…G."""

    masks: Tensor
    ranks: Tensor


@dataclass(frozen=True)
class Batch:
    """Targets padded to G ≥ 1 objects. masks: (B, G, H, W) float; ranks: (B, G), 0 where padded;
    counts: (B,)."""

    masks: Tensor
    ranks: Tensor
    counts: Tensor

    @staticmethod
    def of(targets: Sequence[Target]) -> Batch:
        counts = [len(t.ranks) for t in targets]
        G = max(1, *counts)
        H, W = targets[0].masks.shape[-2:]
        device = targets[0].masks.device
        masks = torch.zeros(len(targets), G, H, W, device=device)
        ranks = torch.zeros(len(targets), G, device=device)
        for b, target in enumerate(targets):
            masks[b, : counts[b]] = target.masks.float()
            ranks[b, : counts[b]] = target.ranks.float()
        return Batch(masks, ranks, torch.tensor(counts, device=device))


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2) as x, y in [0, 1] → (N, C, P)."""
    return F.grid_sample(maps, points[:, None] * 2 - 1, align_corners=False).squeeze(2)


def mask_cost(logits: Tensor, truth: Tensor) -> Tensor:
    """5·BCE + 5·dice of each query to each object. logits: (..., Q, P), truth: (..., G, P)."""
    truth_t = truth.transpose(-1, -2)
    bce = (F.softplus(-logits) @ truth_t + F.softplus(logits) @ (1 - truth_t)) / logits.shape[-1]
    p = logits.sigmoid()
    dice = 1 - (2 * p @ truth_t + 1) / (p.sum(-1)[..., None] + truth.sum(-1)[..., None, :] + 1)
    return 5 * bce + 5 * dice


def assign(cost: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Hungarian matching. cost: (K, B, Q, G) → object index of each query (K, B, Q), -1 = none.

    Costs that are not finite count 0: the losses of such queries are not finite either, and it is
    there that training stops and tells.
    """
    cost = np.nan_to_num(cost, posinf=0.0, neginf=0.0)
    matched = np.full(cost.shape[:3], -1)
    for k in range(cost.shape[0]):
        for b, count in enumerate(counts):
            queries, objects = linear_sum_assignment(cost[k, b, :, :count])
            matched[k, b, queries] = objects
    return matched


@dataclass(frozen=True)
class Matches:
    """One assignment: object (O, B, Q), -1 = none; and its N triples as index vectors."""

    object: Tensor
    o: Tensor
    b: Tensor
    q: Tensor
    g: Tensor

    @staticmethod
    def of(matched: Tensor) -> Matches:
        o, b, q = (matched >= 0).nonzero(as_tuple=True)
        return Matches(matched, o, b, q, matched[o, b, q])

    def per_output(self, values: Tensor, total: Tensor) -> Tensor:
        """Sum of values (N,) by output, divided by total → (O,)."""
        sums = torch.zeros(self.object.shape[0], device=values.device, dtype=values.dtype)
        return sums.index_add(0, self.o, values) / total

    def ranks(self, ranks: Tensor) -> Tensor:
        """Rank of each query's object (O, B, Q), 0 = none. ranks: (B, G)."""
        index = self.object.clamp(min=0)
        found = ranks.expand(index.shape[0], -1, -1).gather(2, index)
        return torch.where(self.object >= 0, found, 0.0)


def sample_objects(maps: Tensor, matches: Matches, points: Tensor) -> Tensor:
    """`sample_points(maps[b, g], points)` of the matched objects' maps, each of which is read in
    place: a copy for every output that matched the object would be ten times as large as they are.

    maps: (B, G, C, H, W); points: (N, P, 2) → (N, C, P).
    """
    B, G = maps.shape[:2]
    O, P = len(matches.object), points.shape[1]  # noqa: E741
    row = matches.b * G + matches.g  # an output matches an object once at most
    where = points.new_zeros(B * G, O, P, 2)
    where[row, matches.o] = points
    values = sample_points(maps.flatten(0, 1), where.flatten(1, 2))  # (B·G, C, O·P)
    return values.unflatten(2, (O, P))[row, :, matches.o]


def class_loss(logits: Tensor, matched: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy, [object, none], by output. logits: (O, B, Q, 2) → (O,)."""
    labels = (matched < 0).long()  # 0 = object
    weights = class_weights[labels]
    ce = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
    return 2 * (weights * ce.view_as(weights)).sum((1, 2)) / weights.sum((1, 2))


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


def object_centres(masks: Tensor, stride: int = 8) -> tuple[Tensor, Tensor]:
    """The cell an object is seeded from: nearest its centroid among those it covers well.

    masks: (B, G, H, W) float → cells (B, G) flat indices, coverage (B, G, H/8, W/8) in [0, 1].
    """
    coverage = F.avg_pool2d(masks, stride)
    h, w = coverage.shape[-2:]
    y = torch.arange(h, device=masks.device, dtype=masks.dtype)[:, None]
    x = torch.arange(w, device=masks.device, dtype=masks.dtype)
    area = coverage.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    cy = (coverage * y).sum((-2, -1), keepdim=True) / area
    cx = (coverage * x).sum((-2, -1), keepdim=True) / area
    distance = ((y - cy) ** 2 + (x - cx) ** 2).sqrt() / area.sqrt()
    well = coverage >= 0.5 * coverage.amax((-2, -1), keepdim=True)
    return (-distance - 10.0 * ~well).flatten(2).argmax(-1), coverage


def heat_loss(
    heat: Tensor, cells: Tensor, coverage: Tensor, counts: Tensor, total: Tensor
) -> Tensor:
    """Focal loss of the centre heat-map (CenterNet, equation 1), scalar.

    heat: (B, h, w) logits; cells: (B, G); coverage: (B, G, h, w); counts: (B,); total: objects that
    the sum is divided by.
    """
    h, w = heat.shape[-2:]
    real = torch.arange(cells.shape[1], device=heat.device) < counts[:, None]  # (B, G)
    y = torch.arange(h, device=heat.device)[:, None] - (cells // w)[..., None, None]
    x = torch.arange(w, device=heat.device) - (cells % w)[..., None, None]
    sigma = (0.2 * coverage.sum((-2, -1)).sqrt()).clamp(min=0.6)[..., None, None]
    bump = torch.exp(-(y**2 + x**2) / (2 * sigma**2)) * real[..., None, None]  # (B, G, h, w)
    truth = torch.cat((bump, torch.zeros_like(heat)[:, None]), 1).amax(1)
    p = heat.sigmoid()
    positive = (1 - p) ** 2 * F.softplus(-heat) * (truth == 1)
    negative = (1 - truth) ** 4 * p**2 * F.softplus(heat) * (truth < 1)
    return (positive + negative).sum() / total


class Criterion:
    """All losses of one batch.

    `Criterion(config)(output, images, targets)` → dict of weighted terms, each (O,) by decoder
    output (scalar terms are (1,)); their sum is the loss. `output` needs training outputs, `images`
    is what the network saw. `points` (P, 2) in [0, 1] replaces the random points everywhere.
    `generator` makes the points repeatable. `objects`: what the losses summed over objects are
    divided by, by default the objects of the batch that can be matched (at most Q of an image);
    several processes give their mean.
    """

    def __init__(self, config: Config, points: int = POINTS):
        self.config = config
        self.points = points

    def __call__(
        self,
        output: Output,
        images: Tensor,
        targets: Sequence[Target],
        points: Tensor | None = None,
        generator: torch.Generator | None = None,
        objects: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        out = output.training
        if out is None:
            raise ValueError("the losses need model(images, training_outputs=True)")
        batch = Batch.of(targets)
        O, B, Q = out.masks.shape[:3]  # noqa: E741
        masks = out.masks.float()
        weights = torch.tensor(self.config.class_weights, device=masks.device)
        matchable = batch.counts.clamp(max=Q).sum()
        total = (matchable if objects is None else torch.as_tensor(objects)).clamp(min=1)
        by_output = lambda x: x.float().unflatten(0, (O, B))  # noqa: E731  (O·B, …) → (O, B, …)

        def random_points(n: int, count: int) -> Tensor:
            return torch.rand(n, count, 2, generator=generator, device=masks.device)

        # one mask cost for all classifications: every one is matched on the shape masks
        where = random_points(B, self.points) if points is None else points.expand(B, -1, -1)
        seen = sample_points(masks.detach().transpose(0, 1).flatten(1, 2), where)  # (B, O·Q, P)
        truth = sample_points(batch.masks, where)  # (B, G, P)
        cost = mask_cost(seen, truth).unflatten(1, (O, Q)).transpose(0, 1)  # (O, B, Q, G)
        terms: dict[str, Tensor] = {}
        if out.heat is not None and out.cells is not None and out.dense is not None:
            cells, coverage = object_centres(batch.masks)
            inside = coverage.flatten(2).gather(
                2, out.cells[:, None].expand(-1, coverage.shape[1], -1)
            )  # (B, G, Q)
            cost = cost + 3 * (1 - inside.transpose(1, 2))
            terms["heat"] = heat_loss(out.heat.float(), cells, coverage, batch.counts, total)[None]
            union = batch.masks.amax(1, keepdim=True)
            union = F.adaptive_avg_pool2d(union, out.dense.shape[-2:]).squeeze(1)
            terms["dense"] = F.binary_cross_entropy_with_logits(out.dense.float(), union)[None]
        graph = out.graph
        classes = {"shape": out.class_s.float(), "graph": by_output(graph.class_logits)}
        if isinstance(graph, DomainOutput):
            assert out.class_t is not None
            classes["texture"] = out.class_t.float()
            classes["graph_s"] = by_output(graph.class_s)
            classes["graph_t"] = by_output(graph.class_t)
        matched = assign(
            torch.cat([cost - 2 * c.detach().softmax(-1)[..., :1] for c in classes.values()])
            .cpu()
            .numpy(),
            batch.counts.tolist(),
        )
        each = torch.from_numpy(matched).to(masks.device).split(O)
        matches = {name: Matches.of(m) for name, m in zip(classes, each, strict=True)}
        self.matches = matches  # kept for inspection

        def classify(name: str) -> Tensor:
            return class_loss(classes[name], matches[name].object, weights)

        def rank(name: str, scores: Tensor) -> Tensor:
            return rank_loss(
                scores, matches[name].ranks(batch.ranks), self.config.rank_loss == "balanced"
            )

        terms["shape_class"] = classify("shape")
        terms["shape_rank"] = rank("shape", out.rank_s.float())
        m = matches["shape"]
        chosen = masks[m.o, m.b, m.q][:, None]  # (N, 1, h, w)
        with torch.no_grad():
            at = (
                self._uncertain_points(chosen, random_points)
                if points is None
                else points.expand(len(chosen), -1, -1)
            )
            truth = sample_objects(batch.masks[:, :, None], m, at).squeeze(1)  # (N, P)
        logits = sample_points(chosen, at).squeeze(1)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * truth).sum(1) + 1) / (p.sum(1) + truth.sum(1) + 1)
        terms["shape_mask"] = 5 * m.per_output(bce, total)
        terms["shape_dice"] = 5 * m.per_output(dice, total)

        terms["domain_class"] = classify("graph")
        terms["domain_rank"] = rank("graph", by_output(graph.rank))
        if not isinstance(graph, DomainOutput):
            return terms
        assert out.rank_t is not None and out.textures is not None
        terms["texture_class"] = classify("texture")
        terms["texture_rank"] = rank("texture", out.rank_t.float())
        m = matches["texture"]
        at = random_points(len(m.o), self.points) if points is None else points.expand(
            len(m.o), -1, -1)  # fmt: skip
        wanted = sample_objects(batch.masks[:, :, None] * images[:, None].float(), m, at)
        got = sample_points(out.textures[m.o, m.b, m.q].float(), at)  # (N, 3, P)
        squared = (got - wanted).square().sum(1).mean(1)
        terms["texture_mse"] = 5 * m.per_output(squared, total)

        for end in ("s", "t"):
            terms[f"domain_class_{end}"] = classify(f"graph_{end}")
            terms[f"domain_rank_{end}"] = rank(
                f"graph_{end}", by_output(vars(graph)[f"rank_{end}"])
            )
        part = {
            name: by_output(value)
            for name, value in vars(graph).items()
            if name.startswith(("fused", "private", "encoded", "restored"))
        }
        terms["domain_similarity"] = 2 * similarity_loss(part["fused_s"], part["fused_t"])
        for end in ("s", "t"):
            terms[f"domain_difference_{end}"] = difference_loss(
                part[f"fused_{end}"], part[f"private_{end}"]
            )
            restored = part[f"restored_{end}"] - part[f"encoded_{end}"]
            terms[f"domain_restore_{end}"] = 0.05 * restored.square().flatten(1).mean(1)
        terms["domain_cross_image"] = cross_image_loss(
            by_output(graph.task), matches["graph"], batch.ranks, batch.counts
        )
        return terms

    def _uncertain_points(
        self, logits: Tensor, random_points: Callable[[int, int], Tensor]
    ) -> Tensor:
        """P points per map: 75% the most uncertain of 3·P random ones, the rest random
        (PointRend, section 3.1). logits: (N, 1, h, w) → (N, P, 2)."""
        N, keep = len(logits), int(UNCERTAIN * self.points)
        candidates = random_points(N, OVERSAMPLE * self.points)
        doubt = -sample_points(logits, candidates).squeeze(1).abs()
        index = doubt.topk(keep, 1).indices[..., None].expand(-1, -1, 2)
        return torch.cat((candidates.gather(1, index), random_points(N, self.points - keep)), 1)
