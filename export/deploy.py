"""The deploy graph: the trained network rewritten for inference, exactly.

It takes letterboxed RGB as uint8, (B, H, W, 3). It gives saliency (B, Q), score (B, Q), masks as
logits, (B, Q, H/4, W/4), and attention (B, H/8, W/8) where the network has it. Only the output of
the last decoder layer is computed. Every rewrite is exact algebra, and a test compares it with the
part of `dsgnn.model` that it replaces:

- Attention over a single key does not depend on the query. Both such attentions of the graph
  encoder fold into one C×C map of the global vector, and the first edges are one row for each
  image.
- The maps A, B, U and V of a graph layer are one product. The common encoder runs once for both
  branches.
- Cross-attention has few queries and many keys. W_k is absorbed into the queries, and W_v is
  applied after pooling, so that there is no tensor of keys or values. The bias of the keys and the
  vector of the level cancel in the softmax; on the side of the values they are a constant. Both
  branches share the two large products.
- Resizing and the sum over channels may change places. Attention masks are therefore made of pixel
  features that are resized once for each level, and the last 1×1 convolution of the pixel embedding
  moves into the mask embedding.
- In deformable attention, the position, the cell's centre and the scale fold into the projection
  that says where to sample.
- The BatchNorms of the pyramid fold into its convolutions.
- What Swin masks in its windows gets the weight 0 instead of e^-100. That number is subnormal in
  float32, and took 40% of the time of Swin-L in ONNX Runtime on a CPU.

Cells are the last axis everywhere, so that nothing is transposed between products.

B is the batch, Q the number of queries, C the width, M the number of heads, D = C / M, K the number
of cells of one level, and N that of all levels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dsgnn.backbone import Backbone, PadThenShiftBlock
from dsgnn.graph import (
    CIGDS,
    DomainSeparationHead,
    GraphEncoder,
    GraphHead,
    GraphLayer,
    LinearBlock,
)
from dsgnn.model import DSGNN, MEAN, STD, Branch
from dsgnn.pixel_decoder import (
    HEADS,
    LEVELS,
    MSDA,
    POINTS,
    DeformablePixelDecoder,
    EncoderLayer,
    FPNPixelDecoder,
    cell_centres,
    resize,
    sine_position,
)
from dsgnn.query_decoder import DecoderLayer, softmax_map
from dsgnn.runtime.errors import OptionError

BLOCKED = -1e4  # added to attention logits; finite, so that half precision has no NaN
Size = tuple[int, int]
M = TypeVar("M", bound=nn.Module)


def _constant(value: Tensor) -> nn.Parameter:
    """A copy in float32 that is not trained."""
    return nn.Parameter(value.detach().float().clone(), requires_grad=False)


def _all(modules: nn.ModuleList, kind: type[M]) -> list[M]:
    """The modules of a list, which are all of one kind; ModuleList does not know which."""
    found = [module for module in modules if isinstance(module, kind)]
    assert len(found) == len(modules)
    return found


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


class DeployMSDA(nn.Module):
    """`dsgnn.pixel_decoder.MSDA` with the cells as the last axis.

    shapes, position: (h, w) of the three levels and the cells' positions, (N, C), where they are
    known at export. Then positions and centres are constants, which are folded in float64.
    """

    def __init__(
        self,
        attention: MSDA,
        shapes: list[Size] | None,
        position: Tensor | None,
    ):
        super().__init__()
        # The rows are in the order level, head, point, (x, y); the logits: head, level, point.
        offsets = attention.sampling_offsets
        weight = offsets.weight.detach().double().view(HEADS, LEVELS, POINTS, 2, -1)
        self.offset_weight = _constant(weight.transpose(0, 1).flatten(0, 3))
        bias = offsets.bias.detach().double().view(HEADS, LEVELS, POINTS, 2).transpose(0, 1)
        self.offset_bias = _constant(bias.reshape(-1, 1))
        self.logit_weight = _constant(attention.attention_weights.weight)
        self.logit_bias = _constant(attention.attention_weights.bias[:, None])
        self.value_weight = _constant(attention.value_proj.weight)
        self.value_bias = _constant(attention.value_proj.bias[:, None])
        self.output = attention.output_proj
        self.folded = shapes is not None and position is not None
        if shapes is not None and position is not None:
            centres = torch.cat([cell_centres(h, w, position.double()) for h, w in shapes])
            scale = torch.tensor([[2 / w, 2 / h] for h, w in shapes], dtype=torch.float64)
            scale = scale[:, None, None].expand(-1, HEADS, POINTS, -1).reshape(-1, 1)
            offset_weight = weight.transpose(0, 1).flatten(0, 3) * scale
            at = 2 * centres.T.repeat(LEVELS * HEADS * POINTS, 1) - 1  # (L·M·P·2, N)
            shift = offset_weight @ position.double().T + bias.reshape(-1, 1) * scale + at
            self.offset_weight = _constant(offset_weight)
            self.offset_bias = _constant(shift)
            logits = attention.attention_weights
            self.logit_bias = _constant(
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
            position = self._position(shapes, decoder.levels.detach().double())
        self.attentions = nn.ModuleList(
            DeployMSDA(layer.attention, shapes, position)
            for layer in _all(decoder.layers, EncoderLayer)
        )
        self.layers = decoder.layers
        self.folded = size is not None

    @staticmethod
    def _position(shapes: list[Size], levels: Tensor) -> Tensor:
        C = levels.shape[1]
        return torch.cat(
            [
                sine_position(h, w, C, levels).flatten(1).T + level
                for (h, w), level in zip(shapes, levels, strict=True)
            ]
        )  # (N, C)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Size]]:
        inputs = [conv(x) for conv, x in zip(self.inputs, reversed(maps[1:]), strict=True)]
        shapes = [(x.shape[-2], x.shape[-1]) for x in inputs]
        x = torch.cat([x.flatten(2) for x in inputs], 2).transpose(1, 2)  # (B, N, C)
        position = centres = x
        if not self.folded:
            position = self._position(shapes, self.levels)
            centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])
        layers = _all(self.layers, EncoderLayer)
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


class DeployCrossAttention(nn.Module):
    """Those products of a layer's cross-attention that do not touch the memory."""

    def __init__(self, attention: nn.MultiheadAttention, level: Tensor):
        super().__init__()
        C = attention.embed_dim
        q, k, v = attention.in_proj_weight.detach().double().split(C)
        bq, _, bv = attention.in_proj_bias.detach().double().split(C)
        out = attention.out_proj
        scale = (C // HEADS) ** -0.5
        self.query_weight = _constant((q * scale).T)  # (C, C)
        self.query_bias = _constant(bq * scale)
        self.key = _constant(k.view(HEADS, C // HEADS, C))  # (M, D, C): absorbed by the queries
        self.value = _constant(v.view(HEADS, C // HEADS, C).transpose(1, 2))  # (M, C, D)
        self.out_weight = _constant(out.weight.T)
        constant = out.weight.double() @ (v @ level.detach().double() + bv) + out.bias.double()
        self.out_bias = _constant(constant)

    def absorb(self, query: Tensor) -> Tensor:
        """Queries (B, Q, C) to what multiplies the memory and its positions: (B, M, Q, C)."""
        B, Q, C = query.shape
        heads = (query @ self.query_weight + self.query_bias).view(B, Q, HEADS, C // HEADS)
        return heads.transpose(1, 2) @ self.key

    def read_out(self, pooled: Tensor) -> Tensor:
        """The memory as each head pooled it, (B, M, Q, C), to the attention's output, (B, Q, C)."""
        B, _, Q, C = pooled.shape
        heads = (pooled @ self.value).transpose(1, 2).reshape(B, Q, C)
        return heads @ self.out_weight + self.out_bias


class DeploySelfAttention(nn.Module):
    """Self-attention of a few queries.

    `x + position` is computed each time. To fold it into a bias for each query would be faster, but
    TensorRT-RTX 1.7 then fails to build.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        C = attention.embed_dim
        weight = attention.in_proj_weight.detach().double().clone()
        bias = attention.in_proj_bias.detach().double().clone()
        scale = (C // HEADS) ** -0.5
        weight[:C] *= scale
        bias[:C] *= scale
        self.qk_weight, self.qk_bias = _constant(weight[: 2 * C].T), _constant(bias[: 2 * C])
        self.v_weight, self.v_bias = _constant(weight[2 * C :].T), _constant(bias[2 * C :])
        self.out = attention.out_proj

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        B, Q, C = x.shape
        both = ((x + position) @ self.qk_weight + self.qk_bias).view(B, Q, 2, HEADS, C // HEADS)
        q, k = both.permute(2, 0, 3, 1, 4).unbind(0)  # (B, M, Q, D)
        v = (x @ self.v_weight + self.v_bias).view(B, Q, HEADS, C // HEADS).transpose(1, 2)
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).reshape(B, Q, C))


class DeployDecoderLayer(nn.Module):
    """A decoder layer without the products that touch the memory."""

    def __init__(self, layer: DecoderLayer, level: Tensor):
        super().__init__()
        self.cross = DeployCrossAttention(layer.cross_attention, level)
        self.own = DeploySelfAttention(layer.self_attention)
        self.norm1, self.norm2, self.norm3 = layer.norm1, layer.norm2, layer.norm3
        self.ffn = layer.ffn

    def finish(self, x: Tensor, position: Tensor, pooled: Tensor) -> Tensor:
        """The layer's output, (B, Q, C). x, position: (B, Q, C). pooled: (B, M, Q, C)."""
        x = self.norm1(x + self.cross.read_out(pooled))
        x = self.norm2(x + self.own(x, position))
        return self.norm3(x + self.ffn(x))


class DeployBranch(nn.Module):
    """The layers of one query decoder.

    embed: the last convolution of the pixel embedding. With it the branch also has a mask
    embedding, into which that convolution is folded.
    """

    def __init__(self, branch: Branch, levels: Tensor, embed: nn.Conv2d | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            DeployDecoderLayer(layer, levels[i % LEVELS])
            for i, layer in enumerate(_all(branch.layers, DecoderLayer))
        )
        if hasattr(branch, "seeds"):
            self.features, self.positions = branch.seeds.features, branch.seeds.positions
        if embed is not None:
            self.norm, self.mlp = branch.heads.norm, branch.heads.embed[:-1]
            last = branch.heads.embed[-1]
            assert isinstance(last, nn.Linear) and embed.bias is not None
            conv = embed.weight.detach().double().flatten(1)  # (C, C')
            bias = embed.bias.detach().double()[:, None]  # (C, 1)
            fold = torch.cat((conv, bias), 1)  # mask = e · (conv F + bias)
            self.mask_weight = _constant(last.weight.double().T @ fold)  # (C, C' + 1)
            self.mask_bias = _constant(last.bias.double() @ fold)

    def layer(self, index: int) -> DeployDecoderLayer:
        """The layer of this number."""
        layer = self.layers[index]
        assert isinstance(layer, DeployDecoderLayer)
        return layer

    def mask_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) to weights on pixel features, (B, Q, C'), and an offset, (B, Q, 1)."""
        e = self.mlp(self.norm(x)) @ self.mask_weight + self.mask_bias
        return e[..., :-1], e[..., -1:]


def _group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """GroupNorm of vectors, (B, C), computed as a LayerNorm over each group."""
    grouped = x.unflatten(1, (norm.num_groups, -1))
    return F.layer_norm(grouped, grouped.shape[-1:]).flatten(1) * norm.weight + norm.bias


class DeployGraphLayer(nn.Module):
    """`GraphLayer` with one product for A, B, U and V. Edges that are all equal stay one row."""

    def __init__(self, layer: GraphLayer):
        super().__init__()
        self.weight = _constant(
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
        self.edge_weight, self.edge_bias = _constant(weight.T), _constant(bias)
        self.layers = nn.ModuleList(
            DeployGraphLayer(layer) for layer in _all(encoder.layers, GraphLayer)
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
        self.read.weight = _constant(torch.cat((head.rank.weight, contrast)))
        self.read.bias = _constant(
            torch.cat((head.rank.bias, head.classify.bias[:1] - head.classify.bias[1:]))
        )
        self.domains = isinstance(head, DomainSeparationHead)
        if isinstance(head, DomainSeparationHead):
            self.encode_t = DeployGraphEncoder(head.encode_t)
            self.common = DeployGraphEncoder(head.common)
            self.fuse_s, self.fuse_t = (
                DeployGraphEncoder(head.fuse_s),
                DeployGraphEncoder(head.fuse_t),
            )
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


def _sine(shape: Size, like: Tensor) -> Tensor:
    """The sine encoding of the positions in a level: (K, C), with C and type of `like`, (…, C)."""
    return sine_position(*shape, like.shape[-1], like).flatten(1).T


def _without_dropout(block: LinearBlock) -> nn.Sequential:
    """The block as it computes in evaluation."""
    return nn.Sequential(*[m for m in block if not isinstance(m, nn.Dropout)])


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
        self.scale = _constant((1 / std)[:, None, None])
        self.shift = _constant((-torch.tensor(MEAN) / std)[:, None, None])
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
            self.sine.extend(
                _constant(_sine((size[0] // s, size[1] // s), levels)) for s in (32, 16, 8)
            )

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
        sine = list(self.sine) or [_sine(shape, tokens[0]) for shape in shapes]
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
