"""The load that the benchmarks of the service put on it, over loopback, and what they count.

A latency is counted from the time at which its request was due. CPU is that of the server's process, without the
model's, and is what to compare where others use the machine.
"""

import asyncio
import json
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil

K, NUM_CONNECTIONS = 100, 8
Request = tuple[str, str, bytes]
Seen = Callable[[float, Request, bytes], None]  # of an answer: when it was due (perf_counter), request, body


@dataclass
class Load:
    """What happened to the requests of a phase."""

    seconds: list[float] = field(default_factory=list)  # from the time at which each was due
    errors: int = 0  # without the refused ones
    refused: int = 0  # with 429: the service had no place for them
    cpu_seconds: float = 0.0  # of the server
    wall_seconds: float = 0.0

    def __str__(self) -> str:
        p50, p99 = (1000 * np.quantile(self.seconds or [np.nan], q) for q in (0.5, 0.99))
        rate = len(self.seconds) / self.wall_seconds
        cpu = 1000 * self.cpu_seconds / max(1, len(self.seconds))
        return f"{rate:.0f} | {p50:.1f} | {p99:.1f} | {cpu:.2f} | {self.refused} | {self.errors}"

    def __iadd__(self, other: "Load") -> "Load":
        """The requests of both, one phase after the other."""
        self.seconds += other.seconds
        self.errors, self.refused = self.errors + other.errors, self.refused + other.refused
        self.cpu_seconds += other.cpu_seconds
        self.wall_seconds += other.wall_seconds
        return self

    def add(self, status: int, seconds: float) -> None:
        """An answer."""
        if status < 300:
            self.seconds.append(seconds)
        elif status == 429:
            self.refused += 1
        else:
            self.errors += 1


class Connection:
    """HTTP/1.1 with as little of its own work as possible: the server has the same two cores."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self.streams is None or self.streams[0].at_eof():  # a server closes idle ones
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        return int(lines[0].split()[1]), await reader.readexactly(length)


async def open_loop(
    port: int, requests: Sequence[Request], rate: float, server: psutil.Process, seen: Seen | None = None
) -> Load:
    """Send the requests at a rate, each at its time, on as many connections as that takes.

    seen: called with each answer that is no error.
    """
    load, free = Load(), [Connection(port) for _ in range(NUM_CONNECTIONS)]
    before, started = server.cpu_times(), time.perf_counter()

    async def send(request: Request, due: float) -> None:
        connection = free.pop() if free else Connection(port)
        try:
            status, body = await connection.ask(*request)
        except (OSError, asyncio.IncompleteReadError):
            load.errors += 1
            return
        free.append(connection)
        load.add(status, time.perf_counter() - due)
        if seen is not None and status < 300:
            seen(due, request, body)

    tasks = []
    for number, request in enumerate(requests):
        due = started + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(send(request, due)))
    await asyncio.gather(*tasks)
    return finished(load, server, before, started)


async def closed_loop(port: int, requests: Sequence[Request], seconds: float, server: psutil.Process) -> Load:
    """Ask as fast as NUM_CONNECTIONS connections can."""
    load, end = Load(), time.perf_counter() + seconds
    before, started = server.cpu_times(), time.perf_counter()

    async def ask(number: int) -> None:
        connection, chance = Connection(port), random.Random(number)
        while (due := time.perf_counter()) < end:
            status, _ = await connection.ask(*chance.choice(requests))
            load.add(status, time.perf_counter() - due)

    await asyncio.gather(*(ask(number) for number in range(NUM_CONNECTIONS)))
    return finished(load, server, before, started)


def finished(load: Load, server: psutil.Process, before: Any, started: float) -> Load:
    """With the CPU and the time since then."""
    after = server.cpu_times()
    load.cpu_seconds = after.user + after.system - before.user - before.system
    load.wall_seconds = time.perf_counter() - started
    return load


def recall_request(history: Sequence[str]) -> Request:
    """`POST /recall` of these notes."""
    return "POST", "/recall", json.dumps({"history": [*history], "k": K}).encode()


def write_result(out: Path, title: str, about: str, lines: Sequence[str]) -> None:
    """A page of results: date, machine and command, a paragraph about the run, and its tables."""
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    head = [f"# {title}", "", f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`", "", about, ""]
    out.write_text("\n".join([*head, *lines]) + "\n")


async def metric(port: int, name: str) -> float:
    """The value of one of the service's metrics, without labels."""
    _, body = await Connection(port).ask("GET", "/metrics", b"")
    return next(float(line.split()[1]) for line in body.decode().splitlines() if line.startswith(f"{name} "))


async def model_loaded(port: int) -> None:
    """Wait until notes can be embedded."""
    while not await metric(port, "notellm2_model_loaded"):
        await asyncio.sleep(0.2)


class Memory(threading.Thread):
    """Watches the memory of a process and its children, in MB. Of pages that several share, each has its part."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.largest, self.is_done = process, 0.0, threading.Event()

    def now(self) -> float:
        """What they hold."""
        total = 0
        for process in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
        return total / 1e6

    def run(self) -> None:
        while not self.is_done.wait(0.2):
            self.largest = max(self.largest, self.now())


def recall_of(port: int, requests: Sequence[Request], alive: Mapping[str, np.ndarray]) -> float:
    """Share of the exact best K in the answers, in percent."""
    names, found = np.array([*alive]), []
    vectors = np.stack([*alive.values()])

    async def ask() -> list[bytes]:
        connection = Connection(port)
        return [(await connection.ask(*request))[1] for request in requests]

    for request, answer in zip(requests, asyncio.run(ask()), strict=True):
        history = json.loads(request[2])["history"]
        scores = (np.stack([alive[name] for name in history]) @ vectors.T).max(axis=0)
        scores[np.isin(names, history)] = -np.inf
        best = set(names[np.argpartition(-scores, K)[:K]])
        found.append(len(best & {hit["note_id"] for hit in json.loads(answer)["hits"]}) / K)
    return 100 * float(np.mean(found))
