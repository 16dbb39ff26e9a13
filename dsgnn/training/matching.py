"""Which query stands for which object: true objects of a batch, points on maps, Hungarian matching.

O decoder outputs, B images, Q queries, G objects (padded to the most in the batch), P points,
N matched triples (output, image, object). Mask2Former, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from dsgnn.data.transforms import ImageTruth

OVERSAMPLE, UNCERTAIN = 3, 0.75  # PointRend, section 3.1


@dataclass(frozen=True)
class PaddedTruth:
    """The objects of a batch, padded to G ≥ 1 in each image.

    masks: (B, G, H, W) float. ranks: (B, G), larger = more salient, 0 where padded. counts: (B,)
    objects of each image. foreground: (B, H, W) int8, 1 = part of something salient, 0 = of
    nothing, -1 = not known. attention: (B, H/8, W/8), the share of looks of each cell, all zeros
    for images where it is not known; None where it is known for none.
    """

    masks: Tensor
    ranks: Tensor
    counts: Tensor
    foreground: Tensor
    attention: Tensor | None = None

    @staticmethod
    def of(images: Sequence[ImageTruth]) -> PaddedTruth:
        """Stack the truth of one image or more, all of the same size and on the same device."""
        counts = [len(image.ranks) for image in images]
        G = max(1, *counts)
        H, W = images[0].masks.shape[-2:]
        device = images[0].masks.device
        masks = torch.zeros(len(images), G, H, W, device=device)
        ranks = torch.zeros(len(images), G, device=device)
        for b, image in enumerate(images):
            masks[b, : counts[b]] = image.masks.float()
            ranks[b, : counts[b]] = image.ranks.float()
        foreground = (masks > 0).any(1).to(torch.int8)
        for b, image in enumerate(images):
            if image.foreground is not None:
                foreground[b] = image.foreground
        maps = [image.attention for image in images if image.attention is not None]
        attention = torch.stack(maps) if len(maps) == len(images) else None
        return PaddedTruth(masks, ranks, torch.tensor(counts, device=device), foreground, attention)

    @property
    def unclaimed(self) -> Tensor:
        """(B, 1, H, W) float: 1 where there may be an object that no mask tells of."""
        covered = (self.masks > 0).any(1)
        return ((self.foreground != 0) & ~covered).float()[:, None]

    def matchable(self, queries: int) -> Tensor:
        """How many objects of the batch Q queries can stand for: at most Q of an image."""
        return self.counts.clamp(max=queries).sum()


@dataclass(frozen=True)
class PointSampler:
    """Where on the maps the mask losses look: x, y in [0, 1].

    count: P. fixed: (P, 2) takes the place of all random points. generator: makes the random ones
    repeatable; it must be of the device that the maps are on.
    """

    count: int
    fixed: Tensor | None = None
    generator: torch.Generator | None = None

    def uniform(self, maps: int, device: torch.device) -> Tensor:
        """P points for each of N maps, uniform over the map → (N, P, 2)."""
        if self.fixed is not None:
            return self.fixed.expand(maps, -1, -1)
        return self._random(maps, self.count, device)

    def uncertain(self, logits: Tensor) -> Tensor:
        """P points per map: 75% are the most uncertain of 3·P random ones, the rest are random.

        logits: (N, 1, h, w) → (N, P, 2).
        """
        if self.fixed is not None:
            return self.fixed.expand(len(logits), -1, -1)
        N, keep = len(logits), int(UNCERTAIN * self.count)
        candidates = self._random(N, OVERSAMPLE * self.count, logits.device)
        doubt = -sample_points(logits, candidates).squeeze(1).abs()
        index = doubt.topk(keep, 1).indices[..., None].expand(-1, -1, 2)
        rest = self._random(N, self.count - keep, logits.device)
        return torch.cat((candidates.gather(1, index), rest), 1)

    def _random(self, maps: int, count: int, device: torch.device) -> Tensor:
        return torch.rand(maps, count, 2, generator=self.generator, device=device)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2) as x, y in [0, 1] → (N, C, P)."""
    return F.grid_sample(maps, points[:, None] * 2 - 1, align_corners=False).squeeze(2)


@dataclass(frozen=True)
class Matches:
    """One assignment: the object of each query (O, B, Q), -1 = none; and its N triples as vectors.

    o, b, q, g: (N,) output, image, query and object of each triple.
    """

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


def mask_costs(masks: Tensor, truth: PaddedTruth, points: Tensor) -> Tensor:
    """`mask_cost` of every output's masks on the same points.

    masks: (O, B, Q, h, w) logits; points: (B, P, 2) → (O, B, Q, G).
    """
    O, _, Q = masks.shape[:3]  # noqa: E741
    seen = sample_points(masks.detach().transpose(0, 1).flatten(1, 2), points)  # (B, O·Q, P)
    wanted = sample_points(truth.masks, points)  # (B, G, P)
    return mask_cost(seen, wanted).unflatten(1, (O, Q)).transpose(0, 1)


def unannotated(masks: Tensor, truth: PaddedTruth) -> Tensor:
    """Queries that may show an object which nobody annotated: no evidence that they show none.

    masks: (O, B, Q, h, w) logits → (O, B, Q) bool, whether more than 30% of the mask lies where the
    truth is silent.
    """
    h, w = masks.shape[-2:]
    silent = F.adaptive_avg_pool2d(truth.unclaimed, (h, w)).flatten(1)  # (B, h·w)
    shown = masks.detach().sigmoid().flatten(3)  # (O, B, Q, h·w)
    there = torch.einsum("obqk,bk->obq", shown, silent)
    return there > 0.3 * shown.sum(-1)


def match(cost: Tensor, class_logits: Iterable[Tensor], counts: Tensor) -> list[Matches]:
    """One matching for each classification: -2 · its probability of an object, and `cost`.

    cost: (O, B, Q, G), the same for all of them; class_logits: (O, B, Q, 2) each; counts: (B,).
    """
    costs = [cost - 2 * logits.detach().softmax(-1)[..., :1] for logits in class_logits]
    matched = assign(torch.cat(costs).cpu().numpy(), counts.tolist())
    each = torch.from_numpy(matched).to(cost.device).split(len(cost))
    return [Matches.of(objects) for objects in each]
