"""Let the stages of a video work at the same time, in order and in bounded memory.

OpenCV, PyAV and the inference libraries all leave the interpreter lock while they work, so threads
suffice: `ahead` reads before it is asked, `Behind` writes after it was told.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
WAIT_S = 0.05  # how often a waiting thread looks whether it is still wanted
LEAVE_S = 2.0  # a thread that hangs in a dead stream's read is left behind


class _End:
    """Follows the last item; error: what ended it early."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def ahead(items: Iterator[Item], size: int) -> Generator[Item, None, None]:
    """The same items in the same order, up to `size` of them made beforehand in a thread.

    An error comes after the items before it. When the caller stops, so does the thread; a
    generator is closed there.
    """
    queue: Queue[Item | _End] = Queue(size)
    unwanted = Event()

    def put(item: Item | _End) -> bool:
        while not unwanted.is_set():
            try:
                queue.put(item, timeout=WAIT_S)
                return True
            except Full:
                continue
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

    thread = Thread(target=work, name="dsgnn-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        thread.join(LEAVE_S)


class Behind(AbstractContextManager["Behind[Item]"], Generic[Item]):
    """Handle items in a thread, in order, at most `size` of them waiting.

    Used in a `with` block; when it is left, on an error or Ctrl-C too, what was put is handled
    first. An error of `handle` is raised by the next `put`, or when the block is left (in place of
    a Ctrl-C: what was written is then not whole); what was put after the failed item is dropped.
    """

    def __init__(self, handle: Callable[[Item], None], size: int) -> None:
        self._handle = handle
        self._queue: Queue[Item | _End] = Queue(size)
        self._failed: BaseException | None = None
        self._thread = Thread(target=self._work, name="dsgnn-behind", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand an item over; waits while the queue is full."""
        if self._failed is not None:
            raise self._failed
        self._queue.put(item)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
