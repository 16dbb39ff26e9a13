"""How long and how fast a network trains: the published recipe, `nano`'s, and AdamW's groups.

A `TrainingPlan` is a recipe with all else that decides what a run computes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsgnn.config import Config
from dsgnn.model import DSGNN
from dsgnn.runtime.errors import OptionError
from dsgnn.training.losses import POINTS


@dataclass(frozen=True)
class Recipe:
    """A training schedule.

    Moments of the schedule (milestones, warmup, sizes) are given as shares of all iterations, from
    0 to 1. `dataclasses.replace(recipe, iterations=…)` therefore makes the schedule longer or
    shorter without changing its form.

    iterations: optimiser steps. batch: images per process and pass. accumulate: passes per step.
    learning_rate: AdamW's. backbone_scale: the backbone's learning rate is this much of it.
    weight_decay: AdamW's. clip: limit of the gradient norm. milestones: at each of these moments
    the learning rate drops to a tenth. Without milestones it rises until `warmup` and then follows
    a cosine to zero. points: how many points of a mask the losses look at. ema: decay of the
    averaged weights, which are those that are evaluated and kept; 0 means that nothing is averaged.
    sizes: pairs of a moment and the sides in pixels that images have until then, one side after
    the other from iteration to iteration. Without sizes images have the configuration's size.
    """

    iterations: int = 36_000
    batch: int = 2
    accumulate: int = 1
    learning_rate: float = 1e-4
    backbone_scale: float = 0.1
    weight_decay: float = 0.05
    clip: float = 0.01
    milestones: tuple[float, ...] = (15 / 36, 30 / 36)
    warmup: float = 0.0
    points: int = POINTS
    ema: float = 0.0
    sizes: tuple[tuple[float, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if min(self.iterations, self.batch, self.accumulate) < 1:
            raise OptionError(
                "iterations, batch and accumulate must be at least 1, got "
                f"{self.iterations}, {self.batch} and {self.accumulate}",
                "iterations",
                "batch",
                "accumulate",
            )

    def rate(self, iteration: int) -> float:
        """Factor on the learning rate."""
        done = iteration / self.iterations
        if self.milestones:
            return 0.1 ** sum(done >= m for m in self.milestones)
        if done < self.warmup:
            return min(1.0, (iteration + 1) / self.iterations / self.warmup)
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))

    def size(self, iteration: int, default: int) -> int:
        """Side of the images of an iteration, in pixels."""
        done = iteration / self.iterations
        sides = next((sides for until, sides in self.sizes if done < until), (default,))
        return sides[iteration % len(sides)]

    def decay(self, iteration: int) -> float:
        """How much of the averaged weights an iteration keeps: less at first."""
        return min(self.ema, (1 + iteration) / (10 + iteration))


PUBLISHED = Recipe()
NANO = Recipe(
    iterations=6_200,
    batch=12,
    learning_rate=1e-3,
    backbone_scale=0.25,
    clip=5.0,
    milestones=(),
    warmup=0.03,
    points=2048,
    ema=0.999,
    sizes=((0.4, (160,)), (0.6, (224,)), (0.85, (192, 256, 320)), (1.0, (256, 288, 320))),
)


def recipe_for(config: Config) -> Recipe:
    """The recipe a configuration was made for."""
    return NANO if config.seeds == "peaks" else PUBLISHED


def adapted(
    recipe: Recipe, iterations: int | None, batch: int | None, accumulate: int | None
) -> Recipe:
    """The recipe with these values in place of its own, where they are given."""
    given: dict[str, Any] = {"iterations": iterations, "batch": batch, "accumulate": accumulate}
    return replace(recipe, **{name: n for name, n in given.items() if n is not None})


AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The type that a mixed-precision setting computes in."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a run computes. A run is resumed only with the plan it was started with.

    config, recipe: the network and its schedule. seed: decides all that is random. amp: mixed
    precision, "off", "bf16" or "fp16". data: facts about the images (JSON values), so that a run
    is not resumed on other ones. origin: the data in words, for the checkpoint. Raises OptionError
    for another `amp`.
    """

    config: Config
    recipe: Recipe
    seed: int = 0
    amp: str = "off"
    data: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    def __post_init__(self) -> None:
        if self.amp not in AMP:
            raise OptionError(f"amp must be one of {', '.join(AMP)}, got {self.amp!r}", "amp")

    def facts(self, processes: int) -> dict[str, Any]:
        """The plan and the number of processes as plain JSON values."""
        facts = {
            "config": self.config.to_dict(),
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "amp": self.amp,
            "processes": processes,
            **self.data,
        }
        return json.loads(json.dumps(facts))  # tuples become lists, as they are when read back


def parameter_groups(model: DSGNN, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW groups: the backbone slower; no decay on norms, embeddings and the graph head.

    → at most four dicts of params, weight_decay, lr and `scale`, the group's factor on the
    learning rate; every parameter that is trained is in exactly one.
    """
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    plain = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters()}
    plain |= {id(p) for p in model.graph.parameters()}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        embedding = name == "levels" or name.endswith(
            ("seeds.features", "seeds.positions", "decoder.levels", "relative_position_bias_table")
        )
        decay = 0.0 if embedding or id(parameter) in plain else recipe.weight_decay
        scale = recipe.backbone_scale if name.startswith("backbone.") else 1.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": p, "weight_decay": decay, "lr": recipe.learning_rate * scale, "scale": scale}
        for (scale, decay), p in groups.items()
    ]
