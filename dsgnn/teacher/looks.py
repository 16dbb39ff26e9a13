"""Predicted looks that are computed once for each photo and kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dsgnn.data.ranks import PredictLooks
from dsgnn.runtime.disk.files import whole_file
from dsgnn.runtime.errors import CheckpointError


def looks_of(path: Path, folder: Path) -> PredictLooks:
    """What predicts looks with the weights in a file: a teacher, or an artifact with attention.

    path: what `dsgnn.teacher` trained, or an ONNX file such as the bundled model. folder: keeps
    the predictions, each named after the photo's pixels and the weights. Raises CheckpointError
    for an artifact without attention, and what opening the file raises.
    """
    if path.suffix == ".onnx":
        from dsgnn.runtime.ranker import Ranker

        ranker = Ranker(path)
        if not ranker.artifact.description.attention:
            raise CheckpointError(f"{path} has no attention, so it cannot tell where people look")

        def predict(image: np.ndarray) -> np.ndarray:
            attention = ranker(image).attention
            assert attention is not None
            return attention

        return KeptLooks(predict, folder / ranker.artifact.sha256[:16])
    from dsgnn.runtime.artifact import sha256_of
    from dsgnn.teacher.network import load_teacher

    return KeptLooks(load_teacher(path).predict, folder / sha256_of(path)[:16])


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
