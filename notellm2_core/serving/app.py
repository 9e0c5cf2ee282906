"""The HTTP interface of the service.

Every answer names the release and the place in the log that it was made from. Errors are problem+json. Searches run on
threads beside the event loop, which only reads and writes; the model has a process of its own.
"""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Annotated, Any
from urllib.parse import quote

import faiss
import msgspec
from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from notellm2_core import __version__
from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import BadNote
from notellm2_core.serving.events import Event, keep_events
from notellm2_core.serving.experiment import team_draft
from notellm2_core.serving.guard import Guard, needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.live_index import Answer
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import VersionConflict
from notellm2_core.serving.metrics import Metrics, Timed
from notellm2_core.serving.problems import ERRORS, add_handlers
from notellm2_core.serving.requests import (
    EventsAnswer,
    K,
    MinSeq,
    NewEvents,
    NewNote,
    NoteAnswer,
    NoteId,
    NoteText,
    RecallRequest,
    SearchAnswer,
    SimilarRequest,
    WriteAnswer,
    WrittenId,
)
from notellm2_core.serving.service import NotReady, Service, Written
from notellm2_core.serving.workers import Workers

_WRITE_SECONDS = 10.0  # that a writer waits until its note is found
_MIN_SEQ_SECONDS = 2.0  # that a reader waits for `min_seq`
_PAGE = FilePath(__file__).parent / "page"
_PAGE_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"

_IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}, 204: {"description": "No picture."}}
_WRITTEN: dict[int | str, dict[str, Any]] = {
    200: {"model": WriteAnswer, "description": "It was so already, or is deleted now."},
    202: {"model": WriteAnswer, "description": "It is kept, and will be found, or no longer found, soon."},
}

PathId = Annotated[NoteId, Path()]
Version = Annotated[int | None, Query(ge=0, lt=2**63)]


def make_app(service: Service, keys: Keys, takes_events: bool = False) -> FastAPI:
    """The application. It does not close the service. takes_events: somebody writes them to files."""
    app = FastAPI(title="NoteLLM-2", version=__version__, summary="Multimodal item-to-item recall.")
    metrics = Metrics(service)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(Timed, metrics=metrics)
    add_handlers(app)
    reads = Workers("read", 2, 256)  # of texts and pictures: few pictures are decoded at a time
    _add_writes(app, service, keys, Workers("write", 64, 256))
    _add_reads(app, service, keys, reads)
    _add_searches(app, service, keys, metrics, reads)
    _add_events(app, service, keys, takes_events)
    _add_releases(app, service, keys)
    _add_state(app, service, keys, metrics, reads)
    _add_page(app)
    return app


def _add_writes(app: FastAPI, service: Service, keys: Keys, writes: Workers) -> None:
    options: dict[str, Any] = {
        "response_model": WriteAnswer, "dependencies": needs(keys, "write"), "responses": ERRORS | _WRITTEN,
        "tags": ["notes"],
    }  # fmt: skip

    async def write(
        status: int, note_id: str, version: int | None, call: Callable[..., Written], *content: Any
    ) -> Response:
        try:
            written = await writes.run(call, *content, version, _WRITE_SECONDS)
        except (BadNote, VersionConflict):
            raise
        except ValueError as e:  # of an id or a text that is none
            raise HTTPException(422, str(e)) from None
        if version is not None and written.receipt.version > version:
            raise HTTPException(409, f"note {note_id!r} has a newer version, {written.receipt.version}, which stays")
        return _written(service, note_id, written, status if written.receipt.applied else 200)

    @app.post("/notes", status_code=201, **options)
    async def write_note(note: NewNote) -> Response:
        """Write a note. 201: it is found from now on; 200: it was there already; 202: it is kept, and will be found."""
        own = _note(note.note_id, note)
        return await write(201, note.note_id, note.version, service.write, own, note.image)

    @app.put("/notes/{note_id}", status_code=201, **options)
    async def replace_note(note_id: Annotated[WrittenId, Path()], note: NoteText, version: Version = None) -> Response:
        """Write a note under this id."""
        return await write(201, note_id, version, service.write, _note(note_id, note), note.image)

    @app.delete("/notes/{note_id}", **options)
    async def delete_note(note_id: PathId, version: Version = None) -> Response:
        """A note is gone. It is no longer found."""
        return await write(200, note_id, version, service.delete, note_id)


def _add_reads(app: FastAPI, service: Service, keys: Keys, reads: Workers) -> None:
    options: dict[str, Any] = {"dependencies": needs(keys, "read"), "tags": ["notes"]}

    @app.get("/notes/{note_id}", response_model=NoteAnswer, responses=ERRORS, **options)
    async def read_note(note_id: PathId) -> NoteAnswer:
        """A note: one that was written here, or one of the release."""
        release = service.current
        if (found := await reads.run(service.cards(release).note, note_id)) is None:
            raise HTTPException(404, f"there is no note {note_id!r}")
        note, entry = found
        return NoteAnswer(
            note_id=note_id, release=release.id, title=note.title, topics=list(note.topics), content=note.content,
            seq=None if entry is None else entry.seq, version=None if entry is None else entry.version,
            not_found_because=service.unusable.get(note_id),
        )  # fmt: skip

    @app.get("/notes/{note_id}/image", responses=ERRORS | _IMAGE, **options)
    async def read_image(note_id: PathId) -> Response:
        """Its picture, made small. 204: it has none that can be used."""
        cards = service.cards(service.current)
        if (data := await reads.run(cards.thumbnail, note_id)) is None:
            if await reads.run(cards.note, note_id) is None:
                raise HTTPException(404, f"there is no note {note_id!r}")
            return Response(status_code=204)
        return Response(data, media_type="image/jpeg", headers={"X-Content-Type-Options": "nosniff"})


def _add_searches(app: FastAPI, service: Service, keys: Keys, metrics: Metrics, reads: Workers) -> None:
    # Each thread of FAISS has a number of threads of its own.
    searches = Workers("search", 2, 256, lambda: faiss.omp_set_num_threads(1))
    options: dict[str, Any] = {
        "response_model": SearchAnswer, "dependencies": needs(keys, "read"), "responses": ERRORS, "tags": ["search"],
    }  # fmt: skip

    async def release_up_to(min_seq: int, release_id: str | None = None) -> LiveRelease:
        """The release that answers, or the one of this id, once it knows the log up to there."""
        if not service.is_ready:
            raise NotReady("the log of notes is still being read")
        try:
            release = service.release(release_id)
        except KeyError:
            raise HTTPException(404, f"release {release_id!r} is not in memory") from None
        if min_seq > release.index.delta.view.seq and min_seq > (last := await reads.run(service.log.last_seq)):
            raise HTTPException(409, f"min_seq = {min_seq} is beyond the end of the log, {last}")
        deadline = time.monotonic() + _MIN_SEQ_SECONDS
        while min_seq > release.index.delta.view.seq:
            if time.monotonic() > deadline:
                raise NotReady(f"the log is known up to {release.index.delta.view.seq}, not to {min_seq}")
            await asyncio.sleep(0.005)
        return release

    @app.get("/notes/{note_id}/similar", **options)
    async def similar_to(note_id: PathId, k: K = 10, min_seq: MinSeq = 0, release: str | None = None) -> Response:
        """The nearest notes of a note, without itself; by one of the releases in memory."""
        by = await release_up_to(min_seq, release)
        try:
            answer = await searches.run(by.index.similar_to, note_id, k)
        except KeyError:
            raise HTTPException(404, f"there is no note {note_id!r}") from None
        return _answer(by.id, answer)

    @app.post("/similar", **options)
    async def similar(body: SimilarRequest, request: Request) -> Response:
        """The nearest notes of a text, a picture, or both."""
        by, note = await release_up_to(body.min_seq, body.release), _note("query", body)
        embedding = by.model.submit(note, body.image, body.inputs)
        try:
            embedded = await _unless_left(request, asyncio.wrap_future(embedding))
        finally:
            embedding.cancel()
        answer = await searches.run(by.index.similar, embedded.vector, body.k, frozenset(body.exclude))
        return _answer(by.id, answer)

    @app.post("/recall", **options)
    async def recall(body: RecallRequest) -> Response:
        """Recommendations for a history: the neighbours of its notes, merged."""
        deadline = time.monotonic() + body.deadline_ms / 1000
        chosen = [body.release] if body.release else service.releases_of(body.user_id)
        by = [await release_up_to(body.min_seq, release_id) for release_id in chosen]
        history = {
            n if isinstance(n, str) else n.note_id: 1.0 if isinstance(n, str) else n.weight for n in body.history
        }
        exclude, answer_id = frozenset(body.exclude), secrets.token_hex(8)
        answers = [
            await searches.run(release.index.recall, history, body.k, body.merge, exclude, deadline) for release in by
        ]
        answer, found_by = answers[0], None
        if len(answers) == 2:
            hits, is_second = team_draft(answers[0].hits, answers[1].hits, body.k, random.Random(answer_id))
            answer, found_by = replace(answer, hits=tuple(hits)), [by[second].id for second in is_second]
        metrics.count(answer, len(history), body.k)
        return _answer(by[0].id, answer, answer_id, found_by)


def _add_events(app: FastAPI, service: Service, keys: Keys, takes_events: bool) -> None:
    writes = Workers("events", 2, 256)

    @app.post(
        "/events", response_model=EventsAnswer, dependencies=needs(keys, "write"), responses=ERRORS, tags=["events"]
    )
    async def write_events(body: NewEvents) -> EventsAnswer:
        """What users saw and did. The next weekly run reads it, and an experiment is judged by it."""
        if not takes_events:
            raise HTTPException(409, "this service keeps no events: its configuration sets no serving.events")
        now = time.time()
        events = [
            Event(
                event.user_id, event.note_id, event.event,
                datetime.fromtimestamp(now if event.timestamp is None else event.timestamp, UTC).replace(tzinfo=None),
                event.answer, event.release,
            )
            for event in body.events
        ]  # fmt: skip
        await writes.run(keep_events, service.log, events)
        return EventsAnswer(kept=len(events))


def _add_releases(app: FastAPI, service: Service, keys: Keys) -> None:
    switches = Workers("switch", 1, 4)

    @app.get("/releases", dependencies=needs(keys, "read"), responses=ERRORS, tags=["releases"])
    async def releases() -> dict[str, Any]:
        """The releases in memory, the one that answers first."""
        return {
            "releases": [
                {"release": r.id, "week": r.week, "seq": r.index.delta.view.seq, "notes": len(r.index.index.note_ids)}
                for r in service.releases
            ]
        }

    @app.post("/releases/{release_id}:activate", dependencies=needs(keys, "admin"), responses=ERRORS, tags=["releases"])
    async def activate(release_id: Annotated[str, Path(max_length=128)]) -> dict[str, str]:
        """Answer from another release, once it has caught up with the log. A restart begins with the champion again."""
        try:
            release = await switches.run(service.activate, release_id)
        except (ValueError, TimeoutError) as e:
            raise HTTPException(409, f"{e}; {service.current.id} stays") from None
        return {"release": release.id}


def _add_state(app: FastAPI, service: Service, keys: Keys, metrics: Metrics, reads: Workers) -> None:
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", dependencies=needs(keys, "read"), responses=ERRORS | text, tags=["state"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(await reads.run(metrics.show), media_type="text/plain; version=0.0.4")

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """The process answers. It asks neither the disk nor the model."""
        return {"status": "ok"}

    @app.get("/readyz", responses=ERRORS, tags=["state"])
    async def readyz() -> dict[str, Any]:
        """The release shows all entries of the log that were there at the start."""
        if not service.is_ready:
            raise NotReady("the log of notes is still being read")
        return {"status": "ready", "release": service.current.id}


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response((_PAGE / name).read_bytes(), media_type=_PAGE_TYPES[name], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "there is no such page")
        return file(name)


def _note(note_id: str, body: NoteText) -> Note:
    """Raises BadNote for a note without text and picture."""
    topics = tuple(topic.strip() for topic in body.topics if topic.strip())
    if body.image is None and not any(text.strip() for text in (body.title, body.content, *topics)):
        raise BadNote("the note is empty: it has neither text nor picture")
    return Note(note_id, body.title, topics, body.content)


def _answer(
    release: str, answer: Answer, answer_id: str | None = None, found_by: Sequence[str] | None = None
) -> Response:
    """found_by: the release of each hit, where two are interleaved."""
    hits: list[dict[str, Any]] = [
        {"note_id": hit.note_id, "score": round(hit.score, 6), "because": hit.because} for hit in answer.hits
    ]
    for hit, by in zip(hits, found_by or (), strict=False):
        hit["release"] = by
    body = {
        "answer": answer_id, "release": release, "seq": answer.seq, "hits": hits, "unknown": answer.unknown,
        "partial": answer.is_partial,
    }  # fmt: skip
    return Response(msgspec.json.encode(body), media_type="application/json")


def _written(service: Service, note_id: str, written: Written, status: int) -> Response:
    receipt = written.receipt
    body = {
        "note_id": note_id, "release": service.current.id, "seq": receipt.seq, "version": receipt.version,
        "applied": receipt.applied, "image": written.image,
    }  # fmt: skip
    return JSONResponse(body, status if written.is_found else 202, {"Location": f"/notes/{quote(note_id, safe='')}"})


async def _unless_left(request: Request, result: "asyncio.Future[Any]") -> Any:
    """The result, unless the caller has hung up meanwhile."""
    while not result.done():
        await asyncio.wait([result], timeout=0.1)
        if not result.done() and await request.is_disconnected():
            result.cancel()
            raise HTTPException(499, "the caller has left")
    return result.result()
