"""Vision features, tokens, the untrained start and the fine-tuned model. Each is a command that can be pasted."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
import yaml

from assets.commands import run_command
from assets.resources import Pipeline, dataset_deps, one_sentence
from assets.tracking import TrackedRun
from notellm2_core.config import Config
from notellm2_core.lake import Dataset, Draft, fingerprint
from notellm2_core.recipe import Recipe

GPU_RETRIES = dg.RetryPolicy(max_retries=2)


@dg.asset(
    group_name="model", kinds={"pytorch", "parquet"}, deps=dataset_deps("vision_features"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def vision_features(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Patch and global features of the frozen encoder, once per distinct image; the store outlives this dataset."""
    recipe = pipeline.recipe()

    def compute(out: Path, notes: Dataset) -> None:
        command = [sys.executable, "-m", "notellm2_core.notes.features", "--config", write_config(recipe),
                   "--notes", notes.path / "notes", "--source", recipe.source,
                   "--store", feature_store(recipe), "--out", out]  # fmt: skip
        run_command(context, [str(c) for c in command])

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        compute(draft.path, inputs["notes"])
        draft.metrics |= json.loads((draft.path / "counts.json").read_text())

    with one_sentence():
        from notellm2_core.notes.feature_store import num_missing

        found = recipe.find("vision_features")
        if found is not None and (missing := num_missing(found.path, feature_store(recipe))):
            context.log.warning(f"the features of {missing} images are no longer in the store: computing them again")
            with tempfile.TemporaryDirectory() as scratch:
                compute(Path(scratch), recipe.dataset("notes"))
    return pipeline.publish(context, build)


@dg.asset(group_name="model", kinds={"huggingface"}, deps=dataset_deps("note_tokens"), retry_policy=GPU_RETRIES)
def note_tokens(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """Every note's text as the LLM's tokens, once for all methods; trainings and exports map the file into memory."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        command = [sys.executable, "-m", "notellm2_core.notes.tokens", "--config", write_config(recipe),
                   "--notes", str(inputs["notes"].path / "notes"), "--out", str(draft.path)]  # fmt: skip
        run_command(context, command)
        draft.metrics |= json.loads((draft.path / "counts.json").read_text())

    return pipeline.publish(context, build)


@dg.asset(
    group_name="model", kinds={"pytorch", "huggingface"}, deps=dataset_deps("start_model"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def start_model(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """The model before its first step: what the zero-shot rows of the report measure."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        command = [sys.executable, "-m", "notellm2_core.training.start", *note_arguments(recipe, inputs),
                   "--pairs", str(inputs["pair_datasets"].path), "--out", str(draft.path),
                   "--train-days", *recipe.window.train.iso()]  # fmt: skip
        run_command(context, command)

    return pipeline.publish(context, build)


@dg.asset(
    group_name="model", kinds={"pytorch", "deepspeed", "huggingface"}, deps=dataset_deps("checkpoint"), pool="gpu",
    retry_policy=GPU_RETRIES,
)  # fmt: skip
def checkpoint(context: dg.AssetExecutionContext, pipeline: Pipeline) -> dg.MaterializeResult:
    """The fine-tuned model (Eq. 1, 7-9; Table 8). A killed training goes on from its last checkpoint."""
    recipe = pipeline.recipe()

    def build(draft: Draft, inputs: Mapping[str, Dataset], run: TrackedRun) -> None:
        from notellm2_core.retrieval.index import empty_index
        from notellm2_core.training.launch import launch_command

        # A wrong factory string is found here, not after hours of training.
        empty_index(recipe.config.model.projection_dim, recipe.config.index.factory)
        work = recipe.work / "training" / recipe.fingerprint("checkpoint")
        command = launch_command(
            Path(write_config(recipe)),
            recipe.config.training,
            notes=inputs["note_tokens"].path,
            images=inputs["vision_features"].path,
            store=feature_store(recipe),
            pairs=inputs["pair_datasets"].path,
            pictures=picture_folders(recipe) if recipe.config.trains_vision else None,
            work=work,
            out=draft.path,
            hard_negatives=inputs["hard_negatives"].path if recipe.config.training.hard_negatives.num else None,
            train_days=recipe.window.train.iso(),
            mlflow_uri=run.uri,
            mlflow_run_id=run.run_id,
        )
        run_command(context, command, reports=True)
        draft.metrics |= json.loads((draft.path / "training.json").read_text())

    result = pipeline.publish(context, build)
    shutil.rmtree(recipe.work / "training" / recipe.fingerprint("checkpoint"), ignore_errors=True)  # nothing to resume
    return result


def note_arguments(recipe: Recipe, inputs: Mapping[str, Dataset]) -> list[str]:
    """The options that every command on notes and their images takes."""
    return [
        "--config", write_config(recipe),
        "--notes", str(inputs["note_tokens"].path),
        "--images", str(inputs["vision_features"].path),
        "--store", str(feature_store(recipe)),
    ]  # fmt: skip


def picture_folders(recipe: Recipe) -> tuple[Path, Path]:
    """The notes that the vision features were made of, and where their pictures are."""
    return recipe.dataset("notes").path / "notes", recipe.source


def feature_store(recipe: Recipe) -> Path:
    """One folder per encoder; every source and every week of this lake shares it."""
    return recipe.lake.root / "vision_store"


def write_config(recipe: Recipe) -> str:
    """The resolved configuration as a file, so that the logged command can be pasted later."""
    config: Config = recipe.config
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    folder = recipe.work / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}-{fingerprint(text)}.yaml"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(text)
        draft.replace(path)
    return str(path)
