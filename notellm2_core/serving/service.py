"""The service without HTTP: notes are written to the log and found; releases are switched.

The log is the truth. A note is embedded, then written with its vector in one transaction, then shown. Where embedding
takes longer than the caller waits, it is written without, and embedded afterwards. One thread follows the log and
applies its entries, in their order, to every release in memory: the one that answers, and the one before it, so that
going back loses nothing. Other processes that follow the same log show the same notes.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from notellm2_core.lake.lake import Lake
from notellm2_core.notes.note import Note
from notellm2_core.release.release import Release, open_release
from notellm2_core.serving.base import marked_bases, open_base
from notellm2_core.serving.cards import Cards
from notellm2_core.serving.experiment import NO_EXPERIMENT, Experiment, answer_prefix
from notellm2_core.serving.follower import Follower
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import GroupCommit, LogUnavailable, NoteLog, Receipt, Write

_POLL_SECONDS = 0.2  # between two looks at the log, for entries of other processes
_SWITCH_SECONDS = 3600.0  # that a release may take to embed what came after it
_LAST_WRITES_SECONDS = 5.0  # that a swap waits for what was written a moment ago
_COMMIT_SECONDS = 30.0  # that a writer waits for the disk, on top of its own patience
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What became of a write. `is_found`: searches see it by now. `image`: what became of the picture, if embedded."""

    receipt: Receipt
    is_found: bool
    image: str | None = None


@dataclass(frozen=True)
class _Served:
    """A release in memory, and who follows the log for it."""

    release: LiveRelease
    follower: Follower


class NotReady(RuntimeError):
    """The service has not read the log up to the place that was asked for."""


class Service:
    """Any number of threads use it."""

    def __init__(self, lake: Lake, log: NoteLog, release_id: str, source: Path | None = None) -> None:
        """Open the release, and begin to follow the log. source: the folder of the notes' pictures; None: not here.

        Answers do not wait for the model to be loaded; new notes do.

        Raises ValueError if the release cannot be used.
        """
        self.lake, self.log, self._source = lake, log, source
        at_start = log.last_seq()
        found = open_release(lake, release_id)
        release = LiveRelease.start(lake, found, LiveRelease.checked_base(lake, found, log), waits=False)
        self._commit = GroupCommit(log)
        self._wake, self._applied, self._switching = threading.Event(), threading.Condition(), threading.Lock()
        self._served: tuple[_Served, ...] = (_Served(release, Follower(log, release, self._wake)),)
        self._arriving: tuple[Follower, ...] = ()  # of a release that is not in memory for searches yet
        self._cards: dict[str, Cards] = {}
        self.experiment: Experiment | None = None
        self.after_switch: Experiment | None = None  # begins with each new release, the one before as its challenger
        self._at_start, self._was_ready, self._closed = at_start, False, False
        self.num_failures = 0  # times that the log could not be followed
        self.num_refused = 0  # times that a champion, or a new base, could not be taken
        self._thread = threading.Thread(target=self._follow, name="follow the log", daemon=True)
        self._thread.start()

    @property
    def current(self) -> LiveRelease:
        """The release that answers. A request takes it once."""
        return self._served[0].release

    @property
    def releases(self) -> Sequence[LiveRelease]:
        """Those in memory, the one that answers first."""
        return [served.release for served in self._served]

    def release(self, release_id: str | None) -> LiveRelease:
        """One of those in memory; None: the one that answers. Raises KeyError if it is not in memory."""
        for release in self.releases:
            if release_id in (None, release.id):
                return release
        raise KeyError(release_id)

    def releases_of(self, user_id: str | None) -> tuple[str, list[LiveRelease]]:
        """The releases that a user's answer is made from: one, or two to be interleaved, the champion first. And what
        its id begins with: it names the experiment.
        """
        current, experiment = self.current, self.experiment
        challenger = None if experiment is None else self._in_memory(experiment.challenger)
        if experiment is None or challenger is None or user_id is None:
            return NO_EXPERIMENT, [current]
        prefix = answer_prefix(experiment.kind, current.id, challenger.release.id)
        if experiment.kind == "ab":
            return prefix, [challenger.release if experiment.includes(user_id) else current]
        if experiment.includes(user_id):
            return prefix, [current, challenger.release]
        return NO_EXPERIMENT, [current]

    def begin(self, experiment: Experiment) -> None:
        """Load the challenger beside the release that answers. It lasts until the challenger answers for all, or has to
        leave the memory.

        Raises ValueError if it cannot be used, or answers already.
        """
        with self._switching:
            found = open_release(self.lake, experiment.challenger)
            if found.id == self.current.id:
                raise ValueError(f"release {found.id} answers already: an experiment needs another challenger")
            if self._in_memory(found.id) is None:
                self._served = (*self._served[:1], self._load(found, _SWITCH_SECONDS))
            self.experiment = replace(experiment, challenger=found.id)

    def _in_memory(self, release_id: str) -> "_Served | None":
        return next((served for served in self._served if served.release.id == release_id), None)

    def cards(self, release: LiveRelease) -> Cards:
        """Texts and pictures of the notes of a release, and of those in the log."""
        if release.id not in self._cards:
            self._cards[release.id] = Cards(self.log, release.notes, self._source)
        return self._cards[release.id]

    @property
    def is_ready(self) -> bool:
        """Whether the log has been read up to where it was at the start. It stays ready where the log fails later.

        Notes that wait for their vectors are found later.
        """
        if not self._was_ready:
            self._was_ready = self._follower.has_read(self._at_start)
        return self._was_ready

    @property
    def lag(self) -> int:
        """How many of the entries that were read the current release does not show yet."""
        return self._follower.num_read - self.current.index.delta.view.seq

    @property
    def unusable(self) -> Mapping[str, str]:
        """Notes of the log that the current release's model cannot embed, and why."""
        return self._follower.unusable

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
        self._wake.set()
        return Written(receipt, self._wait(lambda: self._follower.shows(receipt.seq), deadline), image)

    @property
    def _follower(self) -> Follower:
        return self._served[0].follower

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        with self._applied:
            seconds = max(0.0, deadline - time.monotonic())
            return self._applied.wait_for(lambda: condition() or self._closed, seconds) and not self._closed

    def activate(self, release_id: str, seconds: float = _SWITCH_SECONDS) -> LiveRelease:
        """Answer from another release: load it, embed what came after it, and swap. Returns the one that answers now.

        The one before stays in memory, so that going back is a swap. Raises ValueError if it cannot be used, and
        TimeoutError if it does not catch up with the log in time; the present one then stays.
        """
        with self._switching:
            found, before = open_release(self.lake, release_id), self._served[0]
            if found.id == before.release.id:
                return before.release
            was_here = self._in_memory(found.id)
            served = was_here or self._load(found, seconds)
            follower, target = served.follower, self.log.last_seq()
            self._wait(lambda: follower.has_read(target), time.monotonic() + _LAST_WRITES_SECONDS)
            self._served = (served, before)
            if self.after_switch is not None and was_here is None:  # not where somebody goes back
                self.experiment = replace(self.after_switch, challenger=before.release.id)
            self._end_experiment()
            return served.release

    def refresh(self, seconds: float = 60.0) -> int:
        """Take the newest bases of the releases in memory. Returns how many compaction has made new ones for.

        Raises as `activate`; the base before then stays.
        """
        num_changed = 0
        with self._switching:
            for before in self._served:
                release_id, mark = before.release.id, before.release.base.mark
                if marked_bases(self.lake, release_id, self.log)[-1][0] == mark:
                    continue
                base = open_base(self.lake, open_release(self.lake, release_id), self.log)
                if base.mark == mark:
                    raise ValueError(f"the newest base of release {release_id} is damaged")
                later = before.release.with_base(base)
                served = _Served(later, Follower(self.log, later, self._wake, before.follower))
                self._catch_up(served, before.follower, seconds)
                self._served = tuple(served if other is before else other for other in self._served)
                num_changed += 1
        return num_changed

    def _load(self, found: Release, seconds: float) -> _Served:
        """A release that shows what the present one shows. What is in memory besides that one has to leave for it.

        Raises ValueError before that, where its files cannot be used.
        """
        base = LiveRelease.checked_base(self.lake, found, self.log)
        others, self._served = self._served[1:], self._served[:1]  # never three models in memory
        self._end_experiment()
        for other in others:
            self._cards.pop(other.release.id, None)
            other.release.close()
        release = LiveRelease.start(self.lake, found, base)
        served = _Served(release, Follower(self.log, release, self._wake))
        try:
            self._catch_up(served, self._follower, seconds)
        except BaseException:
            release.close()
            raise
        return served

    def _catch_up(self, served: _Served, present: Follower, seconds: float) -> None:
        """Follow the log for a release until it shows what the present follower does. Raises TimeoutError."""
        follower, target = served.follower, self.log.last_seq()
        self._arriving = (follower,)
        try:
            self._wake.set()
            deadline = time.monotonic() + seconds
            if not self._wait(lambda: follower.has_read(target) and follower.lacking <= present.lacking, deadline):
                raise TimeoutError(f"release {served.release.id} did not catch up with the log in {seconds:.0f} s")
        finally:
            self._arriving = ()

    def _end_experiment(self) -> None:
        """End an experiment whose challenger answers for all, or is no longer in memory."""
        if self.experiment is not None:
            ids = [served.release.id for served in self._served[1:]]
            if self.experiment.challenger not in ids:
                _LOGGER.warning("the experiment with %s has ended", self.experiment.challenger)
                self.experiment = None

    def _follow(self) -> None:
        while not self._closed:
            followers = {*(served.follower for served in self._served), *self._arriving}
            moved = [self._advance(follower) for follower in followers]
            if any(moved):
                with self._applied:
                    self._applied.notify_all()
                continue
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _advance(self, follower: Follower) -> bool:
        try:
            return follower.advance()
        except Exception:  # mostly of the database, which may come back; searches go on, and a metric counts this
            self.num_failures += 1
            if self.num_failures & (self.num_failures - 1) == 0:  # the 1st, 2nd, 4th ...: an outage fills no disk
                _LOGGER.exception("the log cannot be followed now (failure %d); it is tried again", self.num_failures)
            return False

    def close(self) -> None:
        """Commit what waits, and end the models' processes."""
        self._closed = True
        self._wake.set()
        with self._applied:
            self._applied.notify_all()
        self._thread.join()
        self._commit.close()
        for release in self.releases:
            release.close()
