"""Making things before they are asked for."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterable[T], waited: list[float] | None = None) -> Iterator[T]:
    """`items`, the next of which is made in a thread while the caller is busy with one.

    `waited`: gets the seconds that the caller had to wait for each.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, source, end)
        while True:
            start = time.monotonic()
            item = coming.result()
            if waited is not None:
                waited.append(time.monotonic() - start)
            if item is end:
                return
            coming = thread.submit(next, source, end)
            yield item  # type: ignore[misc]  # not the end
