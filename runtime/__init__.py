"""Rank the salient objects of photos and video; needs no PyTorch.

from dsgnn.runtime import Ranker
ranking = Ranker()("photo.jpg")
for item in ranking:
    print(item.rank, item.box, item.area)
for frame, ranking in Ranker().stream("clip.mp4"):
    print([item.identity for item in ranking])
"""

from pathlib import Path

from dsgnn.runtime.images import read_image
from dsgnn.runtime.ranker import Ranker
from dsgnn.runtime.ranking import RankedObject, Ranking

__all__ = ["RankedObject", "Ranker", "Ranking", "read_image", "samples"]


def samples() -> list[Path]:
    """The sample photos that come with the package, by name; `samples/README.md` credits them."""
    return sorted((Path(__file__).parent / "samples").glob("*.jpg"))
