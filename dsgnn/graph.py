"""The graph head: relations between objects decide who is looked at first (DSGNN, section 3.3-3.4).

B batch, Q queries = nodes of the graph, C width, s / t shape / texture.
In training B counts decoder outputs × images: nothing here mixes images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = 8


class FFM(nn.Module):
    """LN(x + W2 ReLU W1 x)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.linear1(x).relu())))


class LinearBlock(nn.Sequential):
    """Dropout, Linear, LayerNorm, ReLU."""

    def __init__(self, c_in: int, c_out: int, dropout: float = 0.0):
        super().__init__(
            nn.Dropout(dropout), nn.Linear(c_in, c_out), nn.LayerNorm(c_out), nn.ReLU()
        )


class GlobalVector(nn.Module):
    """All nodes of an image in one vector: (B, Q, C) → (B, C). Q is baked into a weight."""

    def __init__(self, queries: int, width: int):
        super().__init__()
        groups = 32 if width >= 64 else 8
        self.gather = nn.Linear(queries * width, 4 * width)
        self.norm1 = nn.GroupNorm(groups, 4 * width)
        self.squeeze = nn.Linear(4 * width, width)
        self.norm2 = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.gather(x.flatten(1))).relu()
        return self.norm2(self.squeeze(x)).relu()


class EdgeExtractor(nn.Module):
    """First edges from the global vector.

    Both attentions see one key, so whatever the query they return W_o(W_v g + b_v) + b_o: all
    edges of an image start equal. Kept as published, whose parameters these are; the deploy graph
    folds them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.node_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.edge_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.project = FFM(width)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x: (B, Q, C) nodes, g: (B, C) → edges e_ij (B, Q, Q, C)."""
        B, Q, C = x.shape
        key = g[:, None]  # (B, 1, C)
        f = self.node_attention(x, key, key, need_weights=False)[0]  # (B, Q, C)
        query = f.repeat_interleave(Q, 0)  # (B·Q, Q, C): f_j for every i
        key = f.reshape(B * Q, 1, C)  # f_i
        edges = self.edge_attention(query, key, key, need_weights=False)[0]
        return self.project(edges.view(B, Q, Q, C))


class GraphLayer(nn.Module):
    """Gated message passing; all five maps without bias."""

    def __init__(self, width: int):
        super().__init__()
        self.A, self.B, self.E, self.U, self.V = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.norm_edge = nn.LayerNorm(width)
        self.norm_node = nn.LayerNorm(width)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, Q, C), edges: (B, Q, Q, C) → both updated."""
        Q = x.shape[1]
        message = self.A(x)[:, :, None] + self.B(x)[:, None] + self.E(edges)
        edges = edges + self.norm_edge(message).relu()
        gate = edges.sigmoid().softmax(2)  # over j
        gathered = (gate * self.V(x)[:, None]).sum(2) / Q
        return (x + self.norm_node(self.U(x) + gathered)).relu(), edges


class GraphEncoder(nn.Module):
    """GEnc: (B, Q, C) → (B, Q, C)."""

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.summary = GlobalVector(queries, width)
        self.edges = EdgeExtractor(width)
        self.layers = nn.ModuleList(GraphLayer(width) for _ in range(2))
        self.ffm = FFM(width)

    def forward(self, x: Tensor) -> Tensor:
        start, edges = x, self.edges(x, self.summary(x))
        for layer in self.layers:
            x, edges = layer(x, edges)
        return self.ffm(x + start)


class CIGDS(nn.Module):
    """Cross-image graph domain separation: task-related part of the nodes, squeezed to 32."""

    WIDTH = 32

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.squeeze = LinearBlock(width, self.WIDTH, 0.01)
        self.encode = GraphEncoder(queries, self.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.squeeze(x))


@dataclass(frozen=True)
class GraphOutput:
    """rank: (B, Q), larger = more salient. class_logits: (B, Q, 2). task: (B, Q, 32)."""

    rank: Tensor
    class_logits: Tensor
    task: Tensor


@dataclass(frozen=True)
class DomainOutput(GraphOutput):
    """What the losses of domain separation need, all (B, Q, C) where not said otherwise.

    fused_s, fused_t: f_s, f_t. private_s/t: p. encoded_s/t: v. restored_s/t: r.
    rank_s, rank_t: (B, Q) and class_s, class_t: (B, Q, 2): auxiliary heads.
    """

    fused_s: Tensor
    fused_t: Tensor
    private_s: Tensor
    private_t: Tensor
    encoded_s: Tensor
    encoded_t: Tensor
    restored_s: Tensor
    restored_t: Tensor
    rank_s: Tensor
    rank_t: Tensor
    class_s: Tensor
    class_t: Tensor


class GraphHead(nn.Module):
    """Ranks from the nodes of one decoder: GEnc, then CIGDS."""

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.encode_s = GraphEncoder(queries, width)
        self.separate = CIGDS(queries, width)
        self.rank = nn.Linear(CIGDS.WIDTH, 1)
        self.classify = nn.Linear(CIGDS.WIDTH, 2)

    def read_out(self, fused: Tensor) -> GraphOutput:
        task = self.separate(fused)
        return GraphOutput(self.rank(task).squeeze(-1), self.classify(task), task)

    def forward(self, s: Tensor) -> GraphOutput:
        return self.read_out(self.encode_s(s))


class DomainSeparationHead(GraphHead):
    """Shape and texture nodes, separated into common and private parts, fused, ranked."""

    def __init__(self, queries: int, width: int):
        super().__init__(queries, width)
        self.encode_t = GraphEncoder(queries, width)
        self.common = GraphEncoder(queries, width)
        self.fuse_s = GraphEncoder(queries, width)
        self.fuse_t = GraphEncoder(queries, width)
        self.fuse = LinearBlock(2 * width, width, 0.01)
        # from here on: training only
        self.private_s = GraphEncoder(queries, width)
        self.private_t = GraphEncoder(queries, width)
        self.decode = GraphEncoder(queries, width)
        self.restore_s = LinearBlock(2 * width, width)
        self.restore_t = LinearBlock(2 * width, width)
        self.rank_s, self.rank_t = nn.Linear(width, 1), nn.Linear(width, 1)
        self.class_s, self.class_t = nn.Linear(width, 2), nn.Linear(width, 2)

    def forward(  # type: ignore[override]  # two domains where the simple head has one
        self, s: Tensor, t: Tensor, training_outputs: bool = False
    ) -> GraphOutput:
        """s, t: (B, Q, C) queries before their last LayerNorm → GraphOutput, or DomainOutput."""
        encoded_s, encoded_t = self.encode_s(s), self.encode_t(t)
        common_s, common_t = self.common(encoded_s), self.common(encoded_t)
        fused_s, fused_t = self.fuse_s(common_s), self.fuse_t(common_t)
        out = self.read_out(self.fuse(torch.cat((fused_t, fused_s), -1)))
        if not training_outputs:
            return out
        private_s, private_t = self.private_s(encoded_s), self.private_t(encoded_t)
        return DomainOutput(
            **vars(out),
            fused_s=fused_s,
            fused_t=fused_t,
            private_s=private_s,
            private_t=private_t,
            encoded_s=encoded_s,
            encoded_t=encoded_t,
            restored_s=self.decode(self.restore_s(torch.cat((private_s, common_s), -1))),
            restored_t=self.decode(self.restore_t(torch.cat((private_t, common_t), -1))),
            # upstream applies the two rank layers crosswise; checkpoints depend on it
            rank_s=self.rank_t(fused_s).squeeze(-1),
            rank_t=self.rank_s(fused_t).squeeze(-1),
            class_s=self.class_s(fused_s),
            class_t=self.class_t(fused_t),
        )
