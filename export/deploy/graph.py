"""The graph head of the deploy graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsgnn.export.deploy.folding import all_of, constant
from dsgnn.graph import (
    CIGDS,
    DomainSeparationHead,
    GraphEncoder,
    GraphHead,
    GraphLayer,
    LinearBlock,
)


def _without_dropout(block: LinearBlock) -> nn.Sequential:
    """The block as it computes in evaluation."""
    return nn.Sequential(*[m for m in block if not isinstance(m, nn.Dropout)])


def _group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of vectors, (B, C), computed as a LayerNorm over each group."""
    grouped = x.unflatten(1, (norm.num_groups, -1))
    return F.layer_norm(grouped, grouped.shape[-1:]).flatten(1) * norm.weight + norm.bias


class DeployGraphLayer(nn.Module):
    """`GraphLayer` with one product for A, B, U and V. Edges that are all equal stay one row."""

    def __init__(self, layer: GraphLayer):
        super().__init__()
        self.weight = constant(
            torch.cat([m.weight for m in (layer.A, layer.B, layer.U, layer.V)]).T
        )
        self.E, self.norm_edge, self.norm_node = layer.E, layer.norm_edge, layer.norm_node

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, Q, C). edges: (B, Q, Q, C), or (B, 1, 1, C) where all of them are equal."""
        a, b, u, v = (x @ self.weight).chunk(4, -1)
        message = a[:, :, None] + b[:, None] + self.E(edges)
        edges = edges + self.norm_edge(message).relu()
        gate = edges.sigmoid().softmax(2)
        gathered = (gate * v[:, None]).sum(2) * (1 / x.shape[1])
        return (x + self.norm_node(u + gathered)).relu(), edges


class DeployGraphEncoder(nn.Module):
    """`GraphEncoder` with its two attentions over a single key folded into one map."""

    def __init__(self, encoder: GraphEncoder):
        super().__init__()
        self.summary, self.ffm, self.project = encoder.summary, encoder.ffm, encoder.edges.project
        width = encoder.ffm.norm.normalized_shape[0]
        weight = torch.eye(width, dtype=torch.float64)
        bias = torch.zeros(width, dtype=torch.float64)
        for attention in (encoder.edges.node_attention, encoder.edges.edge_attention):
            C = attention.embed_dim
            v = attention.in_proj_weight.detach().double()[2 * C :]
            bv = attention.in_proj_bias.detach().double()[2 * C :]
            out = attention.out_proj
            weight = out.weight.detach().double() @ v @ weight
            bias = out.weight.double() @ (v @ bias + bv)
            bias = (bias + out.bias.double()).detach()
        self.edge_weight, self.edge_bias = constant(weight.T), constant(bias)
        self.layers = nn.ModuleList(
            DeployGraphLayer(layer) for layer in all_of(encoder.layers, GraphLayer)
        )

    def forward(self, x: Tensor) -> Tensor:
        g = _group_norm(self.summary.gather(x.flatten(1)), self.summary.norm1).relu()
        g = _group_norm(self.summary.squeeze(g), self.summary.norm2).relu()
        edges = self.project(g @ self.edge_weight + self.edge_bias)[:, None, None]  # (B, 1, 1, C)
        start = x
        for layer in self.layers:
            x, edges = layer(x, edges)
        return self.ffm(x + start)


class DeployGraphHead(nn.Module):
    """The graph head: queries of each branch, (B, Q, C), to saliency (B, Q) and score (B, Q)."""

    def __init__(self, head: GraphHead):
        super().__init__()
        separate = head.separate
        self.encode_s = DeployGraphEncoder(head.encode_s)
        self.squeeze = _without_dropout(separate.squeeze)
        self.separate = DeployGraphEncoder(separate.encode)
        # Rank and class are one product. The softmax of two classes is the sigmoid of their
        # difference.
        contrast = head.classify.weight[:1] - head.classify.weight[1:]
        self.read = nn.Linear(CIGDS.WIDTH, 2)
        self.read.weight = constant(torch.cat((head.rank.weight, contrast)))
        self.read.bias = constant(
            torch.cat((head.rank.bias, head.classify.bias[:1] - head.classify.bias[1:]))
        )
        self.domains = isinstance(head, DomainSeparationHead)
        if isinstance(head, DomainSeparationHead):
            self.encode_t = DeployGraphEncoder(head.encode_t)
            self.common = DeployGraphEncoder(head.common)
            self.fuse_s = DeployGraphEncoder(head.fuse_s)
            self.fuse_t = DeployGraphEncoder(head.fuse_t)
            self.fuse = _without_dropout(head.fuse)

    def forward(self, queries: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        x = self.encode_s(queries[0])
        if self.domains:
            t = self.encode_t(queries[1])
            both = self.common(torch.cat((x, t)))  # one run of the common encoder
            c_s, c_t = both[: x.shape[0]], both[x.shape[0] :]
            x = self.fuse(torch.cat((self.fuse_t(c_t), self.fuse_s(c_s)), -1))
        read = self.read(self.separate(self.squeeze(x)))  # (B, Q, 2)
        return read[..., 0], read[..., 1].sigmoid()
