"""Queries that start at peaks of a heat-map (`Config.seeds == "peaks"`): what trains them.

B images, Q queries, G objects (padded to the most in the batch); cells are flat indices into the
map at stride 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dsgnn.data.transforms import ImageTruth
from dsgnn.training.matching import PaddedTruth


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
    heat: Tensor, cells: Tensor, coverage: Tensor, truth: PaddedTruth, total: Tensor
) -> Tensor:
    """Focal loss of the centre heat-map (CenterNet, equation 1), scalar.

    heat: (B, h, w) logits; cells: (B, G); coverage: (B, G, h, w); total: objects that the sum is
    divided by. Where the truth is silent no cell counts as far from every centre.
    """
    h, w = heat.shape[-2:]
    real = torch.arange(cells.shape[1], device=heat.device) < truth.counts[:, None]  # (B, G)
    y = torch.arange(h, device=heat.device)[:, None] - (cells // w)[..., None, None]
    x = torch.arange(w, device=heat.device) - (cells % w)[..., None, None]
    sigma = (0.2 * coverage.sum((-2, -1)).sqrt()).clamp(min=0.6)[..., None, None]
    bump = torch.exp(-(y**2 + x**2) / (2 * sigma**2)) * real[..., None, None]  # (B, G, h, w)
    wanted = torch.cat((bump, torch.zeros_like(heat)[:, None]), 1).amax(1)
    told = 1 - F.adaptive_avg_pool2d(truth.unclaimed, (h, w)).squeeze(1)
    p = heat.sigmoid()
    positive = (1 - p) ** 2 * F.softplus(-heat) * (wanted == 1)
    negative = (1 - wanted) ** 4 * p**2 * F.softplus(heat) * (wanted < 1) * told
    return (positive + negative).sum() / total


def distance_cost(cells: Tensor, coverage: Tensor) -> Tensor:
    """What a query costs more for an object that does not cover the cell it started from.

    cells: (B, Q); coverage: (B, G, h, w) in [0, 1] → (B, Q, G), from 0 to 3.
    """
    index = cells[:, None].expand(-1, coverage.shape[1], -1)
    inside = coverage.flatten(2).gather(2, index)  # (B, G, Q)
    return 3 * (1 - inside.transpose(1, 2))


def dense_loss(logits: Tensor, foreground: Tensor) -> Tensor:
    """Cross-entropy of "any object is here" where that is known, scalar.

    logits: (B, h, w); foreground: (B, H, W) as in `PaddedTruth`.
    """
    h, w = logits.shape[-2:]
    known, union = (
        F.adaptive_avg_pool2d(x.float()[:, None], (h, w)).squeeze(1)
        for x in (foreground >= 0, foreground > 0)
    )
    each = F.binary_cross_entropy_with_logits(logits, union, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def attention_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the attention map from where people look, scalar.

    logits: (B, h, w); truth: (B, h, w), with sum 1, or all zeros where it is not known. The mean is
    over the images where it is.
    """
    predicted, truth = logits.flatten(1).log_softmax(1), truth.flatten(1)
    known = truth.sum(1) > 0
    each = (torch.xlogy(truth, truth) - truth * predicted).sum(1)
    return (each * known).sum() / known.sum().clamp(min=1)


def seed_centres(targets: Sequence[ImageTruth], queries: int, generator: torch.Generator) -> Tensor:
    """For about half the images, seed the first queries from the true objects.

    → (B, Q) cells at stride 8, -1 = take the next predicted peak.
    """
    batch = PaddedTruth.of(targets)
    B, G = batch.ranks.shape
    centres = torch.full((B, queries), -1, dtype=torch.long, device=batch.masks.device)
    cells, _ = object_centres(batch.masks)
    forced = torch.rand(B, 1, generator=generator).to(cells.device) < 0.5
    real = torch.arange(G, device=cells.device) < batch.counts[:, None]
    n = min(G, queries)
    centres[:, :n] = torch.where(forced & real, cells, -1)[:, :n]
    return centres
