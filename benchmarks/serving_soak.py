"""A million mixed requests to the service, with compactions: memory, latencies and recall over time.

    .venv/bin/python benchmarks/serving_soak.py                      a million; hours on two cores
    .venv/bin/python benchmarks/serving_soak.py --requests 20000 --notes 20000

Of the requests, 85 % are recalls (20 history notes, k = 100), 10 % are notes that are written with their vectors, half
of them new, and 5 % are deletions, so that their number stays. Eight connections ask again at once. Notes with vectors
are written to the log by this process, as by another service, and count as acknowledged once they are on the disk.
Three times, `notellm2 compact` runs meanwhile. After each twentieth of the requests, the service has time to read the
log, and its answers are compared with exact search over all living notes. The result is written to
benchmarks/results/serving_soak.md.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from index import DATA_SETS
from serving_load import (
    NUM_CONNECTIONS,
    Connection,
    Memory,
    Request,
    metric,
    model_loaded,
    recall_of,
    recall_request,
    write_result,
)
from serving_site import WEIGHTS, free_port, make_site

from notellm2_core.notes.note import Note
from notellm2_core.serving.group_commit import GroupCommit
from notellm2_core.serving.log import NoteLog, Write

RESULT = Path(__file__).parent / "results" / "serving_soak.md"
HISTORY, NUM_CHECKED, NUM_PARTS, COMPACTED_AFTER = 20, 30, 20, (4, 9, 14)
UPSERTS, DELETIONS, DIM = 0.1, 0.05, 64


class Living:
    """The notes that exist now, for random draws."""

    def __init__(self, vectors: Mapping[str, np.ndarray]) -> None:
        self.vectors = dict(vectors)
        self._names = [*vectors]
        self._places = {name: place for place, name in enumerate(self._names)}

    def put(self, name: str, vector: np.ndarray) -> None:
        if name not in self._places:
            self._places[name] = len(self._names)
            self._names.append(name)
        self.vectors[name] = vector

    def remove(self, name: str) -> None:
        place, last = self._places.pop(name), self._names.pop()
        if last != name:
            self._names[place], self._places[last] = last, place
        del self.vectors[name]

    def draw(self, chance: random.Random) -> str:
        return chance.choice(self._names)


@dataclass
class Part:
    """Seconds of the requests of a part, by kind, and what is no 2xx."""

    recalls: list[float] = field(default_factory=list)
    upserts: list[float] = field(default_factory=list)
    deletions: list[float] = field(default_factory=list)
    errors: int = 0


class Soak:
    """Sends the requests, and knows which notes exist after each."""

    def __init__(self, port: int, commit: GroupCommit, living: Living, fresh: np.ndarray) -> None:
        self._port, self._commit, self.living, self._fresh = port, commit, living, iter(fresh)
        self._chance, self._busy, self._num_new = random.Random(0), set[str](), 0

    async def part(self, num: int) -> Part:
        """Sends `num` requests."""
        part, left = Part(), iter(range(num))

        async def ask() -> None:
            connection = Connection(self._port)
            for _ in left:
                kind = self._chance.random()
                if kind < UPSERTS:
                    await self._write(part)
                elif kind < UPSERTS + DELETIONS:
                    await self._delete(connection, part)
                else:
                    started = time.perf_counter()
                    status, _ = await connection.ask(*self.recall())
                    part.recalls.append(time.perf_counter() - started)
                    part.errors += status != 200

        await asyncio.gather(*(ask() for _ in range(NUM_CONNECTIONS)))
        return part

    def recall(self) -> Request:
        """Of a random history."""
        return recall_request(list(dict.fromkeys(self.living.draw(self._chance) for _ in range(HISTORY))))

    def _free(self) -> str:
        """A note that no other request is changing."""
        while (name := self.living.draw(self._chance)) in self._busy:
            pass
        return name

    async def _write(self, part: Part) -> None:
        name, vector = self._free(), next(self._fresh)
        if self._chance.random() < 0.5:
            name, self._num_new = f"f{self._num_new:07d}", self._num_new + 1
        started = time.perf_counter()
        self._busy.add(name)
        write = Write(Note(name, f"note {started}", (), ""), vectors={WEIGHTS: vector})
        await asyncio.wrap_future(self._commit.submit(write))
        part.upserts.append(time.perf_counter() - started)
        self._busy.discard(name)
        self.living.put(name, vector)

    async def _delete(self, connection: Connection, part: Part) -> None:
        name, started = self._free(), time.perf_counter()
        self._busy.add(name)
        self.living.remove(name)
        status, _ = await connection.ask("DELETE", f"/notes/{name}", b"")
        part.deletions.append(time.perf_counter() - started)
        part.errors += status != 200
        self._busy.discard(name)

    async def settle(self) -> None:
        """Wait until the service shows all that was written."""
        while await metric(self._port, "notellm2_log_lag_entries"):
            await asyncio.sleep(0.2)


def milliseconds(seconds: list[float]) -> str:
    """Median and 99th percentile."""
    return " / ".join(f"{1000 * np.quantile(seconds, q):.1f}" for q in (0.5, 0.99)) if seconds else ""


def measure(options: argparse.Namespace, folder: Path) -> list[str]:
    num_fresh = int(1.2 * UPSERTS * options.requests) + 1000
    vectors = DATA_SETS[options.data](options.notes + num_fresh, DIM, np.random.default_rng(0))
    base, fresh = vectors[: options.notes], vectors[options.notes :]
    site = make_site(folder, base, options.factory)
    living = Living({f"n{n:07d}": vector for n, vector in enumerate(base)})
    port = free_port()
    rows, memories, recalls, errors = [], [], [], 0
    compact = [sys.executable, "-W", "ignore", "-m", "notellm2_core.cli", "compact", "--config", str(site.config_file)]
    with (
        site.serving(port, folder / "serve.log") as process,
        closing(NoteLog.open(site.log)) as log,
        closing(GroupCommit(log)) as commit,
    ):
        memory = Memory(psutil.Process(process.pid))
        asyncio.run(model_loaded(port))
        soak = Soak(port, commit, living, fresh)
        for number in range(NUM_PARTS):
            compaction = subprocess.Popen(compact, stdout=subprocess.DEVNULL) if number in COMPACTED_AFTER else None
            started = time.perf_counter()
            part = asyncio.run(soak.part(options.requests // NUM_PARTS))
            rate = options.requests // NUM_PARTS / (time.perf_counter() - started)
            if compaction is not None and compaction.wait() != 0:
                raise RuntimeError("the compaction failed")
            asyncio.run(soak.settle())
            num_new = asyncio.run(metric(port, "notellm2_new_notes"))
            recalls.append(recall_of(port, [soak.recall() for _ in range(NUM_CHECKED)], living.vectors))
            memories.append(memory.now())
            errors += part.errors
            rows.append(
                f"| {number + 1}{' (compaction)' if compaction else ''} | {rate:.0f} | {milliseconds(part.recalls)} | "
                f"{milliseconds(part.upserts)} | {milliseconds(part.deletions)} | {len(living.vectors):,} | "
                f"{num_new:,.0f} | {recalls[-1]:.2f} | {memories[-1]:.0f} |"
            )
            print(rows[-1], flush=True)
    slope = np.polyfit(np.arange(1, NUM_PARTS), memories[1:], 1)[0]
    return [
        "| part | requests a second | recall, ms | upsert | deletion | notes | new ones | recall@100, % | memory, MB |",
        "| --- |" + " ---: |" * 8,
        *rows,
        "",
        f"No 2xx: {errors}. Lowest recall: {min(recalls):.2f} %. Memory by a straight line after the first part: "
        f"{slope:+.2f} MB a part ({options.requests // NUM_PARTS:,} requests).",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--factory", default="HNSW32")
    parser.add_argument("--data", choices=DATA_SETS, default="manifold")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options, Path(folder))
    about = (
        f"{options.requests:,} requests to a release of {options.notes:,} notes x {DIM}, {options.factory}, "
        f"{options.data}. Latencies: median / 99th percentile. Memory: of the service and its processes."
    )
    write_result(options.out, "A soak of the service", about, table)


if __name__ == "__main__":
    main()
