"""Training: the published recipes and `nano`'s, on one process or many (`torchrun`).

Every random draw of an iteration comes from a seed of (seed, iteration, process), so a resumed
run continues exactly as an uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dsgnn.checkpoint import save_checkpoint
from dsgnn.config import Config
from dsgnn.data.sample import Sample
from dsgnn.losses import POINTS, Batch, Criterion, Target, object_centres
from dsgnn.model import DSGNN, build_model

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast.

    batch: images per process. backbone_scale: factor on the backbone's learning rate. clip: limit
    of the gradient norm. milestones: iterations at which the learning rate drops to a tenth; with
    none it follows a cosine to zero after `warmup` iterations. points: sampled by the mask losses.
    ema: decay of the averaged weights that are evaluated and kept, 0 = none. sizes: (until, px):
    images are px × px until that share of the iterations is done.
    """

    iterations: int = 36_000
    batch: int = 2
    learning_rate: float = 1e-4
    backbone_scale: float = 0.1
    weight_decay: float = 0.05
    clip: float = 0.01
    milestones: tuple[int, ...] = (15_000, 30_000)
    warmup: int = 0
    points: int = POINTS
    ema: float = 0.0
    sizes: tuple[tuple[float, int], ...] = ()

    def rate(self, iteration: int) -> float:
        """Factor on the learning rate."""
        if self.milestones:
            return 0.1 ** sum(iteration >= m for m in self.milestones)
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        done = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def size(self, iteration: int, default: int) -> int:
        """Side of the square images of an iteration, in pixels."""
        for until, size in self.sizes:
            if iteration < until * self.iterations:
                return size
        return default


PUBLISHED = Recipe()
NANO = Recipe(
    iterations=5_000, batch=12, learning_rate=1e-3, backbone_scale=1.0, clip=5.0, milestones=(),
    warmup=200, points=2048, ema=0.999, sizes=((0.6, 160), (0.85, 224), (1.0, 288)),
)  # fmt: skip


def recipe_for(config: Config) -> Recipe:
    """The recipe a configuration was made for."""
    return NANO if config.seeds == "peaks" else PUBLISHED


class Scenes(Protocol):
    """Training data: any number → a sample of the given (height, width)."""

    def scene(self, number: int, size: tuple[int, int]) -> Sample: ...


class _Loader(Dataset):
    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        number, size = key
        return self.scenes.scene(number, (size, size))


def normalise(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 RGB → (B, 3, H, W) float, the network's input."""
    mean, std = (torch.tensor(v, device=images.device) for v in (MEAN, STD))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, list[Target], list[str]]:
    images = torch.from_numpy(np.stack([s.image for s in samples]))
    targets = [Target(torch.from_numpy(s.masks), torch.from_numpy(s.ranks).float())
               for s in samples]  # fmt: skip
    return images, targets, [s.name for s in samples]


def parameter_groups(model: DSGNN, recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW groups: backbone slower; no decay on norms, embeddings and the graph head."""
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


def seed_centres(targets: Sequence[Target], queries: int, generator: torch.Generator) -> Tensor:
    """For about half the images, seed the first queries from the true objects.

    → (B, Q) cells at stride 8, -1 = take the next predicted peak.
    """
    batch = Batch.of(targets)
    B, G = batch.ranks.shape
    centres = torch.full((B, queries), -1, dtype=torch.long, device=batch.masks.device)
    cells, _ = object_centres(batch.masks)
    forced = torch.rand(B, 1, generator=generator).to(cells.device) < 0.5
    real = torch.arange(G, device=cells.device) < batch.counts[:, None]
    n = min(G, queries)
    centres[:, :n] = torch.where(forced & real, cells, -1)[:, :n]
    return centres


def train(
    config: Config,
    scenes: Scenes,
    out: Path,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    workers: int = 1,
    save_every: int = 500,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> DSGNN:
    """Train and leave `last.safetensors`, `state.pt` and `log.jsonl` in `out`.

    Returns the model with the weights that were kept (the averaged ones with `recipe.ema`).
    FloatingPointError names the samples of the batch whose loss was not finite; the last
    checkpoint stays as it was.
    """
    recipe = recipe or recipe_for(config)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(seed)
    model = build_model(config).to(device, memory_format=torch.channels_last).train()
    network: nn.Module = model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    average = build_model(config).to(device) if recipe.ema else None
    if average is not None:
        average.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    start = 0
    state_path = out / "state.pt"
    out.mkdir(parents=True, exist_ok=True)
    if resume and state_path.is_file():
        state = torch.load(state_path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        if average is not None:
            average.load_state_dict(state["average"])
        start = state["iteration"]
    criterion = Criterion(config, recipe.points)
    keys = [
        [
            ((i * world + rank) * recipe.batch + j, recipe.size(i, config.size))
            for j in range(recipe.batch)
        ]
        for i in range(start, recipe.iterations)
    ]
    loader = DataLoader(
        _Loader(scenes), batch_sampler=keys, num_workers=workers, collate_fn=collate,
        worker_init_fn=_quiet_worker, prefetch_factor=4 if workers else None,
    )  # fmt: skip
    log = (out / "log.jsonl").open("a") if rank == 0 else None
    began, seen = time.monotonic(), 0
    running: dict[str, float] = {}
    for iteration, (images, targets, names) in enumerate(loader, start):
        torch.manual_seed(hash((seed, iteration, rank)) % 2**63)
        generator = torch.Generator().manual_seed(hash((seed, iteration, rank, 1)) % 2**63)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * group["scale"] * recipe.rate(iteration)
        images = normalise(images.to(device)).to(memory_format=torch.channels_last)
        targets = [Target(t.masks.to(device), t.ranks.to(device)) for t in targets]
        centres = None
        if config.seeds == "peaks":
            centres = seed_centres(targets, config.queries, generator)
        output = network(images, training_outputs=True, centres=centres)
        terms = {name: term.sum() for name, term in criterion(output, images, targets).items()}
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at iteration {iteration}, samples {', '.join(names)}; "
                f"the last good checkpoint is {out / 'last.safetensors'}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()
        if average is not None:
            _follow(average, model, min(recipe.ema, (1 + iteration) / (10 + iteration)))
        seen += len(images) * world
        for name, term in terms.items():
            running[name] = running.get(name, 0.0) + float(term.detach())
        done = iteration + 1
        if rank == 0 and log is not None and done % 50 == 0:
            values = {name: round(v / 50, 4) for name, v in running.items()}
            running = {}
            record = {"iteration": done, "loss": round(sum(values.values()), 4),
                      "images_per_s": round(seen / (time.monotonic() - began), 2), **values}  # fmt: skip
            print(json.dumps(record), file=log, flush=True)
        if rank == 0 and (done % save_every == 0 or done == recipe.iterations):
            _save_state(state_path, model, average, optimiser, done)
            save_checkpoint(out / "last.safetensors", average or model)
    return average or model


def _quiet_worker(_: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@torch.no_grad()
def _follow(average: DSGNN, model: DSGNN, decay: float) -> None:
    """average ← decay · average + (1 - decay) · model, buffers included."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def _save_state(
    path: Path, model: DSGNN, average: DSGNN | None, optimiser: torch.optim.Optimizer, done: int
) -> None:
    part = path.with_name(path.name + ".part")
    torch.save(
        {"model": model.state_dict(), "average": average.state_dict() if average else None,
         "optimiser": optimiser.state_dict(), "iteration": done},
        part,
    )  # fmt: skip
    part.replace(path)
