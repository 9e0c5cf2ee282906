"""Evaluation: recall of held-out pairs beside the baselines, and how much the model uses the image."""

import json
import sys
from typing import Any

from assets.resources.arguments import note_inputs, write_config
from assets.resources.metadata import table
from assets.resources.steps import GPU, Metrics, Step, dataset
from notellm2_core.config.settings import Config
from notellm2_core.lake.lake import Dataset
from notellm2_core.schema import NOTES_TABLE, TEST_CLICKS, TRAIN_CLICKS


@dataset("evaluation", {"pytorch"}, on=GPU)
def saliency(step: Step) -> Metrics:
    """Saliency (Eq. 3-6): by layer, how much flows from the image and from the text to the final compressed word."""
    from notellm2_core.evaluation.saliency_report import read_saliency, visual_shares

    if step.config.evaluation.saliency_pairs == 0:
        return {}
    step.command([sys.executable, "-m", "notellm2_core.training.measure_saliency",
                  "--config", write_config(step.catalog), *note_inputs(step).arguments(),
                  "--model", step.path("checkpoint"), "--pairs", step.path("pair_datasets"),
                  "--out", step.out])  # fmt: skip
    record = read_saliency(step.out)
    assert record is not None
    return {"num_notes": record["num_notes"], "visual_share": visual_shares(record)}


SHOWN = {
    "recall": ["recall.md"], "neighbours": ["neighbours.jpg"], "plot": ["recall.png"],
    "saliency": ["saliency.md", "saliency.png"],
}  # fmt: skip


def recall_page(report: Dataset, config: Config) -> dict[str, Any]:
    """The five headline figures and the table of all pairs. The other figures are in recall.json and in MLflow."""
    from notellm2_core.evaluation.report import headline

    rows = [row for row in json.loads((report.path / "recall.json").read_text())["rows"] if row["slice"] == "all"]
    shown = []
    for row in rows:
        recall = {f"R@{k}": r and round(r, 1) for k, r in row["recall"].items()}
        shown.append({"method": row["method"], "input": row["input"], **recall})
    all_pairs = table(shown, floats=[f"R@{k}" for k in config.evaluation.ks])
    return {**headline(rows, config.model.method), "all_pairs": all_pairs}


@dataset("evaluation", {"numpy"}, show=SHOWN, page=recall_page)
def eval_recall(step: Step) -> Metrics:
    """Exact Recall@k on held-out notes by input and slice, with baselines and a contact sheet of neighbours."""
    from notellm2_core.evaluation.report_files import ReportInputs, write_report
    from notellm2_core.model.card import write_card

    # In a split by time, pool notes have no clicks before the test days: those of the test days bound popularity.
    clicks = TEST_CLICKS if step.config.split.by == "time" else TRAIN_CLICKS
    inputs = ReportInputs(
        source=step.catalog.source,
        notes=step.path("notes", NOTES_TABLE),
        pairs=step.path("pair_datasets"),
        clicks=step.path("cooccurrence", clicks),
        model=step.path("checkpoint"),
        embeddings=step.path("note_embeddings"),
        initial_embeddings=step.path("initial_embeddings"),
        baseline_embeddings=step.path("baseline_embeddings"),
        saliency=step.path("saliency"),
    )
    recall = write_report(step.config, inputs, step.out)
    license = step.config.model.license
    write_card(step.path("checkpoint"), license, step.out / "recall.md", step.out / "model_card.md")
    return {**recall, "ann": dict(step.inputs["faiss_index"].manifest.metrics)}
