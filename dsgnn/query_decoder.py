"""Query decoders: masked-attention layers over the memory (Mask2Former, section 3.2), the heads
on the queries, and the seeds the queries start from.

B batch, Q queries, C width, K cells of one memory level.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsgnn.pixel_decoder import conv_norm, resize, sine_position

HEADS = 8


def attention_mask(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a query must not look: (B, Q, h, w) logits → (B, Q, K) bool, True = blocked.

    A row that would be blocked everywhere is opened entirely.
    """
    blocked = (resize(mask_logits, size).flatten(2).sigmoid() < 0.5).detach()
    return blocked & ~blocked.all(-1, keepdim=True)


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; a LayerNorm after each."""

    def __init__(self, width: int, feedforward: int):
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, feedforward), nn.ReLU(), nn.Linear(feedforward, width)
        )
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, position: Tensor, key: Tensor, value: Tensor, blocked: Tensor
    ) -> Tensor:
        """x, position: (B, Q, C); key, value: (B, K, C); blocked: (B, Q, K) bool → (B, Q, C)."""
        attended = self.cross_attention(
            x + position, key, value,
            attn_mask=blocked.repeat_interleave(HEADS, 0), need_weights=False,
        )[0]  # fmt: skip
        x = self.norm1(x + attended)
        q = x + position
        x = self.norm2(x + self.self_attention(q, q, x, need_weights=False)[0])
        return self.norm3(x + self.ffn(x))


class LearnedSeeds(nn.Module):
    """Q learned features and positions, the same for every image."""

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.features = nn.Parameter(torch.randn(queries, width))
        self.positions = nn.Parameter(torch.randn(queries, width))

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """→ features and positions, (B, Q, C) each."""
        return self.features.expand(batch, -1, -1), self.positions.expand(batch, -1, -1)


class PeakSeeds(nn.Module):
    """The features at the Q highest peaks of a predicted map of object centres (stride 8).

    Converges far faster than learned queries when training is short. A peak is a cell that is the
    largest of its 5×5 neighbourhood.
    """

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.queries = queries
        self.heat = nn.Sequential(conv_norm(width, width // 2, 3), nn.Conv2d(width // 2, 1, 1))
        self.feature = nn.Linear(width, width)
        last = self.heat[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.constant_(last.bias, -4.0)

    def forward(
        self, memory: Tensor, centres: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """memory: (B, C, h, w) at stride 8.

        centres: (B, Q) flat cells to seed from, -1 = none, the next peak takes its place (training)
        → features, positions (B, Q, C), heat-map logits (B, h, w), cells (B, Q) flat indices.
        """
        B, C, h, w = memory.shape
        heat = self.heat(memory).squeeze(1)  # (B, h, w)
        score = heat.detach().float()  # autocast would round peaks into ties
        peak = score == F.max_pool2d(score[:, None], 5, stride=1, padding=2).squeeze(1)
        if centres is not None:  # true centres come first and silence the peaks around them
            true = torch.zeros_like(score).flatten(1)
            true = true.scatter_reduce(1, centres.clamp(min=0), (centres >= 0).float(), "amax")
            score = score + 1e4 * true.view_as(score)
            around = F.max_pool2d(true.view_as(score)[:, None], 5, stride=1, padding=2).squeeze(1)
            peak = (peak & (around == 0)) | (true.view_as(score) > 0)
        # other cells follow in their order; a larger number would round them into ties
        cells = torch.where(peak, score, score - 100).flatten(1).topk(self.queries).indices
        index = cells[:, :, None].expand(-1, -1, C)  # (B, Q, C)
        features = memory.flatten(2).transpose(1, 2).gather(1, index)
        position = sine_position(h, w, C, memory).expand(B, -1, -1).gather(1, index)
        return self.feature(features), position, heat, cells


class AttentionHead(nn.Module):
    """Where people look: logits over the stride-8 cells of the frame.

    Two convolutions over the finest memory, which the mean of the coarsest one informs about the
    whole photo, and a learned prior over the frame, as people look near its middle more often.
    """

    PRIOR = (9, 12)

    def __init__(self, width: int):
        super().__init__()
        self.context = nn.Linear(width, width)
        self.read = nn.Sequential(
            conv_norm(width, width // 2, 3),
            conv_norm(width // 2, width // 2, 3),
            nn.Conv2d(width // 2, 1, 1),
        )
        self.prior = nn.Parameter(torch.zeros(1, 1, *self.PRIOR))

    def forward(self, memory: list[Tensor]) -> Tensor:
        """memory: (B, C, h, w) at strides 32, 16, 8 → logits (B, H/8, W/8)."""
        context = self.context(memory[0].mean((2, 3)))[:, :, None, None]
        logits = self.read(memory[-1] + context)
        return (logits + resize(self.prior, logits.shape[-2:])).squeeze(1)


def softmax_map(logits: Tensor) -> Tensor:
    """Softmax over all cells of a map: (B, h, w) → (B, h, w), each image's sum 1."""
    return logits.flatten(1).softmax(1).view_as(logits)


class Heads(nn.Module):
    """Class, rank and mask embedding of each query, on LN(query)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 2)
        self.rank = nn.Linear(width, 1)
        self.embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (..., Q, C) → class logits (..., Q, 2), rank (..., Q)."""
        x = self.norm(x)
        return self.classify(x), self.rank(x).squeeze(-1)

    def embedding(self, x: Tensor) -> Tensor:
        """x: (..., Q, C) → mask embedding (..., Q, C)."""
        return self.embed(self.norm(x))


def shape_masks(embedding: Tensor, pixels: Tensor) -> Tensor:
    """Σ_c e_c E_c. embedding: (..., B, Q, C), pixels: (B, C, h, w) → (..., B, Q, h, w)."""
    return torch.einsum("...bqc,bchw->...bqhw", embedding, pixels)


def texture_maps(embedding: Tensor, pixels: Tensor) -> Tensor:
    """Channel r = Σ_c e_c E_{(3c + r) mod C}. → (..., B, Q, 3, h, w).

    Upstream repeats E three times along the channels and regroups; the same index, no copy of E:
    the embedding is scattered to the channels it meets instead.
    """
    C = pixels.shape[1]
    index = 3 * torch.arange(C, device=pixels.device)
    maps = []
    for r in range(3):
        scattered = torch.zeros_like(embedding).index_add(-1, (index + r) % C, embedding)
        maps.append(shape_masks(scattered, pixels))
    return torch.stack(maps, -3)
