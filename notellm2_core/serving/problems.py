"""Errors as problem+json (RFC 9457): a status, and a sentence that says what is wrong."""

import re
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from notellm2_core.serving.embedding import DIED, BadNote, EmbedderBusy, EmbedderDied, EmbedderDown
from notellm2_core.serving.engine import EngineDown
from notellm2_core.serving.group_commit import LogBusy
from notellm2_core.serving.log import LogFull, LogUnavailable, VersionConflict
from notellm2_core.serving.requests import Problem
from notellm2_core.serving.service import NotReady
from notellm2_core.serving.workers import Busy

_RETRY_SECONDS = "1"
_TITLES = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 409: "Conflict", 413: "Too Large", 429: "Busy"}
_STATUS: dict[type[Exception], int] = {
    BadNote: 422, VersionConflict: 409, EmbedderBusy: 429, LogBusy: 429, Busy: 429, LogFull: 507, LogUnavailable: 503,
    EmbedderDied: 503, EmbedderDown: 503, EngineDown: 503, NotReady: 503,
}  # fmt: skip
# What a database or an operating system says names hosts, users and folders.
_SENTENCES: dict[type[Exception], str] = {
    LogUnavailable: "the log of notes cannot be reached now; a write may be there or not: repeat it",
    LogFull: "the disk of the log of notes is full; reads still work",
    EmbedderDown: "the model's process cannot be used now",
    EngineDown: "the search engine cannot be reached now; notes whose neighbours are in the table are answered",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 503, 507)
}


def problem(status: int, detail: str, headers: dict[str, str] | None = None, kind: str = "about:blank") -> Response:
    """The answer. kind: its type (RFC 9457), an address that nobody has to look up."""
    detail = detail.encode(errors="replace").decode()  # JSON carries no lone surrogates
    body = {"type": kind, "title": _TITLES.get(status, "Refused"), "status": status, "detail": detail}
    more = {"Retry-After": _RETRY_SECONDS} if status in (429, 503) else {}
    if status == 401:
        more = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(body, status, {**more, **(headers or {})}, media_type="application/problem+json")


def add_handlers(app: FastAPI) -> None:
    """Answer the errors of the routes, of their bodies, and of the service."""

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names those of one route of the path
            headers["Allow"] = ", ".join(_methods(request))
        return problem(error.status_code, str(error.detail), headers)

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        found = max(error.errors(), key=lambda e: len(e["loc"]))  # of a value of two kinds, the one that fits it better
        names = [str(part) for part in found["loc"] if isinstance(part, int) or re.fullmatch("[a-z_]+", part)]
        return problem(422, f"{'.'.join(names)}: {found['msg']}")

    async def of_service(request: Request, error: Exception) -> Response:
        kind = next(kind for kind in _STATUS if isinstance(error, kind))
        name = DIED if kind is EmbedderDied else "about:blank"
        return problem(_STATUS[kind], _SENTENCES.get(kind, str(error)), kind=name)

    for kind in _STATUS:
        app.exception_handler(kind)(of_service)


def _methods(request: Request) -> list[str]:
    """What may be done with the path of a request."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for methods in found for method in methods})
