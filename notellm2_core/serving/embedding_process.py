"""A model in a process of its own: notes go in, vectors come out, in batches across callers.

torch shares neither the interpreter nor the caches of the processor with the searches. What waits while a batch is
embedded makes the next batch, so a single caller never waits for others, and many callers share the model's time.
"""

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from notellm2_core.config.methods import InputKind
from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import MAX_WAITING, BadNote, Embedded, EmbedderBusy, EmbedderDied, EmbedderDown
from notellm2_core.serving.embedding_worker import embed_notes
from notellm2_core.serving.pictures import PictureProcess
from notellm2_core.vision.image_status import MEANINGS, UNUSABLE, Status

_START_SECONDS = 300.0  # for the model to load
_LONGEST_START = 3600.0  # where loading gives way to other work, which may take nearly all of the processor
_LONGEST_BATCH = 600.0  # seconds; a process that takes longer hangs
_ENDED = "the model's process was ended"
_LONGEST_PAUSE = 300.0  # between two starts of a process that fail; it doubles until then
_IDLE_SECONDS = 0.5  # between two looks whether it is to end
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    note: Note
    image: bytes | None
    inputs: InputKind
    done: "Future[Embedded]"
    status: Status = "missing"  # of the image, once it is known


class EmbeddingProcess:
    """Any number of threads submit notes."""

    def __init__(
        self, model: Path, waits: bool = True, weights_id: str | None = None, max_waiting: int = MAX_WAITING,
        batch_notes: int = 16, gives_way: bool = False,
    ) -> None:  # fmt: skip
        """Loads the model's folder. waits: until it is loaded; raises ValueError then if it cannot be used.

        Otherwise notes wait until it is; if it cannot be used, they have EmbedderDown, and it is tried again.
        weights_id: a model with other weights is not used; None: whatever the folder holds is. gives_way: it is loaded
        at a lower priority; not where it has to be loaded again.
        """
        self._model, self._weights_id, self._batch_notes = model, weights_id, batch_notes
        self._waiting: queue.Queue[_Job] = queue.Queue(max_waiting)
        self._closing, self._closed, self._stop = threading.Lock(), False, threading.Event()
        self._process: BaseProcess | None = None
        self._pictures = PictureProcess()
        self._is_running = False
        self._pause, self._not_before = 0.0, 0.0  # after a start that failed
        self.problem: str | None = None  # why the last start failed; None: it did not, or goes on
        self._launch(gives_way)
        if waits:
            try:
                self._await_model()
            except (ValueError, OSError):
                self._kill()
                raise
        self._thread = threading.Thread(target=self._dispatch, name="embedding", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return self._waiting.qsize()

    @property
    def is_running(self) -> bool:
        """Whether the model is loaded."""
        return self._is_running

    def submit(self, note: Note, image: bytes | None = None, inputs: InputKind = "multimodal") -> "Future[Embedded]":
        """Embed a note by these inputs. The result has BadNote for one that cannot be embedded.

        One that is cancelled while it waits is not embedded. Raises EmbedderBusy, and EmbedderDown after `close`.
        """
        job = _Job(note, image, inputs, Future())
        with self._closing:
            if self._closed:
                raise EmbedderDown(_ENDED)
            try:
                self._waiting.put_nowait(job)
            except queue.Full:
                raise EmbedderBusy(f"{self._waiting.maxsize} notes wait to be embedded") from None
        return job.done

    def close(self) -> None:
        """End the process. Notes that wait fail with EmbedderDown."""
        with self._closing:
            self._closed = True
        self._stop.set()
        self._kill()  # a batch that is being embedded fails at once
        self._pictures.close()
        self._thread.join()
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _launch(self, gives_way: bool = False) -> None:
        """Start the process, which then loads the model."""
        self._start_seconds = _LONGEST_START if gives_way else _START_SECONDS
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._model, self._weights_id, gives_way)
        process = context.Process(target=embed_notes, args=arguments, name="embedder", daemon=True)
        process.start()
        self._process = process
        theirs.close()

    def _await_model(self) -> None:
        """Wait until the process has loaded the model. Raises ValueError or OSError if it cannot."""
        if not self._pipe.poll(self._start_seconds):
            raise ValueError(f"the model {self._model} did not load in {self._start_seconds:.0f} s")
        try:
            problem = self._pipe.recv()
        except EOFError:
            raise ValueError(f"the process that loads the model {self._model} ended") from None
        if problem is not None:
            raise ValueError(problem)
        self._is_running, self._pause, self.problem = True, 0.0, None

    def _restart(self, is_launched: bool = False) -> None:
        """Wait for the model, of a new process. Raises EmbedderDown if it cannot be used, and soon after that."""
        if time.monotonic() < self._not_before:
            raise EmbedderDown(self.problem)
        try:
            if not is_launched:
                self._kill()
                self._launch()
            self._await_model()
        except (ValueError, OSError) as e:
            self.problem = f"the model's process failed: {e}"
            self._pause = min(_LONGEST_PAUSE, max(1.0, 2 * self._pause))
            self._not_before = time.monotonic() + self._pause
            if not self._stop.is_set():
                _LOGGER.error("notes cannot be embedded now: %s; it is tried again in %.0f s", e, self._pause)
            raise EmbedderDown(self.problem) from None

    def _dispatch(self) -> None:
        if not self._is_running:
            with suppress(EmbedderDown):
                self._restart(is_launched=True)
        while not self._stop.is_set():
            if jobs := [job for job in self._next_jobs() if job.done.set_running_or_notify_cancel()]:
                try:
                    if checked := self._check(jobs):
                        self._embed(checked)
                except EmbedderDown as e:
                    _fail(jobs, e)
                except Exception as e:  # whatever it is, nobody waits for ever
                    _fail(jobs, EmbedderDown(f"the model's process failed: {e}"))
        while not self._waiting.empty():
            job = self._waiting.get()
            if job.done.set_running_or_notify_cancel():
                _fail([job], EmbedderDown(_ENDED))

    def _next_jobs(self) -> list[_Job]:
        """What waits by now, up to a batch; after a moment without any, none."""
        jobs: list[_Job] = []
        with suppress(queue.Empty):
            jobs.append(self._waiting.get(timeout=_IDLE_SECONDS))
            while len(jobs) < self._batch_notes:
                jobs.append(self._waiting.get_nowait())
        return jobs

    def _check(self, jobs: Sequence[_Job]) -> list[_Job]:
        """The jobs whose pictures can be used. The model decodes these again: so few are in memory at a time."""
        checked = []
        for job in jobs:
            status = "missing" if job.image is None else self._pictures.status(job.image)
            if status in UNUSABLE and not self._stop.is_set():
                job.done.set_exception(BadNote(f"the picture cannot be used: {MEANINGS[status]}"))
            else:
                checked.append(replace(job, status=status))
        return checked

    def _embed(self, jobs: Sequence[_Job]) -> None:
        """Set the results of the jobs. Where the process ends, each is tried alone: one of them may be the cause."""
        if self._stop.is_set():
            _fail(jobs, EmbedderDown(_ENDED))
            return
        if not self._is_running:
            self._restart()
        try:
            self._pipe.send([(job.note, job.image, job.inputs) for job in jobs])
            if not self._pipe.poll(_LONGEST_BATCH):
                raise EOFError
            results = self._pipe.recv()
        except (EOFError, OSError):
            self._is_running = False
            if len(jobs) > 1:
                for job in jobs:
                    self._embed([job])
            elif self._stop.is_set():
                _fail(jobs, EmbedderDown(_ENDED))
            else:
                _fail(jobs, EmbedderDied("the embedder died of this note"))
            return
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, str):
                job.done.set_exception(BadNote(result))
            else:
                job.done.set_result(Embedded(result, job.status))


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.done.done():
            job.done.set_exception(error)
