"""Stages that work at the same time: order, bounds, errors, and an end."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dsgnn.runtime.video.pipeline import WriteBehind, read_ahead


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    return true()


def test_ahead_keeps_the_order() -> None:
    assert list(read_ahead(iter(range(100)), 3)) == list(range(100))
    assert list(read_ahead(iter([]), 3)) == []


def test_ahead_works_before_it_is_asked_but_not_too_far() -> None:
    made = []

    def make() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = read_ahead(make(), 3)
    assert next(items) == 0
    assert eventually(lambda: len(made) == 5)  # taken, 3 waiting, and one in hand
    time.sleep(0.1)
    assert len(made) == 5
    items.close()


def test_an_error_comes_after_the_items_before_it() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise ZeroDivisionError

    got = []
    with pytest.raises(ZeroDivisionError):
        for item in read_ahead(make(), 5):
            got.append(item)
    assert got == [1, 2]


def test_leaving_ends_the_thread_and_the_generator() -> None:
    closed = threading.Event()

    def make() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = read_ahead(make(), 2)
    assert next(items) == 1
    items.close()
    assert closed.is_set()
    assert eventually(lambda: all(t.name != "dsgnn-read-ahead" for t in threading.enumerate()))


def test_behind_handles_all_in_order_before_it_is_left() -> None:
    done = []

    def handle(item: int) -> None:
        time.sleep(0.002)
        done.append(item)

    with WriteBehind(handle, 2) as behind:
        for number in range(30):
            behind.put(number)
    assert done == list(range(30))
    with pytest.raises(KeyboardInterrupt), WriteBehind(handle, 9) as behind:
        behind.put(30)
        raise KeyboardInterrupt
    assert done[-1] == 30


def test_behind_is_bounded() -> None:
    go = threading.Event()
    put = []
    with WriteBehind(lambda item: go.wait(10), 2) as behind:

        def fill() -> None:
            for number in range(6):
                behind.put(number)
                put.append(number)

        filler = threading.Thread(target=fill)
        filler.start()
        assert eventually(lambda: len(put) == 3)  # one in hand, 2 waiting
        time.sleep(0.1)
        assert len(put) == 3
        go.set()
        filler.join()


def test_an_error_of_behind_comes_out() -> None:
    done = []

    def handle(item: int) -> None:
        if item == 1:
            raise OSError("full")
        done.append(item)

    with pytest.raises(OSError, match="full"), WriteBehind(handle, 2) as behind:
        for number in range(50):
            behind.put(number)
    assert done == [0]
    with pytest.raises(OSError, match="full"), WriteBehind(handle, 2) as behind:
        behind.put(1)  # known only when the block is left
    with pytest.raises(OSError, match="full"), WriteBehind(handle, 2) as behind:
        behind.put(1)
        raise KeyboardInterrupt
