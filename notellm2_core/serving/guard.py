"""Who may ask what, and when: keys, other web pages, the size of a body, and a place for a search, before anything of
the body is read.
"""

import re
from typing import Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Asked

from notellm2_core.serving.keys import Keys, Scope
from notellm2_core.serving.problems import problem
from notellm2_core.serving.workers import Busy, Workers

MAX_BODY_BYTES = 24 << 20  # with a picture
MAX_SMALL_BODY_BYTES = 1 << 20
_MAX_NOTE_BYTES = 36 << 20  # of the embedder, which has every note of a service, with its picture in base64
_MAX_HELD_BYTES = 128 << 20  # of large bodies in memory; decoding them takes several times as much
_SEARCH = re.compile("/recall|/similar|/notes/[^/]+/similar")
_WITH_PICTURES, _OF_EMBEDDER = ("/notes", "/similar"), "/models"
OPEN = ("/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")  # without a key
OPEN_BELOW = "/page/"
_BEARER = HTTPBearer(auto_error=False, description="`notellm2 keys add` prints a key.")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """An ASGI application that only sees requests with a key, of a size that is allowed.

    Without keys, only requests to this machine by its own names are answered, and none that a page from elsewhere
    sends. A search that would find no place is refused here, where that costs little: under more load than the machine
    can answer, its time goes to the answers.
    """

    def __init__(self, app: ASGIApp, keys: Keys, searches: Workers | None = None) -> None:
        self._app, self._keys, self._searches = app, keys, searches
        self._held = 0  # bytes of large bodies in memory, as far as they may still come; only the event loop counts

    async def __call__(self, scope: Asked, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if (refused := self._refused(scope["path"], headers)) is not None:
            status, detail = refused
            await problem(status, detail)(scope, receive, send)
            return
        if self._searches is not None and _SEARCH.fullmatch(scope["path"]):
            try:
                self._searches.require()
            except Busy as e:
                await problem(429, str(e))(scope, receive, send)
                return
        held = _large_body(scope["path"], headers)
        if held and self._held + held > _MAX_HELD_BYTES:
            await problem(429, "too many large bodies are in memory")(scope, receive, send)
            return
        self._held += held
        try:
            await self._counted(scope, receive, send)
        finally:
            self._held -= held

    async def _counted(self, scope: Asked, receive: Receive, send: Send) -> None:
        limit, size = _limit(scope["path"]), 0

        async def counted() -> Message:
            """A part of a body that did not say how large it is."""
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"a body of more than {limit} bytes is too large here")
            return message

        await self._app(scope, counted, send)

    def _refused(self, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """The status and the reason to refuse a request; None: it may pass."""
        if not self._keys.keys:
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            if host.rpartition(":")[0] not in _LOCAL_HOSTS and host not in _LOCAL_HOSTS:
                return 403, "without keys, only requests to this machine by its own name are answered"
            if origin is not None and origin.partition("://")[2] != host:
                return 403, "without keys, pages from elsewhere are not answered"
        elif not _is_open(path) and self._keys.scope_of(_secret(headers.get(b"authorization"))) is None:
            return 401, "a key is needed: Authorization: Bearer KEY"
        limit, size = _limit(path), headers.get(b"content-length", "0")
        if not size.isdecimal() or int(size) > limit:
            return 413, f"a body of {size} bytes is too large; {limit} are allowed here"
        return None


def needs(keys: Keys, scope: Scope) -> list[Any]:
    """The dependencies of a route that needs a key of this scope."""

    async def check(request: Request) -> None:
        found = keys.scope_of(_secret(request.headers.get("authorization")))
        if not keys.allows(found, scope):
            raise HTTPException(403, f"the key has the scope {found}, and this needs {scope}")

    scheme = [Security(_BEARER)] if keys.keys else []  # for the interface's description; `check` does the work
    return [*scheme, Depends(check)]


def _limit(path: str) -> int:
    """Bytes that a body may have."""
    if path.startswith(_OF_EMBEDDER):
        return _MAX_NOTE_BYTES
    return MAX_BODY_BYTES if path.startswith(_WITH_PICTURES) else MAX_SMALL_BODY_BYTES


def _large_body(path: str, headers: dict[bytes, str]) -> int:
    """Bytes that a large body may have; 0 for a small one, which is never refused because of others."""
    limit = _limit(path)
    size = limit if b"transfer-encoding" in headers else int(headers.get(b"content-length", "0"))
    return size if size > MAX_SMALL_BODY_BYTES else 0


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


def _secret(authorization: str | None) -> str | None:
    kind, _, secret = (authorization or "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None
