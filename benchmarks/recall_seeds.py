"""Recall over several seeds: the whole graph per seed, with wall time and peak memory, written to benchmarks/results/.

    .venv/bin/python benchmarks/recall_seeds.py --config pipelines/configs/demo.yaml --seeds 42 43 44
    .venv/bin/python benchmarks/recall_seeds.py --config pipelines/configs/movies.yaml --source FOLDER --seeds 42 43 44

Datasets that do not depend on the seed (pairs, vision features) are made once, in the time of the first seed.
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import yaml

from notellm2_core.config.load import load_config
from notellm2_core.lake.catalog import Catalog

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change, in YAML")
    parser.add_argument("--name", help="of the result files; default: the configuration's name")
    options = parser.parse_args()
    changes = dict(item.split("=", 1) for item in options.set)
    RESULTS.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        results.append(run(options.config, options.source, seed, changes))
        name = options.name or f"recall_{results[0]['config']}"
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1))
        (RESULTS / f"{name}.md").write_text(to_markdown(results, sys.argv))
    print((RESULTS / f"{name}.md").read_text())


def run(config: Path, source: str, seed: int, changes: dict[str, str]) -> dict[str, Any]:
    """The whole graph with this seed. Returns the report, seconds and the peak memory of the process tree."""
    overrides: dict[str, Any] = {"seed": seed, **{k: yaml.safe_load(v) for k, v in changes.items()}}
    if source:
        overrides["source.path"] = str(Path(source).resolve())
    resolved = load_config(config, overrides)
    folder = ROOT / ".dagster" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{resolved.name}-{seed}.yaml"
    own = {"name": f"{resolved.name}-{seed}"}  # each seed has a champion of its own
    file.write_text(yaml.safe_dump(resolved.model_dump(mode="json") | own))
    env = {k: v for k, v in os.environ.items() if k != "SOURCE"}
    env |= {"DAGSTER_HOME": env.get("DAGSTER_HOME", str(ROOT)), "NOTELLM2_CONFIG": str(file)}
    started, peak = time.monotonic(), 0
    process = psutil.Popen([sys.executable, "-W", "ignore", "-m", "pipelines.recall"], cwd=ROOT, env=env)
    while process.poll() is None:
        peak = max(peak, tree_memory(process))
        time.sleep(1)
    if process.returncode:
        sys.exit(process.returncode)
    seconds = time.monotonic() - started
    catalog = Catalog(load_config(file))
    report = json.loads((catalog.dataset("eval_recall").path / "recall.json").read_text())
    training = dict(catalog.dataset("checkpoint").manifest.metrics)
    return {
        "config": resolved.name, "seed": seed, "changes": changes, "seconds": round(seconds), "peak_bytes": peak,
        "training": training, "report": report,
    }  # fmt: skip


def tree_memory(process: psutil.Process) -> int:
    """Proportional set size of the process and its children: shared pages count once."""
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def to_markdown(results: list[dict[str, Any]], command: list[str]) -> str:
    """A row per method and input: recall in percent on all pairs and on short queries, one column per seed."""
    ks = results[0]["report"]["ks"]
    memory = psutil.virtual_memory().total >> 30
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {memory} GB"
    lines = [
        f"# Recall, {results[0]['config']}",
        "",
        f"{date.today()}, {machine}, Python {platform.python_version()}. Command: `python {' '.join(command)}`",
        "",
        "| seed | seconds | peak memory, GB | training seconds | loss first | loss last |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        t = r["training"]
        lines.append(
            f"| {r['seed']} | {r['seconds']} | {r['peak_bytes'] / 2**30:.1f} | {t['seconds']:.0f} "
            f"| {t['loss_first']:.2f} | {t['loss_last']:.2f} |"
        )
    for name in ("all", "short_query"):
        seeds = ", ".join(str(r["seed"]) for r in results)
        lines += ["", f"## {name}: {results[0]['report']['num_pairs'][name]} pairs, seeds {seeds}", ""]
        lines.append("| method | input | " + " | ".join(f"R@{k}" for k in ks) + " |")
        lines.append("| --- | --- |" + " --- |" * len(ks))
        for row in (row for row in results[0]["report"]["rows"] if row["slice"] == name):
            cells = [" / ".join(_percent(r, row, k) for r in results) for k in ks]
            lines.append(f"| {row['method']} | {row['input'] or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(result: dict[str, Any], like: dict[str, Any], k: int) -> str:
    """Recall@k of the row of `result` that has the method, input and slice of the row `like`."""
    for row in result["report"]["rows"]:
        if all(row[key] == like[key] for key in ("method", "input", "slice")):
            value = row["recall"][str(k)]
            return "–" if value is None else f"{value:.1f}"
    return "–"


if __name__ == "__main__":
    main()
