"""Maps, the attention's mask and the queries' seeds against their naive versions."""

import torch
from torch import nn

from dsgnn.pixel_decoder import sine_position
from dsgnn.query_decoder import PeakSeeds, attention_mask, shape_masks, texture_maps


def test_texture_maps_as_upstream_describes_them():
    """Repeat E three times along the channels, regroup to (C, 3), sum over C."""
    torch.manual_seed(2)
    for C in (32, 96, 256):  # 96: several channels meet, 3 divides C
        e, E = torch.randn(2, 4, C), torch.randn(2, C, 3, 5)
        literal = E.repeat(1, 3, 1, 1).view(2, C, 3, 3, 5)
        expected = torch.einsum("bqc,bcrhw->bqrhw", e, literal)
        torch.testing.assert_close(texture_maps(e, E), expected, rtol=1e-4, atol=1e-4)
    stacked = texture_maps(e.expand(6, 2, 4, C), E)  # decoder outputs in front
    torch.testing.assert_close(stacked[3], texture_maps(e, E))
    torch.testing.assert_close(shape_masks(e.expand(6, 2, 4, C), E)[5], shape_masks(e, E))


def test_attention_mask_opens_rows_that_are_blocked_everywhere():
    logits = torch.full((1, 4, 4, 4), -1.0)
    logits[0, 0, :2] = 3.0  # sees the upper half
    logits[0, 1, 0, 0] = 0.1  # one weak pixel: lost when resized
    logits[0, 2] = 2.0  # sees everything
    logits[0, 3, :, :2] = 0.0  # sigmoid 0.5 is not below 0.5
    blocked = attention_mask(logits, (2, 2))
    assert blocked.dtype == torch.bool and blocked.shape == (1, 4, 4)
    assert blocked[0].tolist() == [
        [False, False, True, True],
        [False, False, False, False],
        [False, False, False, False],
        [False, True, False, True],
    ]


def test_queries_start_from_the_highest_peaks():
    seeds = PeakSeeds(3, 32).eval()
    memory = torch.zeros(1, 32, 16, 16)
    heat = torch.full((1, 1, 16, 16), -5.0)
    heat[0, 0, 3, 4], heat[0, 0, 3, 5], heat[0, 0, 12, 2], heat[0, 0, 8, 14] = 4.0, 3.0, 2.0, 1.0
    memory[0, 0] = torch.arange(256.0).view(16, 16)  # a cell's feature tells where it is
    seeds.heat = nn.Sequential(_Fixed(heat))
    seeds.feature = nn.Identity()
    features, position, logits, cells = seeds(memory)
    assert cells.tolist() == [[3 * 16 + 4, 12 * 16 + 2, 8 * 16 + 14]]  # (3, 5) is no peak
    assert features[0, :, 0].tolist() == [52.0, 194.0, 142.0]
    torch.testing.assert_close(position[0, 1], sine_position(16, 16, 32, memory)[12 * 16 + 2])
    assert torch.equal(logits, heat[:, 0])
    # true centres come first, and silence the peaks around them: (3, 4) = 52 is next to 69
    forced = seeds(memory, torch.tensor([[7, -1, 69]]))[3]
    assert sorted(forced[0, :2].tolist()) == [7, 69] and forced[0, 2] == 12 * 16 + 2


def test_where_peaks_are_few_the_next_cells_follow_in_their_order():
    seeds = PeakSeeds(4, 32).eval()
    ramp = torch.arange(256.0).view(1, 1, 16, 16) * 1e-4  # its one peak is the last cell
    seeds.heat = nn.Sequential(_Fixed(ramp))
    assert seeds(torch.zeros(1, 32, 16, 16))[3].tolist() == [[255, 254, 253, 252]]


class _Fixed(nn.Module):
    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value
