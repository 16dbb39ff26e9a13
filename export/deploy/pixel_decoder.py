"""Both pixel decoders of the deploy graph, without their last 1×1 convolution."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dsgnn.export.deploy.folding import M, Size, all_of, constant
from dsgnn.pixel_decoder import (
    HEADS,
    LEVELS,
    MSDA,
    POINTS,
    DeformablePixelDecoder,
    EncoderLayer,
    FPNPixelDecoder,
    cell_centres,
    level_positions,
    resize,
)


class DeployMSDA(nn.Module):
    """`dsgnn.pixel_decoder.MSDA` with the cells as the last axis.

    shapes, position: (h, w) of the three levels and the cells' positions, (N, C), where they are
    known at export. Then positions and centres are constants, which are folded in float64.
    """

    def __init__(self, attention: MSDA, shapes: list[Size] | None, position: Tensor | None):
        super().__init__()
        # The rows are in the order level, head, point, (x, y); the logits: head, level, point.
        offsets = attention.sampling_offsets
        weight = offsets.weight.detach().double().view(HEADS, LEVELS, POINTS, 2, -1)
        weight = weight.transpose(0, 1).flatten(0, 3)
        bias = offsets.bias.detach().double().view(HEADS, LEVELS, POINTS, 2).transpose(0, 1)
        bias = bias.reshape(-1, 1)
        self.offset_weight, self.offset_bias = constant(weight), constant(bias)
        self.logit_weight = constant(attention.attention_weights.weight)
        self.logit_bias = constant(attention.attention_weights.bias[:, None])
        self.value_weight = constant(attention.value_proj.weight)
        self.value_bias = constant(attention.value_proj.bias[:, None])
        self.output = attention.output_proj
        self.folded = shapes is not None and position is not None
        if shapes is not None and position is not None:
            centres = torch.cat([cell_centres(h, w, position.double()) for h, w in shapes])
            scale = torch.tensor([[2 / w, 2 / h] for h, w in shapes], dtype=torch.float64)
            scale = scale[:, None, None].expand(-1, HEADS, POINTS, -1).reshape(-1, 1)
            weight = weight * scale
            at = 2 * centres.T.repeat(LEVELS * HEADS * POINTS, 1) - 1  # (L·M·P·2, N)
            self.offset_weight = constant(weight)
            self.offset_bias = constant(weight @ position.double().T + bias * scale + at)
            logits = attention.attention_weights
            self.logit_bias = constant(
                logits.weight.double() @ position.double().T + logits.bias.double()[:, None]
            )

    def forward(self, x: Tensor, position: Tensor, centres: Tensor, shapes: list[Size]) -> Tensor:
        """x: (B, N, C). Returns the same shape.

        position, (N, C), and centres, (N, 2), are used only where they are not folded.
        """
        B, N, C = x.shape
        seen = x.transpose(1, 2)  # (B, C, N); fused into the products
        query = seen if self.folded else (x + position).transpose(1, 2)
        offsets = (self.offset_weight @ query + self.offset_bias).view(
            B, LEVELS, HEADS, POINTS, 2, N
        )
        logits = self.logit_weight @ query + self.logit_bias  # (B, M·L·P, N)
        weights = logits.view(B * HEADS, LEVELS * POINTS, N).softmax(1)
        values = self.value_weight @ seen + self.value_bias  # (B, C, N)
        total: Tensor | None = None
        parts = values.split([h * w for h, w in shapes], 2)
        for level, (part, (h, w)) in enumerate(zip(parts, shapes, strict=True)):
            grid = offsets[:, level].transpose(-1, -2).reshape(B * HEADS, POINTS, N, 2)
            if not self.folded:
                size = torch.stack([torch.scalar_tensor(s, dtype=x.dtype) for s in (w, h)])
                grid = 2 * (grid / size + centres) - 1
            maps = part.reshape(B * HEADS, C // HEADS, h, w)
            sampled = F.grid_sample(maps, grid, align_corners=False)  # (B·M, D, P, N)
            weight = weights[:, None, level * POINTS : (level + 1) * POINTS]
            pooled = (sampled * weight).sum(2)  # (B·M, D, N)
            total = pooled if total is None else total + pooled
        assert total is not None
        return self.output(total.view(B, C, N).transpose(1, 2))


class DeployDeformable(nn.Module):
    """The published pixel decoder without its last 1×1 convolution.

    It gives the features before that convolution, and the memory as tokens, (B, K, C) for each
    level.
    """

    def __init__(self, decoder: DeformablePixelDecoder, size: Size | None):
        super().__init__()
        self.inputs, self.lateral, self.fuse = decoder.inputs, decoder.lateral, decoder.fuse
        self.levels = decoder.levels
        shapes = position = None
        if size is not None:
            shapes = [(size[0] // s, size[1] // s) for s in (32, 16, 8)]
            levels = decoder.levels.detach().double()
            position = level_positions(shapes, levels, levels)
        self.attentions = nn.ModuleList(
            DeployMSDA(layer.attention, shapes, position)
            for layer in all_of(decoder.layers, EncoderLayer)
        )
        self.layers = decoder.layers
        self.folded = size is not None

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Size]]:
        inputs = [conv(x) for conv, x in zip(self.inputs, reversed(maps[1:]), strict=True)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in inputs]
        x = torch.cat([x.flatten(2) for x in inputs], 2).transpose(1, 2)  # (B, N, C)
        position = centres = x
        if not self.folded:
            position = level_positions(shapes, self.levels, self.levels)
            centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])
        layers = all_of(self.layers, EncoderLayer)
        for layer, attention in zip(layers, self.attentions, strict=True):
            x = layer.norm1(x + attention(x, position, centres, shapes))
            x = layer.norm2(x + layer.ffn(x))
        tokens = list(x.split([h * w for h, w in shapes], 1))
        h, w = shapes[-1]
        fine = self.lateral(maps[0])
        top = tokens[-1].transpose(1, 2).reshape(x.shape[0], x.shape[2], h, w)
        return self.fuse(fine + resize(top, fine.shape[-2:])), tokens, shapes


def _fold_norms(module: M) -> M:
    """A copy of a module whose BatchNorms are folded into the convolutions before them, in
    float64."""
    module = copy.deepcopy(module)
    for block in module.modules():
        if not isinstance(block, nn.Sequential):
            continue
        conv, norm = block[0], block[1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block[0] = fuse_conv_bn_eval(conv.double(), norm.double()).float()
            block[1] = nn.Identity()
    return module


class DeployFPN(nn.Module):
    """`FPNPixelDecoder` without its last 1×1 convolution and without BatchNorms; it gives what
    `DeployDeformable` gives."""

    def __init__(self, decoder: FPNPixelDecoder):
        super().__init__()
        # Exporters do not fold a norm where something else reads its convolution's output, such as
        # its shape.
        self.decoder = _fold_norms(decoder)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Size]]:
        features, memory = self.decoder.features(maps)
        shapes = [(x.shape[-2], x.shape[-1]) for x in memory]
        return features, [x.flatten(2).transpose(1, 2) for x in memory], shapes
