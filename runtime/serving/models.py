"""Which models a server runs, and where: in its own process, or as processes of Ray Serve."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dsgnn.runtime.errors import OptionError
from dsgnn.runtime.ranker import BUNDLED, model_path
from dsgnn.runtime.serving.app import ServeLimits, Workers
from dsgnn.runtime.serving.replicas import name_for, need, replicas
from dsgnn.runtime.serving.worker import PhotoWorker


def parse_models(texts: Sequence[str]) -> dict[str, Path | None]:
    """The files of models by their names, from texts such as "small=nano.onnx" or "nano.onnx".

    A model without a name has that of its file without the suffix. With no text, and for "nano", it
    is the bundled model, whose file is None. Raises OptionError for a name that is empty or given
    twice, and ArtifactError for a checkpoint.
    """
    models: dict[str, Path | None] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not separator or Path(text).exists():
            name, file = Path(text).stem, text
        if not name or not file:
            raise OptionError(f"expected a model as NAME=FILE or FILE, got {text!r}")
        if name in models:
            raise OptionError(f"two models have the name {name}: give them as NAME=FILE")
        path = model_path(file)
        models[name] = None if path == BUNDLED else path.absolute()
    return models or {BUNDLED.stem: None}


@contextmanager
def running(
    models: Mapping[str, Path | None],
    options: Mapping[str, Any],
    limits: ServeLimits,
    bound: socket.socket,
    count: int,
    batch: int | None,
    address: str | None,
) -> Iterator[Mapping[str, Workers]]:
    """Run the workers of each model until the block ends.

    options: the arguments of Ranker beside the model. bound: where the server listens. count:
    replicas of each model. batch: see PhotoWorker. address: of a Ray cluster, see
    `replicas.replicas`. With None everything runs in this process, unless several replicas need a
    GPU each: these are processes of a Ray that is started here.

    Raises DsgnnError or OSError for a model that cannot be loaded, or workers that do not fit.
    """
    rankers = {name: {**options, "model": file} for name, file in models.items()}
    if address is None and count > 1 and any(need(ranker)[1] for ranker in rankers.values()):
        address = "local"
    with ExitStack() as stack:
        if address is not None:
            yield stack.enter_context(
                replicas(rankers, limits, count, batch, address, name_for(bound))
            )
        else:
            here: dict[str, Workers] = {}
            for name, ranker in rankers.items():
                worker = PhotoWorker(ranker, batch, limits.max_pixels, count)
                stack.callback(worker.close)
                here[name] = worker
            yield here
