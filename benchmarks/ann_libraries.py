"""FAISS beside hnswlib and usearch: the CPU time of one search at a recall of 0.95, on one thread.

    .venv/bin/pip install usearch hnswlib           hnswlib needs a C++ compiler; what is missing is left out
    .venv/bin/python benchmarks/ann_libraries.py    100,000 notes; a quarter of an hour on two cores

Data sets as in benchmarks/index.py; queries are held out. Each library builds HNSW with 16 and with 32 links per note
and the same efConstruction; FAISS also builds inverted lists, which the others do not have: with the vectors, and with
4-bit codes whose best candidates are compared exactly. Of each index, the smallest effort (ef of a graph, nprobe of
lists) is searched for by which recall@k reaches the target. Then all contenders take turns, query by query alone, and
the median of the rounds counts. The libraries return ids and similarities; all vectors are of unit length, so that
inner product is cosine.
"""

import argparse
import importlib
import json
import os
import platform
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before FAISS is imported

import faiss
import numpy as np
from index import DATA_SETS, in_turns, seconds

RESULTS = Path(__file__).parent / "results"
Search = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, d] and effort -> rows [Q, k]
_CANDIDATES = 3  # of 4-bit codes, as a multiple of k


class Contender(NamedTuple):
    library: str
    name: str
    build: Callable[[], Search]
    least: int  # effort; a graph cannot search with less than k
    most: int


def of_faiss(vectors: np.ndarray, links: int, ef: int, k: int) -> Search:
    index = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef
    index.add(vectors)
    parameters = cache(lambda ef: faiss.SearchParametersHNSW(efSearch=ef))
    return lambda queries, ef: index.search(queries, k, params=parameters(ef))[1]


def of_inverted_lists(vectors: np.ndarray, factory: str, k: int) -> Search:
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    lists = faiss.extract_index_ivf(index)
    if isinstance(index, faiss.IndexRefineFlat):
        index.k_factor = _CANDIDATES

    def search(queries: np.ndarray, num_lists: int) -> np.ndarray:
        lists.nprobe = num_lists
        rows: np.ndarray = index.search(queries, k)[1]
        return rows

    return search


def of_hnswlib(vectors: np.ndarray, links: int, ef: int, k: int) -> Search:
    index = importlib.import_module("hnswlib").Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), ef_construction=ef, M=links)
    index.add_items(vectors, num_threads=1)

    def search(queries: np.ndarray, ef: int) -> np.ndarray:
        index.set_ef(ef)
        rows: np.ndarray = index.knn_query(queries, k, num_threads=1)[0]
        return rows

    return search


def of_usearch(vectors: np.ndarray, links: int, ef: int, k: int) -> Search:
    index = importlib.import_module("usearch.index").Index(
        ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=links, expansion_add=ef
    )
    index.add(np.arange(len(vectors)), vectors, threads=1)

    def search(queries: np.ndarray, ef: int) -> np.ndarray:
        index.expansion_search = ef
        rows: np.ndarray = index.search(queries, k, threads=1).keys
        return rows.reshape(len(queries), -1)

    return search


GRAPHS = {"faiss": of_faiss, "hnswlib": of_hnswlib, "usearch": of_usearch}


def contenders(vectors: np.ndarray, options: argparse.Namespace) -> list[Contender]:
    graphs = [
        Contender(
            library,
            f"{library} HNSW{links}",
            partial(build, vectors, links, options.ef, options.k),
            options.k,
            options.notes,
        )
        for library, build in GRAPHS.items()
        for links in options.links
    ]
    lists = [
        Contender(
            "faiss", f"faiss {factory}", partial(of_inverted_lists, vectors, factory, options.k), 1, options.lists
        )
        for factory in (f"IVF{options.lists},Flat", f"IVF{options.lists},PQ{options.dim // 2}x4fsr,RFlat")
    ]
    return graphs + lists


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, exact, strict=True)]))


def smallest_effort(
    search: Search, least: int, most: int, queries: np.ndarray, exact: np.ndarray, target: float
) -> tuple[int, float]:
    """The smallest effort (within 3 %) whose recall reaches `target`, and that recall; `most` where none does."""
    low = high = least
    while (reached := recall(search(queries, high), exact)) < target:
        if high == most:
            return most, reached
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 32):
        middle = (low + high) // 2
        if (found := recall(search(queries, middle), exact)) >= target:
            high, reached = middle, found
        else:
            low = middle
    return high, reached


def search_each(search: Search, queries: np.ndarray, effort: int) -> None:
    """One query at a time."""
    for query in queries:
        search(query[None], effort)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    vectors = DATA_SETS[name](options.notes + options.queries, options.dim, rng)
    vectors, queries = vectors[: options.notes], vectors[options.notes :]
    exact = faiss.knn(queries, vectors, options.k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], Any]] = {}
    for contender in contenders(vectors, options):
        try:
            search, built = seconds(contender.build)
        except ImportError as e:
            print(f"{contender.name} is left out: {e}")
            continue
        effort, reached = smallest_effort(search, contender.least, contender.most, queries, exact, options.target)
        runs[contender.name] = partial(search_each, search, queries, effort)
        rows.append({"data": name, "library": contender.library, "index": contender.name, "build_s": built,
                     "effort": effort, "recall": reached})  # fmt: skip
        print(rows[-1], flush=True)
    times = in_turns(runs, options.rounds)
    return [row | {"search_ms": 1000 * times[row["index"]] / len(queries)} for row in rows]


def ratio(rows: list[dict[str, Any]], target: float) -> float:
    """The time of the best of FAISS over that of the best of the others, of those that reach the target."""
    own, others = (
        [row["search_ms"] for row in rows if (row["library"] == "faiss") == is_faiss and row["recall"] >= target]
        for is_faiss in (True, False)
    )
    return min(own, default=float("nan")) / min(others, default=float("nan"))


def to_markdown(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"# FAISS beside hnswlib and usearch ({date.today()})", "",
        f"`.venv/bin/python benchmarks/ann_libraries.py --notes {options.notes} --queries {options.queries} "
        f"--rounds {options.rounds}`, "
        f"{platform.machine()}, {os.cpu_count()} cores; k = {options.k}, efConstruction {options.ef}, one thread, "
        f"{options.queries} held-out queries one by one, {options.rounds} rounds in turns; CPU times.", "",
        "| data | index | build s | ef or nprobe | recall | ms a search |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        figures = f"{row['build_s']:.0f} | {row['effort']} | {row['recall']:.3f} | {row['search_ms']:.3f}"
        lines.append(f"| {row['data']} | {row['index']} | {figures} |")
    for name in options.data:
        found = [
            ratio([row for row in rows if row["data"] == name and part in row["index"]], options.target)
            for part in ("", "HNSW")
        ]
        text = "the best of FAISS takes {:.2f} of the time of the best of the others; of graphs alone, {:.2f}"
        lines += ["", f"On {name}, {text.format(*found)}."]
    lines += ["", "A graph cannot search with an ef below k, and may find more than the target for that."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=[*DATA_SETS])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--links", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--lists", type=int, default=1024)
    parser.add_argument("--ef", type=int, default=80, help="efConstruction")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = [row for name in options.data for row in measure(name, options)]
    text = to_markdown(rows, options)
    (options.out / "ann_libraries.md").write_text(text)
    (options.out / "ann_libraries.json").write_text(json.dumps(rows, indent=1))
    print(text)


if __name__ == "__main__":
    main()
