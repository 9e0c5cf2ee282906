"""Is neglect of the image due to the method, the initialisation or the learning rate? Protocol: decision 0006.

    .venv/bin/python benchmarks/visual_neglect.py run [--seeds 301 302 303 304 305] [--out FOLDER] [--set KEY=VALUE ...]
    .venv/bin/python benchmarks/visual_neglect.py report [--out FOLDER]

`run` trains two LLMs to read the demo world's text, then the eight models of each seed, one at a time on one thread.
Existing results are reused, so it can be killed and started again. `report` writes
benchmarks/results/visual_neglect.md and .json.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from scipy import stats

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.config.training import TrainingSettings
from notellm2_core.evaluation.evaluate import evaluate
from notellm2_core.evaluation.saliency_report import read_saliency, visual_shares
from notellm2_core.lake.catalog import Catalog
from notellm2_core.model.build import load_model
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.runtime.files import new_folder, write_atomically
from notellm2_core.training.launch import Paths, launch_command

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = ROOT / "pipelines" / "configs" / "demo.yaml"
COMMON = {
    "training.batch_pairs": 16, "training.num_ranks": 1, "training.zero_stage": 0, "training.precision": "fp32",
    "training.checkpoint_every_steps": 1000, "training.validate_every_steps": 1000, "evaluation.baselines": ["random"],
}  # fmt: skip
READING = COMMON | {
    "seed": 0, "model.llm.num_layers": 2, "model.init": {"pca_projector": True},
    "training.num_steps": 300, "training.learning_rate": 5e-4,
}  # fmt: skip
PROMPTS = {"basic": "basic", "notellm2": "micl"}  # the method without fusion that has the same prompt
BUDGET = COMMON | {"training.num_steps": 80, "training.learning_rate": 2e-4}
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "method": {"basic": {"model.method": "basic"}, "notellm2": {"model.method": "notellm2"}},
    "initialisation": {
        "random": {"model.init": {}},
        "balanced": {
            "model.init": {
                "pca_projector": True,
                "num_pca_notes": 256,
                "fusion_scale": 0.3,
                "gate_bias": -1.0,
                "visual_token_gain": 1.0,
            }
        },
    },
    "new modules": {
        "slow": {"training.new_module_learning_rate": 3e-5},
        "fast": {"training.new_module_learning_rate": 3e-4},
    },
}
CELLS = tuple(itertools.product(*FACTORS.values()))
MEASURES = ("all pairs", "text-poor queries", "image only", "text only", "S_v share", "gate mean")
K = 10
DATA = (
    "raw_events",
    "notes",
    "interactions",
    "vision_features",
    "cooccurrence",
    "note_split",
    "related_pairs",
    "pair_datasets",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[301, 302, 303, 304, 305])
    parser.add_argument("--cells", nargs="+", default=["/".join(c) for c in CELLS], metavar="METHOD/INIT/RATE")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings to change, in YAML")
    parser.add_argument("--out", type=Path, default=ROOT / ".dagster" / "benchmarks" / "visual_neglect")
    options = parser.parse_args()
    changes = {k: yaml.safe_load(v) for k, v in (item.split("=", 1) for item in options.set)}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.action == "run":
        make_data(load_config(CONFIG, BUDGET))
        readers = {method: teach_reading(method, options.out) for method in PROMPTS}
        for seed, cell in itertools.product(options.seeds, CELLS):
            if "/".join(cell) in options.cells:
                run(seed, cell, readers[cell[0]], changes, options.out)
    else:
        report(options.out)


def make_data(config: Config) -> None:
    """Make the pairs and the vision features with the pipeline if they do not exist."""
    if all(Catalog(config).find(name) for name in DATA):
        return
    file = ROOT / ".dagster" / "benchmarks" / "visual_neglect.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    os.environ |= {"NOTELLM2_CONFIG": str(file), "DAGSTER_HOME": str(ROOT)}
    import dagster as dg

    from assets.resources.partitions import log_partitions
    from pipelines.definitions import definitions

    with dg.DagsterInstance.get() as instance:
        definitions(config.source).resolve_job_def("weekly_retrain").execute_in_process(
            instance=instance,
            partition_key=log_partitions(config.source).get_last_partition_key(),
            asset_selection=[dg.AssetKey(name) for name in DATA],
        )


def teach_reading(method: str, out: Path) -> Path:
    """An LLM that reads the world's text in this method's prompt, and its tokenizer: OUT/reader-METHOD.

    It is trained on pairs whose images are replaced by zeros. The paper's LLMs can read the platform's text in any
    prompt before the experiment; the first layers of a small LLM cannot.
    """
    reader = out / f"reader-{method}"
    if reader.exists():
        return reader
    config = load_config(CONFIG, READING | {"model.method": PROMPTS[method]})
    folder = out / f"reading-{method}"
    blind = folder / "images"
    shutil.rmtree(folder, ignore_errors=True)
    catalog = Catalog(config)
    notes = inputs(catalog)
    shutil.copytree(notes.images, blind)
    table = pq.read_table(notes.images / "note_images.parquet")
    hidden = pa.nulls(len(table), pa.string())
    pq.write_table(table.set_column(1, table.schema.field("image_id"), hidden), blind / "note_images.parquet")
    train(config, folder, replace(notes, images=blind), catalog.dataset("pair_datasets").path)
    model, processor = load_model(folder / "model")
    with new_folder(reader) as draft:
        model.llm.save_pretrained(draft)
        processor.tokenizer.save_pretrained(draft)
    return reader


def inputs(catalog: Catalog) -> NoteInputs:
    """The notes that a training run reads."""
    notes, images = catalog.dataset("notes").path / "notes", catalog.dataset("vision_features").path
    return NoteInputs(notes, images, catalog.lake.root / "vision_store")


def train(config: Config, folder: Path, notes: NoteInputs, pairs: Path) -> None:
    """Train a model on `pairs`; the result is FOLDER/model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    paths = Paths(notes, pairs, folder / "work", folder / "model")
    command = launch_command(folder / "config.yaml", TrainingSettings(), paths)
    call(command, folder / "training.log")
    shutil.rmtree(folder / "work" / "checkpoints", ignore_errors=True)


def run(seed: int, cell: Sequence[str], reader: Path, changes: dict[str, Any], out: Path) -> None:
    """Train one model, embed the test pool and the validation notes, measure; OUT/<seed>-<cell>.json."""
    name = "-".join([str(seed), *cell, *(f"{key}={value}" for key, value in changes.items())])
    if (out / f"{name}.json").exists():
        return
    overrides: dict[str, Any] = {"seed": seed, **BUDGET, "model.llm": {"name": str(reader)}}
    for level, levels in zip(cell, FACTORS.values(), strict=True):
        overrides |= levels[level]
    config = load_config(CONFIG, overrides | changes)
    catalog, folder = Catalog(config), out / name
    notes, pairs = inputs(catalog), catalog.dataset("pair_datasets").path
    shutil.rmtree(folder, ignore_errors=True)
    train(config, folder, notes, pairs)
    common = ["--config", folder / "config.yaml", "--model", folder / "model", *notes.arguments()]
    export = ["--note-ids", pairs / "pool", "--inputs", "multimodal,image,text", "--out", folder / "embeddings"]
    call(python("notellm2_core.inference.export", *common, *export), folder / "export.log")
    measure = ["--pairs", pairs, "--out", folder / "saliency"]
    call(python("notellm2_core.training.measure_saliency", *common, *measure), folder / "saliency.log")
    record = read_saliency(folder / "saliency")
    assert record is not None
    metrics = json.loads((folder / "model" / "training.json").read_text())
    tables = {("model", kind): folder / "embeddings" / kind for kind in ("multimodal", "image", "text")}
    rows = evaluate(tables, notes.notes, pairs, config, tokenizer=folder / "model").to_dict()["rows"]
    recall = {(r["method"], r["input"], r["slice"]): r["recall"] for r in rows}
    measures = {
        "all pairs": recall["model", "multimodal", "all"][str(K)],
        "text-poor queries": recall["model", "multimodal", "short_query"][str(K)],
        "image only": recall["model", "image", "all"][str(K)],
        "text only": recall["model", "text", "all"][str(K)],
        "gate mean": metrics.get("gate_mean"),
        "S_v share": 100 * float(np.mean(list(visual_shares(record).values()))),
    }
    result = {"seed": seed, "cell": list(cell), "changes": changes, "commit": commit(), "measures": measures,
              "validation_recall_at_10": metrics["validation_recall_at_10"], "training": metrics}  # fmt: skip
    write_atomically(out / f"{name}.json", json.dumps(result, indent=1))
    print(name, {k: v if v is None else round(v, 1) for k, v in measures.items()}, flush=True)


def report(out: Path) -> None:
    """Write the values by cell, the difference of the methods in each condition, and the effects of the 2 x 2 x 2."""
    results = [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]
    results = [r for r in results if not r["changes"]]
    seeds = sorted(s for s in {r["seed"] for r in results} if sum(r["seed"] == s for r in results) == len(CELLS))
    values = {(r["seed"], *r["cell"]): r["measures"] for r in results if r["seed"] in seeds}
    lines = [
        "# Who neglects the image?",
        "",
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}. "
        "Command: `python benchmarks/visual_neglect.py run`; protocol: docs/decisions/0006-visual-neglect.md. "
        f"Commit {', '.join(sorted({r['commit'] for r in results}))}. Seeds: {', '.join(map(str, seeds))}.",
        "",
        f"Recalls are R@{K} in percent on the test pool. Mean and standard deviation over the seeds, then the values.",
    ]
    for measure in MEASURES:
        table = {cell: [values[(seed, *cell)].get(measure) for seed in seeds] for cell in CELLS}
        header = "| method | initialisation | new modules | mean | sd | values |"
        lines += ["", f"## {measure}", "", header, "|" + " --- |" * 6]
        for cell, by_seed in table.items():
            if None not in by_seed:
                cells = [*cell, f"{np.mean(by_seed):.3g}", f"{np.std(by_seed, ddof=1):.2g}"]
                cells.append(" / ".join(f"{v:.1f}" if abs(v) >= 1 else f"{v:.3f}" for v in by_seed))
                lines.append(f"| {' | '.join(cells)} |")
        if any(None in by_seed for by_seed in table.values()):
            continue
        y = np.array([table[cell] for cell in CELLS]).reshape(2, 2, 2, len(seeds))  # method, initialisation, rate, seed
        lines += ["", "| effect | mean difference | sd | t | p |", "|" + " --- |" * 5]
        for name, effect in effects(y).items():
            t, p = stats.ttest_1samp(effect, 0)
            lines.append(f"| {name} | {effect.mean():+.3g} | {effect.std(ddof=1):.2g} | {t:.1f} | {p:.2g} |")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "visual_neglect.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "visual_neglect.json").write_text(json.dumps(results, indent=1))
    print("\n".join(lines))


def effects(y: np.ndarray) -> dict[str, np.ndarray]:
    """From `y` [2, 2, 2, seeds], by seed: the methods' difference in each condition, main effects and interactions.

    A main effect is the mean of a factor's second level less that of its first; an interaction is the same with the
    product of the factors' signs.
    """
    initialisations, rates = list(FACTORS["initialisation"]), list(FACTORS["new modules"])
    differences = {
        f"notellm2 - basic: {initialisation}, {rate}": y[1, i, j] - y[0, i, j]
        for i, initialisation in enumerate(initialisations)
        for j, rate in enumerate(rates)
    }
    sign = np.array([-1.0, 1.0])
    for size in (1, 2, 3):
        for axes in itertools.combinations(range(3), size):
            weights = np.ones((2, 2, 2))
            for axis in axes:
                weights = weights * sign.reshape([2 if a == axis else 1 for a in range(3)])
            differences[" x ".join(list(FACTORS)[axis] for axis in axes)] = np.tensordot(weights / 4, y, axes=3)
    return differences


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def python(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def call(command: Sequence[str], log: Path) -> None:
    """Run the command on one thread, its output in `log`. Raises CalledProcessError."""
    with log.open("w") as file:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=env, stdout=file, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
