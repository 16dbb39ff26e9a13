"""The query decoders of the deploy graph: all but the products that touch the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsgnn.export.deploy.folding import all_of, constant
from dsgnn.model import Branch
from dsgnn.pixel_decoder import HEADS, LEVELS
from dsgnn.query_decoder import DecoderLayer


class DeployCrossAttention(nn.Module):
    """Those products of a layer's cross-attention that do not touch the memory."""

    def __init__(self, attention: nn.MultiheadAttention, level: Tensor):
        super().__init__()
        C = attention.embed_dim
        q, k, v = attention.in_proj_weight.detach().double().split(C)
        bq, _, bv = attention.in_proj_bias.detach().double().split(C)
        out = attention.out_proj
        scale = (C // HEADS) ** -0.5
        self.query_weight = constant((q * scale).T)  # (C, C)
        self.query_bias = constant(bq * scale)
        self.key = constant(k.view(HEADS, C // HEADS, C))  # (M, D, C): absorbed by the queries
        self.value = constant(v.view(HEADS, C // HEADS, C).transpose(1, 2))  # (M, C, D)
        self.out_weight = constant(out.weight.T)
        bias = out.weight.double() @ (v @ level.detach().double() + bv) + out.bias.double()
        self.out_bias = constant(bias)

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
        self.qk_weight, self.qk_bias = constant(weight[: 2 * C].T), constant(bias[: 2 * C])
        self.v_weight, self.v_bias = constant(weight[2 * C :].T), constant(bias[2 * C :])
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
            for i, layer in enumerate(all_of(branch.layers, DecoderLayer))
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
            self.mask_weight = constant(last.weight.double().T @ fold)  # (C, C' + 1)
            self.mask_bias = constant(last.bias.double() @ fold)

    def layer(self, index: int) -> DeployDecoderLayer:
        """The layer of this number."""
        layer = self.layers[index]
        assert isinstance(layer, DeployDecoderLayer)
        return layer

    def mask_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, Q, C) to weights on pixel features, (B, Q, C'), and an offset, (B, Q, 1)."""
        e = self.mlp(self.norm(x)) @ self.mask_weight + self.mask_bias
        return e[..., :-1], e[..., -1:]
