"""Embeddings by each model, what they take for related, and the FAISS index."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.commands import run_command
from assets.resources import Build, Pipeline, dataset_deps
from assets.tracking import TrackedRun
from assets.training import GPU_RETRIES, note_arguments, picture_folders
from notellm2_core.files import link_or_copy
from notellm2_core.lake import Dataset, Draft
from notellm2_core.recipe import Recipe
from notellm2_core.training.launch import torchrun

_INPUTS = ("multimodal", "image", "text")


@dg.asset(
    group_name="retrieval", kinds={"pytorch", "parquet"}, deps=dataset_deps("start_embeddings"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def start_embeddings(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Embeddings of the pool before the first training step, for the zero-shot rows."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        _export(context, recipe, inputs, inputs["start_model"].path, draft, _INPUTS, _pool(inputs))
        draft.metrics |= _figures(draft.path)

    return _published(context, pipeline, build)


@dg.asset(
    group_name="model", kinds={"pytorch", "faiss", "parquet"}, deps=dataset_deps("hard_negatives"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def hard_negatives(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Training notes that look related and are not, where `training.hard_negatives` asks for some."""
    recipe = pipeline.recipe()
    settings = recipe.config.training.hard_negatives

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        if not settings.num:
            return
        pairs, model = inputs["pair_datasets"].path, settings.model or inputs["start_model"].path
        _export(context, recipe, inputs, model, draft, _INPUTS[:1], pairs / "train")
        command = [sys.executable, "-m", "notellm2_core.retrieval.hard_negatives",
                   "--embeddings", draft.path / _INPUTS[0], "--pairs", pairs,
                   "--sides", inputs["note_sides"].path / "sides", "--out", draft.path,
                   "--first-rank", settings.first_rank, "--last-rank", settings.last_rank,
                   "--factory", settings.factory]  # fmt: skip
        run_command(context, [str(c) for c in command])
        draft.metrics |= json.loads((draft.path / "counts.json").read_text())

    return _published(context, pipeline, build)


@dg.asset(
    group_name="retrieval", kinds={"pytorch", "parquet"}, deps=dataset_deps("note_embeddings"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def note_embeddings(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Embeddings of all notes by the fine-tuned model; of the test pool with image-only and text-only input too."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        model = inputs["checkpoint"].path
        _export(context, recipe, inputs, model, draft, _INPUTS[:1])
        _export(context, recipe, inputs, model, draft, _INPUTS[1:], _pool(inputs))
        draft.metrics |= _figures(draft.path)

    return _published(context, pipeline, build)


@dg.asset(
    group_name="retrieval", kinds={"pytorch", "parquet"}, deps=dataset_deps("baseline_embeddings"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def baseline_embeddings(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Embeddings of the pool by a plain sentence encoder, where the configuration asks for that row."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        if "minilm" not in recipe.config.evaluation.baselines:
            return
        command = [sys.executable, "-m", "notellm2_core.baselines.encoders", "--encoder", "minilm",
                   "--notes", inputs["notes"].path / "notes", "--note-ids", _pool(inputs),
                   "--out", draft.path / "minilm"]  # fmt: skip
        run_command(context, [str(c) for c in command])

    return pipeline.publish(context, build)


@dg.asset(group_name="retrieval", kinds={"faiss"}, deps=dataset_deps("faiss_index"), retry_policy=GPU_RETRIES)
def faiss_index(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """The ANN index of all notes' multimodal embeddings, with its recall against exact search."""
    settings = pipeline.recipe().config.index

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from notellm2_core.embeddings import read_embeddings
        from notellm2_core.retrieval.index import Index, ann_recall, build_index

        folder = inputs["note_embeddings"].path / "multimodal"
        draft.metrics |= build_index(folder, draft.path / "index", settings.factory)
        index = Index.load(draft.path / "index")
        draft.metrics[f"ann_recall_at_{settings.search_k}"] = ann_recall(
            index, read_embeddings(folder), settings.search_k
        )

    return pipeline.publish(context, build)


def _export(
    context: dg.AssetExecutionContext,
    recipe: Recipe,
    inputs: Mapping[str, Dataset],
    model: Path,
    draft: Draft,
    kinds: Sequence[str],
    note_ids: Path | None = None,
) -> None:
    """Embed into a folder that outlives a kill, from which the next run goes on, and link what is done into `draft`.

    Former datasets of this asset lend what has not changed since; which these are is settled before it starts.
    """
    config, work = recipe.config, _work(context, recipe)
    former = [str(dataset.path) for dataset in recipe.lake.datasets(context.asset_key.path[-1])]
    command = [*torchrun("notellm2_core.retrieval.export", config.export.num_ranks or config.training.num_ranks),
               *note_arguments(recipe, inputs), "--model", str(model), "--inputs", ",".join(kinds),
               "--pictures", *map(str, picture_folders(recipe)),
               "--out", str(work), "--reuse", *former]  # fmt: skip
    run_command(context, command + (["--note-ids", str(note_ids)] if note_ids else []))
    for kind in kinds:
        (draft.path / kind).mkdir()
        for shard in (work / kind).glob("*.parquet"):
            link_or_copy(shard, draft.path / kind / shard.name)


def _published(context: dg.AssetExecutionContext, pipeline: Pipeline, build: Build) -> dg.MaterializeResult:
    """Publish, and drop what a next run would have gone on from."""
    result = pipeline.publish(context, build)
    shutil.rmtree(_work(context, pipeline.recipe()), ignore_errors=True)
    return result


def _work(context: dg.AssetExecutionContext, recipe: Recipe) -> Path:
    name = context.asset_key.path[-1]
    return recipe.work / "export" / f"{name}-{recipe.fingerprint(name)}"


def _figures(out: Path) -> dict[str, Any]:
    """By kind of input, how many were not embedded again, and how alike random pairs are (1: collapsed)."""
    from notellm2_core.embeddings import mean_cosine, num_reused, read_embeddings

    tables = {inputs: read_embeddings(out / inputs) for inputs in _INPUTS}
    return {
        "num_notes": len(tables["multimodal"].note_ids),
        "num_reused": {inputs: num_reused(out / inputs) for inputs in _INPUTS},
        "mean_cosine": {inputs: mean_cosine(table.vectors) for inputs, table in tables.items()},
    }


def _pool(inputs: Mapping[str, Dataset]) -> Path:
    return inputs["pair_datasets"].path / "pool"
