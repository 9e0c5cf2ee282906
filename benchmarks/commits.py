"""Is this commit slower than another one, in training and in export?

    .venv/bin/python benchmarks/commits.py COMMIT [--rounds 5] [--steps 4]

"This commit" is the checkout, with its uncommitted changes.
Each round runs the same contenders of training.py and export.py from both commits, each in its own process, one after
the other. The ratio of a contender is the median over the rounds of (this commit's notes per second / the other's).
The contenders must have the same names in the other commit's scripts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training import RESULTS, heading

ROOT = Path(__file__).parents[1]
CONTENDERS = {"step": "training.py", "gradcache": "training.py", "export": "export.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round, in training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "clone", "-q", ROOT, other], check=True)
        subprocess.run(["git", "checkout", "-q", options.commit], cwd=other, check=True)
        cache = Path(folder) / "cache"
        cache.mkdir()
        results = {name: compare(name, other, cache, options) for name in CONTENDERS}
    (RESULTS / "commits.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "commits.md").write_text(table := to_markdown(results))
    print(table)


def compare(contender: str, other: Path, cache: Path, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Notes per second of each round: {timed row: {"other": [...], "this": [...]}}."""
    rows: dict[str, dict[str, list[float]]] = {}
    for number in range(options.rounds):
        checkouts = {"other": other, "this": ROOT}
        for commit in sorted(checkouts, reverse=bool(number % 2)):  # each comes first in every second round
            for name, rate in rates(contender, checkouts[commit], cache, options.steps).items():
                rows.setdefault(name, {"other": [], "this": []})[commit].append(rate)
                print(f"{name}, {commit}: {rate:.2f} notes/s", flush=True)
    return rows


def rates(contender: str, checkout: Path, cache: Path, steps: int) -> dict[str, float]:
    """Notes per second of each timed row of one process: `contender` of `checkout`."""
    script = CONTENDERS[contender]
    command = [sys.executable, "-W", "ignore", f"benchmarks/{script}", "--one", contender, str(cache)]
    if script == "training.py":
        command += ["--steps", str(steps)]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender} failed in {checkout}:\n{done.stderr[-3000:]}")
    return {name: row["notes_per_s"] for name, row in json.loads(done.stdout.splitlines()[-1]).items()}


def to_markdown(results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    lines = [
        *heading("Training and export against another commit"),
        "`llm` is the bare LLM, the same in both: its ratio is the machine's noise.",
        "",
        "| contender | other, notes/s | this, notes/s | ratio | ratio of each round |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, row in (item for rows in results.values() for item in rows.items()):
        ratios = [this / other for this, other in zip(row["this"], row["other"], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(row['other']):.1f} | {statistics.median(row['this']):.1f} "
            f"| {statistics.median(ratios):.2f} | {', '.join(f'{r:.2f}' for r in ratios)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
