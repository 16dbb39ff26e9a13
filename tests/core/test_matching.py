"""Matching, points and padding against their naive versions."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dsgnn.training.matching import (
    Matches,
    PaddedTruth,
    PointSampler,
    assign,
    mask_cost,
    sample_objects,
    sample_points,
)


def test_mask_cost_by_its_formula():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 40), (torch.rand(2, 40) < 0.4).float()
    for q, g in itertools.product(range(3), range(2)):
        x, t = logits[q], truth[g]
        p = x.sigmoid()
        bce = F.binary_cross_entropy_with_logits(x, t)
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        torch.testing.assert_close(mask_cost(logits, truth)[q, g], 5 * bce + 5 * dice)


def test_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    for Q, G in ((4, 2), (3, 3), (2, 4)):
        cost = rng.normal(size=(1, 1, Q, G))
        matched = assign(cost, [G])[0, 0]
        pairs = [(q, g) for q, g in enumerate(matched) if g >= 0]
        assert len(pairs) == min(Q, G) and len({g for _, g in pairs}) == len(pairs)
        small = min(Q, G)
        best = min(
            sum(cost[0, 0, q, g] for q, g in zip(queries, objects, strict=True))
            for queries in itertools.permutations(range(Q), small)
            for objects in itertools.combinations(range(G), small)
        )
        assert sum(cost[0, 0, q, g] for q, g in pairs) == pytest.approx(best)


def test_padded_objects_are_never_matched_and_nan_costs_do_not_stop():
    cost = np.zeros((2, 3, 4, 3))
    cost[1, 0, 2, 0] = np.nan
    matched = assign(cost, [3, 1, 0])
    assert matched.shape == (2, 3, 4)
    assert [(m >= 0).sum() for m in matched[0]] == [3, 1, 0]
    assert matched[0, 1].max() == 0 and (matched[0, 2] == -1).all()


def test_sample_points_has_x_first_and_cell_centres():
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    at = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.0, 0.25]]])
    assert sample_points(maps, at)[0, 0].tolist() == [1.0, 2.0, 3.0, 2.5, 0.5]  # zeros outside


def test_objects_are_sampled_as_copies_of_their_maps_would_be():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 2, 9, 8, generator=generator)  # (B, G, C, H, W)
    matched = [[[0, -1, 2, 1], [1, 0, -1, -1]], [[2, 0, 1, -1], [-1, -1, -1, 0]]]  # (O, B, Q)
    for matches in (Matches.of(torch.tensor(matched)), Matches.of(torch.full((2, 2, 4), -1))):
        points = torch.rand(len(matches.o), 7, 2, generator=generator)
        naive = sample_points(maps[matches.b, matches.g], points)
        assert torch.equal(sample_objects(maps, matches, points), naive)


def test_uncertain_points_are_the_least_sure():
    """Three quarters of the points: the least sure of three times as many. The rest is random."""
    ramp = torch.linspace(-8, 8, 64).expand(2, 1, 64, 64)  # unsure along the middle column
    points = PointSampler(400, generator=torch.Generator().manual_seed(0))
    at = points.uncertain(ramp)
    assert at.shape == (2, 400, 2) and at.min() >= 0 and at.max() <= 1
    far = (at[..., 0] - 0.5).abs()
    # 300 of 1200 uniform points lie within an eighth of the middle
    # (at the border of the map the zeros outside make more points unsure)
    assert (far[:, :300] < 0.14).float().mean() > 0.99 and far[:, 300:].max() > 0.4
    assert points.uncertain(ramp[:0]).shape == (0, 400, 2)


def test_targets_are_padded_to_the_most_objects(truths):
    batch = PaddedTruth.of([truths[1], truths[0], truths[2]])
    assert batch.masks.shape == (3, 2, 64, 64) and batch.counts.tolist() == [1, 2, 0]
    assert batch.ranks.tolist() == [[1, 0], [2, 1], [0, 0]]
    assert batch.masks[0, 1].max() == 0 and batch.masks[2].max() == 0
