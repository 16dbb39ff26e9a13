"""What a training run resumes from: made afresh, or read from the run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsgnn.config import Config
from dsgnn.model import DSGNN, build_model
from dsgnn.runtime.disk.files import whole_file, write_whole
from dsgnn.training.parallel import gather, process
from dsgnn.training.recipe import Recipe, parameter_groups
from dsgnn.weights.checkpoint import save_checkpoint
from dsgnn.weights.pretrained import initialise

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
log = logging.getLogger("dsgnn")


@dataclass
class State:
    """What a run continues from. run: facts that must not change on the way. best: SA-SOR."""

    model: DSGNN
    average: DSGNN | None
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    run: dict[str, Any]
    iteration: int = 0
    best: float = -np.inf

    @property
    def kept(self) -> DSGNN:
        """The weights that are evaluated and saved."""
        return self.average or self.model

    def save(self, out: Path) -> None:
        """Write state.pt and last.safetensors, each whole or not at all."""
        content = {name: part.state_dict() for name, part in self._parts().items()}
        content |= {"run": self.run, "iteration": self.iteration, "best": self.best}
        with whole_file(out / "state.pt") as part:
            torch.save(content, part)
        save_checkpoint(out / "last.safetensors", self.kept)

    def load(self, out: Path) -> None:
        """ValueError when the run in `out` had another configuration, recipe, seed, …"""
        # To the CPU: the parts move to their device what belongs there, AdamW's counters do not.
        content = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        changed = [
            f"{name} was {content['run'].get(name)}, now {value}"
            for name, value in self.run.items()
            if content["run"].get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{out} cannot be resumed with other settings ({'; '.join(changed)}): resume with "
                f"the same ones, or start another run with --init {out / 'last.safetensors'}"
            )
        for name, part in self._parts().items():
            part.load_state_dict(content[name])
        self.iteration, self.best = content["iteration"], content["best"]

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimiser": self.optimiser, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})


def start(
    config: Config, recipe: Recipe, out: Path, init: Path | None, resume: bool, amp: str, seed: int,
    device: torch.device, data: Mapping[str, Any] | None = None,
) -> State:  # fmt: skip
    """A fresh state, with weights from `init` if given, or that of the run in `out`.

    data: plain facts about what is trained on, which must not change on the way either.
    """
    if amp not in AMP:
        raise ValueError(f"amp must be one of {', '.join(AMP)}, got {amp!r}")
    rank, world = process()
    found = (out / "state.pt").is_file()
    if found and not resume:
        raise ValueError(f"{out} holds a run already: --resume continues it; or choose another")
    torch.manual_seed(seed)
    model = build_model(config).to(device, memory_format=layout(device)).train()
    average = build_model(config).to(device) if recipe.ema else None
    optimiser = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    facts = {"config": config.to_dict(), "recipe": asdict(recipe), "seed": seed, "amp": amp,
             "processes": world, **(data or {})}  # fmt: skip
    state = State(model, average, optimiser, scaler, json.loads(json.dumps(facts)))
    if found:
        state.load(out)
    if len(starts := set(gather(state.iteration))) > 1:
        raise ValueError(
            f"the processes found runs at iterations {sorted(starts)} in {out}: --out must be a "
            "folder that all machines share"
        )
    if found:
        return state
    report = initialise(model, init) if init else None
    if average is not None:
        average.load_state_dict(model.state_dict())
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            log.warning("%s: no run to resume here yet, starting it", out)
        if config.frozen and not report:
            log.warning(
                "%s are not trained and start from random weights: --init brings a backbone's",
                ", ".join(f"backbone.body.{name}" for name in config.frozen),
            )
        if report:
            log.warning("%s", report)
            write_whole(out / "init.json", json.dumps(asdict(report), indent=1).encode())
    return state


def layout(device: torch.device) -> torch.memory_format:
    """channels_last is faster, but training a small ResNet in it on two CPU threads ended in
    "double free or corruption" (PyTorch 2.15; one thread is fine, see also pytorch#136348)."""
    safe = device.type != "cpu" or torch.get_num_threads() == 1
    return torch.channels_last if safe else torch.contiguous_format
