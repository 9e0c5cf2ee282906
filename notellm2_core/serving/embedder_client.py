"""A model of an embedder on another machine, as a service uses it: like a process of its own.

What comes back is not trusted: a vector of another model, width or length is refused, and nothing is shown by it.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import msgspec
import numpy as np

from notellm2_core.config.methods import InputKind
from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import (
    DIED,
    MAX_WAITING,
    BadNote,
    Embedded,
    EmbedderBusy,
    EmbedderDied,
    EmbedderDown,
)
from notellm2_core.serving.entry import require_unit_vector
from notellm2_core.vision.image_status import STATUSES

KEY_VARIABLE = "NOTELLM2_EMBEDDER_KEY"
_AT_ONCE = 16  # notes that are sent at once: they make a batch there
_LOAD_SECONDS = 300.0  # that a note, or a start, waits for the model
_ASK_SECONDS = 2.0  # between two looks whether it is loaded, which also keep it in memory there
_ASK_SOON_SECONDS = 0.5  # while it is not
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # a note waits in a queue there
_LOOK_TIMEOUT = 5.0
_CLOSED = "the connection to the embedder was closed"
T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


class EmbedderClient:
    """An `Embedding`, on a thread with an event loop, which also looks whether the model is loaded.

    While it is being loaded, notes wait; while it cannot be used, they fail at once.
    """

    def __init__(self, url: str, weights_id: str, dim: int, waits: bool = True) -> None:
        """weights_id, dim: of the vectors. waits: until the model is loaded; raises ValueError then if it cannot be.

        The key is that of the environment variable NOTELLM2_EMBEDDER_KEY, if there is one.
        """
        self._url, self._weights_id, self._dim = url, weights_id, dim
        self._address = f"{url.rstrip('/')}/models/{weights_id}"
        self._is_running, self._closed = False, False
        self._problem: str | None = None  # why notes cannot be embedded now; None: they can, or the model is loading
        self._lock, self._num = threading.Lock(), 0  # notes that were submitted and are not done
        self._loop = asyncio.new_event_loop()
        self._known, self._places = asyncio.Event(), asyncio.Semaphore(_AT_ONCE)  # known: the model is not loading
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedder", daemon=True)
        self._thread.start()
        self._watching = self._run(self._watch())
        if waits:
            try:
                self._run(self._await_model()).result()
            except EmbedderDown as e:
                self.close()
                raise ValueError(str(e)) from None

    @property
    def num_waiting(self) -> int:
        return self._num

    @property
    def is_running(self) -> bool:
        return self._is_running

    def submit(self, note: Note, image: bytes | None = None, inputs: InputKind = "multimodal") -> "Future[Embedded]":
        """As `Embedding.submit`. A note that is cancelled while it is embedded leaves the embedder, too."""
        with self._lock:
            if self._closed:
                raise EmbedderDown(_CLOSED)
            if self._num >= MAX_WAITING:
                raise EmbedderBusy(f"{self._num} notes wait to be embedded")
            self._num += 1
            future = self._run(self._embed(note, image, inputs))
        future.add_done_callback(lambda _: self._count_done())
        return future

    def close(self) -> None:
        """End the connections. Notes that wait fail with EmbedderDown."""
        with self._lock:
            self._closed, self._is_running = True, False
        self._run(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def _count_done(self) -> None:
        with self._lock:
            self._num -= 1

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Keep `_is_running` and `_problem` up to date."""
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(keepalive_expiry=2.0)  # less than the server's, which would close it while we send
        async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=limits) as self._http:
            while True:
                try:
                    answer = await self._http.get(self._address, timeout=_LOOK_TIMEOUT)
                    if answer.status_code == 429:  # other models are in use there, for now
                        self._set(False, None)
                    else:
                        found = _content(answer)
                        self._require_model(found)
                        self._set(found["is_loaded"], found["problem"])
                except (httpx.HTTPError, RuntimeError, ValueError, KeyError) as e:
                    self._set(False, str(e) or type(e).__name__)
                await asyncio.sleep(_ASK_SECONDS if self._is_running else _ASK_SOON_SECONDS)

    def _set(self, is_running: bool, problem: str | None) -> None:
        if problem is not None and self._problem is None:
            _LOGGER.error("notes cannot be embedded now by %s: %s; it is tried again", self._url, problem)
        self._is_running, self._problem = is_running, None if is_running else problem
        if self._is_running or self._problem is not None:
            self._known.set()
        else:
            self._known.clear()

    async def _await_model(self) -> None:
        """Wait while the model is loading. Raises EmbedderDown if it cannot be used."""
        try:
            await asyncio.wait_for(self._known.wait(), _LOAD_SECONDS)
        except TimeoutError:
            raise self._down(f"the model did not load in {_LOAD_SECONDS:.0f} s") from None
        if self._problem is not None:
            raise self._down(self._problem)

    async def _embed(self, note: Note, image: bytes | None, inputs: InputKind) -> Embedded:
        body = {"title": note.title, "topics": note.topics, "content": note.content, "image": image, "inputs": inputs}
        headers = {"Content-Type": "application/json"}
        try:
            async with self._places:
                await self._await_model()
                content = msgspec.json.encode(body)
                return self._embedded(await self._http.post(f"{self._address}/embed", content=content, headers=headers))
        except httpx.HTTPError as e:
            self._set(False, str(e) or type(e).__name__)  # the others do not wait for the same
            raise self._down(str(e)) from None
        except asyncio.CancelledError:
            if self._closed:
                raise EmbedderDown(_CLOSED) from None
            raise

    def _down(self, problem: str) -> EmbedderDown:
        return EmbedderDown(f"the embedder {self._url}: {problem}")

    def _embedded(self, answer: httpx.Response) -> Embedded:
        found = _content(answer)
        self._require_model(found)
        try:
            vector = np.array(found["vector"], np.float32)
            if vector.shape != (self._dim,):
                raise ValueError(f"its vectors have the shape {vector.shape}, not ({self._dim},)")
            require_unit_vector(vector, "sent there")
            if found["image"] not in STATUSES:
                raise ValueError(f"{found['image']!r} is nothing that becomes of a picture")
            return Embedded(vector, found["image"])
        except (ValueError, TypeError, KeyError) as e:
            raise self._down(f"it answers wrongly: {e}") from None

    def _require_model(self, found: dict[str, Any]) -> None:
        if found.get("weights_id") != self._weights_id:
            raise self._down(f"it answers by model {found.get('weights_id')}, not by {self._weights_id}")


def _content(answer: httpx.Response) -> dict[str, Any]:
    """The body of an answer. Raises what its status says."""
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise EmbedderDown(f"it answers {answer.status_code} without a JSON object")
    if answer.status_code == 200:
        return content
    detail = str(content.get("detail"))
    if answer.status_code in (413, 422):
        raise BadNote(detail)
    if answer.status_code == 429:
        raise EmbedderBusy(detail)
    if content.get("type") == DIED:
        raise EmbedderDied(detail)
    raise EmbedderDown(f"it answers {answer.status_code}: {detail}")
