"""The training loop, on one process or many, resumed exactly.

What is random in an iteration follows from (seed, iteration, pass, process) alone. A resumed run
therefore continues as an uninterrupted one would. Differs from upstream: where several passes make
a step, each counts the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from dsgnn.data.records import Samples, palette_of
from dsgnn.evaluation.loop import measure
from dsgnn.evaluation.rankers import model_ranker
from dsgnn.metrics import summarise
from dsgnn.model import DSGNN
from dsgnn.runtime.disk.files import claimed
from dsgnn.runtime.errors import OptionError
from dsgnn.training.batches import ExampleSource, Key, load
from dsgnn.training.journal import EVALUATED, Journal
from dsgnn.training.parallel import gather, mean, process, share_buffers
from dsgnn.training.recipe import TrainingPlan
from dsgnn.training.state import BEST, start
from dsgnn.training.step import Step
from dsgnn.weights.checkpoint import save_checkpoint

log = logging.getLogger("dsgnn")


@dataclass(frozen=True)
class RunOptions:
    """How a run starts and is carried out.

    initial_weights: a file to start from, see `dsgnn.weights.pretrained`. resume: go on with the
    run in the folder, if there is one. device: of this process. workers: processes that prepare
    images. every: iterations between two evaluations, after each of which all is saved; by default
    there are 20. log_every: iterations between two records of the losses.
    """

    initial_weights: Path | None = None
    resume: bool = False
    device: str | torch.device = "cpu"
    workers: int = 0
    every: int | None = None
    log_every: int = 50


def train(
    plan: TrainingPlan,
    source: ExampleSource,
    out: Path,
    options: RunOptions | None = None,
    validation: Samples | None = None,
) -> DSGNN:
    """Train, and leave last.safetensors, best.safetensors, state.pt, log.jsonl and TensorBoard
    events in `out`.

    validation: images to evaluate on (protocol `dsgnn`); "best" is the highest SA-SOR there. In a
    process group every process calls this.

    → the model in eval mode, with the weights that were kept (the averaged ones with `recipe.ema`).
    Raises NotFiniteError with the batch's names when the loss or its gradient is not finite (the
    last checkpoint stays as it was), OptionError for settings that do not fit, CheckpointError for
    initial weights that cannot be used, FolderBusyError if another run is writing into `out`, and
    what the source raised.
    """
    trainer = Trainer(plan, source, out, options or RunOptions(), validation)
    with claimed(out) if process()[0] == 0 else nullcontext():
        return trainer.run()


class Trainer:
    """One run: `run` is the loop, the other methods are what happens in it."""

    def __init__(
        self,
        plan: TrainingPlan,
        source: ExampleSource,
        out: Path,
        options: RunOptions,
        validation: Samples | None,
    ):
        """Make or resume the run's state; arguments and errors as for `train`."""
        if validation is not None and not len(validation):
            raise OptionError(
                "there are no images to evaluate on: choose another validation split, or none",
                "validation",
            )
        self.plan, self.source, self.out, self.options = plan, source, out, options
        self.validation = validation
        device = torch.device(options.device)
        self.state = start(plan, out, device, options.initial_weights, options.resume)
        self.step = Step(plan, self.state, out)
        self.losses = LossMeans()
        self.clock = Stopwatch()
        self.first_iteration = self.state.iteration
        self.journal: Journal | None = None  # of the first process only
        self.time_told = False

    def run(self) -> DSGNN:
        """Train to the end of the recipe → the model that was kept."""
        iterations = self.plan.recipe.iterations
        every = self.options.every or max(1, iterations // 20)
        self._warn()
        if process()[0] == 0:
            self.journal = Journal(self.out, self.state.iteration, iterations)
            self.journal.say(self.summary())
        batches = load(self.source, self._keys(), self.options.workers)
        self.clock.start()
        try:
            for iteration in range(self.state.iteration, iterations):
                self.losses.add(self.step(iteration, batches))
                self.state.iteration = done = iteration + 1
                saves = done % every == 0 or done == iterations
                if saves or done % self.options.log_every == 0:
                    self._record_losses()
                if saves:
                    with self.clock.stopped():  # images_per_s is of training alone
                        self._evaluate()
                        self._save()
                if self.journal:
                    self.journal.bar.update()
        finally:
            if self.journal:
                self.journal.close()
        return self.state.kept.eval()

    def summary(self) -> str:
        """What is about to be trained, on what, for how long, and where it is written."""
        parameters = list(self.state.model.parameters())
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        data = ", ".join(f"{name} {value}" for name, value in self.plan.data.items())
        return "\n".join(
            [
                f"{self.plan.config.name}: {total / 1e6:.2f} million parameters, of which "
                f"{trained / 1e6:.2f} million are trained, on {self.step.device}",
                f"data: {data or 'not described'}",
                f"iterations: {self.state.iteration} of {self.plan.recipe.iterations} done, each "
                f"of {self.images_per_iteration} images; how long it takes is told once it was "
                "measured",
                f"written into: {self.out}",
            ]
        )

    @property
    def images_per_iteration(self) -> int:
        """How many images all processes see in a step."""
        return self.plan.recipe.batch * self.plan.recipe.accumulate * process()[1]

    def origin(self) -> str:
        """The data and how long it was trained on, for whoever finds the checkpoint."""
        done = f"{self.state.iteration:,} iterations of {self.images_per_iteration} images"
        return f"{self.plan.origin or 'data that is not described'}, {done}"

    def _warn(self) -> None:
        if process()[0] == 0 and self.plan.config.texture and self.plan.recipe.batch == 1:
            log.warning(
                "one image per process: the cross-image and difference losses compare the images "
                "of one process's batch, so they are 0 in this run. A batch of 2 or more turns "
                "them on; more passes per step do not."
            )

    def _keys(self) -> Iterator[list[Key]]:
        """Which examples this process sees in each pass from the current iteration on."""
        (rank, world), recipe = process(), self.plan.recipe
        for iteration in range(self.state.iteration, recipe.iterations):
            size = recipe.size(iteration, self.plan.config.size)
            for number in range(recipe.accumulate):
                first = ((iteration * recipe.accumulate + number) * world + rank) * recipe.batch
                yield [(first + i, size) for i in range(recipe.batch)]

    def _record_losses(self) -> None:
        """Write down the means of the losses since the last record."""
        done, recipe = self.state.iteration, self.plan.recipe
        losses = self.losses.take()
        seen = (done - self.first_iteration) * self.images_per_iteration
        if self.journal:
            record = {
                "iteration": done,
                "images": done * self.images_per_iteration,
                "loss": sum(losses.values()),
                "learning_rate": recipe.learning_rate * recipe.rate(done - 1),
                "images_per_s": seen / self.clock.seconds,
                "losses": losses,
            }
            self.journal.losses(record)
            if not self.time_told and done < recipe.iterations:
                self.time_told = True
                left = (recipe.iterations - done) * self.clock.seconds
                seconds = round(left / (done - self.first_iteration))
                self.journal.say(
                    f"expected time: {timedelta(seconds=seconds)} for the iterations that are left "
                    "(hours:minutes:seconds), evaluations not counted"
                )

    def _evaluate(self) -> None:
        """Measure the weights that are kept, and save them where they are the best so far."""
        if self.validation is None:
            return
        figures = evaluate_together(self.state.kept, self.validation)
        sa_sor = figures["sa_sor"]
        best = sa_sor is not None and sa_sor > self.state.best_sa_sor
        if sa_sor is not None:
            self.state.best_sa_sor = max(sa_sor, self.state.best_sa_sor)
        if not self.journal:
            return
        if sa_sor is None:
            log.warning(
                "no validation image has two objects to order: there is no SA-SOR, and no %s is "
                "written",
                BEST,
            )
        done = self.state.iteration
        images = done * self.images_per_iteration
        self.journal.evaluation({"iteration": done, "images": images, "evaluation": figures}, best)
        if best:
            save_checkpoint(self.out / BEST, self.state.kept, origin=self.origin())

    def _save(self) -> None:
        if self.journal:
            self.state.save(self.out, self.origin())


def evaluate_together(model: DSGNN, validation: Samples) -> dict[str, float | None]:
    """Figures of the validation split; each process measures its share of the images."""
    rank, world = process()
    share_buffers(model)
    training = model.training
    model.eval()
    palette = palette_of(validation)
    share = measure(
        model_ranker(model), validation, range(rank, len(validation), world), palette=palette
    )
    model.train(training)
    figures = summarise([image for part in gather(share) for image in part], palette=palette)
    return {name: figures[name] for name in EVALUATED}


class LossMeans:
    """The mean of each loss over iterations and processes, since it was last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """terms: the losses of one iteration, scalars."""
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(term)) + term
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means, which then begin anew. Every process must call it at the same time."""
        means = {name: mean(total / self._count).item() for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class Stopwatch:
    """Seconds since `start`, without the time it was stopped."""

    def start(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time in this block does not count."""
        since = time.monotonic()
        yield
        self._began += time.monotonic() - since
