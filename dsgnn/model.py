"""DSGNN, the network: photo → ranked objects (paper: figure 2).

Differences from the published code: runs on any device; batched; only the last output is computed
unless training outputs are asked for. The named options in `dsgnn.config` (used by `nano`) are
ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dsgnn.backbone import Backbone
from dsgnn.config import Config, get_config
from dsgnn.graph import DomainSeparationHead, GraphHead, GraphOutput
from dsgnn.pixel_decoder import DeformablePixelDecoder, FPNPixelDecoder, sine_position
from dsgnn.query_decoder import (
    AttentionHead,
    DecoderLayer,
    Heads,
    LearnedSeeds,
    PeakSeeds,
    attention_mask,
    shape_masks,
    softmax_map,
    texture_maps,
)

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB → (B, 3, H, W) float, the network's input."""
    mean, std = (torch.tensor(v, device=images.device) for v in (MEAN, STD))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class TrainingOutput:
    """All O = L + 1 outputs: before the first decoder layer and after each.

    class_s, class_t: (O, B, Q, 2). rank_s, rank_t: (O, B, Q). masks: (O, B, Q, H/4, W/4).
    textures: (O, B, Q, 3, H/4, W/4). graph: GraphOutput or DomainOutput with O·B for B.
    The `_t` terms and textures are None without a texture branch. heat: (B, H/8, W/8) logits and
    cells (B, Q), where queries start from peaks; dense: (B, H/4, W/4) logits of "any object".
    """

    class_s: Tensor
    rank_s: Tensor
    masks: Tensor
    graph: GraphOutput
    class_t: Tensor | None = None
    rank_t: Tensor | None = None
    textures: Tensor | None = None
    heat: Tensor | None = None
    cells: Tensor | None = None
    dense: Tensor | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """saliency: (B, Q), larger = looked at earlier. class_logits: (B, Q, 2) = [object, none].
    masks: (B, Q, H/4, W/4) logits. training: only when asked for."""

    saliency: Tensor
    class_logits: Tensor
    masks: Tensor
    training: TrainingOutput | None = None
    attention: Tensor | None = None

    @property
    def score(self) -> Tensor:
        """(B, Q): probability that the query is an object."""
        return self.class_logits.softmax(-1)[..., 0]

    def answers(self) -> tuple[Tensor, ...]:
        """What an artifact of the network gives, in this order: saliency, score, masks and, where
        the network has it, attention."""
        found = (self.saliency, self.score, self.masks)
        return found if self.attention is None else (*found, self.attention)


class Branch(nn.Module):
    """One stack of decoder layers with its heads (and seeds, where these are learned)."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.width
        if config.seeds == "learned":
            self.seeds = LearnedSeeds(config.queries, C)
        self.layers = nn.ModuleList(
            DecoderLayer(C, config.feedforward) for _ in range(config.layers)
        )
        self.heads = Heads(C)


class DSGNN(nn.Module):
    """The whole network for one `Config`."""

    def __init__(self, config: Config):
        super().__init__()
        C = config.width
        self.config = config
        self.backbone = Backbone(config)
        if config.pixel_decoder == "deformable":
            self.pixel_decoder: DeformablePixelDecoder | FPNPixelDecoder = DeformablePixelDecoder(
                self.backbone.channels, C, config.encoder_layers
            )
        else:
            self.pixel_decoder = FPNPixelDecoder(self.backbone.channels, C)
        self.levels = nn.Parameter(torch.randn(3, C))
        self.shape = Branch(config)
        if config.seeds == "peaks":
            self.seeds = PeakSeeds(config.queries, C)
            self.dense = nn.Conv2d(C, 1, 1)  # training only
        if config.attention:
            self.attention = AttentionHead(C)
        if config.texture:
            self.texture = Branch(config)
            self.graph: GraphHead = DomainSeparationHead(config.queries, C)
        else:
            self.graph = GraphHead(config.queries, C)

    def memory_levels(self, memory: list[Tensor]) -> list[tuple[Tensor, Tensor, tuple[int, int]]]:
        """memory: (B, C, h, w) at strides 32, 16, 8 → key, value (B, K, C) and (h, w) of each."""
        levels = []
        for x, level in zip(memory, self.levels, strict=True):
            h, w = x.shape[-2:]
            value = x.flatten(2).transpose(1, 2) + level  # (B, K, C)
            key = value + sine_position(h, w, x.shape[1], x)
            levels.append((key, value, (h, w)))
        return levels

    def forward(
        self, images: Tensor, training_outputs: bool = False, centres: Tensor | None = None
    ) -> Output:
        """images: (B, 3, H, W) normalised float, H and W multiples of 32.

        centres: (B, Q) cells to seed queries from (see `PeakSeeds`), in training only.
        """
        B = images.shape[0]
        pixels, memory = self.pixel_decoder(self.backbone(images))
        logits = self.attention(memory) if self.config.attention else None
        attention = None if logits is None else softmax_map(logits)
        heat = cells = None
        if self.config.seeds == "peaks":
            s, position_s, heat, cells = self.seeds(memory[-1], centres)
        else:
            s, position_s = self.shape.seeds(B)
        stacks = [(self.shape, [s], position_s)]
        if self.config.texture:
            t, position_t = self.texture.seeds(B)
            stacks.append((self.texture, [t], position_t))
        levels = self.memory_levels(memory)
        masks = [shape_masks(self.shape.heads.embedding(s), pixels)]
        for i in range(self.config.layers):
            key, value, size = levels[i % 3]
            blocked = attention_mask(masks[-1], size)  # both stacks look where the shapes are
            for branch, queries, position in stacks:
                queries.append(branch.layers[i](queries[-1], position, key, value, blocked))
            masks.append(shape_masks(self.shape.heads.embedding(stacks[0][1][-1]), pixels))
        queries_by_stack = [queries for _, queries, _ in stacks]
        if not training_outputs:
            graph = self.graph(*(queries[-1] for queries in queries_by_stack))
            return Output(graph.rank, graph.class_logits, masks[-1], attention=attention)
        training = self._training_output(queries_by_stack, masks, pixels, heat, cells)
        training = replace(training, attention=logits)
        graph = training.graph
        return Output(graph.rank[-B:], graph.class_logits[-B:], masks[-1], training, attention)

    def _training_output(
        self,
        queries_by_stack: list[list[Tensor]],
        masks: list[Tensor],
        pixels: Tensor,
        heat: Tensor | None,
        cells: Tensor | None,
    ) -> TrainingOutput:
        s, *rest = [torch.stack(queries) for queries in queries_by_stack]  # (O, B, Q, C)
        class_s, rank_s = self.shape.heads(s)
        out = {"class_s": class_s, "rank_s": rank_s, "masks": torch.stack(masks)}
        if rest:
            t = rest[0]
            out["class_t"], out["rank_t"] = self.texture.heads(t)
            out["textures"] = texture_maps(self.texture.heads.embedding(t), pixels)
            graph = self.graph(s.flatten(0, 1), t.flatten(0, 1), training_outputs=True)
        else:
            graph = self.graph(s.flatten(0, 1))
        if heat is not None:
            out |= {"heat": heat, "cells": cells, "dense": self.dense(pixels).squeeze(1)}
        return TrainingOutput(graph=graph, **out)


def build_model(config: str | Config) -> DSGNN:
    """The network of a configuration (by name or as `Config`), random weights, eval mode."""
    return DSGNN(get_config(config)).eval()


__all__ = ["DSGNN", "MEAN", "STD", "Output", "TrainingOutput", "build_model", "normalise"]
