"""Let the stages of a video work at the same time, in order and in bounded memory.

OpenCV, PyAV and the inference libraries all release the interpreter lock while they work, so
threads suffice. `read_ahead` produces items before they are asked for, and `WriteBehind` handles
items after they were handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, suppress
from queue import Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")
WAIT_S = 0.05  # how often a waiting thread checks whether it is still wanted
LEAVE_S = 2.0  # a thread that hangs while it reads a dead stream is abandoned after this time


class _End:
    """Put into the queue after the last item. error: what ended the items early, if anything."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def read_ahead(items: Iterator[Item], size: int) -> Generator[Item, None, None]:
    """Yield the same items in the same order, up to `size` of them read in advance by a thread.

    An error of `items` is raised after the items that came before it. Closing this generator ends
    the thread, and the thread closes `items` if that is a generator.
    """
    queue: Queue[Item | _End] = Queue(size)
    unwanted = Event()

    def put(item: Item | _End) -> bool:
        while not unwanted.is_set():
            with suppress(Full):
                queue.put(item, timeout=WAIT_S)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    break
            put(_End())
        except BaseException as error:
            put(_End(error))
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = Thread(target=work, name="dsgnn-read-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        thread.join(LEAVE_S)


class WriteBehind(AbstractContextManager["WriteBehind[Item]"], Generic[Item]):
    """Handle items in a thread, in order, with at most `size` of them waiting.

    It is used in a `with` block. When the block is left, everything that was put is handled first;
    this holds for an error and for Ctrl-C too. An error of `handle` is raised by the next `put`, or
    else when the block is left. There it takes the place of a Ctrl-C, because what was written is
    not whole. Items that were put after the failed one are dropped.
    """

    def __init__(self, handle: Callable[[Item], None], size: int) -> None:
        self._handle = handle
        self._queue: Queue[Item | _End] = Queue(size)
        self._failed: BaseException | None = None
        self._thread = Thread(target=self._work, name="dsgnn-write-behind", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand an item over, and wait while the queue is full."""
        if self._failed is not None:
            raise self._failed
        self._queue.put(item)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._queue.put(_End())
        self._thread.join()
        if self._failed is not None and self._failed is not error:
            raise self._failed

    def _work(self) -> None:
        while not isinstance(item := self._queue.get(), _End):
            if self._failed is None:
                try:
                    self._handle(item)
                except BaseException as error:
                    self._failed = error
