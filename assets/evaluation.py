"""The proof: recall of held-out pairs, beside everything it has to beat, and how much the model looks at the image."""

import sys
from collections.abc import Mapping

import dagster as dg

from assets.commands import run_command
from assets.resources import Pipeline, dataset_deps, shown
from assets.tracking import TrackedRun
from assets.training import GPU_RETRIES, note_arguments, picture_folders
from notellm2_core.lake import Dataset, Draft


@dg.asset(
    group_name="evaluation", kinds={"pytorch"}, deps=dataset_deps("saliency"), pool="gpu", retry_policy=GPU_RETRIES
)  # fmt: skip
def saliency(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """How much each layer's final compressed word reads from the image, from the text, and the rest (Eq. 3-6)."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from notellm2_core.evaluation.saliency import read_saliency, visual_shares

        if recipe.config.evaluation.saliency_pairs == 0:
            return
        command = [sys.executable, "-m", "notellm2_core.training.saliency", *note_arguments(recipe, inputs),
                   "--model", str(inputs["checkpoint"].path), "--pairs", str(inputs["pair_datasets"].path),
                   "--pictures", *map(str, picture_folders(recipe)), "--out", str(draft.path)]  # fmt: skip
        run_command(context, command)
        record = read_saliency(draft.path)
        assert record is not None
        draft.metrics |= {"num_notes": record["num_notes"], "visual_share": visual_shares(record)}

    return pipeline.publish(context, build)


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
            saliency=inputs["saliency"].path,
            out=draft.path,
        )
        draft.metrics["ann"] = dict(inputs["faiss_index"].manifest.metrics)

    files = {
        "recall": ["recall.md"], "neighbours": ["neighbours.jpg"], "plot": ["recall.png"],
        "saliency": ["saliency.md", "saliency.png"],
    }  # fmt: skip
    return pipeline.publish(context, build, shown(files))
