"""Exact evaluation: the ranks of all pairs, beside the bare matrix product, plain counting in fp64, and FAISS.

    .venv/bin/python benchmarks/evaluation.py                             a tenth of the paper's test pairs; minutes
    .venv/bin/python benchmarks/evaluation.py --pairs 21262 --rounds 1    all of them

The paper's test has 21,262 pairs and 534,144 notes (Table 1). Vectors are random; a target is near its query, so that
its rank is what a good model gives. All take turns with the same pairs, on all cores: the bare product of fp32
matrices, in blocks that stay in the cache and in blocks of 31 queries with all notes; `target_ranks`; `count_ranks` of
`cosine_rows`, which computes all scores in fp64; and FAISS's exact search with k = 10,000, for a tenth of the queries
(its time is multiplied by ten). The ranks of the first two are compared. Memory: the peak of this process, in a run of
`target_ranks` alone. Growth: with twice the pairs, and twice the notes. The result is written to
benchmarks/results/evaluation.md.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import faiss
import numpy as np

from notellm2_core.embeddings.table import Embeddings
from notellm2_core.evaluation.pairs import Pairs
from notellm2_core.evaluation.recall import cosine_rows, count_ranks, target_ranks

RESULT = Path(__file__).parent / "results" / "evaluation.md"
DIM, FAISS_K, FAISS_SHARE = 64, 10_000, 10
BLOCKS = {"in the cache": (64, 8192), "of 31 queries": (31, 1 << 30)}


def world(num_pairs: int, num_notes: int) -> tuple[Embeddings, Pairs]:
    """Notes, and pairs of queries that occur once, with targets that few others are nearer than."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(num_notes, DIM)).astype(np.float32)
    queries, targets = np.split(rng.choice(num_notes, 2 * num_pairs, replace=False), 2)
    vectors[queries] = 0.5 * vectors[targets] + rng.normal(size=(num_pairs, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = tuple(f"n{row}" for row in range(num_notes))
    pairs = Pairs(tuple(ids[row] for row in queries), tuple(ids[row] for row in targets))
    return Embeddings(ids, vectors, Path("random")), pairs


def product(table: Embeddings, pairs: Pairs, num_queries: int, num_notes: int) -> None:
    """All scores in fp32, none of which is looked at."""
    left = table.vectors[table.rows(pairs.query_ids)]
    for start in range(0, len(left), num_queries):
        for first in range(0, len(table.vectors), num_notes):
            left[start : start + num_queries] @ table.vectors[first : first + num_notes].T


def faiss_search(table: Embeddings, pairs: Pairs) -> None:
    index = faiss.IndexFlatIP(DIM)
    index.add(table.vectors)
    index.search(table.vectors[table.rows(pairs.query_ids)][::FAISS_SHARE], FAISS_K)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(num_pairs: int, num_notes: int, rounds: int) -> dict[str, float]:
    """The median seconds of each contender."""
    table, pairs = world(num_pairs, num_notes)
    calls: dict[str, Callable[[], object]] = {
        f"product in fp32, blocks {name}": partial(product, table, pairs, *block) for name, block in BLOCKS.items()
    }
    calls["target_ranks"] = lambda: target_ranks(table, table, pairs)
    calls["count_ranks in fp64"] = lambda: count_ranks(cosine_rows(table, table), table.note_ids, pairs)
    calls["FAISS, k = 10,000"] = lambda: faiss_search(table, pairs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call) * (FAISS_SHARE if "FAISS" in name else 1))
            print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    fast, plain = target_ranks(table, table, pairs), count_ranks(cosine_rows(table, table), table.note_ids, pairs)
    if not all(np.array_equal(getattr(fast, name), getattr(plain, name)) for name in vars(fast)):
        raise RuntimeError("target_ranks and count_ranks differ")
    return {name: float(np.median(values)) for name, values in times.items()}


def alone(num_pairs: int, num_notes: int) -> tuple[float, float]:
    """Seconds and peak memory in GB of `target_ranks` in a process of its own."""
    command = [sys.executable, __file__, "--alone", "--pairs", str(num_pairs), "--notes", str(num_notes)]
    took, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(took), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2126)
    parser.add_argument("--notes", type=int, default=534_144)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.alone:
        table, pairs = world(options.pairs, options.notes)
        print(seconds(lambda: target_ranks(table, table, pairs)), end=" ")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    times = measure(options.pairs, options.notes, options.rounds)
    bare = min(value for name, value in times.items() if name.startswith("product"))
    lines = [
        "# Exact evaluation", "",
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores. Command: `python {' '.join(sys.argv)}`", "",
        f"{options.pairs:,} pairs, {options.notes:,} notes x {DIM}; the ranks of `target_ranks` and `count_ranks` are "
        "the same. FAISS: a tenth of the queries, times ten.", "",
        "| what | seconds | of the faster product |", "| --- | ---: | ---: |",
        *(f"| {name} | {value:.2f} | {value / bare:.2f} |" for name, value in times.items()), "",
        "| pairs | notes | target_ranks, s | peak memory, GB |", "| ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for times_pairs, times_notes in ((1, 1), (2, 1), (1, 2)):
        num_pairs, num_notes = times_pairs * options.pairs, times_notes * options.notes
        took, peak = alone(num_pairs, num_notes)
        lines.append(f"| {num_pairs:,} | {num_notes:,} | {took:.2f} | {peak:.2f} |")
    print("\n".join(lines))
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
