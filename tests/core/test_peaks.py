"""Centres of objects and the losses of nano's maps: heat, foreground, looks."""

import math

import pytest
import torch

from dsgnn.data.transforms import ImageTruth
from dsgnn.training.matching import PaddedTruth
from dsgnn.training.peaks import attention_loss, dense_loss, heat_loss, object_centres


def test_seeds_of_objects_lie_on_them():
    masks = torch.zeros(1, 2, 64, 64)
    masks[0, 0, 8:24, 40:56] = 1  # a square: its middle
    masks[0, 1, 32:, :8], masks[0, 1, 56:, :] = 1, 1  # an L: its centroid lies outside
    cells, coverage = object_centres(masks)
    y, x = cells[0] // 8, cells[0] % 8
    assert 1 <= y[0] <= 2 and 5 <= x[0] <= 6
    assert coverage[0, 1, y[1], x[1]] == 1
    heat = torch.full((1, 8, 8), -12.0)
    heat.view(1, -1)[0, cells[0]] = 12.0
    truth = PaddedTruth.of([ImageTruth(masks[0], torch.tensor([2.0, 1.0]))])
    right = heat_loss(heat, cells, coverage, truth, torch.tensor(2.0))
    wrong = heat_loss(heat.flip(-1), cells, coverage, truth, torch.tensor(2.0))
    assert right < 0.01 < 1 < wrong


def test_the_dense_loss_looks_only_where_something_is_known(half_known: ImageTruth) -> None:
    logits = torch.zeros(1, 16, 16, requires_grad=True)
    dense_loss(logits, PaddedTruth.of([half_known]).foreground).backward()
    assert logits.grad is not None
    assert logits.grad[..., :8].all() and not logits.grad[..., 8:].any()


def test_heat_on_what_is_not_known_costs_nothing(half_known: ImageTruth) -> None:
    cells, coverage = object_centres(half_known.masks[None])
    padded = PaddedTruth.of([half_known])
    heat = torch.full((1, 8, 8), -12.0)
    before = heat_loss(heat, cells, coverage, padded, torch.tensor(1.0))
    heat[0, 6, 6] = 6.0  # in the right half
    assert heat_loss(heat, cells, coverage, padded, torch.tensor(1.0)) == before
    heat[0, 6, 1] = 6.0  # in the left half
    assert heat_loss(heat, cells, coverage, padded, torch.tensor(1.0)) > before + 1


def test_the_attention_loss_is_a_divergence_over_the_images_that_have_a_truth() -> None:
    truth = torch.zeros(2, 2, 2)
    truth[0] = torch.tensor([[0.5, 0.25], [0.25, 0.0]])
    logits = torch.tensor([[0.5, 0.25], [0.25, 1e-9]]).log().expand(2, 2, 2)
    assert attention_loss(logits, truth).item() == pytest.approx(0.0, abs=1e-6)
    uniform = torch.zeros(2, 2, 2)
    by_hand = 0.5 * math.log(0.5 / 0.25) + 2 * 0.25 * math.log(0.25 / 0.25)
    assert attention_loss(uniform, truth).item() == pytest.approx(by_hand)
    assert attention_loss(uniform, torch.zeros(2, 2, 2)).item() == 0
