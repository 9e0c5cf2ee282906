"""How long requests take, for Prometheus.

Latencies are measured by route, not by path: ids would make a series each.
"""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # limits of the histograms
PROMETHEUS = "text/plain; version=0.0.4"
TEXT_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}  # for /docs


def request_seconds(registry: CollectorRegistry) -> Histogram:
    """The histogram of an application."""
    return Histogram(
        "notellm2_request_seconds", "Of a request, from its first byte to the last of its answer.",
        ("method", "route", "status"), buckets=SECONDS, registry=registry,
    )  # fmt: skip


class Timed:
    """An ASGI application whose requests are measured."""

    def __init__(self, app: ASGIApp, seconds: Histogram) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._seconds.labels(scope["method"], route, status).observe(time.perf_counter() - started)
