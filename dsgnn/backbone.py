"""Backbones: any timm `features_only` network with strides 4, 8, 16 and 32.

Swin differs from timm's in two ways that change the published network's numbers: feature maps are
padded to whole windows *before* the cyclic shift, and each of the four outputs has a LayerNorm.
(The order of channels in patch merging is the checkpoint loader's business.)
"""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F

from dsgnn.config import Config
from dsgnn.runtime.errors import OptionError

STRIDES = (4, 8, 16, 32)
LOADING = ("checkpoint_path", "cache_dir")  # of timm.create_model, besides `pretrained…`


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's Swin block with the published order: pad, roll, partition, attend, and back."""

    def _attn(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        (wh, ww), (sh, sw) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -W % ww, 0, -H % wh))
        Hp, Wp = x.shape[1:3]
        if sh or sw:
            x = torch.roll(x, (-sh, -sw), (1, 2))
        windows = window_partition(x, self.window_size).view(-1, wh * ww, C)
        windows = self.attn(windows, mask=self.get_attn_mask(x))
        x = window_reverse(windows.view(-1, wh, ww, C), self.window_size, Hp, Wp)
        if sh or sw:
            x = torch.roll(x, (sh, sw), (1, 2))
        return x[:, :H, :W]


class Backbone(nn.Module):
    """Feature maps of a photo at strides 4, 8, 16 and 32.

    channels: of the four maps. Raises OptionError when timm does not know the name, the network has
    other strides, or `backbone_options` would fetch or load weights: a checkpoint carries its
    configuration, and opening one must read no other file. Some of timm's networks work at one size
    only: give them `img_size` in `backbone_options`.
    """

    def __init__(self, config: Config):
        super().__init__()
        if not timm.is_model(config.backbone):
            raise OptionError(
                f"backbone {config.backbone!r} is not a timm model; timm.list_models() names them"
            )
        options = dict(config.backbone_options)
        loading = [o for o in options if o.startswith("pretrained") or o in LOADING]
        if loading:
            raise OptionError(
                f"config {config.name}: backbone_options must not load weights, got "
                f"{', '.join(loading)}: give a training the weights to start from instead"
            )
        self.is_swin = config.backbone.startswith("swin_")
        if config.backbone.startswith(("swin_", "swinv2_")) and "_cr_" not in config.backbone:
            options |= {"always_partition": True, "strict_img_size": False}
        # timm lists stride 2 too, where a network has it: take the last four.
        self.body = cast(Any, timm.create_model(config.backbone, features_only=True, **options))
        reductions = self.body.feature_info.reduction()
        if tuple(reductions[-4:]) != STRIDES:
            raise OptionError(
                f"backbone {config.backbone} has strides {reductions}; "
                "maps at strides 4, 8, 16 and 32 are needed"
            )
        self.channels: list[int] = self.body.feature_info.channels()[-4:]
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        self.frozen_norm = config.frozen_norm
        frozen = [self.body.get_submodule(name) for name in config.frozen]
        for module in [*frozen, *(self.batch_norms() if self.frozen_norm else [])]:
            module.requires_grad_(False)
        if self.is_swin:
            for module in self.modules():
                if isinstance(module, SwinTransformerBlock):
                    module.__class__ = PadThenShiftBlock
            self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def batch_norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.frozen_norm:
            for module in self.batch_norms():
                module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W) normalised float → four maps (B, C_i, H / stride, W / stride)."""
        maps = self.body(images)[-4:]
        if self.is_swin:
            maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        return [x.movedim(-1, 1) for x in maps] if self.channels_last else maps
