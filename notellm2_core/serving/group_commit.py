"""The writes of many callers, committed to the log together."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from notellm2_core.serving.entry import Receipt, Write
from notellm2_core.serving.log import NoteLog


class LogBusy(queue.Full):
    """As many writes are waiting as may wait. This one was not taken, and may be repeated later."""


class GroupCommit:
    """Commits the writes of many threads or tasks together: one sync of the disk serves them all.

    window_seconds: how long the first write of a transaction waits for others. max_writes: of a transaction.
    max_waiting: how many writes may wait for their transaction.
    """

    def __init__(
        self, log: NoteLog, window_seconds: float = 0.005, max_writes: int = 512, max_waiting: int = 4096
    ) -> None:
        self._log, self._window_seconds, self._max_writes = log, window_seconds, max_writes
        self._waiting: queue.Queue[tuple[Write, Future[Receipt]] | None] = queue.Queue(max_waiting)
        self._is_closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="group commit of the log", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> Future[Receipt]:
        """Take a write. Its future has the receipt once the note is on the disk, or the error that `append` raises.

        A write whose future is cancelled before its transaction begins is not made. Raises LogBusy where `max_waiting`
        writes are waiting, and RuntimeError after `close`.
        """
        future: Future[Receipt] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("this group commit is closed.")
            try:
                self._waiting.put_nowait((write, future))
            except queue.Full:
                raise LogBusy(f"{self._waiting.maxsize} writes are waiting for the log.") from None
        return future

    def close(self) -> None:
        """Commit what is waiting, and take no more."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            group = []
            waiting = self._waiting.get()
            deadline = time.monotonic() + self._window_seconds
            while waiting is not None:
                group.append(waiting)
                if len(group) == self._max_writes:
                    break
                try:
                    waiting = self._waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
            is_open = waiting is not None
            self._commit([(write, future) for write, future in group if future.set_running_or_notify_cancel()])

    def _commit(self, group: Sequence[tuple[Write, Future[Receipt]]]) -> None:
        results: Sequence[Receipt | Exception]
        try:
            results = self._log.append_each([write for write, _ in group]) if group else []
        except Exception as e:  # every caller has it, and the thread serves the next ones
            results = [e] * len(group)
        for (_, future), result in zip(group, results, strict=True):
            if isinstance(result, Receipt):
                future.set_result(result)
            else:
                future.set_exception(result)
