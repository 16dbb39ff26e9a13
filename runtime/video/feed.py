"""What every kind of video source gives: pictures with their times, until it ends or breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dsgnn.runtime.errors import InputError

DEFAULT_RATE = 25.0  # frames per second of a source that does not state its rate
KEPT = "the frames before that were ranked"  # the end of a message about what broke off


class Ended(InputError):
    """A source broke off before its end. The frames that came before are good."""


@dataclass(frozen=True, eq=False)
class Shot:
    """One frame of a source that may be asked for its picture.

    number: its number in the source, from 0. time_s: its presentation time, in seconds from the
    beginning of the source; it grows from shot to shot. duration_s: how long it is shown, as far as
    the source tells. picture: gives it as (h, w, 3) uint8 RGB, or raises Ended; it must be called
    before the next shot is taken.
    """

    number: int
    time_s: float
    duration_s: float
    picture: Callable[[], np.ndarray]


class Feed:
    """Where frames come from.

    rate: frames per second on average, as the source states it. declared: the number of frames that
    it says it has, 0 if it does not say. notes: what a person should know of what was taken; it is
    whole at the end. has_sound: whether it holds sound too.
    """

    rate: float
    declared = 0
    notes: list[str]
    has_sound = False

    def shots(self, start_s: float) -> Iterator[Shot]:
        """Give the frames in order. Some before `start_s` may be left out, and keep their numbers.

        Raises Ended where the source breaks off.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Close the source, where anything is kept open."""


def steady_shots(rate: float, pictures: Iterator[Callable[[], np.ndarray]]) -> Iterator[Shot]:
    """Shots of a source whose frames come at a constant rate, the first one at 0 s."""
    for number, picture in enumerate(pictures):
        yield Shot(number, number / rate, 1 / rate, picture)
