"""What a training run resumes from: made afresh, or read from the run's folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsgnn.model import DSGNN, build_model
from dsgnn.runtime.disk.files import claimed, whole_file, write_whole
from dsgnn.runtime.errors import CheckpointError, OptionError
from dsgnn.training.parallel import gather, process
from dsgnn.training.recipe import TrainingPlan, parameter_groups
from dsgnn.weights.checkpoint import save_checkpoint
from dsgnn.weights.pretrained import initialise

STATE_FILE, STATE_BEFORE = "state.pt", "state.before.pt"
LAST, BEST = "last.safetensors", "best.safetensors"
log = logging.getLogger("dsgnn")


@dataclass
class TrainingState:
    """What a run continues from.

    model: the network that is trained. average: the running average of its weights, where the
    recipe keeps one. facts: `TrainingPlan.facts`, which must not change on the way. iteration: how
    many are done. best_sa_sor: the highest on the validation split so far.
    """

    model: DSGNN
    average: DSGNN | None
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    facts: dict[str, Any]
    iteration: int = 0
    best_sa_sor: float = -np.inf

    @property
    def kept(self) -> DSGNN:
        """The weights that are evaluated and saved."""
        return self.average or self.model

    def save(self, out: Path, origin: str = "") -> None:
        """Write state.pt and last.safetensors, each whole or not at all.

        The state.pt that was there stays as state.before.pt. origin: see `save_checkpoint`.
        """
        content = {name: part.state_dict() for name, part in self._parts().items()}
        content |= {"run": self.facts, "iteration": self.iteration, "best": self.best_sa_sor}
        with whole_file(out / STATE_FILE) as file:
            torch.save(content, file)
            if (out / STATE_FILE).exists():
                os.replace(out / STATE_FILE, out / STATE_BEFORE)
        save_checkpoint(out / LAST, self.kept, origin=origin)

    def load(self, out: Path) -> None:
        """Take over the state of the run in `out`, which may be extended to more iterations.

        Raises OptionError when its plan is another one, and CheckpointError when its file is
        damaged.
        """
        content = _read_state(out)
        changed = list(_differences(content["run"], self.facts))
        iterations = content["run"]["recipe"]["iterations"]
        extended = self.facts["recipe"]["iterations"] > iterations
        if extended:
            changed = [text for text in changed if not text.startswith("recipe.iterations ")]
        if changed:
            raise OptionError(
                f"{out} cannot be resumed with other settings ({'; '.join(changed)}): resume it "
                f"with the same ones, or start another run from the weights {out / LAST}",
                "resume",
                "initial_weights",
            )
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self.iteration, self.best_sa_sor = content["iteration"], content["best"]
        if extended and process()[0] == 0:
            log.warning(
                "%s is extended from %d to %d iterations; the schedule of what is left is that of "
                "the longer run",
                out,
                iterations,
                self.facts["recipe"]["iterations"],
            )

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimiser": self.optimiser, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})


def start(
    plan: TrainingPlan,
    out: Path,
    device: torch.device,
    initial_weights: Path | None = None,
    resume: bool = False,
) -> TrainingState:
    """The state of the run in `out` where it is resumed, and a fresh one otherwise.

    initial_weights: what a fresh state starts from, see `dsgnn.weights.pretrained`. Raises
    OptionError when `out` holds a run that is not to be resumed, or one with another plan, and
    when a part of the network that is not trained would start from random weights; CheckpointError
    for weights or a state that cannot be used.
    """
    found = any((out / name).is_file() for name in (STATE_FILE, STATE_BEFORE))
    if found and not resume:
        raise OptionError(
            f"{out} holds a run already: resume it, or choose another folder", "resume", "out"
        )
    if plan.config.frozen and not found and initial_weights is None:
        raise OptionError(
            f"{plan.config.name} does not train {', '.join(plan.config.frozen)} of its backbone, "
            "which would stay random: give weights to start from, such as those of a classifier "
            "with this backbone",
            "initial_weights",
        )
    state = _fresh(plan, device)
    if found:
        state.load(out)
    if len(starts := set(gather(state.iteration))) > 1:
        raise OptionError(
            f"the processes found runs at iterations {sorted(starts)} in {out}: the run's folder "
            "must be one that all machines share",
            "out",
        )
    if not found:
        _begin(state, plan, out, initial_weights, resume)
    return state


def _fresh(plan: TrainingPlan, device: torch.device) -> TrainingState:
    """Random weights, the same ones for the same seed."""
    torch.manual_seed(plan.seed)
    model = build_model(plan.config).to(device).to(memory_format=layout(device)).train()
    return TrainingState(
        model,
        build_model(plan.config).to(device) if plan.recipe.ema else None,
        torch.optim.AdamW(parameter_groups(model, plan.recipe), betas=(0.9, 0.999)),
        torch.amp.GradScaler(device.type, enabled=plan.amp == "fp16"),
        plan.facts(process()[1]),
    )


def _begin(
    state: TrainingState, plan: TrainingPlan, out: Path, initial_weights: Path | None, resume: bool
) -> None:
    """Load the weights that a new run starts from, and make its folder."""
    report = initialise(state.model, initial_weights) if initial_weights else None
    if state.average is not None:
        state.average.load_state_dict(state.model.state_dict())
    if process()[0] != 0:
        return
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        log.warning("%s: there is no run to resume here yet, so one is started", out)
    if report:
        log.warning("%s", report)
        with claimed(out):
            write_whole(out / "init.json", json.dumps(asdict(report), indent=1).encode())


def _read_state(out: Path) -> dict[str, Any]:
    """What `TrainingState.save` wrote. Raises CheckpointError that says what can be done."""
    path, before = out / STATE_FILE, out / STATE_BEFORE
    why = "it is not there"
    if path.is_file():
        try:
            # To the CPU: the parts move to their device what belongs there, AdamW's counters do not
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        else:
            if isinstance(content, dict) and {"model", "run", "iteration", "best"} <= set(content):
                return content
            why = "it is not the state of a run"
    rest = f"or start another run from the weights {out / LAST}"
    if before.is_file():
        rest = f"rename {before} to {path.name} to go on from the state before it, {rest}"
    raise CheckpointError(f"{path} is damaged and cannot be resumed ({why}): {rest}")


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], path: str = ""
) -> Iterator[str]:
    """Each single value that is not what it was: "recipe.batch was 2, now 4"."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{path}{name}.")
        elif old != new:
            yield f"{path}{name} was {old}, now {new}"


def layout(device: torch.device) -> torch.memory_format:
    """The memory format to train in: channels_last, which is faster, but not on CPUs.

    There the gradient of a 1 × 1 convolution of stride 2, which every ResNet has, is computed
    outside its memory in that format, which ends the process (PyTorch 2.14 with one thread or two
    on an AMD EPYC, and 2.15 with two on an Intel Xeon; see also pytorch#136348).
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last
