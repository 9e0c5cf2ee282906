"""Processes that write to a log. They are forked from one that has imported everything, so that they start at once.

    python -m tests.notellm2_core.serving.writers

reads a list of jobs a line. It starts a process for each, prints their ids, and `done` when all have ended. A process
prints the numbers of the entries of each transaction as soon as they are acknowledged.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from subprocess import Popen

from notellm2_core.notes.note import Note
from notellm2_core.serving.log import NoteLog, Write

NOTES_OF_A_WRITE = 3


@dataclass
class Writers:
    """The starting process, as a test sees it."""

    process: Popen[str]

    def start(self, url: str, names: Sequence[str], num_writes: int, num_threads: int = 1) -> list[int]:
        """The ids of new processes, one for each name. Each thread of a process writes `num_writes` times."""
        assert self.process.stdin is not None
        jobs = [(url, name, num_writes, num_threads) for name in names]
        print(json.dumps(jobs), file=self.process.stdin, flush=True)
        pids: list[int] = json.loads(self._line())
        return pids

    def acknowledged(self) -> Iterator[list[int]]:
        """The numbers of the entries of each transaction, until all processes have ended."""
        while (line := self._line()) != "done\n":
            yield json.loads(line)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the writers' process has ended"
        return line


def notes(name: str, number: int) -> list[Note]:
    """What the writer `name` writes in its transaction `number`."""
    ids = [f"{name}-{number}-{part}" for part in range(NOTES_OF_A_WRITE)]
    return [Note(note_id, f"title {number}", ("a", "b"), "x" * 50) for note_id in ids]


def _write(url: str, name: str, num_writes: int, num_threads: int) -> None:
    log = NoteLog.open(url)

    def write(thread: int) -> None:
        for number in range(num_writes):
            receipts = log.append([Write(note, image=b"image") for note in notes(f"{name}-{thread}", number)])
            os.write(1, f"{json.dumps([receipt.seq for receipt in receipts])}\n".encode())

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()


def _start(jobs: Sequence[tuple[str, str, int, int]]) -> list[int]:
    """Fork a process for each job. They begin together, when their ids are printed."""
    gate, opened = os.pipe()
    pids = []
    for job in jobs:
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            os.close(opened)
            os.read(gate, 1)
            _write(*job)
            code = 0
        finally:
            os._exit(code)
    os.write(1, f"{json.dumps(pids)}\n".encode())
    os.close(opened)
    os.close(gate)
    return pids


if __name__ == "__main__":
    for line in sys.stdin:
        for pid in _start(json.loads(line)):
            os.waitpid(pid, 0)
        os.write(1, b"done\n")
