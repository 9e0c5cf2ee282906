"""The routes that search, and the one that takes what users did with the answers."""

import asyncio
import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from notellm2_core.config.methods import InputKind
from notellm2_core.notes.note import Note
from notellm2_core.serving.cards import Cards
from notellm2_core.serving.embedding import BadNote, Embedded
from notellm2_core.serving.events import Event, keep_events
from notellm2_core.serving.experiment import NO_EXPERIMENT, interleaved, new_answer_id
from notellm2_core.serving.forms import form_of
from notellm2_core.serving.guard import needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.live_index import Answer
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.metrics import Metrics
from notellm2_core.serving.note_routes import PathId, has_text, in_memory, note_of
from notellm2_core.serving.problems import ERRORS
from notellm2_core.serving.requests import (
    EventsAnswer,
    Inputs,
    K,
    MinSeq,
    NewEvents,
    RecallRequest,
    ReleaseId,
    SearchAnswer,
    SimilarRequest,
)
from notellm2_core.serving.service import NotReady, Service
from notellm2_core.serving.workers import Workers, unless_left

_MIN_SEQ_SECONDS = 2.0  # that a reader waits for `min_seq`


def add_searches(
    app: FastAPI, service: Service, keys: Keys, metrics: Metrics, reads: Workers, searches: Workers
) -> None:
    """`GET /notes/{id}/similar`, `POST /similar` and `POST /recall`."""
    options: dict[str, Any] = {
        "response_model": SearchAnswer, "dependencies": needs(keys, "read"), "responses": ERRORS, "tags": ["search"],
    }  # fmt: skip
    reader = _Reader(service, reads)

    @app.get("/notes/{note_id}/similar", **options)
    async def similar_to(
        request: Request, note_id: PathId, k: K = 10, inputs: Inputs = "multimodal", min_seq: MinSeq = 0,
        release: ReleaseId = None,
    ) -> Response:  # fmt: skip
        """The nearest notes of a note, without itself; by all of it, or by its text or picture alone."""
        by = await reader.up_to(min_seq, in_memory(service, release))
        try:
            if inputs == "multimodal":
                return _answer(by.id, await searches.run(by.index.similar_to, note_id, k))
            note, image = await reads.run(_stored, service.cards(by), note_id)
            vector = await _embedded(request, by, note, image, inputs)
        except KeyError:
            raise HTTPException(404, f"there is no note {note_id!r}") from None
        except BadNote as e:
            raise HTTPException(404, f"note {note_id!r}: {e}") from None
        return _answer(by.id, await searches.run(by.index.similar, vector, k, frozenset([note_id])))

    @app.post("/similar", openapi_extra=form_of(SimilarRequest), **options)
    async def similar(body: SimilarRequest, request: Request) -> Response:
        """The nearest notes of a text, a picture, or both."""
        by = await reader.up_to(body.min_seq, in_memory(service, body.release))
        vector = await _embedded(request, by, note_of("query", body), body.image, body.inputs)
        return _answer(by.id, await searches.run(by.index.similar, vector, body.k, frozenset(body.exclude)))

    @app.post("/recall", **options)
    async def recall(body: RecallRequest) -> Response:
        """Recommendations for a history: the neighbours of its notes, merged."""
        deadline = time.monotonic() + body.deadline_ms / 1000
        prefix, chosen = service.releases.of_user(body.user_id)
        if body.release:
            prefix, chosen = NO_EXPERIMENT, [in_memory(service, body.release)]
        by = [await reader.up_to(body.min_seq, release) for release in chosen]
        history = {
            n if isinstance(n, str) else n.note_id: 1.0 if isinstance(n, str) else n.weight for n in body.history
        }
        exclude, answer_id = frozenset(body.exclude), new_answer_id(prefix)
        searches.require(len(by))  # both or none: a search for nobody takes time from others
        answers = await asyncio.gather(
            *(searches.run(r.index.recall, history, body.k, body.merge, exclude, deadline) for r in by)
        )
        answer, found_by = answers[0], None
        if len(answers) == 2:
            answer, is_second = interleaved(answers[0], answers[1], body.k, random.Random(answer_id))
            found_by = [by[second].id for second in is_second]
        metrics.count(answer, len(history), body.k)
        return _answer(by[0].id, answer, answer_id, found_by)


class _Reader:
    """Has a request wait for what it wants to see."""

    def __init__(self, service: Service, reads: Workers) -> None:
        self._service, self._reads = service, reads

    async def up_to(self, min_seq: int, release: LiveRelease) -> LiveRelease:
        """The release, once it knows the log up to there."""
        if not self._service.is_ready:
            raise NotReady("the log of notes is still being read")
        if min_seq > release.index.delta.view.seq and min_seq > (
            last := await self._reads.run(self._service.log.last_seq)
        ):
            raise HTTPException(409, f"min_seq = {min_seq} is beyond the end of the log, {last}")
        deadline = time.monotonic() + _MIN_SEQ_SECONDS
        while min_seq > release.index.delta.view.seq:
            if time.monotonic() > deadline:
                raise NotReady(f"the log is known up to {release.index.delta.view.seq}, not to {min_seq}")
            await asyncio.sleep(0.005)
        return release


def add_events(app: FastAPI, service: Service, keys: Keys, takes_events: bool) -> None:
    """`POST /events`. takes_events: somebody writes them to files; if not, it refuses them."""
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
                event.answer, event.release, event.event_id,
            )
            for event in body.events
        ]  # fmt: skip
        repeated = await writes.run(keep_events, service.log, events)
        return EventsAnswer(kept=len(events), repeated=repeated)


def _answer(
    release: str, answer: Answer, answer_id: str | None = None, found_by: Sequence[str] | None = None
) -> Response:
    """found_by: the release of each hit, where two are interleaved."""
    scores = np.round([hit.score for hit in answer.hits], 6).tolist()
    hits: list[dict[str, Any]] = [
        {"note_id": hit.note_id, "score": score, "because": hit.because}
        for hit, score in zip(answer.hits, scores, strict=True)
    ]
    for hit, by in zip(hits, found_by or (), strict=False):
        hit["release"] = by
    body = {
        "answer": answer_id, "release": release, "seq": answer.seq, "hits": hits, "unknown": answer.unknown,
        "partial": answer.is_partial,
    }  # fmt: skip
    return Response(msgspec.json.encode(body), media_type="application/json")


def _stored(cards: Cards, note_id: str) -> tuple[Note, bytes | None]:
    """A note and its picture. Raises KeyError if it is not there."""
    if (found := cards.note(note_id)) is None:
        raise KeyError(note_id)
    return found[0], cards.image(note_id)


async def _embedded(
    request: Request, by: LiveRelease, note: Note, image: bytes | None, inputs: InputKind
) -> np.ndarray:
    """The unit vector [d] of what the model reads of a note. Raises BadNote where there is nothing of it."""
    if inputs == "image" and image is None:
        raise BadNote("there is no picture, and inputs = image reads nothing else")
    if inputs == "text" and not has_text(note):
        raise BadNote("there is no text, and inputs = text reads nothing else")
    embedding = by.model.submit(note, None if inputs == "text" else image, inputs)
    try:
        embedded: Embedded = await unless_left(request, asyncio.wrap_future(embedding))
    finally:
        embedding.cancel()
    return embedded.vector
