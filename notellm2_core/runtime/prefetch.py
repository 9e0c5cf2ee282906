"""An iterator that makes its next item before it is asked for."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of an iterable; a thread makes the next one while the caller uses the current one.

    An exception of the iterable is raised where the item that it replaces would have come.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.seconds_waited = 0.0  # that the caller waited for the current item
        self._items = items

    def __iter__(self) -> Iterator[T]:
        items, end = iter(self._items), object()
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            coming = thread.submit(next, items, end)
            while True:
                start = time.monotonic()
                item = coming.result()
                self.seconds_waited = time.monotonic() - start
                if item is end:
                    return
                coming = thread.submit(next, items, end)
                yield item  # type: ignore[misc]  # not the end
