"""The backbone of the deploy graph, and the graph as a whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dsgnn.backbone import Backbone, PadThenShiftBlock
from dsgnn.export.deploy.folding import Size, constant
from dsgnn.export.deploy.graph import DeployGraphHead
from dsgnn.export.deploy.pixel_decoder import DeployDeformable, DeployFPN
from dsgnn.export.deploy.query_decoder import DeployBranch
from dsgnn.model import DSGNN, MEAN, STD
from dsgnn.pixel_decoder import HEADS, LEVELS, DeformablePixelDecoder, resize, sine_position
from dsgnn.query_decoder import softmax_map
from dsgnn.runtime.errors import OptionError

BLOCKED = -1e4  # added to attention logits; finite, so that half precision has no NaN


class DeploySwinBlock(PadThenShiftBlock):
    """A Swin block that adds `BLOCKED` to what its windows mask."""

    def get_attn_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        mask = super().get_attn_mask(*args, **kwargs)
        return None if mask is None else mask.masked_fill(mask != 0, BLOCKED)


def _deploy_backbone(backbone: Backbone) -> Backbone:
    """A copy of the backbone that shares its weights."""
    backbone = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
    for module in backbone.modules():
        if isinstance(module, PadThenShiftBlock):
            module.__class__ = DeploySwinBlock
    return backbone


class DeployGraph(nn.Module):
    """The whole network for inference.

    size: (H, W) of a static input, multiples of 32; None = any size. Raises OptionError for others.
    """

    def __init__(self, model: DSGNN, size: Size | None = None):
        super().__init__()
        if size is not None and (size[0] % 32 or size[1] % 32 or min(size) < 32):
            raise OptionError(f"size must be multiples of 32, got {size[0]}x{size[1]}")
        model = model.eval().float()
        self.config, self.size = model.config, size
        std = torch.tensor(STD)
        self.scale = constant((1 / std)[:, None, None])
        self.shift = constant((-torch.tensor(MEAN) / std)[:, None, None])
        self.backbone = _deploy_backbone(model.backbone)
        decoder = model.pixel_decoder
        if isinstance(decoder, DeformablePixelDecoder):
            self.pixels: nn.Module = DeployDeformable(decoder, size)
        else:
            self.pixels = DeployFPN(decoder)
        levels = model.levels.detach()
        self.shape = DeployBranch(model.shape, levels, decoder.embed)
        branches = [self.shape]
        if model.config.texture:
            self.texture = DeployBranch(model.texture, levels)
            branches.append(self.texture)
        self.branches = branches  # a plain list, as both are registered above
        if model.config.seeds == "peaks":
            self.seeds = model.seeds
        if model.config.attention:
            self.attention = model.attention
        self.graph_head = DeployGraphHead(model.graph)
        self.sine = nn.ParameterList()
        if size is not None:
            shapes = [(size[0] // s, size[1] // s) for s in (32, 16, 8)]
            C = model.config.width
            self.sine.extend(constant(sine_position(h, w, C, levels)) for h, w in shapes)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image: (B, H, W, 3) uint8, letterboxed RGB.

        Returns saliency (B, Q), score (B, Q), masks (B, Q, H/4, W/4), and attention (B, H/8, W/8)
        where the network has it.
        """
        B = image.shape[0]
        # Channels come first, because a broadcast over a last axis of three costs ten times as
        # much.
        images = image.float().permute(0, 3, 1, 2) * self.scale + self.shift
        features, tokens, shapes = self.pixels(self.backbone(images))
        if self.config.seeds == "peaks":
            h, w = shapes[-1]
            grid = tokens[-1].transpose(1, 2).reshape(B, -1, h, w)
            s, position, _, _ = self.seeds(grid)
            queries, positions = [s], [position]
        else:
            queries = [branch.features.expand(B, -1, -1) for branch in self.branches]
            positions = [branch.positions for branch in self.branches]
        C, like = self.config.width, tokens[0]
        sine = list(self.sine) or [sine_position(h, w, C, like) for h, w in shapes]
        keys = [(x + p).transpose(1, 2) for x, p in zip(tokens, sine, strict=True)]  # (B, C, K)
        small = [resize(features, shape).flatten(2) for shape in shapes]  # (B, C', K)
        for i in range(self.config.layers):
            level = i % LEVELS
            weight, offset = self.shape.mask_embedding(queries[0])
            blocked = (weight @ small[level] + offset) < 0  # (B, Q, K)
            blocked = blocked & ~blocked.all(-1, keepdim=True)
            bias = torch.where(blocked, BLOCKED, 0.0)[:, None]  # (B, 1, Q, K)
            layers = [branch.layer(i) for branch in self.branches]
            asked = torch.cat(
                [
                    layer.cross.absorb(x + p)
                    for layer, x, p in zip(layers, queries, positions, strict=True)
                ],
                1,
            )  # (B, branches · M, Q, C)
            rows = asked.flatten(1, 2)
            logits = (rows @ keys[level]).unflatten(1, asked.shape[1:3])
            attended = (logits + bias).softmax(-1).flatten(1, 2) @ tokens[level]
            pooled = attended.unflatten(1, asked.shape[1:3]).split(HEADS, 1)
            queries = [
                layer.finish(x, p, part)
                for layer, x, p, part in zip(layers, queries, positions, pooled, strict=True)
            ]
        weight, offset = self.shape.mask_embedding(queries[0])
        masks = (weight @ features.flatten(2) + offset).unflatten(2, features.shape[-2:])
        saliency, score = self.graph_head(queries)
        if not self.config.attention:
            return saliency, score, masks
        memory = [
            x.transpose(1, 2).unflatten(2, shape) for x, shape in zip(tokens, shapes, strict=True)
        ]
        return saliency, score, masks, softmax_map(self.attention(memory))
