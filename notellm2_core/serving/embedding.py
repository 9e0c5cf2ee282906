"""A model in a process of its own: notes go in, vectors come out, in batches across callers.

torch shares neither the interpreter nor the caches of the processor with the searches. What waits while a batch is
embedded makes the next batch, so a single caller never waits for others, and many callers share the model's time.
"""

import multiprocessing
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from notellm2_core.config.methods import InputKind
from notellm2_core.config.source import SourceSettings
from notellm2_core.notes.note import Note, NoteWithImage
from notellm2_core.runtime.processes import die_with_parent
from notellm2_core.vision import images
from notellm2_core.vision.image_status import MEANINGS, UNUSABLE, Status

if TYPE_CHECKING:
    from notellm2_core.inference.embedder import Embedder

_START_SECONDS = 300.0  # for the model to load


class EmbedderBusy(RuntimeError):
    """So many notes wait that no more are taken."""


class EmbedderDied(RuntimeError):
    """The process ended while it embedded this note; a new one has been started."""


class BadNote(ValueError):
    """The note cannot be embedded; the message says why."""


@dataclass(frozen=True)
class Embedded:
    """The unit vector [d] of a note, and what became of its picture."""

    vector: np.ndarray
    image: Status


@dataclass(frozen=True)
class _Job:
    note: Note
    image: bytes | None
    inputs: InputKind
    done: "Future[Embedded]"


class EmbeddingProcess:
    """Any number of threads submit notes."""

    def __init__(self, model: Path, max_waiting: int = 256, batch_notes: int = 16) -> None:
        """Loads the model's folder; raises ValueError if it cannot be used."""
        self._model, self._batch_notes = model, batch_notes
        self._waiting: queue.Queue[_Job | None] = queue.Queue(max_waiting)
        self._start()
        self._thread = threading.Thread(target=self._dispatch, name="embedding", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return self._waiting.qsize()

    def submit(self, note: Note, image: bytes | None = None, inputs: InputKind = "multimodal") -> "Future[Embedded]":
        """Embed a note by these inputs. The result has BadNote for one that cannot be embedded.

        Cancelling it frees its place. Raises EmbedderBusy.
        """
        job = _Job(note, image, inputs, Future())
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise EmbedderBusy(f"{self._waiting.maxsize} notes wait to be embedded") from None
        return job.done

    def close(self) -> None:
        """End the process. Notes that wait are cancelled."""
        while True:
            try:
                job = self._waiting.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.done.cancel()
        self._waiting.put(None)
        self._thread.join()
        self._process.terminate()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._model), name="embedder", daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(_START_SECONDS):
            self._process.kill()
            raise ValueError(f"the model {self._model} did not load in {_START_SECONDS:.0f} s")
        try:
            problem = self._pipe.recv()
        except EOFError:
            raise ValueError(f"the process that loads the model {self._model} ended") from None
        if problem is not None:
            raise ValueError(problem)

    def _dispatch(self) -> None:
        while (job := self._waiting.get()) is not None:
            jobs = [job]
            while len(jobs) < self._batch_notes:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._waiting.put(None)
                    break
                jobs.append(more)
            self._embed([job for job in jobs if job.done.set_running_or_notify_cancel()])

    def _embed(self, jobs: Sequence[_Job]) -> None:
        """Set the results of the jobs. Where the process ends, each is tried alone: one of them may be the cause."""
        if not jobs:
            return
        try:
            self._pipe.send([(job.note, job.image, job.inputs) for job in jobs])
            results = self._pipe.recv()
        except (EOFError, OSError):
            self._process.kill()
            self._process.join()
            try:
                self._start()
            except ValueError as e:
                for job in jobs:
                    job.done.set_exception(EmbedderDied(str(e)))
                return
            if len(jobs) > 1:
                for job in jobs:
                    self._embed([job])
            else:
                jobs[0].done.set_exception(EmbedderDied("the embedder died of this note"))
            return
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Embedded):
                job.done.set_result(result)
            else:
                job.done.set_exception(BadNote(result))


def _serve(pipe: Connection, model: Path) -> None:
    """The process: load the model, then answer each list of notes with a list of Embedded or sentences."""
    die_with_parent()
    from notellm2_core.inference.embedder import Embedder

    try:
        embedder = Embedder.from_pretrained(model)
    except (ValueError, OSError, RuntimeError) as e:
        pipe.send(f"the model {model} cannot be loaded: {e}")
        return
    pipe.send(None)
    while True:
        try:
            notes = pipe.recv()
        except EOFError:
            return
        pipe.send(embed_each(embedder, notes))


Asked = tuple[Note, bytes | None, InputKind]


def embed_each(embedder: "Embedder", notes: Sequence[Asked]) -> list[Embedded | str]:
    """Embed notes together. Of those that cannot be, or whose picture is unusable, a sentence that says why."""
    results: list[Embedded | str] = []
    good: dict[InputKind, list[tuple[int, NoteWithImage, Status]]] = {}
    for place, (note, data, inputs) in enumerate(notes):
        status, picture = ("missing", None) if data is None else decoded(data)
        results.append(f"the picture cannot be used: {MEANINGS[status]}" if status in UNUSABLE else "")
        if status not in UNUSABLE:
            good.setdefault(inputs, []).append((place, NoteWithImage(note, picture), status))
    for inputs, group in good.items():
        try:
            vectors = embedder.embed([note for _, note, _ in group], inputs)
        except (ValueError, RuntimeError) as e:
            reason = f"the note cannot be embedded: {e}"
            for place, _, _ in group:
                results[place] = reason if len(group) == 1 else embed_each(embedder, [notes[place]])[0]
            continue
        for (place, _, status), vector in zip(group, vectors, strict=True):
            results[place] = Embedded(vector, status)
    return results


def decoded(data: bytes) -> tuple[Status, Image.Image | None]:
    """The picture in these bytes; without one, why."""
    max_pixels = SourceSettings().max_image_pixels
    encoded = images.fetch(Path(), None, data, max_pixels)
    return images.decode(encoded.data, max_pixels) if encoded.status == "ok" else (encoded.status, None)
