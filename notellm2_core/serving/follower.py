"""Follows the log for one release: what is written there is embedded where it has to be, and shown."""

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future
from datetime import datetime

import numpy as np

from notellm2_core.serving.embedding import BadNote, Embedded, EmbedderBusy, EmbedderDied, EmbedderDown
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import Entry, NoteLog

_TAIL_ENTRIES = 1000
_TRIES = 3  # to embed a note that the embedder dies of
_PAUSE_SECONDS = 1.0  # after the model was down
_AT_ONCE = 32  # notes that are given to the model: callers of the service have the other places of its queue
_LOGGER = logging.getLogger(__name__)


class Follower:
    """One thread advances it. Any thread may ask what it shows."""

    def __init__(
        self, log: NoteLog, release: LiveRelease, wake: threading.Event, earlier: "Follower | None" = None
    ) -> None:
        """wake: set when a vector is there. earlier: the one before, of the same model, which knows the bad notes."""
        self._log, self._release, self._wake = log, release, wake
        self._read = release.base.cut_seq  # entries up to here were read
        self._waiting = release.base.waiting  # entries before it that were not read yet
        self._newest: dict[str, int] = {}  # note_id -> its last entry that was read, while others of it are embedded
        self._embedding: dict[int, tuple[Entry, Future[Embedded] | None]] = {}  # entries that wait for their vector
        self._changes: dict[str, np.ndarray | None] = {}  # what is to be applied
        self._unsaved: dict[int, np.ndarray] = {}  # vectors that the log does not have yet
        self._deaths: Counter[int] = Counter() if earlier is None else Counter(earlier._deaths)  # by entry
        self._bad: dict[int, str] = {} if earlier is None else dict(earlier._bad)  # entries that cannot be embedded
        self._not_before = 0.0  # no note is given to the model before this time, which was down
        self._shown = self._read, frozenset(self._waiting)  # applied up to here, except these
        self.unusable: dict[str, str] = {}  # notes that this model cannot embed, and why
        self.waits_since: datetime | None = None  # when the oldest note that waits for its vector was written (UTC)

    @property
    def num_read(self) -> int:
        """The last entry that was read."""
        return self._read

    def shows(self, seq: int) -> bool:
        """Whether this entry is applied."""
        upto, without = self._shown
        return seq <= upto and seq not in without

    def has_read(self, seq: int) -> bool:
        """Whether this entry and all before it are applied, except those that wait for their vectors."""
        return not self._waiting and self._shown[0] >= seq

    @property
    def lacking(self) -> frozenset[int]:
        """The entries that were read and wait for their vectors."""
        return self._shown[1]

    def shows_upto(self, seq: int) -> bool:
        """Whether this entry and all before it are applied."""
        return self._release.index.delta.view.seq >= seq

    def advance(self) -> bool:
        """Read and apply what there is. Returns whether anything changed.

        After an error of the log, the next call goes on where this one was: nothing is skipped.
        """
        self._read_entries()
        self._collect()
        upto = min(self._embedding, default=self._read + 1) - 1
        self.waits_since = self._embedding[upto + 1][0].time if self._embedding else None
        shown = self._read, frozenset(self._embedding)
        if not self._changes and shown == self._shown:
            self._save()
            return False
        self._release.index.apply(self._changes, upto)
        self._changes, self._shown = {}, shown
        self._save()
        return True

    def _read_entries(self) -> None:
        """Read the next entries of the log, with their vectors."""
        entries = self._log.newest(self._waiting) if self._waiting else self._log.tail(self._read, _TAIL_ENTRIES)
        if not entries:
            self._waiting = ()
            return
        last = entries[-1].seq
        if self._waiting:
            known = self._log.vectors_of(self._release.weights_id, [entry.seq for entry in entries])
        else:
            seqs, vectors = self._log.vectors(self._release.weights_id, entries[0].seq - 1, last)
            known = dict(zip(seqs, vectors, strict=True))
        newest = {entry.note.note_id: entry.seq for entry in entries}
        deleted = {entry.note.note_id for entry in entries if entry.deleted}
        for entry in entries:
            note_id = entry.note.note_id
            if newest[note_id] != entry.seq:
                continue
            self.unusable.pop(note_id, None)
            if entry.deleted:
                self._changes[note_id] = None
            elif entry.seq in known:
                self._changes[note_id] = known[entry.seq]
            elif entry.seq in self._bad:
                self.unusable[note_id], self._changes[note_id] = self._bad[entry.seq], None
            else:
                self._embedding[entry.seq] = entry, None
                if note_id in deleted:  # and written again: what was before the deletion does not stay meanwhile
                    self._changes[note_id] = None
        self._newest |= newest
        self._waiting, self._read = (), max(self._read, last)

    def _collect(self) -> None:
        """Take the vectors that are there by now, and submit other notes as far as the model takes them."""
        num_submitted, is_full = 0, False
        for seq, (entry, future) in sorted(self._embedding.items()):
            note_id = entry.note.note_id
            if self._newest[note_id] != seq:  # written again meanwhile
                del self._embedding[seq]
            elif future is None:
                is_full = is_full or num_submitted >= _AT_ONCE or not self._submit(seq, entry)
                num_submitted += not is_full
            elif future.done():
                self._take(seq, entry, future)
            else:
                num_submitted += 1
        if not self._embedding:
            self._newest.clear()  # only those that wait need it

    def _submit(self, seq: int, entry: Entry) -> bool:
        if time.monotonic() < self._not_before:
            return False
        image = None if entry.image_id is None else self._log.image(entry.image_id)
        try:
            future = self._release.model.submit(entry.note, image)
        except (EmbedderBusy, EmbedderDown):
            return False
        future.add_done_callback(lambda _: self._wake.set())
        self._embedding[seq] = entry, future
        return True

    def _take(self, seq: int, entry: Entry, future: "Future[Embedded]") -> None:
        note_id, problem = entry.note.note_id, ""
        try:
            self._changes[note_id] = self._unsaved[seq] = future.result().vector
        except (EmbedderBusy, EmbedderDown):  # not the note's fault
            self._embedding[seq] = entry, None
            self._not_before = time.monotonic() + _PAUSE_SECONDS
            return
        except EmbedderDied as e:  # it is tried again, unless it is the note that the process dies of
            self._deaths[seq] += 1
            if self._deaths[seq] < _TRIES:
                self._embedding[seq] = entry, None
                return
            problem = str(e)
        except BadNote as e:
            problem = str(e)
        if problem:
            self._bad[seq] = self.unusable[note_id] = problem
            self._changes[note_id] = None
            _LOGGER.warning("release %s: note %r is not shown: %s", self._release.id, note_id, problem)
        del self._embedding[seq]

    def _save(self) -> None:
        """Keep the vectors in the log, so that nobody has to embed these notes again."""
        if self._unsaved:
            self._log.put_vectors(self._release.weights_id, self._unsaved)
            self._unsaved = {}
