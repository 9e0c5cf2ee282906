"""The report as files: recall.json, the tables, the plots and the contact sheet of neighbours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notellm2_core.config.baselines import encoders
from notellm2_core.config.settings import Config
from notellm2_core.evaluation import saliency_report
from notellm2_core.evaluation.evaluate import evaluate, image_reader, neighbour_sheet
from notellm2_core.evaluation.report import run_metrics, to_markdown, to_plot

ORACLE = "oracle.parquet"


@dataclass(frozen=True)
class ReportInputs:
    """The datasets that a report is made from."""

    source: Path  # holds the images, and maybe an oracle.parquet
    notes: Path
    pairs: Path
    clicks: Path  # TARGET_CLICKS, for the popularity baseline
    model: Path  # the trained model
    embeddings: Path  # a folder for each kind of input
    initial_embeddings: Path  # likewise, by the initial model
    baseline_embeddings: Path
    saliency: Path


def write_report(config: Config, inputs: ReportInputs, out: Path) -> dict[str, Any]:
    """Evaluate, and write the files of the report into `out`; those of the saliency only if it was measured.

    Returns Recall@k by method, input and slice, in percent, nested: {"notellm2": {"multimodal": {"all": {"10": ...}}}},
    and MRR and nDCG of the means over the queries, {"per_query": {"notellm2": {"multimodal": {"mrr": ...}}}}.
    """
    folders: dict[tuple[str, str], Path] = {
        (config.model.method, folder.name): folder for folder in _inputs(inputs.embeddings)
    }
    if "zero_shot" in config.evaluation.baselines:
        folders |= {("zero_shot", folder.name): folder for folder in _inputs(inputs.initial_embeddings)}
    for name in encoders(config.evaluation.baselines):
        folders[name, "text"] = inputs.baseline_embeddings / name
    oracle = inputs.source / ORACLE if (inputs.source / ORACLE).exists() else None
    report = evaluate(
        folders, inputs.notes, inputs.pairs, config, tokenizer=inputs.model, clicks=inputs.clicks, oracle=oracle
    )
    (out / "recall.json").write_text(json.dumps(report.to_dict(), indent=1))
    (out / "recall.md").write_text(to_markdown(report))
    (out / "recall.png").write_bytes(to_plot(report))
    if (record := saliency_report.read_saliency(inputs.saliency)) is not None:
        (out / "saliency.md").write_text(saliency_report.to_markdown(record))
        (out / "saliency.png").write_bytes(saliency_report.to_plot({record["method"]: record}))
    image = image_reader(inputs.notes, inputs.source, config.source.max_image_pixels)
    sheet = neighbour_sheet(
        inputs.embeddings / "multimodal",
        inputs.notes,
        inputs.pairs,
        config.evaluation.num_sheet_queries,
        image,
        config.seed,
    )
    (out / "neighbours.jpg").write_bytes(sheet)
    return run_metrics(report)


def _inputs(embeddings: Path) -> list[Path]:
    return sorted(p for p in embeddings.iterdir() if p.is_dir())
