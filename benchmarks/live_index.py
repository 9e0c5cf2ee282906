"""The live index in its process: CPU of a recall, its recall against exact search, and CPU of a write.

    .venv/bin/python benchmarks/live_index.py                       100,000 notes; minutes on two cores
    .venv/bin/python benchmarks/live_index.py --notes 1000000       the table takes most of an hour

The data sets are those of benchmarks/index.py. One per cent of the release's notes are deleted, and new notes of the
same distribution are written. A recall has 20 history notes of the release and k = 100; its answer is compared with
that of all living notes. Times are of the processor, on one thread, because others may use the machine. The result is
written to benchmarks/results/live_index.md.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy and faiss

import argparse
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import faiss
import numpy as np
import psutil
from index import DATA_SETS

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours
from notellm2_core.serving.live_index import LiveIndex

RESULT = Path(__file__).parent / "results" / "live_index.md"
HISTORY, K, DELETED, NUM_RECALLS = 20, 100, 0.01, 200


def cpu_ms(calls: list[float]) -> str:
    """Median and 99th percentile."""
    return f"{1000 * np.median(calls):.2f} / {1000 * np.quantile(calls, 0.99):.2f}"


def exact(live: LiveIndex, history: list[str], alive: dict[str, np.ndarray]) -> set[str]:
    """The best K by max, over all living notes."""
    names = np.array([name for name in alive if name not in set(history)])
    vectors = np.stack([alive[name] for name in names])
    scores = (np.stack([alive[name] for name in history]) @ vectors.T).max(axis=0)
    return set(names[np.argpartition(-scores, K)[:K]])


def measure(name: str, options: argparse.Namespace) -> list[str]:
    rng = np.random.default_rng(0)
    largest = max(options.fresh)
    vectors = DATA_SETS[name](options.notes + largest, options.dim, rng)
    base, fresh = vectors[: options.notes], vectors[options.notes :]
    ids = tuple(f"n{i:07d}" for i in range(options.notes))
    started = time.process_time()
    index = make_index(Embeddings(ids, base, Path("base")), IndexSettings(factory=options.factory, search_k=K))
    built = time.process_time() - started
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        made = write_neighbours(index, base, Path(folder))
        tabled = time.process_time() - started
        table = NeighbourTable.load(Path(folder), index)
        for num_fresh in options.fresh:
            live = LiveIndex(index, table)
            alive = dict(zip(ids, base, strict=True))
            gone = rng.choice(options.notes, int(DELETED * options.notes), replace=False)
            live.apply({ids[i]: None for i in gone}, 1)
            for i in gone:
                del alive[ids[i]]
            writes = []
            for n in range(num_fresh):
                started = time.process_time()
                live.apply({f"f{n:06d}": fresh[n]}, 2 + n)
                writes.append(time.process_time() - started)
                alive[f"f{n:06d}"] = fresh[n]
            known = np.array([i for i in ids if i in alive])
            recalls, searches, found = [], [], []
            for n in range(NUM_RECALLS):
                history = [str(i) for i in rng.choice(known, HISTORY, replace=False)]
                started = time.process_time()
                answer = live.recall(dict.fromkeys(history, 1.0), K)
                recalls.append(time.process_time() - started)
                if n < 20:
                    best = exact(live, history, alive)
                    found.append(len(best & {hit.note_id for hit in answer.hits}) / K)
                started = time.process_time()
                live.similar(fresh[n], 10)
                searches.append(time.process_time() - started)
            rows.append(
                f"| {name} | {num_fresh:,} | {cpu_ms(recalls)} | {100 * np.mean(found):.1f} | {cpu_ms(searches)} "
                f"| {cpu_ms(writes)} | {built:.0f} | {tabled:.0f} | {made['recall']:.2f} |"
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--fresh", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--factory", default="HNSW32")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rows = [row for name in options.data for row in measure(name, options)]
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# The live index",
        "",
        f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`",
        "",
        f"{options.notes:,} notes x {options.dim}, {options.factory}; {DELETED:.0%} deleted; a recall has {HISTORY} "
        f"history notes and k = {K}. Milliseconds of CPU, median / 99th percentile; seconds of CPU to build index and "
        "table.",
        "",
        "| data | new notes | recall, ms | recall@100, % | similar, k = 10, ms | write, ms | index, s | table, s "
        "| table's recall, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
