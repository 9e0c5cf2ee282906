"""The releases in memory: they show the same notes, one of them answers, and another can take its place.

One thread follows the log and applies its entries, in their order, to every release: the one that answers, and the one
before it, so that going back loses nothing.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import Release, open_release
from notellm2_core.serving.base import marked_bases, open_base
from notellm2_core.serving.engine import Engine, FaissEngine
from notellm2_core.serving.experiment import NO_EXPERIMENT, Experiment, answer_prefix
from notellm2_core.serving.follower import Follower
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.log import NoteLog

_POLL_SECONDS = 0.2  # between two looks at the log, for entries of other processes
_SWITCH_SECONDS = 3600.0  # that a release may take to embed what came after it
_LAST_WRITES_SECONDS = 5.0  # that a swap waits for what was written a moment ago
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Served:
    """A release in memory, and who follows the log for it."""

    release: LiveRelease
    follower: Follower


class ServedReleases:
    """At most two. Any number of threads use it."""

    def __init__(
        self, lake: Lake, log: NoteLog, release_id: str, engine: Engine | None = None, embedder: str | None = None
    ) -> None:
        """Open the release that answers first, and begin to follow the log. engine: where releases are searched, not
        closed here; None: FAISS. embedder: the URL of one; None: the models run in processes of this machine.

        Answers do not wait for the model to be loaded; new notes do. Raises ValueError if the release cannot be used,
        and EngineDown.
        """
        self.lake, self._log, self._engine, self._embedder = lake, log, engine or FaissEngine(), embedder
        found = open_release(lake, release_id)
        base = LiveRelease.checked_base(lake, found, log, self._engine)
        release = LiveRelease.start(lake, found, base, False, embedder)
        self._wake, self._applied, self._switching = threading.Event(), threading.Condition(), threading.Lock()
        self._served: tuple[_Served, ...] = (_Served(release, Follower(log, release, self._wake)),)
        self._arriving: tuple[Follower, ...] = ()  # of a release that is not in memory for searches yet
        self._closed = False
        self.experiment: Experiment | None = None
        self.after_switch: Experiment | None = None  # begins with each new release, the one before as its challenger
        self.num_failures = 0  # times that the log could not be followed
        self.num_refused = 0  # times that a champion, or a new base, could not be taken
        self._tell_engine()
        self._thread = threading.Thread(target=self._follow, name="follow the log", daemon=True)
        self._thread.start()

    @property
    def current(self) -> LiveRelease:
        """The release that answers. A request takes it once."""
        return self._served[0].release

    @property
    def follower(self) -> Follower:
        """Of the release that answers."""
        return self._served[0].follower

    @property
    def in_memory(self) -> Sequence[LiveRelease]:
        """All of them, the one that answers first."""
        return [served.release for served in self._served]

    def get(self, release_id: str | None) -> LiveRelease:
        """One of those in memory; None: the one that answers. Raises KeyError if it is not in memory."""
        if release_id is None:
            return self.current
        if (served := self._find(release_id)) is None:
            raise KeyError(release_id)
        return served.release

    def unusable(self, release: LiveRelease) -> Mapping[str, str]:
        """Notes of the log that the model of one of them cannot embed, and why."""
        served = self._find(release.id)
        return {} if served is None else served.follower.unusable

    def of_user(self, user_id: str | None) -> tuple[str, list[LiveRelease]]:
        """The releases that a user's answer is made from: one, or two to be interleaved, the champion first. And what
        its id begins with: it names the experiment.
        """
        current, experiment = self.current, self.experiment
        challenger = None if experiment is None else self._find(experiment.challenger)
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
            if self._find(found.id) is None:
                self._served = (*self._served[:1], self._load(found, _SWITCH_SECONDS))
                self._tell_engine()
            self.experiment = replace(experiment, challenger=found.id)

    def activate(self, release_id: str, seconds: float = _SWITCH_SECONDS) -> LiveRelease:
        """Answer from another release: load it, embed what came after it, and swap. Returns the one that answers now.

        The one before stays in memory, so that going back is a swap. Raises ValueError if it cannot be used, and
        TimeoutError if it does not catch up with the log in time; the present one then stays.
        """
        with self._switching:
            found, before = open_release(self.lake, release_id), self._served[0]
            if found.id == before.release.id:
                return before.release
            was_here = self._find(found.id)
            served = was_here or self._load(found, seconds)
            follower, target = served.follower, self._log.last_seq()
            self.wait_for(lambda: follower.has_read(target), time.monotonic() + _LAST_WRITES_SECONDS)
            self._served = (served, before)
            if self.after_switch is not None and was_here is None:  # not where somebody goes back
                self.experiment = replace(self.after_switch, challenger=before.release.id)
            self._tell_engine()
            self._end_experiment()
            return served.release

    def refresh(self, seconds: float = 60.0) -> int:
        """Take the newest bases of the releases in memory. Returns how many compaction has made new ones for.

        Raises as `activate`; the base before then stays.
        """
        num_changed = 0
        with self._switching:
            for before in self._served:
                found, mark = before.release.release, before.release.base.mark
                if marked_bases(self.lake, found, self._log)[-1][0] == mark:
                    continue
                base = open_base(self.lake, found, self._log, self._engine)
                if base.mark == mark:
                    raise ValueError(f"the newest base of release {found.id} is damaged")
                later = before.release.with_base(base)
                served = _Served(later, Follower(self._log, later, self._wake, before.follower))
                self._catch_up(served, before.follower, seconds)
                self._served = tuple(served if other is before else other for other in self._served)
                self._tell_engine()
                num_changed += 1
        return num_changed

    def read_on(self) -> None:
        """Something was written: read it at once."""
        self._wake.set()

    def wait_for(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Whether a condition of what is shown holds before the deadline, of `time.monotonic`."""
        with self._applied:
            seconds = max(0.0, deadline - time.monotonic())
            return self._applied.wait_for(lambda: condition() or self._closed, seconds) and not self._closed

    def close(self) -> None:
        """Follow the log no longer, and end the models' processes."""
        self._closed = True
        self._wake.set()
        with self._applied:
            self._applied.notify_all()
        self._thread.join()
        for release in self.in_memory:
            release.close()

    def _find(self, release_id: str) -> _Served | None:
        return next((served for served in self._served if served.release.id == release_id), None)

    def _load(self, found: Release, seconds: float) -> _Served:
        """A release that shows what the present one shows. What is in memory besides that one has to leave for it.

        Raises ValueError before that, where its files cannot be used.
        """
        base = LiveRelease.checked_base(self.lake, found, self._log, self._engine)
        others, self._served = self._served[1:], self._served[:1]  # never three models in memory
        self._end_experiment()
        for other in others:
            other.release.close()
        release = LiveRelease.start(self.lake, found, base, embedder=self._embedder)
        served = _Served(release, Follower(self._log, release, self._wake))
        try:
            self._catch_up(served, self.follower, seconds)
        except BaseException:
            release.close()
            raise
        return served

    def _catch_up(self, served: _Served, present: Follower, seconds: float) -> None:
        """Follow the log for a release until it shows what the present follower does. Raises TimeoutError."""
        follower, target = served.follower, self._log.last_seq()
        self._arriving = (follower,)
        try:
            self._wake.set()
            deadline = time.monotonic() + seconds
            if not self.wait_for(lambda: follower.has_read(target) and follower.lacking <= present.lacking, deadline):
                raise TimeoutError(f"release {served.release.id} did not catch up with the log in {seconds:.0f} s")
        finally:
            self._arriving = ()

    def _tell_engine(self) -> None:
        self._engine.serve([release.base.index for release in self.in_memory])

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
