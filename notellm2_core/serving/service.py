"""The service without HTTP: notes are written to the log and found; releases are switched.

The log is the truth. A note is embedded, then written with its vector in one transaction, then shown. Where embedding
takes longer than the caller waits, it is written without, and embedded afterwards. One thread follows the log and
applies its entries, in their order, to every release in memory: the one that answers, and the one before it, so that
going back loses nothing. Other processes that follow the same log show the same notes.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.release.release import open_release
from notellm2_core.serving.cards import Cards
from notellm2_core.serving.embedding import BadNote, Embedded, EmbedderBusy, EmbedderDied
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import Entry, GroupCommit, NoteLog, Receipt, Write

_POLL_SECONDS = 0.2  # between two looks at the log, for entries of other processes
_TAIL_ENTRIES = 1000
_TRIES = 3  # to embed a note that the embedder dies of


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

    def __init__(self, lake: Lake, log: NoteLog, release_id: str, source: Path | None = None) -> None:
        """Open the release, and begin to follow the log. source: the folder of the notes' pictures; None: not here.

        Raises ValueError if the release cannot be used.
        """
        self.lake, self.log, self._source = lake, log, source
        self._commit = GroupCommit(log)
        self._releases: tuple[LiveRelease, ...] = (LiveRelease.open(lake, open_release(lake, release_id)),)
        self._at_start = log.last_seq()
        self._wake = threading.Event()
        self._followers = {self.current.id: _Follower(log, self.current, self._wake)}
        self._applied = threading.Condition()
        self._switching, self._closed = threading.Lock(), False
        self.problem: str | None = None  # why the log cannot be followed at present
        self._thread = threading.Thread(target=self._follow, name="follow the log", daemon=True)
        self._thread.start()

    @property
    def current(self) -> LiveRelease:
        """The release that answers. A request takes it once."""
        return self._releases[0]

    @property
    def releases(self) -> Sequence[LiveRelease]:
        """Those in memory, the one that answers first."""
        return self._releases

    @cached_property
    def _cards(self) -> dict[str, Cards]:
        return {}

    def cards(self, release: LiveRelease) -> Cards:
        """Texts and pictures of the notes of a release, and of those in the log."""
        if release.id not in self._cards:
            self._cards[release.id] = Cards(self.log, release.notes, self._source)
        return self._cards[release.id]

    def release(self, release_id: str | None) -> LiveRelease:
        """One of those in memory; None: the one that answers. Raises KeyError if it is not in memory."""
        for release in self._releases:
            if release_id in (None, release.id):
                return release
        raise KeyError(release_id)

    @property
    def is_ready(self) -> bool:
        """Whether the entries that were there at the start are shown, and the log can be followed."""
        return self.problem is None and self._follower.shows_upto(self._at_start)

    @property
    def lag(self) -> int:
        """How many entries of the log the current release does not show yet."""
        return self.log.last_seq() - self.current.index.delta.view.seq

    def write(
        self, note: Note, image: bytes | None, version: int | None, vector: np.ndarray | None, seconds: float
    ) -> Written:
        """Write a note; wait at most `seconds` until searches see it.

        Raises BadNote for a note or a picture that cannot be embedded, EmbedderBusy, EmbedderDied, ValueError for a
        version that has other content, LogBusy and LogFull: nothing was written then.
        """
        deadline, current = time.monotonic() + seconds, self.current
        vectors: Mapping[str, np.ndarray] = {}
        status = None
        if vector is not None:
            vectors = {current.weights_id: vector}
        else:
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
        receipt = self._commit.submit(write).result()
        self._wake.set()
        return Written(receipt, self._wait(lambda: self._follower.shows(receipt.seq), deadline), image)

    def wait_for(self, seq: int, deadline: float) -> bool:
        """Whether the current release shows all entries up to `seq`, at the latest by the deadline (monotonic)."""
        return self._wait(lambda: self._follower.shows_upto(seq), deadline)

    @property
    def _follower(self) -> "_Follower":
        return self._followers[self.current.id]

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        with self._applied:
            return self._applied.wait_for(condition, max(0.0, deadline - time.monotonic()))

    def activate(self, release_id: str, seconds: float = 3600.0) -> LiveRelease:
        """Answer from another release: load it, embed what came after it, and swap. Returns the one that answers now.

        The one before stays in memory, so that going back is a swap. Raises ValueError if it cannot be used, and
        TimeoutError if it does not catch up with the log in time; the present one then stays.
        """
        with self._switching:
            found = open_release(self.lake, release_id)
            if found.id == self.current.id:
                return self.current
            ready = next((release for release in self._releases if release.id == found.id), None)
            fresh = ready is None
            release = LiveRelease.open(self.lake, found) if ready is None else ready
            if fresh:
                self._followers |= {release.id: _Follower(self.log, release, self._wake)}
                self._wake.set()
            deadline, target = time.monotonic() + seconds, self.log.last_seq()
            if not self._wait(lambda: self._followers[release.id].shows_upto(target), deadline):
                if fresh:
                    self._forget(release)
                raise TimeoutError(f"release {release.id} did not catch up with the log in {seconds:.0f} s")
            before = self.current
            gone = [old for old in self._releases if old.id not in (release.id, before.id)]
            self._releases = (release, before)
            for old in gone:
                self._forget(old)
            return release

    def _forget(self, release: LiveRelease) -> None:
        self._followers = {key: value for key, value in self._followers.items() if key != release.id}
        release.close()

    def _follow(self) -> None:
        while not self._closed:
            moved = False
            try:
                for follower in tuple(self._followers.values()):
                    moved |= follower.advance()
                self.problem = None
            except Exception as e:  # of the database, mostly; it may come back, and searches go on meanwhile
                self.problem = f"{type(e).__name__}: {e}"
            if moved:
                with self._applied:
                    self._applied.notify_all()
                continue
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def close(self) -> None:
        """Commit what waits, and end the models' processes."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        self._commit.close()
        for release in self._releases:
            release.close()


class _Follower:
    """Applies the entries of the log to one release. Used by one thread, but for `shows`."""

    def __init__(self, log: NoteLog, release: LiveRelease, wake: threading.Event) -> None:
        """wake: set when a vector is there."""
        self._log, self._release, self._wake = log, release, wake
        self._read = release.cut_seq  # entries up to here were read
        self._newest: dict[str, int] = {}  # note_id -> its last entry that was read
        self._embedding: dict[int, tuple[Entry, Future[Embedded] | None]] = {}  # entries that wait for their vector
        self._deaths = Counter[int]()  # entries that the embedder died of, and how often
        self._shown: tuple[int, frozenset[int]] = self._read, frozenset()  # applied up to here, but for these
        self.unusable: dict[str, str] = {}  # notes that this model cannot embed, and why

    def shows(self, seq: int) -> bool:
        """Whether this entry is applied."""
        upto, without = self._shown
        return seq <= upto and seq not in without

    def shows_upto(self, seq: int) -> bool:
        """Whether this entry and all before it are applied."""
        return self._release.index.delta.view.seq >= seq

    def advance(self) -> bool:
        """Read and apply what there is. Returns whether anything changed."""
        entries = self._log.tail(self._read, _TAIL_ENTRIES)
        changes: dict[str, np.ndarray | None] = {}
        if entries:
            self._read = entries[-1].seq
            self._newest |= {entry.note.note_id: entry.seq for entry in entries}
            seqs, vectors = self._log.vectors(self._release.weights_id, entries[0].seq - 1, self._read)
            known = dict(zip(seqs, vectors, strict=True))
            for entry in entries:
                note_id = entry.note.note_id
                if self._newest[note_id] != entry.seq:
                    continue
                if entry.deleted:
                    changes[note_id] = None
                elif entry.seq in known:
                    changes[note_id] = known[entry.seq]
                else:
                    self._embedding[entry.seq] = entry, None
        changes |= self._embedded()
        view = self._release.index.delta.view
        upto = min(self._embedding, default=self._read + 1) - 1
        if not changes and upto == view.seq and not entries:
            return False
        self._release.index.apply(changes, upto)
        self._shown = self._read, frozenset(self._embedding)
        return True

    def _embedded(self) -> dict[str, np.ndarray | None]:
        """The notes whose vectors are there by now; others are submitted as far as the model takes them."""
        done: dict[int, np.ndarray] = {}
        changes: dict[str, np.ndarray | None] = {}
        for seq, (entry, future) in sorted(self._embedding.items()):
            note_id = entry.note.note_id
            if self._newest[note_id] != seq:  # written again meanwhile
                del self._embedding[seq]
            elif future is None:
                image = None if entry.image_id is None else self._log.image(entry.image_id)
                try:
                    future = self._release.model.submit(entry.note, image)
                except EmbedderBusy:
                    break
                future.add_done_callback(lambda _: self._wake.set())
                self._embedding[seq] = entry, future
            elif future.done():
                del self._embedding[seq]
                try:
                    done[seq] = future.result().vector
                    changes[note_id] = done[seq]
                except BadNote as e:
                    self.unusable[note_id], changes[note_id] = str(e), None
                except EmbedderDied as e:  # it is tried again, unless it is the note that the process dies of
                    self._deaths[seq] += 1
                    if self._deaths[seq] < _TRIES:
                        self._embedding[seq] = entry, None
                    else:
                        self.unusable[note_id], changes[note_id] = str(e), None
        if done:
            self._log.put_vectors(self._release.weights_id, done)
        return changes
