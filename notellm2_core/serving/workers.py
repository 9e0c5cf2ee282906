"""Threads beside the event loop, with a bound on what waits for them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(RuntimeError):
    """So much waits that no more is taken."""


class Workers:
    """`num` threads; at most `max_waiting` calls wait for one."""

    def __init__(self, name: str, num: int, max_waiting: int, initializer: Callable[[], None] | None = None) -> None:
        self._name, self._most = name, num + max_waiting
        self._pool = ThreadPoolExecutor(num, name, initializer)
        self._num = 0  # calls that wait or run; only the event loop's thread counts

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """The call's result. Raises Busy."""
        if self._num >= self._most:
            raise Busy(f"too many requests wait ({self._name})")
        self._num += 1
        future = self._pool.submit(call, *arguments)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))
        return await asyncio.wrap_future(future)

    def _end(self) -> None:
        self._num -= 1
