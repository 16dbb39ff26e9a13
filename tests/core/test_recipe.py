"""How long and how fast a network trains, and which parameters learn how fast."""

from dataclasses import replace

import pytest
from torch import nn

from dsgnn.config import CONFIGS
from dsgnn.model import build_model
from dsgnn.training.recipe import (
    NANO,
    PUBLISHED,
    Recipe,
    parameter_groups,
    recipe_for,
)


def test_the_published_schedule():
    rates = [PUBLISHED.rate(i) for i in (0, 14_999, 15_000, 29_999, 30_000, 35_999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert (PUBLISHED.learning_rate, PUBLISHED.weight_decay) == (1e-4, 0.05)
    assert (PUBLISHED.clip, PUBLISHED.batch, PUBLISHED.points) == (0.01, 2, 12_544)
    assert recipe_for(CONFIGS["swin-l-irsr"]) is PUBLISHED and recipe_for(CONFIGS["nano"]) is NANO


def test_nano_warms_up_and_follows_a_cosine():
    n, warm = NANO.iterations, NANO.warmup * NANO.iterations
    assert [NANO.rate(i) for i in (0, int(warm))] == pytest.approx([1 / warm, 1], abs=1e-2)
    assert NANO.rate(round((n + warm) / 2)) == pytest.approx(0.5, abs=1e-3)
    assert NANO.rate(n - 1) < 1e-5
    assert replace(NANO, iterations=n // 10).rate(n // 20) == pytest.approx(NANO.rate(n // 2))
    assert replace(NANO, iterations=1).rate(0) == 1
    assert NANO.decay(0) == 0.1 and NANO.decay(10**6) == NANO.ema


def test_nano_grows_through_its_sizes_and_then_mixes_them():
    n = NANO.iterations
    assert {NANO.size(i, 0) for i in range(n // 3)} == {160}
    assert NANO.size(n // 2, 0) == 224
    late = [NANO.size(i, 0) for i in range(round(0.7 * n), round(0.7 * n) + 6)]
    assert late[:3] == late[3:] and set(late) == {192, 256, 320}
    assert {NANO.size(i, 0) for i in range(round(0.9 * n), n)} == {256, 288, 320}
    assert PUBLISHED.size(100, 576) == 576


def test_a_recipe_without_iterations_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0, 2 and 1"):
        Recipe(iterations=0)


@pytest.mark.parametrize("name", ["r50-assr", "swin-t-irsr", "nano"])
def test_parameter_groups_hold_every_trained_parameter_once(name):
    model = build_model(CONFIGS[name])
    recipe = recipe_for(CONFIGS[name])
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    groups = {}
    for group in parameter_groups(model, recipe):
        assert group["lr"] == recipe.learning_rate * group["scale"]
        for parameter in group["params"]:
            assert groups.setdefault(names.pop(id(parameter)), group) is group
    assert not names
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == CONFIGS[name].frozen_norm
    assert all(isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Module) for n in frozen)
    for parameter, group in groups.items():
        module = model.get_submodule(parameter.rpartition(".")[0])
        norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
        plain = (
            norm
            or parameter.startswith("graph.")
            or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention)
        )  # embeddings are parameters of other modules
        plain &= parameter != "attention.prior"  # decays towards looking everywhere alike
        assert group["weight_decay"] == (0.0 if plain else 0.05), parameter
        expected = recipe.backbone_scale if parameter.startswith("backbone.") else 1.0
        assert group["scale"] == expected, parameter
