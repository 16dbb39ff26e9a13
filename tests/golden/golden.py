"""The published network with synthetic weights, and what it computed from them.

Every parameter is a pure function of its name, shape and seed, so no published weights are needed.
The arrays and numbers beside this file come from the published implementation (CPU, float32).
`forward_swinl_assr_2.npz` has no `input`: the other files hold preprocessing.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from synthetic_weights import synthetic_parameter

from dsgnn.model import DSGNN, build_model
from dsgnn.weights.checkpoint import load_upstream

HERE = Path(__file__).parent


def shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Upstream name → shape of every entry of a published checkpoint."""
    stored = json.loads((HERE / "parameters.json").read_text())
    return {name: tuple(shape) for name, shape in stored[config].items()}


def upstream_state(config: str, seed: int) -> dict[str, torch.Tensor]:
    """A published checkpoint's state_dict with the synthetic weights of `seed`."""
    return {
        name: torch.from_numpy(np.asarray(synthetic_parameter(name, shape, seed)))
        for name, shape in shapes(config).items()
        if not name.endswith("relative_position_index")  # computed
    }


@lru_cache(maxsize=2)
def published_model(config: str, seed: int) -> DSGNN:
    """Our network with those weights, eval mode. Shared between tests: leave it as it is."""
    model = build_model(config)
    load_upstream(model, upstream_state(config, seed))
    return model


def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file here."""
    with np.load(HERE / f"{name}.npz") as file:
        return dict(file)
