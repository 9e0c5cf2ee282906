"""Keeps a service up to date with the lake: it answers from the champion of the ledger, and takes compacted bases."""

import logging
import threading
import time

from notellm2_core.lake.ledger import Ledger
from notellm2_core.release.served import LEASE_SECONDS, mark_served
from notellm2_core.serving.service import Service

_POLL_SECONDS = 0.5
_LONGEST_PAUSE = 300.0  # after failures; it doubles until then
_LOGGER = logging.getLogger(__name__)


class Watcher:
    """A thread that looks at the ledger, and at what compaction has made."""

    def __init__(self, service: Service, ledger: Ledger, follows_champion: bool = True) -> None:
        """follows_champion: answer from each new champion. What somebody activates by hand answers until the next."""
        self._service, self._ledger, self._follows = service, ledger, follows_champion
        self._champion: str | None = service.current.id
        self._marked = -LEASE_SECONDS
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch the lake", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Do what there is to do. Raises what keeps it from that: the service stays as it is."""
        now = time.monotonic()
        if now - self._marked > LEASE_SECONDS / 100:
            for release in self._service.releases:
                mark_served(self._service.lake, release.id)
            self._marked = now
        champion = self._ledger.state().champion
        if self._follows and champion is not None and champion != self._champion:
            self._service.activate(champion)
            self._champion, self._marked = champion, -LEASE_SECONDS
            _LOGGER.warning("release %s answers now: it is the new champion", champion)
        if self._service.refresh():
            _LOGGER.warning("release %s answers on a compacted base now", self._service.current.id)

    def close(self) -> None:
        """End the thread, after what it is doing."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        pause, not_before, failed_at = _POLL_SECONDS, 0.0, -1
        while not self._closing.wait(_POLL_SECONDS):
            number = -1
            try:
                number = self._ledger.state().number
                if number == failed_at and time.monotonic() < not_before:
                    continue  # nothing was decided since the last failure
                self.look()
                pause = _POLL_SECONDS
            except Exception as e:  # a damaged release, a full disk: the last good one stays, and a metric counts this
                self._service.num_refused += 1
                pause = min(_LONGEST_PAUSE, 2 * pause)
                not_before, failed_at = time.monotonic() + pause, number
                _LOGGER.error("%s; %s stays, and this is tried again", e, self._service.current.id)
