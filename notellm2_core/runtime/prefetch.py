"""Prefetching: a thread makes the next item while the caller uses the current one."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """The items of an iterable, each made one ahead in a thread.

    An exception of the iterable is raised in place of the item that failed.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.seconds_waited = 0.0  # how long the caller waited for the current item
        self._items = items

    def __iter__(self) -> Iterator[T]:
        items, end = iter(self._items), object()
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            next_item = thread.submit(next, items, end)
            while True:
                start = time.monotonic()
                item = next_item.result()
                self.seconds_waited = time.monotonic() - start
                if item is end:
                    return
                next_item = thread.submit(next, items, end)
                yield item  # type: ignore[misc]  # not the end
