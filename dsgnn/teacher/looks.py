"""Predicted looks that are computed once for each photo and kept on disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from dsgnn.data.ranks import PredictLooks
from dsgnn.runtime.artifact import open_artifact, sha256_of
from dsgnn.runtime.disk.files import whole_file
from dsgnn.runtime.errors import CheckpointError


def looks_of(path: Path, folder: Path | None = None) -> PredictLooks:
    """What predicts looks with the weights in a file: a teacher, or an artifact with attention.

    path: what `dsgnn.teacher` trained, or an ONNX file such as the bundled model, which needs no
    PyTorch. folder: keeps the predictions, each named after the photo's pixels and the weights;
    None = they are not kept. Raises CheckpointError for an artifact without attention, and what
    opening the file raises.
    """
    predict: PredictLooks
    if path.suffix == ".onnx":
        predict = ArtifactLooks(path)
    else:
        from dsgnn.teacher.network import load_teacher

        predict = load_teacher(path).predict
    return predict if folder is None else KeptLooks(predict, folder / sha256_of(path)[:16])


class ArtifactLooks:
    """`PredictLooks` by the attention of an exported network.

    Each process opens the artifact for itself when it is first asked: an inference library does not
    survive the fork of a process that prepares images.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._process = path, 0
        if not open_artifact(path).description.attention:
            raise CheckpointError(f"{path} has no attention, so it cannot tell where people look")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image: (h, w, 3) uint8 RGB → (gh, gw) float32, sum 1."""
        if self._process != os.getpid():
            from dsgnn.runtime.ranker import Ranker

            self._ranker, self._process = Ranker(self.path, threads=1), os.getpid()
        attention = self._ranker(image).attention
        assert attention is not None  # the description says so
        return attention


class KeptLooks:
    """`PredictLooks` with a memory on disk, in half precision.

    predict: asked about each photo once. folder: made if missing; several processes may share it.
    """

    def __init__(self, predict: PredictLooks, folder: Path) -> None:
        self.predict, self.folder = predict, folder

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image: (h, w, 3) uint8 RGB → (gh, gw) float32, sum 1."""
        shape = np.array(image.shape, np.int64).tobytes()
        name = hashlib.sha256(shape + np.ascontiguousarray(image).tobytes()).hexdigest()
        path = self.folder / name[:2] / f"{name}.npy"
        if not path.is_file():
            looks = self.predict(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as part, part.open("wb") as file:
                np.save(file, (looks / looks.max()).astype(np.float16))
        looks = np.load(path).astype(np.float32)
        return looks / looks.sum()
