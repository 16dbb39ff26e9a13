"""Pixel decoders: backbone maps → memory at strides 32, 16 and 8, and the pixel embedding.

`DeformablePixelDecoder` is the published one, with multi-scale deformable attention (MSDA).
`FPNPixelDecoder` has convolutions only, and is for small models.

B is the batch, C the width, L = 3 the number of levels, M = 8 that of attention heads, P = 4 that
of points, D = C / M the width of a head, and N the number of cells of all levels together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS, POINTS, LEVELS = 8, 4, 3


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize (B, C, h, w) to another height and width, bilinearly and with half-pixel centres.

    It is the only resizing in the network.
    """
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def sine_position(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """The sine encoding of the cells' positions, row by row: (height · width, channels).

    The first half of the channels encodes y, the second half x.
    """
    half = channels // 2
    steps = torch.arange(half, device=like.device, dtype=torch.float32)
    divisor = 10000 ** (2 * (steps // 2) / half)

    def axis(n: int) -> Tensor:
        cells = torch.arange(1, n + 1, device=like.device, dtype=torch.float32)
        angle = (cells / (n + 1e-6) * 2 * math.pi)[:, None] / divisor  # (n, half)
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), -1).flatten(1)

    y = axis(height).T[:, :, None].expand(half, height, width)
    x = axis(width).T[:, None, :].expand(half, height, width)
    return torch.cat((y, x)).to(like.dtype).flatten(1).T


def level_positions(shapes: list[tuple[int, int]], levels: Tensor, like: Tensor) -> Tensor:
    """The positions of the cells of all levels, each with the vector of its level: (N, C).

    shapes: (h, w) of each level. levels: (L, C). like: of the type of the encoding.
    """
    parts = zip(shapes, levels, strict=True)
    return torch.cat([sine_position(h, w, len(level), like) + level for (h, w), level in parts])


def cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """The centres of the cells, row by row: (height · width, 2), x and y in 0…1."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((x.flatten(), y.flatten()), -1)


class MSDA(nn.Module):
    """Multi-scale deformable attention (Deformable DETR, section 4.1)."""

    def __init__(self, width: int):
        super().__init__()
        self.sampling_offsets = nn.Linear(width, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(width, HEADS * LEVELS * POINTS)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2)
        reach = torch.arange(1, POINTS + 1)[:, None] * direction[:, None, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(reach.expand(-1, LEVELS, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, x: Tensor, centres: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Let every cell gather from P points of each level: (B, N, C).

        query, x: (B, N, C), the cells with and without their positions. centres: (N, 2), x and y in
        0…1. shapes: (h, w) of each level.
        """
        B, N, C = x.shape
        offsets = self.sampling_offsets(query).view(B, N, HEADS, LEVELS, POINTS, 2)
        weights = self.attention_weights(query).view(B, N, HEADS, LEVELS * POINTS).softmax(-1)
        weights = weights.view(B, N, HEADS, LEVELS, POINTS)
        values = self.value_proj(x).view(B, N, HEADS, C // HEADS)
        values = values.split([h * w for h, w in shapes], 1)
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for level, ((h, w), value) in enumerate(zip(shapes, values, strict=True)):
            maps = value.permute(0, 2, 3, 1).reshape(B * HEADS, C // HEADS, h, w)
            size = torch.tensor((w, h), device=x.device, dtype=x.dtype)
            at = centres[:, None, None] + offsets[:, :, :, level] / size  # (B, N, M, P, 2)
            grid = at.permute(0, 2, 1, 3, 4).reshape(B * HEADS, N, POINTS, 2) * 2 - 1
            sampled = F.grid_sample(maps, grid, align_corners=False)  # (B·M, D, N, P)
            weight = weights[:, :, :, level].transpose(1, 2).reshape(B * HEADS, 1, N, POINTS)
            total = total + (sampled * weight).sum(-1)  # (B·M, D, N)
        return self.output_proj(total.view(B, C, N).transpose(1, 2))


class EncoderLayer(nn.Module):
    """MSDA and a feed-forward network, each with a residual connection and a LayerNorm after it."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = MSDA(width)
        self.norm1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )
        self.norm2 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, position: Tensor, centres: Tensor, shapes: list[tuple[int, int]]
    ) -> Tensor:
        """x: (B, N, C). position: (N, C), added to what asks. The others are as for `MSDA`."""
        x = self.norm1(x + self.attention(x + position, x, centres, shapes))
        return self.norm2(x + self.ffn(x))


class DeformablePixelDecoder(nn.Module):
    """The published pixel decoder: an encoder with MSDA over strides 32, 16 and 8, and a map of
    stride 4 above it."""

    def __init__(self, channels: list[int], width: int, layers: int):
        super().__init__()
        self.inputs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(32, width))
            for c in reversed(channels[1:])
        )
        self.levels = nn.Parameter(torch.randn(LEVELS, width))
        self.layers = nn.ModuleList(EncoderLayer(width) for _ in range(layers))
        self.lateral = nn.Sequential(
            nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(32, width)
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(32, width), nn.ReLU()
        )
        self.embed = nn.Conv2d(width, width, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """maps: the backbone's, of strides 4, 8, 16 and 32.

        Returns the pixel embedding E, (B, C, H/4, W/4), and the memory, a (B, C, h, w) for each of
        the strides 32, 16 and 8.
        """
        inputs = [conv(x) for conv, x in zip(self.inputs, reversed(maps[1:]), strict=True)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in inputs]
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], 1)  # (B, N, C)
        position = level_positions(shapes, self.levels, x)
        centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])  # (N, 2)
        for layer in self.layers:
            x = layer(x, position, centres, shapes)
        memory = [
            part.transpose(1, 2).unflatten(2, shape)
            for part, shape in zip(x.split([h * w for h, w in shapes], 1), shapes, strict=True)
        ]
        fine = self.lateral(maps[0])
        fine = fine + resize(memory[-1], fine.shape[-2:])
        return self.embed(self.fuse(fine)), memory


def conv_norm(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps height and width, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


class FPNPixelDecoder(nn.Module):
    """A feature pyramid, from coarse to fine, in which every normalisation folds into a
    convolution.

    The map of stride 4 has half the width, because a small model would spend most of its time
    there.
    """

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.inputs = nn.ModuleList(conv_norm(c, width, 1) for c in reversed(channels[1:]))
        self.outputs = nn.ModuleList(conv_norm(width, width, 3) for _ in range(LEVELS))
        self.lateral = conv_norm(channels[0], width // 2, 1)
        self.narrow = nn.Conv2d(width, width // 2, 1)
        self.fuse = conv_norm(width // 2, width // 2, 3)
        self.embed = nn.Conv2d(width // 2, width, 1)

    def features(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The map that `embed` is applied to, (B, C/2, H/4, W/4), and the memory."""
        memory: list[Tensor] = []
        for conv, output, x in zip(self.inputs, self.outputs, reversed(maps[1:]), strict=True):
            x = conv(x)
            if memory:
                x = x + resize(memory[-1], x.shape[-2:])
            memory.append(output(x))
        fine = self.lateral(maps[0])
        return self.fuse(fine + resize(self.narrow(memory[-1]), fine.shape[-2:])), memory

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same as `DeformablePixelDecoder.forward`."""
        fine, memory = self.features(maps)
        return self.embed(fine), memory
