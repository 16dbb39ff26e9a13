"""The graph head: relations between objects decide who is looked at first (DSGNN, section 3.3-3.4).

B is the batch, Q the number of queries, which are the nodes of the graph, and C the width. Names
that end in s are of shape, those that end in t of texture. In training, B counts the outputs of all
decoder layers for all images, because nothing here mixes images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HEADS = 8


class FFM(nn.Module):
    """The feed-forward module of the paper: LayerNorm(x + W2 ReLU(W1 x)) on (…, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.linear2(self.linear1(x).relu())))


class LinearBlock(nn.Sequential):
    """Dropout, a linear map, LayerNorm and ReLU, one after the other: (…, c_in) → (…, c_out)."""

    def __init__(self, c_in: int, c_out: int, dropout: float = 0.0):
        super().__init__(
            nn.Dropout(dropout), nn.Linear(c_in, c_out), nn.LayerNorm(c_out), nn.ReLU()
        )


class GlobalVector(nn.Module):
    """Sum up all nodes of an image in one vector: (B, Q, C) → (B, C).

    The first linear map has Q·C inputs, so a network works for one number of queries only.
    """

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
    """The first edges of the graph, made of the global vector.

    Both attentions have a single key. Whatever the query is, they therefore return
    W_o(W_v g + b_v) + b_o, and all edges of an image start equal. They are kept as published,
    because published checkpoints have their parameters. The deploy graph folds them into one map.
    """

    def __init__(self, width: int):
        super().__init__()
        self.node_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.edge_attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.project = FFM(width)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """x: the nodes, (B, Q, C). g: the global vector, (B, C). Returns edges, (B, Q, Q, C)."""
        B, Q, C = x.shape
        key = g[:, None]  # (B, 1, C)
        f = self.node_attention(x, key, key, need_weights=False)[0]  # (B, Q, C)
        query = f.repeat_interleave(Q, 0)  # (B·Q, Q, C): f_j for every i
        key = f.reshape(B * Q, 1, C)  # f_i
        edges = self.edge_attention(query, key, key, need_weights=False)[0]
        return self.project(edges.view(B, Q, Q, C))


class GraphLayer(nn.Module):
    """One step in which nodes and edges pass messages to each other, through gates on the edges.

    The five linear maps have no bias. Their names are those of the paper.
    """

    def __init__(self, width: int):
        super().__init__()
        self.A, self.B, self.E, self.U, self.V = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.norm_edge = nn.LayerNorm(width)
        self.norm_node = nn.LayerNorm(width)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """x: the nodes, (B, Q, C). edges: (B, Q, Q, C). Returns both, updated."""
        Q = x.shape[1]
        message = self.A(x)[:, :, None] + self.B(x)[:, None] + self.E(edges)
        edges = edges + self.norm_edge(message).relu()
        gate = edges.sigmoid().softmax(2)  # over j
        gathered = (gate * self.V(x)[:, None]).sum(2) / Q
        return (x + self.norm_node(self.U(x) + gathered)).relu(), edges


class GraphEncoder(nn.Module):
    """The graph encoder (GEnc in the paper): nodes (B, Q, C) that know of each other, (B, Q, C)."""

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
    """Cross-image graph domain separation: the part of the nodes that ranking needs.

    (B, Q, C) → (B, Q, 32).
    """

    WIDTH = 32

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.squeeze = LinearBlock(width, self.WIDTH, 0.01)
        self.encode = GraphEncoder(queries, self.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.squeeze(x))


@dataclass(frozen=True)
class GraphOutput:
    """What the graph head says of each query.

    rank: (B, Q), larger = more salient. class_logits: (B, Q, 2), object first. task: (B, Q, 32),
    the vector that both were read from.
    """

    rank: Tensor
    class_logits: Tensor
    task: Tensor


@dataclass(frozen=True)
class DomainOutput(GraphOutput):
    """What the losses of domain separation need beside that.

    Each is (B, Q, C) where nothing else is said; letters are those of the paper. fused_s, fused_t:
    f, the common part of each domain. private_s, private_t: p, the part that only this domain has.
    encoded_s, encoded_t: v, the nodes after the first encoder. restored_s, restored_t: r, what the
    decoder makes of the common and the private part. rank_s, rank_t, (B, Q), and class_s, class_t,
    (B, Q, 2): what auxiliary heads say of each domain alone.
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
    """Rank the nodes of one decoder: the graph encoder, and then CIGDS."""

    def __init__(self, queries: int, width: int):
        super().__init__()
        self.encode_s = GraphEncoder(queries, width)
        self.separate = CIGDS(queries, width)
        self.rank = nn.Linear(CIGDS.WIDTH, 1)
        self.classify = nn.Linear(CIGDS.WIDTH, 2)

    def read_out(self, fused: Tensor) -> GraphOutput:
        """Ranks and classes from the fused nodes, (B, Q, C)."""
        task = self.separate(fused)
        return GraphOutput(self.rank(task).squeeze(-1), self.classify(task), task)

    def forward(self, s: Tensor) -> GraphOutput:
        """s: the decoder's queries before their last LayerNorm, (B, Q, C)."""
        return self.read_out(self.encode_s(s))


class DomainSeparationHead(GraphHead):
    """Rank by shape and texture: each is separated into a common and a private part, and the common
    parts are fused."""

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
        """s, t: the two decoders' queries before their last LayerNorm, (B, Q, C) each.

        Returns a GraphOutput, or with training_outputs a DomainOutput.
        """
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
            # The published code applies the two rank layers crosswise. Checkpoints depend on it.
            rank_s=self.rank_t(fused_s).squeeze(-1),
            rank_t=self.rank_s(fused_t).squeeze(-1),
            class_s=self.class_s(fused_s),
            class_t=self.class_t(fused_t),
        )
