"""The HTTP interface of the service.

Every answer names the release and the place in the log that it was made from. Errors are problem+json (RFC 9457).
Searches run on two threads beside the event loop, which only reads and writes; the model has a process of its own.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from notellm2_core import __version__
from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import BadNote, EmbedderBusy, EmbedderDied
from notellm2_core.serving.keys import Keys, Scope
from notellm2_core.serving.live_index import Answer
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import LogBusy, LogFull, LogUnavailable
from notellm2_core.serving.metrics import Metrics, Timed
from notellm2_core.serving.requests import (
    MAX_ID,
    K,
    MinSeq,
    NewNote,
    NoteAnswer,
    NoteText,
    Problem,
    RecallRequest,
    SearchAnswer,
    SimilarRequest,
    WriteAnswer,
)
from notellm2_core.serving.service import NotReady, Service, Written

_PAGE = FilePath(__file__).parent / "page"
_PAGE_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
_TEXT: dict[str, Any] = {"content": {"text/plain": {}}}
_JPEG: dict[str, Any] = {"content": {"image/jpeg": {}}}
MAX_BODY_BYTES = 24 << 20
_NUM_SEARCHES = 2  # at once
_WRITE_SECONDS = 10.0  # that a writer waits until its note is found
_MIN_SEQ_SECONDS = 2.0  # that a reader waits for `min_seq`
_RETRY_SECONDS = "1"
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "content": {"application/problem+json": {}}}
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 503, 507)
}
_STATUS: dict[type[Exception], int] = {
    BadNote: 422, EmbedderBusy: 429, LogBusy: 429, LogFull: 507, LogUnavailable: 503, EmbedderDied: 503, NotReady: 503,
}  # fmt: skip


def make_app(service: Service, keys: Keys) -> FastAPI:
    """The application. It does not close the service."""
    app = FastAPI(
        title="NoteLLM-2", version=__version__, summary="Multimodal item-to-item recall.", max_body_size=MAX_BODY_BYTES
    )
    searches = ThreadPoolExecutor(_NUM_SEARCHES, "search")
    writes = ThreadPoolExecutor(64, "write")  # they wait for the model and for the disk
    metrics = Metrics(service)
    app.add_middleware(Timed, metrics=metrics)
    _add_errors(app)

    def needs(scope: Scope) -> Any:
        def check(authorization: Annotated[str | None, Header()] = None) -> None:
            kind, _, secret = (authorization or "").partition(" ")
            found = keys.scope_of(secret.strip() if kind.lower() == "bearer" else None)
            if found is None:
                raise HTTPException(401, "a key is needed: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
            if not keys.allows(found, scope):
                raise HTTPException(403, f"the key has the scope {found}, and this needs {scope}")

        return [Depends(check)]

    async def on(pool: ThreadPoolExecutor, call: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)

    async def up_to(min_seq: int) -> None:
        if min_seq > service.current.index.delta.view.seq:
            deadline = time.monotonic() + _MIN_SEQ_SECONDS
            if not await on(writes, service.wait_for, min_seq, deadline):
                raise NotReady(f"the log is known up to {service.current.index.delta.view.seq}, not to {min_seq}")

    def chosen(release: str | None) -> LiveRelease:
        try:
            return service.release(release)
        except KeyError:
            raise HTTPException(404, f"release {release!r} is not in memory") from None

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "there is no such page")
        return _file(name)

    @app.post("/notes", status_code=201, response_model=WriteAnswer, dependencies=needs("write"), responses=_ERRORS,
              tags=["notes"])  # fmt: skip
    async def write_note(note: NewNote, response: Response) -> Response:
        """Write a note. 201: it is found from now on; 202: it is kept, and will be found."""
        return await put(note.note_id, note, note.version)

    @app.put("/notes/{note_id}", status_code=201, response_model=WriteAnswer, dependencies=needs("write"),
             responses=_ERRORS, tags=["notes"])  # fmt: skip
    async def replace_note(
        note_id: Annotated[str, Path(max_length=MAX_ID)],
        note: NoteText,
        version: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        """Write a note under this id."""
        return await put(note_id, note, version)

    async def put(note_id: str, body: NoteText, version: int | None) -> Response:
        note = _note(note_id, body)
        return await write(201, note_id, service.write, note, body.image, version, None, _WRITE_SECONDS)

    async def write(status: int, note_id: str, call: Callable[..., Written], *arguments: Any) -> Response:
        try:
            written = await on(writes, call, *arguments)
        except BadNote:
            raise
        except ValueError as e:  # of the log: an id that is none, a version that has other content
            raise HTTPException(409 if "version" in str(e) else 422, _printable(str(e))) from None
        return _written(service, note_id, written, status)

    @app.delete("/notes/{note_id}", response_model=WriteAnswer, dependencies=needs("write"), responses=_ERRORS,
                tags=["notes"])  # fmt: skip
    async def delete_note(
        note_id: Annotated[str, Path(max_length=MAX_ID)], version: Annotated[int | None, Query(ge=0)] = None
    ) -> Response:
        """A note is gone. It is no longer found."""
        return await write(200, note_id, service.delete, note_id, version, _WRITE_SECONDS)

    @app.get(
        "/notes/{note_id}", response_model=NoteAnswer, dependencies=needs("read"), responses=_ERRORS, tags=["notes"]
    )
    async def read_note(note_id: Annotated[str, Path(max_length=MAX_ID)]) -> NoteAnswer:
        """A note: one that was written here, or one of the release."""
        release = service.current
        cards = service.cards(release)
        found = await on(writes, cards.note, note_id)
        if found is None:
            raise HTTPException(404, f"there is no note {note_id!r}")
        note, entry = found
        has_image = await on(writes, cards.thumbnail, note_id) is not None
        place = {"seq": entry.seq, "version": entry.version} if entry is not None else {"seq": None, "version": None}
        return NoteAnswer(
            note_id=note_id, release=release.id, title=note.title, topics=list(note.topics), content=note.content,
            has_image=has_image, **place,
        )  # fmt: skip

    @app.get("/notes/{note_id}/image", dependencies=needs("read"), responses=_ERRORS | {200: _JPEG}, tags=["notes"])
    async def read_image(note_id: Annotated[str, Path(max_length=MAX_ID)]) -> Response:
        """Its picture, made small."""
        data = await on(writes, service.cards(service.current).thumbnail, note_id)
        if data is None:
            raise HTTPException(404, f"note {note_id!r} has no picture that can be used")
        return Response(data, media_type="image/jpeg", headers={"X-Content-Type-Options": "nosniff"})

    @app.get("/notes/{note_id}/similar", response_model=SearchAnswer, dependencies=needs("read"), responses=_ERRORS,
             tags=["search"])  # fmt: skip
    async def similar_to(
        note_id: Annotated[str, Path(max_length=MAX_ID)], k: K = 10, min_seq: MinSeq = 0, release: str | None = None
    ) -> Response:
        """The nearest notes of a note, without itself; by one of the releases in memory."""
        await up_to(min_seq)
        by = chosen(release)
        try:
            answer = await on(searches, by.index.similar_to, note_id, k)
        except KeyError:
            raise HTTPException(404, f"there is no note {note_id!r}") from None
        return _answer(by.id, answer)

    @app.post("/similar", response_model=SearchAnswer, dependencies=needs("read"), responses=_ERRORS, tags=["search"])
    async def similar(body: SimilarRequest, request: Request) -> Response:
        """The nearest notes of a text, a picture, or both."""
        await up_to(body.min_seq)
        release, note = chosen(body.release), _note("query", body)
        embedding = release.model.submit(note, body.image, body.inputs)
        try:
            embedded = await _unless_left(request, asyncio.wrap_future(embedding))
        finally:
            embedding.cancel()
        answer = await on(searches, release.index.similar, embedded.vector, body.k, frozenset(body.exclude))
        return _answer(release.id, answer)

    @app.post("/recall", response_model=SearchAnswer, dependencies=needs("read"), responses=_ERRORS, tags=["search"])
    async def recall(body: RecallRequest) -> Response:
        """Recommendations for a history: the neighbours of its notes, merged."""
        await up_to(body.min_seq)
        history = {
            note.note_id if not isinstance(note, str) else note: 1.0 if isinstance(note, str) else note.weight
            for note in body.history
        }
        release, deadline = service.current, time.monotonic() + body.deadline_ms / 1000
        answer = await on(
            searches, release.index.recall, history, body.k, body.merge, frozenset(body.exclude), deadline
        )
        metrics.count(answer, len(history), body.k)
        return _answer(release.id, answer)

    @app.get("/releases", dependencies=needs("read"), responses=_ERRORS, tags=["releases"])
    async def releases() -> dict[str, Any]:
        """The releases in memory, the one that answers first."""
        return {
            "releases": [
                {"release": r.id, "week": r.week, "seq": r.index.delta.view.seq, "notes": len(r.index.index.note_ids)}
                for r in service.releases
            ]
        }

    @app.post("/releases/{release_id}:activate", dependencies=needs("admin"), responses=_ERRORS, tags=["releases"])
    async def activate(release_id: Annotated[str, Path(max_length=MAX_ID)]) -> dict[str, str]:
        """Answer from another release, once it has caught up with the log."""
        try:
            release = await on(writes, service.activate, release_id)
        except (ValueError, TimeoutError) as e:
            raise HTTPException(409, f"{e}; {service.current.id} stays") from None
        return {"release": release.id}

    @app.get("/metrics", dependencies=needs("read"), responses=_ERRORS | {200: _TEXT}, tags=["state"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(await on(writes, metrics.show), media_type="text/plain; version=0.0.4")

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """The process answers. It asks neither the disk nor the model."""
        return {"status": "ok"}

    @app.get("/readyz", responses=_ERRORS, tags=["state"])
    async def readyz() -> dict[str, Any]:
        """The release shows all entries of the log that were there at the start."""
        if not service.is_ready:
            raise NotReady(service.problem or "the log is still being read")
        return {"status": "ready", "release": service.current.id}

    return app


def _file(name: str) -> Response:
    """A file of the page, which loads nothing from elsewhere."""
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response((_PAGE / name).read_bytes(), media_type=_PAGE_TYPES[name], headers=headers)


def _note(note_id: str, body: NoteText) -> Note:
    """Raises BadNote for a note without text and picture."""
    topics = tuple(topic.strip() for topic in body.topics if topic.strip())
    if body.image is None and not any(text.strip() for text in (body.title, body.content, *topics)):
        raise BadNote("the note is empty: it has neither text nor picture")
    return Note(note_id, body.title, topics, body.content)


def _answer(release: str, answer: Answer) -> Response:
    hits = [{"note_id": hit.note_id, "score": round(hit.score, 6), "because": hit.because} for hit in answer.hits]
    body = {
        "release": release,
        "seq": answer.seq,
        "hits": hits,
        "unknown": answer.unknown,
        "partial": answer.is_partial,
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def _written(service: Service, note_id: str, written: Written, status: int) -> Response:
    receipt = written.receipt
    body = {
        "note_id": note_id, "release": service.current.id, "seq": receipt.seq, "version": receipt.version,
        "applied": receipt.applied, "image": written.image,
    }  # fmt: skip
    headers = {"Location": f"/notes/{quote(note_id, safe='')}"}
    return JSONResponse(body, status if written.is_found else 202, headers)


async def _unless_left(request: Request, result: "asyncio.Future[Any]") -> Any:
    """The result, unless the caller has hung up meanwhile."""
    while not result.done():
        await asyncio.wait([result], timeout=0.1)
        if not result.done() and await request.is_disconnected():
            result.cancel()
            raise HTTPException(499, "the caller has left")
    return result.result()


def _add_errors(app: FastAPI) -> None:
    def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
        title = {401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}.get(status, "Refused")
        body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
        more = {"Retry-After": _RETRY_SECONDS} if status in (429, 503) else {}
        return JSONResponse(body, status, {**more, **(headers or {})}, media_type="application/problem+json")

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return problem(422, _printable(f"{where}: {first['msg']}"))

    async def of_service(request: Request, error: Exception) -> Response:
        return problem(
            next(status for kind, status in _STATUS.items() if isinstance(error, kind)), _printable(str(error))
        )

    for kind in _STATUS:
        app.exception_handler(kind)(of_service)


def _printable(text: str) -> str:
    """Text without what JSON cannot carry."""
    return text.encode(errors="replace").decode()
