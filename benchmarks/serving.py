"""The service under load: latencies of `/recall` at given rates, CPU of a request, saturation, recall, and writes.

    .venv/bin/python benchmarks/serving.py                    100,000 notes; minutes on two quiet cores
    .venv/bin/python benchmarks/serving.py --notes 1000000    the index and the table take most of two hours

A release of each data set of benchmarks/index.py, with a tiny model; one per cent of its notes are deleted, and new
notes of the same distribution are in the log. A recall has 20 history notes and k = 100. The load comes from this
process, over loopback, at a given rate whatever the answers take (open loop): a latency is counted from the time at
which the request was due, so waiting for a slow answer counts, too. CPU is that of the server's process, without the
model's, and is what to compare where others use the machine. Saturation: eight connections that ask again at once.
Recall: of the answers, against exact search over all living notes. Writes: notes with a text, which the tiny model
embeds, at a rate, while recalls go on.

The result is written to benchmarks/results/serving.md.
"""

import argparse
import asyncio
import json
import platform
import random
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from index import DATA_SETS
from serving_site import make_site, write_log

RESULT = Path(__file__).parent / "results" / "serving.md"
HISTORY, K, DELETED, NUM_CONNECTIONS, NUM_CHECKED = 20, 100, 0.01, 8, 30


@dataclass
class Load:
    """What happened to the requests of a phase."""

    seconds: list[float] = field(default_factory=list)  # from the time at which each was due
    errors: int = 0
    cpu_seconds: float = 0.0  # of the server
    wall_seconds: float = 0.0

    def __str__(self) -> str:
        p50, p99 = (1000 * np.quantile(self.seconds or [np.nan], q) for q in (0.5, 0.99))
        rate = len(self.seconds) / self.wall_seconds
        cpu = 1000 * self.cpu_seconds / max(1, len(self.seconds))
        return f"{rate:.0f} | {p50:.1f} | {p99:.1f} | {cpu:.2f} | {self.errors}"


class Connection:
    """HTTP/1.1 with as little of its own work as possible: the server has the same two cores."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        return int(lines[0].split()[1]), await reader.readexactly(length)


Request = tuple[str, str, bytes]


async def open_loop(port: int, requests: Sequence[Request], rate: float, server: psutil.Process) -> Load:
    """Send the requests at a rate, each at its time, on as many connections as that takes."""
    load, free = Load(), [Connection(port) for _ in range(NUM_CONNECTIONS)]
    before, started = server.cpu_times(), time.perf_counter()

    async def send(request: Request, due: float) -> None:
        connection = free.pop() if free else Connection(port)
        try:
            status, _ = await connection.ask(*request)
        except (OSError, asyncio.IncompleteReadError):
            load.errors += 1
            return
        free.append(connection)
        if status >= 300:
            load.errors += 1
        else:
            load.seconds.append(time.perf_counter() - due)

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
            if status >= 300:
                load.errors += 1
            else:
                load.seconds.append(time.perf_counter() - due)

    await asyncio.gather(*(ask(number) for number in range(NUM_CONNECTIONS)))
    return finished(load, server, before, started)


def finished(load: Load, server: psutil.Process, before: Any, started: float) -> Load:
    after = server.cpu_times()
    load.cpu_seconds = after.user + after.system - before.user - before.system
    load.wall_seconds = time.perf_counter() - started
    return load


def recall_of(port: int, requests: Sequence[Request], alive: dict[str, np.ndarray]) -> float:
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


def measure(name: str, num_fresh: int, options: argparse.Namespace, folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    vectors = DATA_SETS[name](options.notes + num_fresh, options.dim, rng)
    base, fresh = vectors[: options.notes], vectors[options.notes :]
    site = make_site(folder, base, options.factory)
    ids = [f"n{n:07d}" for n in range(options.notes)]
    gone = [ids[n] for n in rng.choice(options.notes, int(DELETED * options.notes), replace=False)]
    write_log(site, fresh, gone)
    alive = dict(zip(ids, base, strict=True)) | {f"f{n:06d}": vector for n, vector in enumerate(fresh)}
    for note_id in gone:
        del alive[note_id]
    known = np.array([note_id for note_id in ids if note_id in alive])
    histories = [rng.choice(known, HISTORY, replace=False).tolist() for _ in range(2000)]
    recalls: list[Request] = [
        ("POST", "/recall", json.dumps({"history": history, "k": K}).encode()) for history in histories
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows = []
    started = time.perf_counter()
    with site.serving(port, folder / "serve.log") as process:
        ready, server = time.perf_counter() - started, psutil.Process(process.pid)
        quality = recall_of(port, recalls[:NUM_CHECKED], alive)
        asyncio.run(closed_loop(port, recalls, 3, server))  # warm
        label = f"| {name} | {num_fresh:,} |"
        for rate in options.rates:
            num = int(rate * options.seconds)
            requests = [recalls[n % len(recalls)] for n in range(num)]
            rows.append(f"{label} {rate} a second | {asyncio.run(open_loop(port, requests, rate, server))} |")
            print(rows[-1], flush=True)
        rows.append(f"{label} saturation | {asyncio.run(closed_loop(port, recalls, options.seconds, server))} |")
        print(rows[-1], flush=True)
        notes = [
            ("POST", "/notes", json.dumps({"note_id": f"w{n}", "title": f"note {n}"}).encode())
            for n in range(int(options.write_rate * options.seconds))
        ]

        async def both() -> tuple[Load, Load]:
            requests = recalls[: int(options.rates[0] * options.seconds)]
            return await asyncio.gather(
                open_loop(port, requests, options.rates[0], server), open_loop(port, notes, options.write_rate, server)
            )

        while "notellm2_model_loaded 1.0" not in asyncio.run(Connection(port).ask("GET", "/metrics", b""))[1].decode():
            time.sleep(0.2)
        of_recalls, of_writes = asyncio.run(both())
        rows.append(f"{label} {options.rates[0]} a second, with writes | {of_recalls} |")
        rows.append(f"{label} writes, {options.write_rate} a second | {of_writes} |")
        print("\n".join(rows[-2:]), flush=True)
    rows.append(f"{label} ready after {ready:.1f} s; recall@{K} {quality:.2f} % | | | | | |")
    print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--fresh", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--factory", default="HNSW32")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--write-rate", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    for name in options.data:
        for num_fresh in options.fresh:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, num_fresh, options, Path(folder))
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# The service under load",
        "",
        f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`",
        "",
        f"{options.notes:,} notes x {options.dim}, {options.factory}; {DELETED:.0%} deleted; a recall has {HISTORY} "
        f"history notes and k = {K}. Milliseconds; CPU is that of the server, a request. While notes are written, the "
        "CPU of both kinds is counted in both rows.",
        "",
        "| data | new notes | load | a second | p50 | p99 | CPU | errors |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
