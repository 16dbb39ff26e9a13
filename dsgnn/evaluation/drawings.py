"""The worst predictions of an evaluation, drawn beside the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dsgnn.data.records import Samples
from dsgnn.evaluation.rankers import Rank, truth
from dsgnn.runtime.disk.files import write_whole


def draw_worst(
    folder: Path, rank: Rank, samples: Samples, images: Sequence[Mapping[str, Any]], count: int
) -> None:
    """Draw the images of lowest SA-SOR: the truth on the left, the prediction on the right.

    images: what `measure` gave. count: at most so many are drawn.
    """
    ranked = [i for i, image in enumerate(images) if image["sa_sor"] is not None]
    ranked.sort(key=lambda i: images[i]["sa_sor"])
    for place, index in enumerate(ranked[:count], start=1):
        folder.mkdir(exist_ok=True)
        sample = samples[index]
        pictures = [truth(sample).draw(sample.image), rank(sample).draw(sample.image)]
        captions = ["truth", f"predicted: SA-SOR {images[index]['sa_sor']:.2f}"]
        bars = []
        for picture, caption in zip(pictures, captions, strict=True):
            bar = np.full((24, picture.shape[1], 3), 24, np.uint8)
            cv2.putText(bar, caption, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255,) * 3, 1)
            bars.append(np.vstack([bar, picture]))
        both = cv2.cvtColor(np.hstack(bars), cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", both)[1].tobytes()
        write_whole(folder / f"{place:02d}-{sample.name.replace('/', '-')}.jpg", data)
