"""Backbones by their timm name, what is refused, and Swin's padding against a naive version."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.nn import functional as F

from dsgnn.backbone import PadThenShiftBlock
from dsgnn.model import build_model


@pytest.mark.parametrize(
    "name", ["convnext_atto", "mobilenetv3_small_050", "swinv2_tiny_window8_256", "regnetx_002"]
)
def test_any_timm_backbone_by_name(name, small):
    model = build_model(replace(small, backbone=name, backbone_options={}))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, output = model.backbone(images), model(images)
    assert [tuple(x.shape[1:]) for x in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(model.backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    assert output.masks.shape == (1, 5, 16, 24)


@pytest.mark.parametrize("option", ["pretrained", "pretrained_cfg", "checkpoint_path"])
def test_no_option_of_a_backbone_loads_weights(option, small):
    """A checkpoint's header holds its configuration: opening one must read no other file."""
    with pytest.raises(ValueError, match=rf"must not load weights, got {option}: give a training"):
        build_model(replace(small, backbone_options={**small.backbone_options, option: "x"}))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_a_backbone_of_other_strides_is_refused(name, small):
    options = {"output_stride": 16} if name == "resnet18" else {}
    with pytest.raises(ValueError, match=f"backbone {name} has strides .*4, 8, 16 and 32"):
        build_model(replace(small, backbone=name, backbone_options=options))


def test_swin_pads_before_it_shifts():
    torch.manual_seed(0)
    ours = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, always_partition=True,
        strict_img_size=False, embed_dim=8, depths=(2,), num_heads=(2,), out_indices=(0,),
    )  # fmt: skip
    block = next(
        m for m in ours.modules() if isinstance(m, SwinTransformerBlock) and any(m.shift_size)
    )
    fits, odd = torch.randn(2, 14, 21, 8), torch.randn(2, 10, 9, 8)
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.weight)
    expected, other = block._attn(fits), block._attn(odd)
    block.__class__ = PadThenShiftBlock
    torch.testing.assert_close(block._attn(fits), expected)  # nothing to pad: timm's
    assert (block._attn(odd) - other).abs().max() > 1e-2  # padding: timm rolls first
    # naive: pad, roll, attend window by window with a mask between regions, roll back, crop
    H, W, shift = 14, 14, block.shift_size[0]
    region = torch.zeros(H, W, dtype=torch.long)
    for i, rows in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
        for j, columns in enumerate((slice(0, -7), slice(-7, -shift), slice(-shift, None))):
            region[rows, columns] = 3 * i + j
    x = F.pad(odd, (0, 0, 0, W - 9, 0, H - 10)).roll((-shift, -shift), (1, 2))
    out = torch.zeros_like(x)
    for top in range(0, H, 7):
        for left in range(0, W, 7):
            at = (slice(top, top + 7), slice(left, left + 7))
            labels = region[at].flatten()
            mask = torch.where(labels[:, None] == labels, 0.0, -100.0)
            window = block.attn(x[:, at[0], at[1]].reshape(2, 49, 8), mask=mask[None])
            out[:, at[0], at[1]] = window.view(2, 7, 7, 8)
    out = out.roll((shift, shift), (1, 2))[:, :10, :9]
    torch.testing.assert_close(block._attn(odd), out)
