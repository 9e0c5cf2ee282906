"""The proof: recall of held-out pairs, beside everything it has to beat."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources import Pipeline, dataset_deps
from assets.tracking import TrackedRun
from notellm2_core.lake import Dataset, Draft


@dg.asset(group_name="evaluation", kinds={"numpy"}, deps=dataset_deps("eval_recall"))
def eval_recall(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Exact Recall@k on held-out notes for every input and slice, with baselines and a picture of neighbours."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from notellm2_core.evaluation.release import write_report

        draft.metrics |= write_report(
            recipe.config,
            source=recipe.source,
            notes=inputs["notes"].path / "notes",
            pairs=inputs["pair_datasets"].path,
            # By time, the pool had no clicks before the test days: this is the best that popularity could do.
            clicks=inputs["cooccurrence"].path
            / ("test_clicks" if recipe.config.split.by == "time" else "train_clicks"),
            model=inputs["checkpoint"].path,
            embeddings=inputs["note_embeddings"].path,
            start_embeddings=inputs["start_embeddings"].path,
            baseline_embeddings=inputs["baseline_embeddings"].path,
            out=draft.path,
        )
        draft.metrics["ann"] = dict(inputs["faiss_index"].manifest.metrics)

    return pipeline.publish(context, build, _show)


def _show(dataset: Dataset) -> dict[str, Any]:
    table = (dataset.path / "recall.md").read_text()
    return {
        "recall": dg.MetadataValue.md(table),
        "neighbours": dg.MetadataValue.md(_picture(dataset.path / "neighbours.jpg")),
        "plot": dg.MetadataValue.md(_picture(dataset.path / "recall.png")),
    }


def _picture(path: Path) -> str:
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    return f"![{path.stem}](data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()})"
