"""The routes of single notes: written, deleted, read."""

from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Path, Query, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import BadNote
from notellm2_core.serving.forms import form_of
from notellm2_core.serving.guard import needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import VersionConflict
from notellm2_core.serving.problems import ERRORS
from notellm2_core.serving.requests import NewNote, NoteAnswer, NoteId, NoteText, ReleaseId, WriteAnswer, WrittenId
from notellm2_core.serving.service import Service, Written
from notellm2_core.serving.workers import Workers

_WRITE_SECONDS = 10.0  # that a writer waits until its note is found
_IMAGE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/jpeg": {}}}, 204: {"description": "No picture."}}
_WRITTEN: dict[int | str, dict[str, Any]] = {
    200: {"model": WriteAnswer, "description": "It was so already, or is deleted now."},
    202: {"model": WriteAnswer, "description": "It is kept, and will be found, or no longer found, soon."},
}

PathId = Annotated[NoteId, Path()]
Version = Annotated[int | None, Query(ge=0, lt=2**63)]


def add_writes(app: FastAPI, service: Service, keys: Keys, writes: Workers) -> None:
    """`POST /notes`, `PUT` and `DELETE /notes/{id}`."""
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

    @app.post("/notes", status_code=201, openapi_extra=form_of(NewNote), **options)
    async def write_note(note: NewNote) -> Response:
        """Write a note. 201: it is found from now on; 200: it was there already; 202: it is kept, and will be found."""
        own = note_of(note.note_id, note)
        return await write(201, note.note_id, note.version, service.write, own, note.image)

    @app.put("/notes/{note_id}", status_code=201, openapi_extra=form_of(NoteText), **options)
    async def replace_note(note_id: Annotated[WrittenId, Path()], note: NoteText, version: Version = None) -> Response:
        """Write a note under this id."""
        return await write(201, note_id, version, service.write, note_of(note_id, note), note.image)

    @app.delete("/notes/{note_id}", **options)
    async def delete_note(note_id: PathId, version: Version = None) -> Response:
        """A note is gone. It is no longer found."""
        return await write(200, note_id, version, service.delete, note_id)


def add_reads(app: FastAPI, service: Service, keys: Keys, reads: Workers) -> None:
    """`GET /notes/{id}` and its image."""
    options: dict[str, Any] = {"dependencies": needs(keys, "read"), "tags": ["notes"]}

    @app.get("/notes/{note_id}", response_model=NoteAnswer, responses=ERRORS, **options)
    async def read_note(note_id: PathId, release: ReleaseId = None) -> NoteAnswer:
        """A note: one that was written here, or one of the release."""
        by = in_memory(service, release)
        if (found := await reads.run(service.cards(by).note, note_id)) is None:
            raise HTTPException(404, f"there is no note {note_id!r}")
        note, entry = found
        return NoteAnswer(
            note_id=note_id, release=by.id, title=note.title, topics=list(note.topics), content=note.content,
            seq=None if entry is None else entry.seq, version=None if entry is None else entry.version,
            not_found_because=service.releases.unusable(by).get(note_id),
        )  # fmt: skip

    @app.get("/notes/{note_id}/image", responses=ERRORS | _IMAGE, **options)
    async def read_image(note_id: PathId, release: ReleaseId = None) -> Response:
        """Its picture, made small. 204: it has none that can be used."""
        cards = service.cards(in_memory(service, release))
        if (data := await reads.run(cards.thumbnail, note_id)) is None:
            if await reads.run(cards.note, note_id) is None:
                raise HTTPException(404, f"there is no note {note_id!r}")
            return Response(status_code=204)
        return Response(data, media_type="image/jpeg", headers={"X-Content-Type-Options": "nosniff"})


def in_memory(service: Service, release_id: str | None) -> LiveRelease:
    """The release of this id, or the one that answers."""
    try:
        return service.releases.get(release_id)
    except KeyError:
        raise HTTPException(404, f"release {release_id!r} is not in memory") from None


def note_of(note_id: str, body: NoteText) -> Note:
    """Raises BadNote for a note without text and picture."""
    note = Note(note_id, body.title, tuple(t.strip() for t in body.topics if t.strip()), body.content)
    if body.image is None and not has_text(note):
        raise BadNote("the note is empty: it has neither text nor picture")
    return note


def has_text(note: Note) -> bool:
    """Whether there is a text to read."""
    return any(text.strip() for text in (note.title, note.content, *note.topics))


def _written(service: Service, note_id: str, written: Written, status: int) -> Response:
    receipt = written.receipt
    body = {
        "note_id": note_id, "release": service.current.id, "seq": receipt.seq, "version": receipt.version,
        "applied": receipt.applied, "image": written.image,
    }  # fmt: skip
    return JSONResponse(body, status if written.is_found else 202, {"Location": f"/notes/{quote(note_id, safe='')}"})
