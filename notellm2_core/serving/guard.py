"""Who may ask what: keys, other web pages, and the size of a body, before anything of the body is read."""

from typing import Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Asked

from notellm2_core.serving.keys import Keys, Scope
from notellm2_core.serving.problems import problem

MAX_BODY_BYTES = 24 << 20  # with a picture
MAX_SMALL_BODY_BYTES = 1 << 20
_WITH_PICTURES = ("/notes", "/similar")
OPEN = ("/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")  # without a key
OPEN_BELOW = "/page/"
_BEARER = HTTPBearer(auto_error=False, description="`notellm2 keys add` prints a key.")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class Guard:
    """An ASGI application that only sees requests with a key, of a size that is allowed.

    Without keys, only requests to this machine by its own names are answered, and none that a page from elsewhere
    sends.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Asked, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if (refused := self._refused(scope["path"], headers)) is not None:
            status, detail = refused
            await problem(status, detail)(scope, receive, send)
            return
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
    return MAX_BODY_BYTES if path.startswith(_WITH_PICTURES) else MAX_SMALL_BODY_BYTES


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_BELOW)


def _secret(authorization: str | None) -> str | None:
    kind, _, secret = (authorization or "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None
