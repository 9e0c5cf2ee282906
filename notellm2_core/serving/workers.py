"""Threads beside the event loop, with a bound on what waits for them, and callers who do not wait."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException

T = TypeVar("T")


class Busy(RuntimeError):
    """So much waits that no more is taken."""


class Workers:
    """`num` threads; at most `max_waiting` calls wait for one."""

    def __init__(
        self,
        name: str,
        num: int,
        max_waiting: int,
        initializer: Callable[[], None] | None = None,
        observe: Callable[[float, float], None] | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        """observe: called with the seconds that a call waited, and took. refused: called where a call is refused."""
        self._name, self._most, self._observe, self._refused = name, num + max_waiting, observe, refused
        self._pool = ThreadPoolExecutor(num, name, initializer)
        self._num = 0  # calls that wait or run; only the event loop's thread counts

    def require(self, num: int = 1) -> None:
        """Raise Busy if so many calls are not taken now."""
        if self._num + num > self._most:
            self._refused()
            raise Busy(f"too many requests wait ({self._name})")

    async def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """The call's result. Raises Busy."""
        self.require()
        self._num += 1
        if self._observe is not None:
            call, arguments = self._timed, (self._observe, time.perf_counter(), call, *arguments)
        future = self._pool.submit(call, *arguments)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._end))
        return await asyncio.wrap_future(future)

    @staticmethod
    def _timed(observe: Callable[[float, float], None], submitted: float, call: Callable[..., T], *arguments: Any) -> T:
        started = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            observe(started - submitted, time.perf_counter() - started)

    def _end(self) -> None:
        self._num -= 1


async def unless_left(request: Request, result: "asyncio.Future[Any]") -> Any:
    """The result, unless the caller has hung up meanwhile."""
    while not result.done():
        await asyncio.wait([result], timeout=0.1)
        if not result.done() and await request.is_disconnected():
            result.cancel()
            raise HTTPException(499, "the caller has left")
    return result.result()
