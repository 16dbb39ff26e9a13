"""Every rewrite of the deploy graph against the part of the network it replaces."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dsgnn.backbone import PadThenShiftBlock
from dsgnn.config import CONFIGS, Config
from dsgnn.export.deploy.graph import DeployGraphEncoder, DeployGraphHead
from dsgnn.export.deploy.network import BLOCKED, DeployGraph
from dsgnn.export.deploy.pixel_decoder import DeployFPN, DeployMSDA
from dsgnn.export.deploy.query_decoder import (
    DeployBranch,
    DeployCrossAttention,
    DeploySelfAttention,
)
from dsgnn.graph import DomainSeparationHead, GraphEncoder, GraphHead
from dsgnn.model import Branch, build_model, normalise
from dsgnn.pixel_decoder import HEADS, MSDA, FPNPixelDecoder, cell_centres, sine_position
from dsgnn.query_decoder import attention_mask, shape_masks

SMALL = {"channels": (16, 32, 64, 96), "layers": (1, 1, 1, 1)}
C = 64
PARTS = {"width": C, "feedforward": 96, "encoder_layers": 2, "layers": 4}


def small(name: str, **changes) -> Config:
    """A published configuration, in every part but with small widths."""
    return replace(CONFIGS[name], backbone="resnet18", backbone_options=SMALL, **PARTS, **changes)


@pytest.fixture(autouse=True)
def _random() -> None:
    torch.manual_seed(0)


def shake(module: nn.Module) -> nn.Module:
    """Random values everywhere, so that no zero bias or unit scale hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [5, 8])
@torch.no_grad()
def test_graph_encoder(queries: int, batch: int) -> None:
    encoder = shake(GraphEncoder(queries, C))
    x = torch.randn(batch, queries, C)
    close(DeployGraphEncoder(encoder)(x), encoder(x))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [5, 8])
@torch.no_grad()
def test_graph_heads(queries: int, batch: int) -> None:
    s, t = torch.randn(2, batch, queries, C)
    for head, inputs in ((GraphHead(queries, C), [s]), (DomainSeparationHead(queries, C), [s, t])):
        want = shake(head)(*inputs)
        saliency, score = DeployGraphHead(head)(inputs)
        close(saliency, want.rank)
        close(score, want.class_logits.softmax(-1)[..., 0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("queries", [5, 8])
@torch.no_grad()
def test_cross_attention_with_blocked_rows(queries: int, batch: int) -> None:
    attention = shake(nn.MultiheadAttention(C, HEADS, batch_first=True))
    memory, level = torch.randn(batch, 6 * 7, C), torch.randn(C)
    sine = sine_position(6, 7, C, memory)
    query = torch.randn(batch, queries, C)
    logits = torch.randn(batch, queries, 6, 7)
    logits[:, 0] = -1.0  # blocked everywhere: opened entirely
    logits[:, 1] = 1.0  # open everywhere
    logits[:, 2, 1:] = -1.0
    blocked = attention_mask(logits, (6, 7))
    assert not blocked[:, 0].any() and blocked[:, 2].any()
    want = attention(
        query,
        memory + level + sine,
        memory + level,
        attn_mask=blocked.repeat_interleave(HEADS, 0),
        need_weights=False,
    )[0]
    deploy = DeployCrossAttention(attention, level)
    scores = deploy.absorb(query).flatten(1, 2) @ (memory + sine).transpose(1, 2)
    scores = scores.unflatten(1, (HEADS, queries)) + torch.where(blocked, BLOCKED, 0.0)[:, None]
    pooled = (scores.softmax(-1).flatten(1, 2) @ memory).unflatten(1, (HEADS, queries))
    close(deploy.read_out(pooled), want)


@torch.no_grad()
def test_self_attention() -> None:
    attention = shake(nn.MultiheadAttention(C, HEADS, batch_first=True))
    x, position = torch.randn(3, 5, C), torch.randn(3, 5, C)
    q = x + position
    want = attention(q, q, x, need_weights=False)[0]
    close(DeploySelfAttention(attention)(x, position), want)


@torch.no_grad()
def test_mask_embedding_without_the_pixel_embedding() -> None:
    branch = shake(Branch(small("r50-assr")))
    conv = shake(nn.Conv2d(32, C, 1))
    features, x = torch.randn(2, 32, 6, 5), torch.randn(2, 5, C)
    weight, offset = DeployBranch(branch, torch.randn(3, C), conv).mask_embedding(x)
    want = shape_masks(branch.heads.embedding(x), conv(features))
    close((weight @ features.flatten(2) + offset).view_as(want), want)


@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_deformable_attention(folded: bool) -> None:
    attention = shake(MSDA(C))
    attention.sampling_offsets.bias.mul_(3)  # some points lie outside
    shapes = [(2, 3), (4, 6), (8, 12)]
    x = torch.randn(3, sum(h * w for h, w in shapes), C)
    position = torch.randn(x.shape[1], C)
    centres = torch.cat([cell_centres(h, w, x) for h, w in shapes])
    deploy = DeployMSDA(attention, shapes if folded else None, position if folded else None)
    close(deploy(x, position, centres, shapes), attention(x + position, x, centres, shapes))


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_pyramid_without_its_norms(batch: int) -> None:
    decoder = shake(FPNPixelDecoder([8, 16, 24, 32], C))
    norms = [module for module in decoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 2)
    maps = [torch.randn(batch, c, s, s + 1) for c, s in ((8, 16), (16, 8), (24, 4), (32, 2))]
    features, memory = decoder.features(maps)
    deploy = DeployFPN(decoder)
    got, tokens, shapes = deploy(maps)
    scale = features.abs().max()
    close(got / scale, features / scale)
    assert shapes == [(2, 3), (4, 5), (8, 9)]
    for part, level in zip(tokens, memory, strict=True):
        close(part / scale, level.flatten(2).transpose(1, 2) / scale)
    assert len(norms) == 8 and not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    assert torch.equal(decoder.features(maps)[0], features)  # the network itself is as it was


@torch.no_grad()
def test_swin_without_subnormal_attention() -> None:
    tiny = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    model = build_model(replace(CONFIGS["swin-t-assr"], backbone_options=tiny, **PARTS)).eval()
    shake(model.backbone)
    graph = DeployGraph(model)
    images = torch.randn(2, 3, 96, 160)
    want = model.backbone(images)
    for got, wanted in zip(graph.backbone(images), want, strict=True):
        close(got, wanted)
    ours, theirs = (
        next(m for m in body.modules() if isinstance(m, PadThenShiftBlock) and any(m.shift_size))
        for body in (graph.backbone, model.backbone)
    )
    grid = torch.zeros(1, 14, 21, 16)
    least = [block.get_attn_mask(grid).exp().min().item() for block in (ours, theirs)]
    assert least[0] == 0 < least[1] < torch.finfo(torch.float32).tiny
    assert ours.mlp.fc1.weight is theirs.mlp.fc1.weight  # 0.8 GB of Swin-L: not twice


@pytest.mark.parametrize(
    "config",
    [
        small("r50-assr"),
        small("r50-irsr"),
        CONFIGS["nano"],
        replace(CONFIGS["nano"], name="inattentive", attention=False),
    ],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_the_whole_graph(config: Config, folded: bool) -> None:
    model = build_model(config).eval()
    for name, part in model.named_children():
        if name != "backbone":  # not rewritten; shaken, a deep one magnifies rounding
            shake(part)
    images = torch.randint(0, 256, (3, 64, 96, 3), dtype=torch.uint8)
    want = model(normalise(images))
    graph = DeployGraph(model, (64, 96) if folded else None).eval()
    for batch in (slice(0, 3), slice(1, 2)):
        got = graph(images[batch])
        assert len(got) == len(config.outputs)
        for value, wanted in zip(got, want.answers(), strict=True):
            scale = max(1.0, wanted.abs().max().item())
            torch.testing.assert_close(value / scale, wanted[batch] / scale, atol=1e-4, rtol=0)
    if config.attention:
        assert got[-1].shape == (1, 8, 12)
        assert got[-1].std() > 1e-5 and got[-1].sum().item() == pytest.approx(1, abs=1e-5)


def test_wrong_size() -> None:
    model = build_model(small("r50-assr"))
    with pytest.raises(ValueError, match="multiples of 32, got 60x96"):
        DeployGraph(model, (60, 96))
