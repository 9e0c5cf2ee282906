"""Switches a service under load to another release and back, and checks every answer.

    .venv/bin/python benchmarks/serving_switch.py                    100,000 notes; minutes on two quiet cores
    .venv/bin/python benchmarks/serving_switch.py --notes 2000 --seconds 3

The releases have the same notes and models of different widths (64 and 32). New notes are in the log, which the second
model has to embed first, and notes are deleted meanwhile. Recalls come at a rate that does not wait for answers:
before, during and after the switch, and around the way back. Of every answer it is checked that its scores are those of
the one release that it names, and that it has no note whose deletion was acknowledged before it was asked. Counted are
errors, refusals, latencies, the time of the switch and of the way back, and memory of the service with its processes.
The result is written to benchmarks/results/serving_switch.md.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from index import DATA_SETS
from serving_load import Connection, K, Load, Memory, Request, model_loaded, open_loop, recall_request, write_result
from serving_site import RELEASE, add_release, free_port, make_site, write_log

from notellm2_core.serving.log import NoteLog

RESULT = Path(__file__).parent / "results" / "serving_switch.md"
OTHER = "fedcba9876543210"
HISTORY, DIMS = 20, (64, 32)


@dataclass
class Answers:
    """The answers, and when each deletion was acknowledged."""

    answers: list[tuple[float, Request, bytes]] = field(default_factory=list)  # when each was due
    deleted: dict[str, float] = field(default_factory=dict)

    def add(self, due: float, request: Request, body: bytes) -> None:
        self.answers.append((due, request, body))

    def faults(self, vectors: dict[str, dict[str, np.ndarray]]) -> dict[str, int]:
        """Answers with other scores than their release's, and those with a note that was deleted before. vectors: of
        each release, those of all its notes.
        """
        counts = {"other scores": 0, "deleted notes": 0}
        for due, (_, _, asked), body in self.answers:
            answer = json.loads(body)
            own, hits = vectors[answer["release"]], answer["hits"]
            history = np.stack([own[note_id] for note_id in json.loads(asked)["history"]])
            scores = (history @ np.stack([own[hit["note_id"]] for hit in hits]).T).max(axis=0)
            counts["other scores"] += not np.allclose(scores, [hit["score"] for hit in hits], rtol=0, atol=1e-4)
            counts["deleted notes"] += any(self.deleted.get(hit["note_id"], due) < due for hit in hits)
        return counts


class Drill:
    """A service, the load on it, and what happens meanwhile."""

    def __init__(self, port: int, server: psutil.Process, requests: Sequence[Request], rate: int) -> None:
        self.port, self.server, self.requests, self.rate = port, server, requests, rate
        self.answers, self.num_sent = Answers(), 0
        self.rows: list[str] = []

    async def load(self, label: str, seconds: float, during: Coroutine[Any, Any, float] | None = None) -> Load:
        """Recalls for as long as that takes, and at least `seconds`."""
        task = None if during is None else asyncio.create_task(during)
        whole, started = Load(), time.perf_counter()
        while time.perf_counter() - started < seconds or (task is not None and not task.done()):
            part = [self.requests[(self.num_sent + n) % len(self.requests)] for n in range(self.rate)]
            self.num_sent += self.rate
            whole += await open_loop(self.port, part, self.rate, self.server, self.answers.add)
        took = "" if task is None else f"{await task:.2f}"
        self.rows.append(f"| {label} | {took} | {whole} |")
        print(self.rows[-1], flush=True)
        return whole

    async def activate(self, release: str) -> float:
        """Seconds until the service answers from it. Raises RuntimeError where it is refused."""
        await asyncio.sleep(0.5)
        started = time.perf_counter()
        status, body = await Connection(self.port).ask("POST", f"/releases/{release}:activate", b"")
        if status != 200:
            raise RuntimeError(body.decode())
        return time.perf_counter() - started

    async def delete(self, note_ids: Sequence[str], a_second: float) -> None:
        """One note after the other, until this is cancelled."""
        connection = Connection(self.port)
        for note_id in note_ids:
            status, body = await connection.ask("DELETE", f"/notes/{note_id}", b"")
            if status != 200:
                raise RuntimeError(body.decode())
            self.answers.deleted[note_id] = time.perf_counter()
            await asyncio.sleep(1 / a_second)

    async def run(self, seconds: float, to_delete: Sequence[str]) -> None:
        """The whole of it."""
        deletions = asyncio.create_task(self.delete(to_delete, 5))
        await self.load("before", seconds)
        await self.load("while it is switched", 1, self.activate(OTHER))
        await self.load("after", seconds)
        await self.load("while it goes back", 1, self.activate(RELEASE))
        await self.load("after that", seconds)
        deletions.cancel()


def measure(options: argparse.Namespace, folder: Path) -> list[str]:
    rng, num = np.random.default_rng(0), options.notes
    of_notes = {
        release: DATA_SETS[options.data](num, dim, rng) for release, dim in zip((RELEASE, OTHER), DIMS, strict=True)
    }
    site = make_site(folder, of_notes[RELEASE], options.factory)
    add_release(site, OTHER, of_notes[OTHER], options.factory)
    write_log(site, DATA_SETS[options.data](options.fresh, DIMS[0], rng), [])
    ids = [f"n{n:07d}" for n in range(num)]
    asked, to_delete = np.split(rng.permutation(ids), [num // 2])
    histories = [rng.choice(asked, HISTORY, replace=False).tolist() for _ in range(1000)]
    requests = [recall_request(history) for history in histories]
    port = free_port()
    with site.serving(port, folder / "serve.log") as process:
        server = psutil.Process(process.pid)
        drill, memory = Drill(port, server, requests, options.rate), Memory(server)
        asyncio.run(model_loaded(port))
        asyncio.run(drill.load("warm-up", 2))
        before = memory.now()
        memory.start()
        asyncio.run(drill.run(options.seconds, to_delete.tolist()))
        memory.is_done.set()
    vectors = {release: dict(zip(ids, rows, strict=True)) for release, rows in of_notes.items()}
    with closing(NoteLog.open(site.log)) as log:
        entries = {entry.seq: entry.note.note_id for entry in log.tail(0, options.fresh)}
        for release, of_release in vectors.items():
            found = log.vectors_of(f"of {release}", list(entries))
            of_release |= {entries[seq]: vector for seq, vector in found.items()}
    faults = drill.answers.faults(vectors)
    return [
        "| phase | switch, s | a second | p50 | p99 | CPU | refused | errors |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *drill.rows,
        "",
        f"{len(drill.answers.answers):,} answers; with other scores than those of the release that they name: "
        f"{faults['other scores']}; with a note whose deletion was acknowledged before: {faults['deleted notes']} of "
        f"{len(drill.answers.deleted)} deletions. Memory of the service and its processes: {before:.0f} MB before, "
        f"{memory.largest:.0f} MB at most ({memory.largest / before:.2f} times).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--fresh", type=int, default=500, help="notes in the log, which the second model has to embed")
    parser.add_argument("--factory", default="HNSW32")
    parser.add_argument("--data", choices=DATA_SETS, default="manifold")
    parser.add_argument("--rate", type=int, default=100, help="recalls a second")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options, Path(folder))
    about = (
        f"{options.notes:,} notes, {options.factory}, {options.data}, of widths {DIMS[0]} and {DIMS[1]}; "
        f"{options.fresh:,} new ones, which the second model embeds before the switch; a recall has {HISTORY} history "
        f"notes and k = {K}. Latencies in milliseconds; CPU of the server in milliseconds a request."
    )
    write_result(options.out, "A switch under load", about, table)


if __name__ == "__main__":
    main()
