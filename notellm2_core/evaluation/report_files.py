"""The report as files: recall.json, the tables, the plots and the contact sheet of neighbours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notellm2_core.config.settings import Config
from notellm2_core.evaluation import saliency_report
from notellm2_core.evaluation.evaluate import evaluate, neighbour_sheet, picture_reader
from notellm2_core.evaluation.report import Report, to_markdown, to_plot

ORACLE = "oracle.parquet"


@dataclass(frozen=True)
class ReportInputs:
    """The folders that a report is made from."""

    source: Path  # of the images; a source may have an oracle.parquet, too
    notes: Path
    pairs: Path
    clicks: Path  # clicks per note, for the popularity baseline
    model: Path  # the trained model
    embeddings: Path  # with a folder for each input
    initial_embeddings: Path  # of the model before training, likewise
    baseline_embeddings: Path
    saliency: Path


def write_report(config: Config, inputs: ReportInputs, out: Path) -> dict[str, Any]:
    """Measure, and write the files of the report into `out`; those of the saliency only where it was measured.

    Returns R@k by method, input and slice, in percent, nested: {"notellm2": {"multimodal": {"all": {"10": ...}}}}.
    """
    folders: dict[tuple[str, str], Path] = {
        (config.model.method, folder.name): folder for folder in _inputs(inputs.embeddings)
    }
    if "zero_shot" in config.evaluation.baselines:
        folders |= {("zero_shot", folder.name): folder for folder in _inputs(inputs.initial_embeddings)}
    if "minilm" in config.evaluation.baselines:
        folders["minilm", "text"] = inputs.baseline_embeddings / "minilm"
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
    picture = picture_reader(inputs.notes, inputs.source, config.source.max_image_pixels)
    sheet = neighbour_sheet(
        inputs.embeddings / "multimodal",
        inputs.notes,
        inputs.pairs,
        config.evaluation.num_sheet_queries,
        picture,
        config.seed,
    )
    (out / "neighbours.jpg").write_bytes(sheet)
    return _figures(report)


def _inputs(embeddings: Path) -> list[Path]:
    return sorted(p for p in embeddings.iterdir() if p.is_dir())


def _figures(report: Report) -> dict[str, Any]:
    """The recalls as nested figures; a cold slice that is empty, or holds all pairs, says nothing of its own."""
    whole = report.num_pairs["all"]
    silent = {name for name in ("cold_query", "cold_target") if report.num_pairs[name] in (0, whole)}
    figures: dict[str, Any] = {}
    for row in (row for row in report.rows if row.slice not in silent):
        figures.setdefault(row.method, {}).setdefault(row.inputs or "-", {})[row.slice] = {
            str(recall.k): recall.expected for recall in row.recalls if recall.expected is not None
        }
    return figures
