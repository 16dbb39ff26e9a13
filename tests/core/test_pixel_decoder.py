"""Deformable attention and the position encoding against their naive versions."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from dsgnn.pixel_decoder import HEADS, MSDA, POINTS, cell_centres, sine_position


def test_msda_equals_a_loop_over_points():
    torch.manual_seed(1)
    C, shapes = 16, [(2, 3), (3, 5), (6, 7)]
    layer = MSDA(C)
    nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
    nn.init.normal_(layer.attention_weights.weight)
    N = sum(h * w for h, w in shapes)
    query, x = torch.randn(2, N, C), torch.randn(2, N, C)
    centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])
    with torch.no_grad():
        fast = layer(query, x, centres, shapes)
        offsets = layer.sampling_offsets(query).view(2, N, HEADS, 3, POINTS, 2)
        weights = layer.attention_weights(query).view(2, N, HEADS, 12).softmax(-1)
        value = layer.value_proj(x).view(2, N, HEADS, C // HEADS)
        slow = torch.zeros(2, N, HEADS, C // HEADS)
        outside = 0
        for b, n, m in np.ndindex(2, N, HEADS):
            start = 0
            for level, (h, w) in enumerate(shapes):
                for p in range(POINTS):
                    dx, dy = offsets[b, n, m, level, p].tolist()
                    px = centres[n, 0].item() * w + dx - 0.5
                    py = centres[n, 1].item() * h + dy - 0.5
                    left, top = int(np.floor(px)), int(np.floor(py))
                    for i, j in product((top, top + 1), (left, left + 1)):
                        share = (1 - abs(px - j)) * (1 - abs(py - i))
                        if 0 <= i < h and 0 <= j < w:
                            cell = value[b, start + i * w + j, m]
                            slow[b, n, m] += weights[b, n, m, 4 * level + p] * share * cell
                        else:
                            outside += share > 0.1
                start += h * w
        slow = layer.output_proj(slow.flatten(2))
    assert outside > 100  # zeros outside are part of it
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


def test_sine_position_by_its_formula():
    position = sine_position(3, 5, 32, torch.zeros(1))
    assert position.shape == (3 * 5, 32)
    for c, y, x in ((0, 0, 0), (1, 2, 4), (7, 1, 3), (16, 2, 1), (31, 0, 4), (22, 1, 0)):
        k, (i, n) = c % 16, (y, 3) if c < 16 else (x, 5)  # y first
        angle = (i + 1) / (n + 1e-6) * 2 * np.pi / 10000 ** (2 * (k // 2) / 16)
        expected = np.sin(angle) if k % 2 == 0 else np.cos(angle)
        assert position[y * 5 + x, c].item() == pytest.approx(expected, abs=1e-5)
