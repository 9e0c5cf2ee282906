"""Keeps a service up to date with the lake: it answers from the champion of the ledger, and takes compacted bases."""

import logging
import threading
import time
from collections.abc import Callable

from notellm2_core.lake.ledger import Ledger
from notellm2_core.release.served import LEASE_SECONDS, mark_served
from notellm2_core.serving.served_releases import ServedReleases

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 10.0
_LONGEST_PAUSE = 300.0  # after failures; it doubles until then
_LOGGER = logging.getLogger(__name__)


class Watcher:
    """A thread that looks at the ledger, and at what compaction has made."""

    def __init__(self, releases: ServedReleases, ledger: Ledger, follows_champion: bool = True) -> None:
        """follows_champion: answer from each new champion. What somebody activates by hand answers until the next."""
        self._releases, self._ledger = releases, ledger
        self._champion, self._marked = releases.current.id, -LEASE_SECONDS
        self._looks = [_Look(self._mark), _Look(self._take_bases)]
        if follows_champion:
            self._looks.append(_Look(self._follow_champion, lambda: ledger.state().champion))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch the lake", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, after what it is doing, if that takes only a moment."""
        self._closing.set()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            for look in self._looks:
                if (problem := look.tried()) is not None:  # the last good one stays, and a metric counts this
                    self._releases.num_refused += 1
                    _LOGGER.error("%s; %s stays, and this is tried again", problem, self._releases.current.id)

    def _mark(self) -> None:
        """Say which releases are in memory, so that retention keeps them."""
        if time.monotonic() - self._marked > LEASE_SECONDS / 100:
            for release in self._releases.in_memory:
                mark_served(self._releases.lake, release.id)
            self._marked = time.monotonic()

    def _follow_champion(self) -> None:
        champion = self._ledger.state().champion
        if champion is not None and champion != self._champion:
            self._releases.activate(champion)
            self._champion, self._marked = champion, -LEASE_SECONDS
            _LOGGER.warning("release %s answers now: it is the new champion", champion)

    def _take_bases(self) -> None:
        if self._releases.refresh():
            _LOGGER.warning("release %s answers on a compacted base now", self._releases.current.id)


class _Look:
    """Something that is done again and again; after failures ever more rarely, unless its key has changed."""

    def __init__(self, do: Callable[[], None], key: Callable[[], object] = lambda: None) -> None:
        self._do, self._key = do, key
        self._pause, self._not_before = _POLL_SECONDS, 0.0
        self._failed: object = None  # the key of the last failure

    def tried(self) -> Exception | None:
        """What it failed with; None: it did not, or it is not time yet."""
        key: object = None
        try:
            key = self._key()
            if not self._waits(key):
                self._do()
                self._pause = _POLL_SECONDS
        except Exception as e:  # a damaged release, a full disk, a ledger that cannot be read
            if self._waits(key):
                return None
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
            self._not_before, self._failed = time.monotonic() + self._pause, key
            return e
        return None

    def _waits(self, key: object) -> bool:
        return key == self._failed and time.monotonic() < self._not_before
