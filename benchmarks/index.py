"""The index beside plain FAISS: neighbours found, recall, build time and search latency, for k from 1 to 5,000.

    .venv/bin/python benchmarks/index.py                        200,000 notes; a quarter of an hour on two cores
    .venv/bin/python benchmarks/index.py --notes 1000000 --rounds 0 --threads 2 --factories IVF1024,Flat

Data sets, of unit vectors:
  clusters    50 vectors per cluster on average, by Zipf's law, so that k reaches beyond most clusters; noise 0.6
  manifold    12 dimensions in `--dim`, with 5 % noise

Each is indexed as it is, and with `--equal` of its rows replaced by copies, half of them in pairs, half in groups of
2,000. Queries are held-out vectors of the same distribution, and notes of the index without themselves. `recall` is
that of the answer, against exact search over all rows.

Plain FAISS is the same factory on all rows, searched with the parameters that our build chose. Where no rows are equal
it is the index within ours, whose own search is timed. Where rows are equal it is another, which returns the duplicates
of a vector in any order, and fewer than k where it finds no more. `--rounds 0` builds no plain index.

Times are of the processor, because others may use the machine; the medians of several rounds, in which the contenders
take turns. Our build has two parts that plain FAISS does not have, which are listed: finding the equal vectors, and
finding the search parameters (tuning).
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
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
from notellm2_core.retrieval.parameters import format_parameters, searcher
from notellm2_core.retrieval.points import distinct_points
from notellm2_core.retrieval.tuning import Samples, tune

RESULTS = Path(__file__).parent / "results"
CLUSTER_NOTES, NOISE, MANIFOLD_DIMS, MANIFOLD_NOISE, LARGE_GROUP = 50, 0.6, 12, 0.05, 2000
TIE = 2e-6
SEARCH_ROUNDS = 5


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


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work`, and the processor's seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def in_turns(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each contender's seconds; they take turns, every other round in reverse."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in [*contenders][:: (-1) ** number]:
            times[name].append(seconds(contenders[name])[1])
    return {name: float(np.median(values)) for name, values in times.items()}


def recall(scores: np.ndarray, exact: np.ndarray) -> float:
    """Percent of the exact k nearest, of scores [Q, k] and the exact ones [Q, k]; ties with the k-th count."""
    return 100 * float((scores >= exact[:, -1:] - TIE).mean())


def one_by_one(run: Callable[[np.ndarray], Any], queries: Iterable[np.ndarray]) -> None:
    for query in queries:
        run(query)


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

    plain_search = searcher(plain, parameters)
    search: dict[str, Callable[[np.ndarray], Any]] = {
        "ours": lambda queries: index.search_rows(queries, k),
        "plain": lambda queries: plain_search(queries, k),
    }
    single = [query[None] for query in held_out[:50]]
    batch = in_turns({name: partial(run, held_out) for name, run in search.items()}, SEARCH_ROUNDS)
    alone = in_turns({name: partial(one_by_one, run, single) for name, run in search.items()}, SEARCH_ROUNDS)
    return {
        "k": k,
        "parameters": format_parameters(parameters),
        "fewest_hits": int(min((found >= 0).sum(axis=1).min(), (near >= 0).sum(axis=1).min())),
        "recall_held_out": recall(scores(held_out, found), exact),
        "recall_notes": recall(scores(vectors[notes], near), exact_near),
        "batch_ms": {name: 1000 * value / len(held_out) for name, value in batch.items()},
        "alone_ms": {name: 1000 * value / len(single) for name, value in alone.items()},
    }


def build(
    vectors: np.ndarray, held_out: np.ndarray, factory: str, options: argparse.Namespace
) -> tuple[Index, Any, dict[str, float]]:
    """Our index, the plain one, and the seconds of each; of ours, those for equal vectors and for tuning."""
    table = Embeddings(tuple(map(str, range(len(vectors)))), vectors)
    settings = IndexSettings(factory=factory)
    times: dict[str, list[float]] = {"ours": [], "equal": [], "tuning": [], "plain": []}
    builds = {"ours": partial(make_index, table, settings, options.threads)}
    if options.rounds:
        builds["plain"] = partial(filled_index, vectors, factory, options.threads)
    made: dict[str, Any] = {}
    for number in range(max(1, options.rounds)):
        for name in [*builds][:: (-1) ** number]:
            made[name], build_s = seconds(builds[name])
            times[name].append(build_s)
        index = made["ours"]
        times["equal"].append(seconds(partial(distinct_points, vectors))[1])
        samples = Samples(index, vectors[index.points.first_rows], held_out)
        again = partial(tune, samples, settings.search_k, settings.target_recall)
        times["tuning"].append(seconds(again)[1])
    has_equal = len(index.points.sizes) < len(vectors)
    plain = made["plain"] if options.rounds and has_equal else index.faiss_index
    return index, plain, {name: float(np.median(values)) for name, values in times.items() if values}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A result per data set, share of equal vectors and factory."""
    for name in options.data:
        rng = np.random.default_rng(0)
        generated = DATA_SETS[name](options.notes + options.queries, options.dim, rng)
        held_out = generated[options.notes :]
        for share in dict.fromkeys((0.0, options.equal)):
            vectors = with_equal(generated[: options.notes], share, rng)
            for factory in options.factories:
                index, plain, build_s = build(vectors, held_out, factory, options)
                ks = [k for k in options.ks if k < len(vectors)]
                rows = [measure_k(index, plain, vectors, held_out, k) for k in ks]
                yield {"data": name, "equal": share, "factory": factory, "build_s": build_s, "by_k": rows}


def ratio(times: dict[str, float]) -> str:
    """The cells ours, plain and their ratio."""
    if "plain" not in times:
        return f"{times['ours']:.1f} | | "
    digits = 3 if times["plain"] < 1 else 1
    return f"{times['ours']:.{digits}f} | {times['plain']:.{digits}f} | {times['ours'] / times['plain']:.2f}"


def to_markdown(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    total = psutil.virtual_memory().total >> 30
    lines = [
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {total} GB, Python "
        f"{platform.python_version()}, FAISS {faiss.__version__}. Command: `python {' '.join(sys.argv)}`. "
        f"{options.notes:,} x {options.dim}, {options.threads} thread(s); recall in percent, the target is 95; "
        "processor's seconds of a build, and milliseconds of a query in a batch and alone.",
        "",
        "| data | equal | factory | build, s | plain | ratio | of it equal vectors | tuning |",
        "|" + " --- |" * 8,
    ]
    for r in results:
        name = f"| {r['data']} | {r['equal']:.0%} | {r['factory']} |"
        times = r["build_s"]
        lines.append(f"{name} {ratio(times)} | {times['equal']:.1f} | {times['tuning']:.1f} |")
    lines += [
        "",
        "| data | equal | factory | k | parameters | fewest hits | recall, held out | recall, notes | batch, ms "
        "| plain | ratio | alone, ms | plain | ratio |",
        "|" + " --- |" * 14,
    ]
    for r in results:
        for row in r["by_k"]:
            lines.append(
                f"| {r['data']} | {r['equal']:.0%} | {r['factory']} | {row['k']} | {row['parameters'] or 'none'} | "
                f"{row['fewest_hits']} | {row['recall_held_out']:.1f} | {row['recall_notes']:.1f} | "
                f"{ratio(row['batch_ms'])} | {ratio(row['alone_ms'])} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--data", nargs="+", choices=[*DATA_SETS], default=[*DATA_SETS])
    parser.add_argument("--equal", type=float, default=0.4, help="share of equal vectors")
    parser.add_argument("--factories", nargs="+", default=["HNSW32", "IVF1024,Flat", "IVF1024,PQ32x4fs,RFlat"])
    parser.add_argument("--ks", type=int, nargs="+", default=[1, 10, 30, 100, 300, 1000, 5000])
    parser.add_argument("--queries", type=int, default=200, help="of each kind")
    parser.add_argument("--rounds", type=int, default=2, help="builds of each contender; 0: ours once, no plain index")
    parser.add_argument("--threads", type=int, default=1, help="of builds and searches")
    parser.add_argument("--out", type=Path, default=RESULTS / "faiss_index", help="without .json and .md")
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    for result in run(options):
        results.append(result)
        print(json.dumps(result), flush=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1))
        options.out.with_suffix(".md").write_text("# The index beside plain FAISS\n\n" + to_markdown(results, options))


if __name__ == "__main__":
    main()
