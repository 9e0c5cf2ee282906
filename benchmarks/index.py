"""The index beside plain FAISS: neighbours found, recall, build time and search latency, for k from 1 to 5,000.

    .venv/bin/python benchmarks/index.py                        1,000,000 notes; hours on two cores
    .venv/bin/python benchmarks/index.py --notes 200000 --factories HNSW32

Data sets, of unit vectors:
  clusters    50 vectors per cluster on average, by Zipf's law, so that k reaches beyond most clusters; noise 0.6
  manifold    12 dimensions in `--dim`, with 5 % noise

Each is indexed as it is, and with `--equal` of its rows replaced by copies, half of them in pairs, half in groups of
2,000. Queries are held-out vectors of the same distribution, and notes of the index without themselves. `recall` is
that of the answer, against exact search over all rows. Plain FAISS is the same factory on all rows, searched with the
parameters that our build chose; its results hold duplicates of one vector in any order, and fewer than k where it finds
no more.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.factory import filled_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.parameters import format_parameters, search_points

RESULTS = Path(__file__).parent / "results"
CLUSTER_NOTES, NOISE, MANIFOLD_DIMS, MANIFOLD_NOISE, LARGE_GROUP = 50, 0.6, 12, 0.05, 2000
TIE = 2e-6


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clusters(num_vectors: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    num_clusters = max(1, num_vectors // CLUSTER_NOTES)
    sizes = 1.0 / np.arange(1, num_clusters + 1)
    cluster = rng.choice(num_clusters, num_vectors, p=sizes / sizes.sum())
    centres = unit(rng.standard_normal((num_clusters, dim)))
    return unit(centres[cluster] + NOISE * unit(rng.standard_normal((num_vectors, dim))))


def manifold(num_vectors: int, dim: int, rng: np.random.Generator) -> np.ndarray:
    basis = rng.standard_normal((MANIFOLD_DIMS, dim))
    vectors = unit(rng.standard_normal((num_vectors, MANIFOLD_DIMS)) @ basis)
    return unit(vectors + MANIFOLD_NOISE * unit(rng.standard_normal((num_vectors, dim))))


DATA_SETS = {"clusters": clusters, "manifold": manifold}


def with_equal(vectors: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The vectors with `share` of the rows replaced by copies of others."""
    copies = rng.permutation(len(vectors))[: int(share * len(vectors))]
    pairs, groups = np.array_split(copies, 2)
    equal = vectors.copy()
    equal[pairs[len(pairs) // 2 :][: len(pairs) // 2]] = equal[pairs[: len(pairs) // 2]]
    for group in np.split(groups, range(LARGE_GROUP, len(groups), LARGE_GROUP)):
        equal[group] = equal[group[:1]]
    return equal


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def milliseconds(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> tuple[float, float]:
    """Of a query in a batch of all of them, the best of three; of a query alone, the median."""
    batch = min(seconds(lambda: search(queries)) for _ in range(3)) / len(queries)
    alone = np.median([seconds(lambda q=query: search(q[None])) for query in queries[:50]])
    return 1000 * batch, 1000 * float(alone)


def recall(scores: np.ndarray, exact: np.ndarray) -> float:
    """Percent of the exact k nearest, of scores [Q, k] and the exact ones [Q, k]; ties with the k-th count."""
    return 100 * float((scores >= exact[:, -1:] - TIE).mean())


def measure_k(index: Index, plain: Any, vectors: np.ndarray, held_out: np.ndarray, k: int) -> dict[str, Any]:
    parameters = index.parameters(k)
    notes = np.random.default_rng(k).permutation(len(vectors))[: len(held_out)]
    found, _ = index.search_rows(held_out, k)
    near, _ = index.search_rows(vectors[notes], k, own=notes)
    exact = faiss.knn(held_out, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[0]
    exact_near = faiss.knn(vectors[notes], vectors, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[0][:, 1:]

    def scores(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        own = np.stack([vectors[r] @ q for q, r in zip(queries, rows, strict=True)])
        return np.where(rows >= 0, own, -np.inf)

    ours = milliseconds(lambda q: index.search_rows(q, k), held_out)
    theirs = milliseconds(lambda q: search_points(plain, q, k, parameters), held_out)
    return {
        "k": k,
        "parameters": format_parameters(parameters),
        "fewest_hits": int(min((found >= 0).sum(axis=1).min(), (near >= 0).sum(axis=1).min())),
        "recall_held_out": recall(scores(held_out, found), exact),
        "recall_notes": recall(scores(vectors[notes], near), exact_near),
        "ms": ours[0],
        "plain_ms": theirs[0],
        "alone_ms": ours[1],
        "plain_alone_ms": theirs[1],
    }


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result per data set, share of equal vectors and factory."""
    for name in options.data:
        rng = np.random.default_rng(0)
        generated = DATA_SETS[name](options.notes + options.queries, options.dim, rng)
        held_out = generated[options.notes :]
        for share in (0.0, options.equal):
            vectors = with_equal(generated[: options.notes], share, rng)
            table = Embeddings(tuple(map(str, range(len(vectors)))), vectors)
            for factory in options.factories:
                started = time.perf_counter()
                plain = filled_index(vectors, factory, options.threads)
                plain_built = time.perf_counter()
                index = make_index(table, IndexSettings(factory=factory), options.threads)
                built = time.perf_counter()
                ks = [k for k in options.ks if k < len(vectors)]
                yield {
                    "data": name,
                    "equal": share,
                    "factory": factory,
                    "plain_build_s": plain_built - started,
                    "build_s": built - plain_built,
                    "by_k": [measure_k(index, plain, vectors, held_out, k) for k in ks],
                }


def to_markdown(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    total = psutil.virtual_memory().total >> 30
    lines = [
        "# The index beside plain FAISS",
        "",
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {total} GB, Python "
        f"{platform.python_version()}, FAISS {faiss.__version__}. Command: `python {' '.join(sys.argv)}`. "
        f"{options.notes:,} x {options.dim}, built by {options.threads} thread(s); recall in percent, the target "
        "is 95; ms of a query in a batch, and of a query alone.",
        "",
        "| data | equal | factory | build, s | plain, s | ratio | k | parameters | fewest hits | recall, held out "
        "| recall, notes | ms | plain, ms | ratio | alone, ms | plain, ms |",
        "|" + " --- |" * 16,
    ]
    for r in results:
        for row in r["by_k"]:
            lines.append(
                f"| {r['data']} | {r['equal']:.0%} | {r['factory']} | {r['build_s']:.1f} | {r['plain_build_s']:.1f} | "
                f"{r['build_s'] / r['plain_build_s']:.2f} | {row['k']} | {row['parameters'] or 'none'} | "
                f"{row['fewest_hits']} | {row['recall_held_out']:.1f} | {row['recall_notes']:.1f} | {row['ms']:.2f} | "
                f"{row['plain_ms']:.2f} | {row['ms'] / row['plain_ms']:.2f} | {row['alone_ms']:.2f} | "
                f"{row['plain_alone_ms']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--data", nargs="+", choices=[*DATA_SETS], default=[*DATA_SETS])
    parser.add_argument("--equal", type=float, default=0.4, help="share of equal vectors")
    parser.add_argument("--factories", nargs="+", default=["HNSW32", "IVF4096,Flat"])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 30, 100, 300, 1000, 5000])
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of a build, ours and plain")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for result in run(options):
        results.append(result)
        print(json.dumps(result), flush=True)
        (options.out / "index.json").write_text(json.dumps(results, indent=1))
        (options.out / "index.md").write_text(to_markdown(results, options))


if __name__ == "__main__":
    main()
