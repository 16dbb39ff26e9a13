"""Training on one process or many (`torchrun`), resumed exactly.

What is random in an iteration follows from (seed, iteration, pass, process) alone, so a resumed run
continues as an uninterrupted one would. Differs from upstream: where several passes make a step,
each counts the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsgnn.config import Config, get_config
from dsgnn.data import open_data
from dsgnn.data.records import Samples
from dsgnn.data.transforms import Examples, ImageTruth
from dsgnn.evaluation.loop import measure, model_ranker
from dsgnn.metrics import summarise
from dsgnn.model import DSGNN, normalise
from dsgnn.scenes.composite import CompositeScenes
from dsgnn.training.batches import Epochs, ExampleSource, Key, Scenes, load, mix
from dsgnn.training.journal import EVALUATED, Journal, curve
from dsgnn.training.losses import Criterion
from dsgnn.training.parallel import gather, join, leave, mean, process, share_buffers
from dsgnn.training.peaks import seed_centres
from dsgnn.training.recipe import Recipe, recipe_for
from dsgnn.training.state import AMP, State, layout, start
from dsgnn.weights.checkpoint import save_checkpoint

log = logging.getLogger("dsgnn")


def train(
    config: Config,
    source: ExampleSource,
    out: Path,
    recipe: Recipe | None = None,
    *,
    validation: Samples | None = None,
    init: Path | None = None,
    resume: bool = False,
    data: Mapping[str, Any] | None = None,
    amp: str = "off",
    seed: int = 0,
    workers: int = 0,
    every: int | None = None,
    log_every: int = 50,
    device: str | torch.device = "cpu",
) -> DSGNN:
    """Train, and leave last.safetensors, best.safetensors, state.pt, log.jsonl and TensorBoard
    events in `out`.

    validation: evaluated (protocol `dsgnn`) every `every` iterations, when everything is saved too,
    by default 20 times; "best" is the highest SA-SOR there. init: weights to start from, see
    `dsgnn.weights.pretrained`. resume: go on with the run in `out`, if there is one. data: facts
    about the images (JSON values); a run with others is not resumed. amp: "off", "bf16", "fp16".
    workers: processes that prepare images. In a process group every process calls this.
    → the model with the weights that were kept (the averaged ones with `recipe.ema`), eval mode.
    Raises FloatingPointError with the batch's names when the loss or its gradient is not finite:
    the last checkpoint stays as it was; ValueError for settings that do not fit.
    """
    recipe, device = recipe or recipe_for(config), torch.device(device)
    every = every or max(1, recipe.iterations // 20)
    if validation is not None and not len(validation):
        raise ValueError("there are no images to evaluate on: give --val another split, or none")
    rank, world = process()
    state = start(config, recipe, out, init, resume, amp, seed, device, data)
    if rank == 0 and config.texture and recipe.batch == 1:
        log.warning(
            "one image per process: the cross-image and difference losses compare the images of "
            "one process's batch, so they are 0 in this run; --batch 2 or more turns them on "
            "(--accumulate does not)"
        )
    step = Step(config, recipe, state, amp, seed, out)
    batches = load(source, _keys(config, recipe, state.iteration), workers)
    journal = Journal(out, state.iteration, recipe.iterations) if rank == 0 else None
    per_step = recipe.batch * recipe.accumulate * world
    began, first, since = time.monotonic(), state.iteration, state.iteration
    running: dict[str, Tensor] = {}
    try:
        for iteration in range(state.iteration, recipe.iterations):
            for name, term in step(iteration, batches).items():
                running[name] = running.get(name, torch.zeros_like(term)) + term
            state.iteration = done = iteration + 1
            save = done % every == 0 or done == recipe.iterations
            if save or done % log_every == 0:
                losses = {name: mean(v / (done - since)).item() for name, v in running.items()}
                running, since = {}, done
                record = {
                    "iteration": done,
                    "images": done * per_step,
                    "loss": sum(losses.values()),
                    "learning_rate": recipe.learning_rate * recipe.rate(iteration),
                    "images_per_s": (done - first) * per_step / (time.monotonic() - began),
                    "losses": losses,
                }
                if journal:
                    journal.losses(record)
            paused = time.monotonic()
            if save and validation is not None:
                figures = _evaluate(state.kept, validation)
                value = figures["sa_sor"]
                best = False
                if value is not None:
                    best, state.best = value > state.best, max(value, state.best)
                elif rank == 0:
                    log.warning(
                        "no validation image has two objects to order: there is no SA-SOR, and no "
                        "best.safetensors is written"
                    )
                if journal:
                    record = {"iteration": done, "images": done * per_step, "evaluation": figures}
                    journal.evaluation(record, best)
                    if best:
                        save_checkpoint(out / "best.safetensors", state.kept)
            if save and rank == 0:
                state.save(out)
            began += time.monotonic() - paused  # images_per_s is of training alone
            if journal:
                journal.bar.update()
    finally:
        if journal:
            journal.close()
    return state.kept.eval()


class Step:
    """One optimiser step: `step(iteration, batches)` → the mean of each loss over its passes."""

    def __init__(
        self, config: Config, recipe: Recipe, state: State, amp: str, seed: int, out: Path
    ):
        self.config, self.recipe, self.state = config, recipe, state
        self.amp, self.seed, self.out = amp, seed, out
        self.device = next(state.model.parameters()).device
        self.criterion = Criterion(config, recipe.points)
        self.network: nn.Module = state.model
        if process()[1] > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(state.model, device_ids=devices)

    def __call__(self, iteration: int, batches: Iterator[Examples]) -> dict[str, Tensor]:
        recipe, optimiser, scaler = self.recipe, self.state.optimiser, self.state.scaler
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * group["scale"] * recipe.rate(iteration)
        optimiser.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        for number in range(recipe.accumulate):
            examples = next(batches)
            names += examples.names
            with self._together(number == recipe.accumulate - 1):
                terms = self.losses(examples, mix(self.seed, iteration, number, process()[0]))
                loss = torch.stack(list(terms.values())).sum()
                self._stop_unless_finite("loss", loss, iteration, examples.names)
                scaler.scale(loss / recipe.accumulate).backward()
            for name, term in terms.items():
                totals[name] = totals.get(name, 0) + term.detach() / recipe.accumulate
        scaler.unscale_(optimiser)
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), recipe.clip)
        if self.amp != "fp16":  # there the scaler leaves such a step out and scales less
            self._stop_unless_finite("gradient", norm, iteration, names)
        scaler.step(optimiser)
        scaler.update()
        if self.state.average is not None:
            _follow(self.state.average, self.state.model, recipe.decay(iteration))
        return totals

    def losses(self, examples: Examples, seed: int) -> dict[str, Tensor]:
        """Every weighted loss of one batch, as scalars."""
        torch.manual_seed(seed)  # dropout and the points of the mask losses
        images = normalise(examples.images.to(self.device))
        images = images.contiguous(memory_format=layout(self.device))
        targets = [
            ImageTruth(t.masks.to(self.device), t.ranks.to(self.device)) for t in examples.targets
        ]
        centres = None
        if self.config.seeds == "peaks":
            generator = torch.Generator().manual_seed(seed)
            centres = seed_centres(targets, self.config.queries, generator)
        with torch.autocast(self.device.type, AMP[self.amp], enabled=self.amp != "off"):
            output = self.network(images, training_outputs=True, centres=centres)
        count = float(sum(min(len(t.ranks), self.config.queries) for t in targets))
        objects = mean(torch.tensor(count, device=self.device))
        terms = self.criterion(output, images, targets, objects=objects)
        return {name: term.sum() for name, term in terms.items()}

    def _together(self, last: bool) -> Any:
        """Gradients are exchanged in the last pass of a step only."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _stop_unless_finite(
        self, what: str, value: Tensor, iteration: int, names: list[str]
    ) -> None:
        """FloatingPointError on every process when the value is not finite on one."""
        if not mean((~torch.isfinite(value.detach())).float()):
            return
        found = enumerate(gather((value.item(), names)))
        bad = [
            f"{v} on process {r} for {', '.join(n)}" for r, (v, n) in found if not np.isfinite(v)
        ]
        raise FloatingPointError(
            f"the {what} of iteration {iteration + 1} is not finite: {'; '.join(bad)}. The "
            f"checkpoints in {self.out} are from before it. Look at these images and their "
            "annotations, or train without --amp"
        )


def run(
    config: str,
    data: str,
    out: Path,
    *,
    split: str = "train",
    val: str = "val",
    iterations: int | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    seed: int = 0,
    device: str = "auto",
    **options: Any,
) -> None:
    """What `dsgnn-train` does: open the data, join the process group, train, draw the curve.

    data: as for `dsgnn.data.open_data`; made-up scenes are trained on without end. val: the split
    to evaluate on, or "none". device: "auto", "cpu", "cuda" or "cuda:N". options: of `train`.
    """
    if val in split.split("+"):
        raise ValueError(f"the split {val} would be trained on too: give --val another, or none")
    chosen = get_config(config)
    recipe = recipe_for(chosen)
    recipe = replace(
        recipe,
        iterations=recipe.iterations if iterations is None else iterations,
        batch=recipe.batch if batch is None else batch,
        accumulate=accumulate,
    )
    samples = open_data(data, split)
    validation = None if val == "none" else open_data(data, val)
    source: ExampleSource
    if isinstance(samples, CompositeScenes):
        samples.load()
        source = Scenes(samples, seed)
    else:
        source = Epochs(samples, chosen.augmentation, seed)
    images = {"training images": len(samples), "validation images": len(validation or ())}
    facts = {"split": split, "val": val, **images}
    where = join(device)
    try:
        train(
            chosen, source, out, recipe, validation=validation, data=facts, seed=seed, device=where,
            **options,
        )  # fmt: skip
        if process()[0] == 0:
            curve(out)
    finally:
        leave()


def _keys(config: Config, recipe: Recipe, start: int) -> Iterator[list[Key]]:
    """Which examples this process sees in each pass from iteration `start` on."""
    rank, world = process()
    for iteration in range(start, recipe.iterations):
        size = recipe.size(iteration, config.size)
        for number in range(recipe.accumulate):
            first = ((iteration * recipe.accumulate + number) * world + rank) * recipe.batch
            yield [(first + i, size) for i in range(recipe.batch)]


def _evaluate(model: DSGNN, validation: Samples) -> dict[str, float | None]:
    """Figures of the validation split; each process measures its share of the images."""
    rank, world = process()
    share_buffers(model)
    training = model.training
    model.eval()
    palette = getattr(validation, "palette", "irsr")
    share = measure(
        model_ranker(model), validation, range(rank, len(validation), world), palette=palette
    )
    model.train(training)
    figures = summarise([image for part in gather(share) for image in part], palette=palette)
    return {name: figures[name] for name in EVALUATED}


@torch.no_grad()
def _follow(average: DSGNN, model: DSGNN, decay: float) -> None:
    """average ← decay · average + (1 - decay) · model, buffers included."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)
