"""The published configurations, and values that do not go together."""

from dataclasses import replace

import pytest

from dsgnn.config import CONFIGS, get_config
from dsgnn.model import build_model


def test_the_published_configurations():
    names = [f"{b}-{d}" for b in ("r50", "swin-t", "swin-s", "swin-b", "swin-l")
             for d in ("assr", "irsr")]  # fmt: skip
    assert sorted(CONFIGS) == sorted(["nano", *names])
    table = {  # design: S, Q, threshold, class weights, augmentation
        "r50-assr": (576, 5, 0.4, (0.1, 1.0), "jitter"),
        "r50-irsr": (640, 8, 0.75, (1.0, 0.1), "flip"),
        "swin-l-assr": (640, 5, 0.75, (0.1, 1.0), "jitter"),
        "swin-l-irsr": (640, 8, 0.75, (1.0, 0.1), "flip"),
    }
    for name, expected in table.items():
        c = CONFIGS[name]
        assert (c.size, c.queries, c.threshold, c.class_weights, c.augmentation) == expected
        assert c.frozen_norm == name.startswith("r50")
    assert CONFIGS["swin-l-assr"].backbone_options["drop_path_rate"] == 0.3


def test_unknown_names_and_values_are_named(small):
    with pytest.raises(
        ValueError, match="unknown configuration 'r51'; choose one of nano, r50-assr"
    ):
        build_model("r51")
    assert get_config(small) is small
    with pytest.raises(ValueError, match="config small: seeds must be one of learned, peaks"):
        replace(small, seeds="random")
    with pytest.raises(ValueError, match="seeds='peaks' needs texture=False"):
        replace(small, seeds="peaks")
    with pytest.raises(ValueError, match="width must be a multiple of 32, got 40"):
        replace(small, width=40)
    with pytest.raises(ValueError, match="'resnet5' is not a timm model"):
        build_model(replace(small, backbone="resnet5", backbone_options={}))
