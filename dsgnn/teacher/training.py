"""Training the gaze network on people's fixations, and how well a map agrees with them.

Each photo's target is the density of the fixations of all its viewers, blurred by about one degree
of visual angle; the loss is the Kullback-Leibler divergence from it. What the frozen stages make of
each photo and of its mirror image is computed once and kept in half precision. The weights that
count are an exponential moving average of those that are trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dsgnn.data.gaze import GazePhoto, density, read_gaze
from dsgnn.model import normalise
from dsgnn.runtime.errors import DataError, OptionError
from dsgnn.teacher.network import GazeConfig, GazeNetwork, Teacher, resize, save_teacher
from dsgnn.training.step import follow
from dsgnn.weights.pretrained import initialise


@dataclass(frozen=True)
class GazeRecipe:
    """How one gaze network is trained.

    passes: over the training photos. batch: photos per step. learning_rate: of the readout, at its
    highest; it rises over half a pass and falls along a cosine. backbone_rate: the same of the
    backbone's trained stages. weight_decay: of AdamW. blur: the Gaussian's standard deviation as a
    part of the photo's longest side. average: decay of the moving average. clip: of the gradient's
    norm.
    """

    passes: int
    batch: int = 8
    learning_rate: float = 1e-3
    backbone_rate: float = 2e-4
    weight_decay: float = 1e-2
    blur: float = 0.029
    average: float = 0.99
    clip: float = 1.0


@dataclass(frozen=True)
class Prepared:
    """Photos of one size, ready for `GazeNetwork.read`.

    features: (N, 2, C, h, w) float16 of each photo and of its mirror image. targets: (N, h, w)
    float32, the density of looks. sources: (N,) int64, places in the configuration's sources.
    """

    features: Tensor
    targets: Tensor
    sources: Tensor


def prepare(network: GazeNetwork, photos: Sequence[GazePhoto], blur: float) -> Prepared:
    """Read the photos and run the frozen stages on them.

    Raises DataError when there is none, when they differ in size after resizing, or when one is
    from a source that the network does not know.
    """
    if not photos:
        raise DataError("there is no photo to prepare; does the folder hold the training split?")
    sources = network.config.sources
    unknown = sorted({photo.source for photo in photos} - set(sources))
    if unknown:
        raise DataError(
            f"unknown sources {', '.join(unknown)}; the network has {', '.join(sources)}"
        )
    features: list[Tensor] = []
    targets: list[Tensor] = []
    network.eval()
    for photo in photos:
        image = resize(photo.read(), network.config.size)
        pixels = normalise(torch.from_numpy(image)[None]).to(memory_format=torch.channels_last)
        maps = network.features(torch.cat([pixels, pixels.flip(3)]))
        if features and maps.shape != features[0].shape:
            raise DataError(
                f"{photo.path.name} has {photo.width}×{photo.height} pixels, others have another "
                "shape: train on photos of one shape"
            )
        features.append(maps.half())
        gh, gw = maps.shape[-2:]
        targets.append(torch.from_numpy(density(photo, (gh, gw), blur * max(gh, gw))))
    places = torch.tensor([sources.index(photo.source) for photo in photos])
    return Prepared(torch.stack(features), torch.stack(targets), places)


def divergence(log_prediction: Tensor, target: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each photo's prediction from its target: (B,).

    log_prediction, target: (B, h, w); the target sums to 1.
    """
    return (torch.xlogy(target, target) - target * log_prediction).sum((1, 2))


def train_network(
    config: GazeConfig,
    recipe: GazeRecipe,
    photos: Sequence[GazePhoto],
    init: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> GazeNetwork:
    """Train one gaze network and return its averaged weights, in eval mode.

    photos: those that `may_train` are learnt from; those of the validation split that are not
    marked `dev` are compared with after each pass. init: ImageNet weights for the backbone, in one
    of the forms of `dsgnn.weights.pretrained`; without, it starts from random weights. say: is
    given one line per pass. Raises DataError or CheckpointError where the photos or the weights do
    not serve.
    """
    torch.manual_seed(seed)
    network = GazeNetwork(config).to(memory_format=torch.channels_last)
    if init is not None:
        initialise(network, init)
    data = prepare(network, [photo for photo in photos if photo.may_train], recipe.blur)
    unseen = [photo for photo in photos if photo.split == "val" and not photo.dev]
    validation = prepare(network, unseen, recipe.blur)
    average = copy.deepcopy(network)
    steps_per_pass = math.ceil(len(data.sources) / recipe.batch)
    steps = recipe.passes * steps_per_pass
    optimiser = torch.optim.AdamW(_groups(network, recipe), weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: _rate(step, steps, warm_up=max(1, steps_per_pass // 2))
    )
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step, (chosen, mirrored) in enumerate(_batches(len(data.sources), recipe, generator), 1):
        loss = train_step(network, data, chosen, mirrored)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
        optimiser.step()
        schedule.step()
        follow(average, network, min(recipe.average, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % steps_per_pass == 0:
            figures = mean_divergence(average, validation)
            say(
                f"pass {step // steps_per_pass} of {recipe.passes}: divergence "
                f"{np.mean(losses[-steps_per_pass:]):.3f} in training; on validation photos "
                + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            )
    return average.eval()


def train_step(network: GazeNetwork, data: Prepared, chosen: Tensor, mirrored: Tensor) -> Tensor:
    """The mean divergence of some photos, for the gradient.

    chosen: (B,) int64, which photos. mirrored: (B,) bool, which of them as in a mirror.
    """
    network.train()
    targets = data.targets[chosen]
    targets = torch.where(mirrored[:, None, None], targets.flip(2), targets)
    features = data.features[chosen, mirrored.long()].float()
    features = features.contiguous(memory_format=torch.channels_last)
    return divergence(network.read(features, data.sources[chosen]), targets).mean()


def _batches(
    photos: int, recipe: GazeRecipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every photo once a pass, in another order each time, every second one mirrored by chance."""
    for _ in range(recipe.passes):
        for chosen in torch.randperm(photos, generator=generator).split(recipe.batch):
            yield chosen, torch.rand(len(chosen), generator=generator) < 0.5


def _groups(network: GazeNetwork, recipe: GazeRecipe) -> list[dict]:
    backbone = [p for p in network.backbone.parameters() if p.requires_grad]
    readout = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
    return [
        {"params": readout, "lr": recipe.learning_rate},
        {"params": backbone, "lr": recipe.backbone_rate},
    ]


def _rate(step: int, steps: int, warm_up: int) -> float:
    """The factor of the learning rates at a step, counted from 0."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step + 1 - warm_up) / max(1, steps - warm_up))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def mean_divergence(network: GazeNetwork, data: Prepared, batch: int = 16) -> dict[str, float]:
    """The divergence from people's looks on prepared photos: {source: mean over its photos}.

    Each prediction is the mean of those for the photo and for its mirror image.
    """
    network.eval()
    found = []
    for chosen in torch.arange(len(data.sources)).split(batch):
        places = data.sources[chosen]
        plain, mirrored = (network.read(data.features[chosen, i].float(), places) for i in (0, 1))
        prediction = (plain.exp() + mirrored.exp().flip(2)) / 2
        found.append(divergence(prediction.log(), data.targets[chosen]))
    values = torch.cat(found)
    return {
        name: float(values[data.sources == place].mean())
        for place, name in enumerate(network.config.sources)
        if (data.sources == place).any()
    }


def parse_members(texts: Sequence[str], size: int) -> list[tuple[GazeConfig, Path | None]]:
    """ "BACKBONE=FILE" of each member → its configuration at this size, and the file.

    Raises OptionError for another form or a file that is not there.
    """
    members: list[tuple[GazeConfig, Path | None]] = []
    for text in texts:
        backbone, found, file = text.partition("=")
        if not found or not Path(file).is_file():
            raise OptionError(f"{text!r} must be BACKBONE=FILE with a file that exists")
        members.append((GazeConfig(backbone=backbone, size=size), Path(file)))
    return members


def run(
    gaze: Path,
    members: Sequence[tuple[GazeConfig, Path | None]],
    recipe: GazeRecipe,
    out: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Teacher:
    """Train a teacher on a folder with `fixations.json` and write it to `out`.

    members: each network's configuration and the weights its backbone starts from. They are trained
    one after another, and `out` is written anew after each. The rest as in `train_network`.
    """
    photos = read_gaze(gaze)
    networks: list[GazeNetwork] = []
    for number, (config, init) in enumerate(members):
        say(f"network {number + 1} of {len(members)}: {config.backbone} at {config.size} pixels")
        networks.append(train_network(config, recipe, photos, init, seed + number, say))
        save_teacher(out, Teacher(networks))
    return Teacher(networks).eval()
