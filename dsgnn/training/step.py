"""One optimiser step: passes over batches, their losses, and the update of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsgnn.data.transforms import Examples
from dsgnn.model import normalise
from dsgnn.runtime.errors import NotFiniteError
from dsgnn.training.batches import mix
from dsgnn.training.losses import Criterion
from dsgnn.training.parallel import gather, mean, process
from dsgnn.training.peaks import seed_centres
from dsgnn.training.recipe import AMP, TrainingPlan
from dsgnn.training.state import TrainingState, layout


class Step:
    """One optimiser step: `step(iteration, batches)` → the mean of each loss over its passes."""

    def __init__(self, plan: TrainingPlan, state: TrainingState, out: Path):
        """out: the run's folder, for messages."""
        self.plan, self.state, self.out = plan, state, out
        self.device = next(state.model.parameters()).device
        self.criterion = Criterion(plan.config, plan.recipe.points)
        self.network: nn.Module = state.model
        if process()[1] > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(state.model, device_ids=devices)

    def __call__(self, iteration: int, batches: Iterator[Examples]) -> dict[str, Tensor]:
        """Raises NotFiniteError with the batch's names, before any weight has changed."""
        recipe, optimiser = self.plan.recipe, self.state.optimiser
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * group["scale"] * recipe.rate(iteration)
        optimiser.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        names: list[str] = []
        for number in range(recipe.accumulate):
            examples = next(batches)
            names += examples.names
            for name, term in self._pass(examples, iteration, number).items():
                totals[name] = totals.get(name, torch.zeros_like(term)) + term / recipe.accumulate
        self._update(iteration, names)
        return totals

    def losses(self, examples: Examples, seed: int) -> dict[str, Tensor]:
        """Every weighted loss of one batch, as scalars."""
        queries = self.plan.config.queries
        torch.manual_seed(seed)  # dropout and the points of the mask losses
        images = normalise(examples.images.to(self.device))
        images = images.contiguous(memory_format=layout(self.device))
        targets = [truth.to(self.device) for truth in examples.targets]
        centres = None
        if self.plan.config.seeds == "peaks":
            generator = torch.Generator().manual_seed(seed)
            centres = seed_centres(targets, queries, generator)
        amp = self.plan.amp
        with torch.autocast(self.device.type, AMP[amp], enabled=amp != "off"):
            output = self.network(images, training_outputs=True, centres=centres)
        count = float(sum(min(len(t.ranks), queries) for t in targets))
        objects = mean(torch.tensor(count, device=self.device))
        terms = self.criterion(output, images, targets, objects=objects)
        return {name: term.sum() for name, term in terms.items()}

    def _pass(self, examples: Examples, iteration: int, number: int) -> dict[str, Tensor]:
        """Add the gradients of one batch → its losses."""
        accumulate = self.plan.recipe.accumulate
        with self._exchange_if(last=number == accumulate - 1):
            terms = self.losses(examples, mix(self.plan.seed, iteration, number, process()[0]))
            loss = torch.stack(list(terms.values())).sum()
            self._stop_unless_finite("loss", loss, iteration, examples.names)
            self.state.scaler.scale(loss / accumulate).backward()
        return {name: term.detach() for name, term in terms.items()}

    def _update(self, iteration: int, names: list[str]) -> None:
        """Change the weights by the gradients, and the averaged weights after them."""
        state, scaler = self.state, self.state.scaler
        scaler.unscale_(state.optimiser)
        norm = nn.utils.clip_grad_norm_(state.model.parameters(), self.plan.recipe.clip)
        if self.plan.amp != "fp16":  # with fp16 the scaler skips such a step and lowers its scale
            self._stop_unless_finite("gradient", norm, iteration, names)
        scaler.step(state.optimiser)
        scaler.update()
        if state.average is not None:
            follow(state.average, state.model, self.plan.recipe.decay(iteration))

    def _exchange_if(self, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients in the last pass of a step only."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _stop_unless_finite(
        self, what: str, value: Tensor, iteration: int, names: list[str]
    ) -> None:
        """NotFiniteError on every process when the value is not finite on one."""
        if not mean((~torch.isfinite(value.detach())).float()):
            return
        found = enumerate(gather((value.item(), names)))
        bad = [
            f"{v} on process {r} for {', '.join(n)}" for r, (v, n) in found if not np.isfinite(v)
        ]
        precision = "" if self.plan.amp == "off" else ", or train without mixed precision"
        raise NotFiniteError(
            f"the {what} of iteration {iteration + 1} is not finite: {'; '.join(bad)}. The "
            f"checkpoints in {self.out} are from before it. Look at these images and their "
            f"annotations{precision}."
        )


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 - decay) · model, buffers included."""
    for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)
