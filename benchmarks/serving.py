"""The service under load: latencies of `/recall` at given rates, CPU of a request, saturation, recall, and writes.

    .venv/bin/python benchmarks/serving.py                    100,000 notes; minutes on two quiet cores
    .venv/bin/python benchmarks/serving.py --notes 1000000    the index and the table take most of two hours

A release of each data set of benchmarks/index.py, with a tiny model; one per cent of its notes are deleted, and new
notes of the same distribution are in the log. A recall has 20 history notes and k = 100. The load comes from this
process, over loopback, at a given rate whatever the answers take (open loop): a latency is counted from the time at
which the request was due, so waiting for a slow answer counts, too. CPU is that of the server's process, without the
model's, and is what to compare where others use the machine. Saturation: eight connections that ask again at once; then
three times as many requests a second as that answered, of which the service refuses what it has no place for.
Recall: of the answers, against exact search over all living notes. Writes: notes with a text, which the tiny model
embeds, at a rate, while recalls go on. Upserts: notes with their vectors, half of them new, which this process writes
to the log as another service would; each is there once it is on the disk. A recall then waits until the service shows
the last one.

The result is written to benchmarks/results/serving.md.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import numpy as np
from index import DATA_SETS
from psutil import Process
from serving_load import (
    Connection,
    K,
    Load,
    Request,
    closed_loop,
    finished,
    model_loaded,
    open_loop,
    recall_of,
    recall_request,
    write_result,
)
from serving_site import WEIGHTS, Site, free_port, make_site, write_log

from notellm2_core.notes.note import Note
from notellm2_core.serving.group_commit import GroupCommit
from notellm2_core.serving.log import NoteLog, Receipt, Write

RESULT = Path(__file__).parent / "results" / "serving.md"
HISTORY, DELETED, NUM_CHECKED = 20, 0.01, 30


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
    recalls = [recall_request(history) for history in histories]
    port = free_port()
    rows = []
    started = time.perf_counter()
    with site.serving(port, folder / "serve.log") as process:
        ready, server = time.perf_counter() - started, Process(process.pid)
        quality = recall_of(port, recalls[:NUM_CHECKED], alive)
        asyncio.run(closed_loop(port, recalls, 3, server))  # warm
        label = f"| {name} | {num_fresh:,} |"
        for rate in options.rates:
            num = int(rate * options.seconds)
            requests = [recalls[n % len(recalls)] for n in range(num)]
            rows.append(f"{label} {rate} a second | {asyncio.run(open_loop(port, requests, rate, server))} |")
            print(rows[-1], flush=True)
        most = asyncio.run(closed_loop(port, recalls, options.seconds, server))
        overload = 3 * len(most.seconds) / most.wall_seconds
        requests = [recalls[n % len(recalls)] for n in range(int(overload * options.seconds))]
        refusing = asyncio.run(open_loop(port, requests, overload, server))
        rows.append(f"{label} saturation | {most} |")
        rows.append(f"{label} three times that: {overload:.0f} a second | {refusing} |")
        print("\n".join(rows[-2:]), flush=True)
        notes = [
            ("POST", "/notes", json.dumps({"note_id": f"w{n}", "title": f"note {n}"}).encode())
            for n in range(int(options.write_rate * options.seconds))
        ]

        async def both() -> tuple[Load, Load]:
            requests = recalls[: int(options.rates[0] * options.seconds)]
            return await asyncio.gather(
                open_loop(port, requests, options.rates[0], server), open_loop(port, notes, options.write_rate, server)
            )

        asyncio.run(model_loaded(port))
        of_recalls, of_writes = asyncio.run(both())
        rows.append(f"{label} {options.rates[0]} a second, with writes | {of_recalls} |")
        rows.append(f"{label} writes, {options.write_rate} a second | {of_writes} |")
        print("\n".join(rows[-2:]), flush=True)
        of_recalls, of_upserts, seconds = measure_upserts(site, port, recalls, fresh, options, server)
        rows.append(f"{label} {options.rates[0]} a second, with upserts | {of_recalls} |")
        found = f"the last one shown after {1000 * seconds:.0f} ms"
        rows.append(f"{label} upserts, {options.upsert_rate} a second; {found} | {of_upserts} |")
        print("\n".join(rows[-2:]), flush=True)
    rows.append(f"{label} ready after {ready:.1f} s; recall@{K} {quality:.2f} % | | | | | | |")
    print(rows[-1], flush=True)
    return rows


def measure_upserts(
    site: Site, port: int, recalls: list[Request], vectors: np.ndarray, options: argparse.Namespace, server: Process
) -> tuple[Load, Load, float]:
    """Recalls and upserts at their rates, and the seconds after which the service shows the last upsert."""
    num, written = int(options.upsert_rate * options.seconds), Load()

    async def write(commit: GroupCommit) -> None:
        before, started = server.cpu_times(), time.perf_counter()

        def done(due: float) -> Callable[[Future[Receipt]], None]:
            return lambda receipt: written.add(500 if receipt.exception() else 200, time.perf_counter() - due)

        for number in range(num):
            due = started + number / options.upsert_rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            note = Note(f"u{number // 2:06d}", "x", (), "")
            vector = {WEIGHTS: vectors[number % len(vectors)]}
            commit.submit(Write(note, None, False, 1 + number % 2, vector)).add_done_callback(done(due))
        await asyncio.to_thread(commit.close)
        finished(written, server, before, started)

    async def seen(log: NoteLog) -> float:
        started = time.perf_counter()
        body = {**json.loads(recalls[0][2]), "min_seq": log.last_seq()}
        status, _ = await Connection(port).ask("POST", "/recall", json.dumps(body).encode())
        return time.perf_counter() - started if status == 200 else float("nan")

    async def both(log: NoteLog) -> tuple[Load, float]:
        requests = recalls[: int(options.rates[0] * options.seconds)]
        asked = asyncio.create_task(open_loop(port, requests, options.rates[0], server))
        await write(GroupCommit(log, max_waiting=num))
        seconds = await seen(log)
        return await asked, seconds

    with closing(NoteLog.open(site.log)) as log:
        of_recalls, seconds = asyncio.run(both(log))
    return of_recalls, written, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--fresh", type=int, nargs="+", default=[2000, 10_000], help="at least one")
    parser.add_argument("--factory", default="HNSW32")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--write-rate", type=int, default=20)
    parser.add_argument("--upsert-rate", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows = []
    for name in options.data:
        for num_fresh in options.fresh:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, num_fresh, options, Path(folder))
    about = (
        f"{options.notes:,} notes x {options.dim}, {options.factory}; {DELETED:.0%} deleted; a recall has {HISTORY} "
        f"history notes and k = {K}. Milliseconds; CPU is that of the server, a request. While notes are written, the "
        "CPU of both kinds is counted in both rows."
    )
    write_result(
        options.out,
        "The service under load",
        about,
        [
            "| data | new notes | load | a second | p50 | p99 | CPU | refused | errors |",
            "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            *rows,
        ],
    )


if __name__ == "__main__":
    main()
