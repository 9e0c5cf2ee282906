"""The three engines of the service beside each other: CPU of a search at 10,000 notes.

    .venv/bin/python benchmarks/serving_engines.py

All three compare a query with all vectors, which are random unit vectors of width 64. Times are of the processor,
because others may use the machine: of this process, and of the server's for the real Milvus.
The result is written to benchmarks/results/serving_engines.md.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before numpy and faiss

import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from notellm2_core.lake.lake import Lake
from notellm2_core.serving.engine import BaseIndex, open_engine
from tests.support.bases import unit_vectors, write_base
from tests.support.milvus_server import milvus_server

NUM, DIM, K, NUM_CALLS = 10_000, 64, 100, 50
RESULT = Path(__file__).parent / "results" / "serving_engines.md"


def measure(index: BaseIndex, vectors: np.ndarray, batch: int, server: psutil.Process | None) -> str:
    """CPU ms of a call: of this process, and of the server."""
    queries = unit_vectors(1, batch, DIM)
    rows, _ = index.search_rows(queries, K)  # warm
    assert (rows == np.argsort(-(queries @ vectors.T), axis=1)[:, :K]).mean() > 0.99
    start, start_of_server = time.process_time(), _seconds(server)
    for _ in range(NUM_CALLS):
        index.search_rows(queries, K)
    own = 1000 * (time.process_time() - start) / NUM_CALLS
    return f"{own:.2f}" + (f" + {1000 * (_seconds(server) - start_of_server) / NUM_CALLS:.2f}" if server else "")


def _seconds(server: psutil.Process | None) -> float:
    return 0.0 if server is None else sum(server.cpu_times()[:2])


def main() -> None:
    vectors = unit_vectors(0, NUM, DIM)
    lines = []
    with (
        tempfile.TemporaryDirectory() as folder,
        milvus_server(Path(folder) / "bin", Path(folder) / "milvus") as running,
    ):
        assert running.process is not None
        lake = Lake(Path(folder) / "lake")
        files = write_base(lake, "bench", [f"n{n}" for n in range(NUM)], vectors)
        urls = {
            "FAISS": None,
            "milvus-lite 3.2.2": f"milvus://{folder}/notes.db",
            "Milvus 2.3.5, a server": running.url,
        }
        for name, url in urls.items():
            engine = open_engine(url, lake)
            start = time.perf_counter()
            index, _ = engine.open(files)
            seconds = time.perf_counter() - start
            server = psutil.Process(running.process.pid) if url == running.url else None
            one, twenty = (measure(index, vectors, batch, server) for batch in (1, 20))
            lines.append(f"| {name} | {seconds:.1f} | {one} | {twenty} |")
            engine.close()
    RESULT.write_text(
        f"# The engines of the service\n\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}. Command: `python benchmarks/{Path(__file__).name}`\n\n"
        f"{NUM:,} notes x {DIM}, random unit vectors, k = {K}, exact search. CPU of a call in milliseconds, "
        f"the mean of {NUM_CALLS}: of the service's process, and of the server's, which also takes some while it is "
        "idle.\n\n"
        "| engine | opening, s of wall | one query | twenty |\n| --- | ---: | ---: | ---: |\n" + "\n".join(lines) + "\n"
    )
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
