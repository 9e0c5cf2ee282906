"""The GPU benchmark runs on a CPU with the tiny models: its contenders and its table. The index benchmark, small.

The engines beside ours in the benchmark of pairs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL_IN_ONE_PROCESS = """
import gpu
options = gpu.parsed()
gpu.TEXT_PAIRS = gpu.EXPORTED_BATCHES = 2
results = {}
for run in gpu.PROCESSES.values():
    results |= run(options)
print(gpu.to_markdown(results, options))
"""


@pytest.mark.slow
def test_gpu_benchmark_with_tiny_models() -> None:
    config = ["--config", str(ROOT / "pipelines/configs/tiny.yaml"), "--gradient-checkpointing"]
    sizes = ["--pairs", "2", "3", "--steps", "1", "--batch-notes", "2", "--micro-batch-tokens", "300"]
    command = [sys.executable, "-W", "ignore", "-c", ALL_IN_ONE_PROCESS, *config, *sizes]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    names = [row[0].strip("| ") for row in rows if "trainer" not in row[0]]  # it needs `datasets`
    inference = ["llm", "plain", "llm-fused", "plain-fused", "llm-training", "export", "export-mixed"]
    assert names == ["contender", "---", *inference, "step-2", "step-3", "text"]
    assert all(float(row[1].replace(",", "")) > 0 for row in rows[2:])


@pytest.mark.slow
def test_index_benchmark_with_few_notes(tmp_path: Path) -> None:
    """k hits for every k, at the target recall, with and without equal vectors."""
    sizes = ["--notes", "2000", "--dim", "16", "--queries", "20", "--ks", "1", "50", "1500", "--factories", "HNSW16",
             "--rounds", "1"]  # fmt: skip
    command = [sys.executable, "-W", "ignore", "index.py", *sizes, "--out", str(tmp_path / "index")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT / "benchmarks", env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "index.json").read_text())
    assert [(r["data"], r["equal"]) for r in results] == [(d, e) for d in ("clusters", "manifold") for e in (0.0, 0.4)]
    for row in (row for result in results for row in result["by_k"]):
        assert row["fewest_hits"] == row["k"]
        assert min(row["recall_held_out"], row["recall_notes"]) >= 90
    assert (tmp_path / "index.md").read_text().count("| clusters |") == 2 + 6  # builds, and searches


@pytest.mark.parametrize("engine", ["polars", "clickhouse"])
def test_engines_compute_the_same_pairs(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 generated events: the pairs, users and scores of DuckDB's query."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cooccurrence import compare, generate
    from pair_engines import ENGINES

    module, function = ENGINES[engine]
    pytest.importorskip(module)
    log = tmp_path / "log.parquet"
    generate(5_000, log)
    for name, run in (("duckdb", ENGINES["duckdb"][1]), (engine, function)):
        assert run(log, tmp_path / name, "")["seconds"] > 0
    found = compare(tmp_path / engine, tmp_path / "duckdb", 1)
    assert found["pairs"] > 5_000 and found["differing"] == 0 and found["max_error"] < 1e-12
