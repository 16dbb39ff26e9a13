"""How steady a video's ranks are, on generated clips whose truth is known.

    python tests/runtime/steadiness.py [--clips N] [--jitter SHARE]

A clip shows ellipses that drift, cross, hide each other, enter and leave; saliencies stay, or
change places at a given time. A simulated network sees the truth through noise: saliencies jitter,
masks are shifted and grow or shrink, 3% of the objects are missed and in 3% of the frames something
is found where nothing is. Its query is the one whose part of the picture an object is in, as the
queries of such networks specialise on places; in the raw ranking the query is the only identity.

It prints identity switches per second, rank changes per second (also those of the truth itself),
SA-SOR over all frames, and how well objects are found (F1 at IoU 0.5), each raw and steadied.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dsgnn.metrics import image_metrics
from dsgnn.runtime import RankedObject, Ranking
from dsgnn.runtime.video.steady import Steadier

H, W = 90, 160
RATE = 25
SECONDS = 8
MISSED = 0.03
BLIPS = 0.03
QUERY_AT = [(20, 30), (20, 130), (70, 30), (70, 130), (45, 80)]  # (y, x)
YX = np.mgrid[:H, :W]


@dataclass(frozen=True)
class Truth:
    """One frame: masks (G, h, w) bool, their objects' numbers and saliencies."""

    masks: np.ndarray
    numbers: tuple[int, ...]
    saliency: np.ndarray


def clip(seed: int) -> list[Truth]:
    """The truth of one clip."""
    random = np.random.default_rng(seed)
    total = int(random.integers(3, 6))
    centre = random.uniform((20, 20), (H - 20, W - 20), (total, 2))
    velocity = random.uniform(-14, 14, (total, 2))  # pixels a second
    radius = random.uniform(8, 17, (total, 2))
    saliency = random.permutation(np.arange(total)).astype(float)
    swap_s = random.uniform(2, SECONDS - 2)
    swap = random.choice(total, 2, replace=False)
    enters = np.where(random.random(total) < 0.3, random.uniform(1, 4, total), 0)
    leaves = np.where(random.random(total) < 0.3, random.uniform(4, 7, total), SECONDS)
    frames = []
    for time_s in np.arange(SECONDS * RATE) / RATE:
        at = centre + velocity * time_s
        span = np.array([H - 1, W - 1])
        at = span - np.abs(np.mod(at, 2 * span) - span)  # bounces at the border
        values = saliency.copy()
        share = np.clip((time_s - swap_s) / 0.5, 0, 1)  # changes places within half a second
        values[swap] += share * (saliency[swap[::-1]] - saliency[swap])
        free = np.ones((H, W), bool)
        masks, numbers = [], []
        for number in range(total):  # the first lie in front
            offset = (YX - at[number][:, None, None]) / radius[number][:, None, None]
            mask = ((offset**2).sum(0) <= 1) & free
            free &= ~mask
            if enters[number] <= time_s < leaves[number] and mask.sum() >= 60:
                masks.append(mask)
                numbers.append(number)
        stacked = np.array(masks, bool).reshape(-1, H, W)
        frames.append(Truth(stacked, tuple(numbers), values[np.array(numbers, int)]))
    return frames


def seen(truth: Truth, random: np.random.Generator, jitter: float) -> Ranking:
    """What a noisy network makes of a frame. jitter: of saliencies whose steps are 1."""
    found = []
    for mask, value in zip(truth.masks, truth.saliency, strict=True):
        if random.random() >= MISSED:
            found.append((_worn(mask, random), value + random.normal(0, jitter)))
    if random.random() < BLIPS:
        y, x = random.uniform(10, H - 10), random.uniform(10, W - 10)
        blip = ((YX[0] - y) ** 2 + (YX[1] - x) ** 2) <= 64
        found.append((blip, random.uniform(0, 4)))
    found.sort(key=lambda pair: -pair[1])
    queries = list(range(len(QUERY_AT)))
    objects = []
    for mask, value in found[: len(QUERY_AT)]:
        ys, xs = np.nonzero(mask)
        far = [np.hypot(QUERY_AT[q][0] - ys.mean(), QUERY_AT[q][1] - xs.mean()) for q in queries]
        query = queries.pop(int(np.argmin(far)))
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append(
            RankedObject(len(objects) + 1, value, 0.9, box, mask, len(ys) / (H * W), query, query)
        )
    return Ranking(H, W, tuple(objects))


def _worn(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shifted by up to a pixel, and up to a pixel larger or smaller."""
    moved = np.roll(mask, random.integers(-1, 2, 2), (0, 1))
    sides = [np.roll(moved, shift, axis) for shift in (-1, 1) for axis in (0, 1)]
    worn = (moved.copy(), np.any([moved, *sides], 0), np.all([moved, *sides], 0))
    return worn[int(random.integers(3))]


@dataclass
class Tally:
    """What was counted over clips."""

    seconds: float = 0.0
    switches: int = 0
    changes: int = 0
    true_changes: int = 0
    found: int = 0
    wanted: int = 0
    shown: int = 0
    sa_sor: list[float] = field(default_factory=list)

    def add(self, truths: list[Truth], rankings: list[Ranking]) -> None:
        identity: dict[int, int | None] = {}
        rank: dict[int, int] = {}
        true_rank: dict[int, int] = {}
        self.seconds += len(truths) / RATE
        for truth, ranking in zip(truths, rankings, strict=True):
            own = (-truth.saliency).argsort().argsort() + 1
            for number, place in zip(truth.numbers, own.tolist(), strict=True):
                self.true_changes += true_rank.get(number, place) != place
                true_rank[number] = place
            masks = np.array([item.mask for item in ranking.objects], bool).reshape(-1, H, W)
            scores = np.array([-item.rank for item in ranking.objects], float)
            values = image_metrics(truth.masks, len(own) + 1 - own, masks, scores, "official")
            self.wanted += values["objects"]
            self.shown += values["predictions"]
            self.found += values["matched"]
            if values["sa_sor"] is not None:
                self.sa_sor.append(values["sa_sor"])
            for number, index in _matches(truth.masks, masks):
                item = ranking.objects[index]
                key = truth.numbers[number]
                self.switches += identity.get(key, item.identity) != item.identity
                self.changes += rank.get(key, item.rank) != item.rank
                identity[key], rank[key] = item.identity, item.rank

    def figures(self) -> dict[str, float]:
        return {
            "identity switches per second": self.switches / self.seconds,
            "rank changes per second": self.changes / self.seconds,
            "true rank changes per second": self.true_changes / self.seconds,
            "SA-SOR": float(np.mean(self.sa_sor)),
            "F1": 2 * self.found / (self.wanted + self.shown),
        }


def _matches(truth: np.ndarray, found: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (true object, found object) whose IoU is over a half.

    An object has at most one such partner, unless found masks overlap; then the first is taken.
    """
    for number, mask in enumerate(truth):
        for index, other in enumerate(found):
            if (mask & other).sum() > 0.5 * (mask | other).sum():
                yield number, index
                break


def measure(clips: int, jitter: float = 0.5) -> tuple[dict[str, float], dict[str, float]]:
    """Figures over that many clips: (raw, steadied)."""
    raw, steady = Tally(), Tally()
    for seed in range(clips):
        truths = clip(seed)
        random = np.random.default_rng(1000 + seed)
        rankings = [seen(truth, random, jitter) for truth in truths]
        steadier = Steadier()
        steadied = [steadier(ranking, i / RATE) for i, ranking in enumerate(rankings)]
        raw.add(truths, rankings)
        steady.add(truths, steadied)
    return raw.figures(), steady.figures()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--jitter", type=float, default=0.5)
    options = parser.parse_args()
    raw, steady = measure(options.clips, options.jitter)
    print(f"{options.clips} clips of {SECONDS} s, saliency noise {options.jitter} of a step")
    for name, value in raw.items():
        print(f"{name:30} raw {value:7.3f}  steadied {steady[name]:7.3f}")


if __name__ == "__main__":
    main()
