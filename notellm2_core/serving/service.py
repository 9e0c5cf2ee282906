"""The service without HTTP: notes are written to the log, and found.

The log is the truth. A note is embedded, then written with its vector in one transaction, then shown. Where embedding
takes longer than the caller waits, it is written without, and embedded afterwards. Other processes that follow the same
log show the same notes.
"""

import time
from collections.abc import Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.serving.cards import Cards
from notellm2_core.serving.engine import Engine
from notellm2_core.serving.group_commit import GroupCommit
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import LogUnavailable, NoteLog, Receipt, Write
from notellm2_core.serving.pictures import PictureProcess
from notellm2_core.serving.served_releases import ServedReleases

_COMMIT_SECONDS = 30.0  # that a writer waits for the disk, on top of its own patience


@dataclass(frozen=True)
class Written:
    """What became of a write. `is_found`: searches see it by now. `image`: what became of the picture, if embedded."""

    receipt: Receipt
    is_found: bool
    image: str | None = None


class NotReady(RuntimeError):
    """The service has not read the log up to the place that was asked for."""


class Service:
    """Any number of threads use it."""

    def __init__(
        self,
        lake: Lake,
        log: NoteLog,
        release_id: str,
        source: Path | None = None,
        engine: Engine | None = None,
        embedder: str | None = None,
    ) -> None:
        """source: the folder of the notes' pictures; None: not here. engine, embedder: as of `ServedReleases`, which
        raises the same.
        """
        self.lake, self.log, self._source = lake, log, source
        self._at_start, self._was_ready = log.last_seq(), False
        self.releases = ServedReleases(lake, log, release_id, engine, embedder)
        self._commit = GroupCommit(log)
        self._cards: dict[str, Cards] = {}
        self._pictures = PictureProcess()

    @property
    def current(self) -> LiveRelease:
        """The release that answers. A request takes it once."""
        return self.releases.current

    @property
    def is_ready(self) -> bool:
        """Whether the log has been read up to where it was at the start. It stays ready where the log fails later.

        Notes that wait for their vectors are found later.
        """
        if not self._was_ready:
            self._was_ready = self.releases.follower.has_read(self._at_start)
        return self._was_ready

    @property
    def lag(self) -> int:
        """How many of the entries that were read the current release does not show yet."""
        return self.releases.follower.num_read - self.current.index.delta.view.seq

    def cards(self, release: LiveRelease) -> Cards:
        """Texts and pictures of the notes of a release, and of those in the log."""
        if (cards := self._cards.get(release.id)) is None:
            in_memory = {other.id for other in self.releases.in_memory}
            cards = Cards(self.log, release.notes, self._source, self._pictures)
            self._cards = {i: c for i, c in self._cards.items() if i in in_memory} | {release.id: cards}
        return cards

    def write(self, note: Note, image: bytes | None, version: int | None, seconds: float) -> Written:
        """Write a note; wait about `seconds` until searches see it.

        Raises BadNote for a note or a picture that cannot be embedded, EmbedderBusy, EmbedderDied, EmbedderDown,
        ValueError (of it, VersionConflict for a version that has other content), LogBusy and LogFull: nothing was
        written then. After LogUnavailable it may be there or not.
        """
        Write(note, image, False, version)  # its errors come before the model's work
        deadline, current = time.monotonic() + seconds, self.current
        vectors: Mapping[str, np.ndarray] = {}
        status = None
        embedding = current.model.submit(note, image)
        with suppress(FutureTimeout):
            embedded = embedding.result(seconds)
            vectors, status = {current.weights_id: embedded.vector}, embedded.image
        embedding.cancel()
        return self._write(Write(note, image, False, version, vectors), deadline, status)

    def delete(self, note_id: str, version: int | None, seconds: float) -> Written:
        """Write that a note is gone; wait until searches no longer see it."""
        deadline = time.monotonic() + seconds
        return self._write(Write(Note(note_id, "", (), ""), None, True, version), deadline, None)

    def _write(self, write: Write, deadline: float, image: str | None) -> Written:
        committing = self._commit.submit(write)
        try:
            receipt = committing.result(max(0.0, deadline - time.monotonic()) + _COMMIT_SECONDS)
        except FutureTimeout:
            raise LogUnavailable("the log does not answer; the write may be there or not: repeat it") from None
        releases = self.releases
        releases.read_on()
        is_found = releases.wait_for(lambda: releases.follower.shows(receipt.seq), deadline)
        return Written(receipt, is_found, image)

    def close(self) -> None:
        """Commit what waits, and end the models' processes."""
        self._commit.close()
        self.releases.close()
        self._pictures.close()
