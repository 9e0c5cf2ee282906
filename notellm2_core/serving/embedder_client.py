"""A model of an embedder on another machine, as a service uses it: like a process of its own.

What comes back is not trusted: a vector of another model, width or length is refused, and nothing is shown by it.
"""

import logging
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

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
_LOGGER = logging.getLogger(__name__)


class EmbedderClient:
    """An `Embedding`. A thread looks whether the model is loaded; while it is not, notes fail at once."""

    def __init__(self, url: str, weights_id: str, dim: int, waits: bool = True) -> None:
        """weights_id, dim: of the vectors. waits: until the model is loaded; raises ValueError then if it cannot be.

        The key is that of the environment variable NOTELLM2_EMBEDDER_KEY, if there is one.
        """
        self._url, self._weights_id, self._dim = url, weights_id, dim
        key = os.environ.get(KEY_VARIABLE)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(keepalive_expiry=2.0)  # less than the server's, which would close it while we send
        self._address = f"{url.rstrip('/')}/models/{weights_id}"
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT, limits=limits)
        self._state = threading.Condition()
        self._is_running, self._closed = False, False
        self._problem: str | None = None  # why notes cannot be embedded now; None: they can, or the model is loading
        self._num = 0  # notes that were submitted and are not done
        self._pool = ThreadPoolExecutor(_AT_ONCE, "embedder")
        self._watching = threading.Thread(target=self._watch, name="watch the embedder", daemon=True)
        self._watching.start()
        if waits:
            try:
                self._await_model()
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
        """As `Embedding.submit`."""
        with self._state:
            if self._closed:
                raise EmbedderDown(_CLOSED)
            if self._num >= MAX_WAITING:
                raise EmbedderBusy(f"{self._num} notes wait to be embedded")
            self._num += 1
            future = self._pool.submit(self._embed, note, image, inputs)
        future.add_done_callback(lambda _: self._count_done())
        return future

    def close(self) -> None:
        """End the connections. Notes that wait fail with EmbedderDown."""
        with self._state:
            self._closed, self._is_running, self._problem = True, False, _CLOSED
            self._state.notify_all()
        self._http.close()
        self._pool.shutdown()
        self._watching.join()

    def _count_done(self) -> None:
        with self._state:
            self._num -= 1

    def _watch(self) -> None:
        """Keep `_is_running` and `_problem` up to date."""
        while not self._closed:
            try:
                answer = self._http.get(self._address, timeout=_LOOK_TIMEOUT)
                if answer.status_code == 429:  # other models are in use there, for now
                    self._set(False, None)
                else:
                    found = _content(answer)
                    self._require_model(found)
                    self._set(found["is_loaded"], found["problem"])
            except (httpx.HTTPError, RuntimeError, ValueError, KeyError) as e:
                self._set(False, str(e))
            with self._state:
                self._state.wait_for(lambda: self._closed, _ASK_SECONDS if self._is_running else _ASK_SOON_SECONDS)

    def _set(self, is_running: bool, problem: str | None) -> None:
        with self._state:
            if self._closed:
                return
            if problem is not None and self._problem is None:
                _LOGGER.error("notes cannot be embedded now by %s: %s; it is tried again", self._url, problem)
            self._is_running, self._problem = is_running, None if is_running else problem
            self._state.notify_all()

    def _await_model(self) -> None:
        """Wait while the model is loading. Raises EmbedderDown if it cannot be used."""
        with self._state:
            self._state.wait_for(lambda: self._is_running or self._problem is not None, _LOAD_SECONDS)
            if not self._is_running:
                problem = self._problem or f"the model did not load in {_LOAD_SECONDS:.0f} s"
                raise EmbedderDown(f"the embedder {self._url}: {problem}")

    def _embed(self, note: Note, image: bytes | None, inputs: InputKind) -> Embedded:
        self._await_model()
        body = {"title": note.title, "topics": note.topics, "content": note.content, "image": image, "inputs": inputs}
        headers = {"Content-Type": "application/json"}
        try:
            answer = self._http.post(f"{self._address}/embed", content=msgspec.json.encode(body), headers=headers)
        except (httpx.HTTPError, RuntimeError) as e:  # RuntimeError: of a client that was closed
            self._set(False, str(e))  # the others do not wait for the same
            raise EmbedderDown(f"the embedder {self._url}: {e}") from None
        return self._embedded(answer)

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
            raise EmbedderDown(f"the embedder {self._url} answers wrongly: {e}") from None

    def _require_model(self, found: dict[str, Any]) -> None:
        if found.get("weights_id") != self._weights_id:
            raise EmbedderDown(
                f"the embedder {self._url} answers by model {found.get('weights_id')}, not by {self._weights_id}"
            )


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
