"""Vision features, note tokens, the initial model, hard negatives and the fine-tuned model, each made by a command."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources.arguments import feature_store, image_folders, note_inputs, write_config
from assets.resources.commands import run_command
from assets.resources.export import MULTIMODAL, export
from assets.resources.steps import GPU, PROCESS, Metrics, Step, dataset
from notellm2_core.config.settings import Config
from notellm2_core.lake.catalog import Catalog
from notellm2_core.schema import COUNTS_FILE, NOTES_TABLE, SPLIT_TABLE, TRAIN

PYTHON = (sys.executable, "-m")


def _restore_features(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    """Compute features again that were removed from the store, which outlives the dataset."""
    from notellm2_core.vision.feature_store import num_missing

    features = catalog.find("vision_features")
    if features is not None and (missing := num_missing(features.path, feature_store(catalog))):
        context.log.warning(f"the features of {missing} images are no longer in the store: computing them again")
        with tempfile.TemporaryDirectory() as scratch:
            run_command(context, _features_command(catalog, Path(scratch)))


def _features_command(catalog: Catalog, out: Path) -> Sequence[str]:
    notes, source = image_folders(catalog)
    command = [*PYTHON, "notellm2_core.vision.extract", "--config", write_config(catalog), "--notes", notes,
               "--source", source, "--store", feature_store(catalog), "--out", out]  # fmt: skip
    return [str(part) for part in command]


@dataset("model", {"pytorch", "parquet"}, on=GPU, before=_restore_features)
def vision_features(step: Step) -> Metrics:
    """Patch and global features of the frozen encoder, once per distinct image. Their store outlives this dataset."""
    step.command(_features_command(step.catalog, step.out))
    return json.loads((step.out / COUNTS_FILE).read_text())


@dataset("model", {"huggingface"}, on=PROCESS)
def note_tokens(step: Step) -> Metrics:
    """Every note's text as the LLM's tokens, once for all methods; training runs and exports memory-map the file."""
    step.command([*PYTHON, "notellm2_core.model.tokenise", "--config", write_config(step.catalog),
                  "--notes", step.path("notes", NOTES_TABLE), "--out", step.out])  # fmt: skip
    return json.loads((step.out / COUNTS_FILE).read_text())


@dataset("model", {"pytorch", "huggingface"}, on=GPU)
def initial_model(step: Step) -> Metrics:
    """The model before its first training step, which the report measures as zero-shot."""
    step.command([*PYTHON, "notellm2_core.training.initialise", "--config", write_config(step.catalog),
                  *note_inputs(step, images=False).arguments(), "--pairs", step.path("pair_datasets"),
                  "--out", step.out, "--train-days", *step.catalog.window.train.iso()])  # fmt: skip
    return {}


@dataset("model", {"pytorch", "faiss", "parquet"}, on=GPU)
def hard_negatives(step: Step) -> Metrics:
    """Training notes that look related and are not, mined or given, if `training.hard_negatives.num` is set."""
    settings = step.config.training.hard_negatives
    if not settings.num:
        return {}
    pairs, split = step.path("pair_datasets"), step.path("note_split", SPLIT_TABLE)
    if settings.file is not None:
        step.command([*PYTHON, "notellm2_core.retrieval.given_negatives", "--file", settings.file, "--pairs", pairs,
                      "--note-split", split, "--out", step.out])  # fmt: skip
        return json.loads((step.out / COUNTS_FILE).read_text())
    export(step, settings.model or step.path("initial_model"), [MULTIMODAL], pairs / TRAIN)
    step.command([*PYTHON, "notellm2_core.retrieval.hard_negatives", "--embeddings", step.out / MULTIMODAL,
                  "--pairs", pairs, "--note-split", split, "--out", step.out,
                  "--first-rank", str(settings.first_rank), "--last-rank", str(settings.last_rank),
                  "--factory", settings.factory])  # fmt: skip
    return json.loads((step.out / COUNTS_FILE).read_text())


def _check_index_factory(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    """Refuse a wrong `index.factory` before the training run, not hours later."""
    from notellm2_core.retrieval.factory import empty_index

    empty_index(catalog.config.model.projection_dim, catalog.config.index.factory)


@dataset("model", {"pytorch", "deepspeed", "huggingface"}, on=GPU, before=_check_index_factory)
def checkpoint(step: Step) -> Metrics:
    """The fine-tuned model (Eq. 1, 7-9; Table 8). A killed training run resumes from its last checkpoint."""
    from notellm2_core.release.release import open_release
    from notellm2_core.training.launch import NO_REPORTS, Paths, Reports, Start, launch_command
    from notellm2_core.training.trials import choose_rates, has_diverged

    catalog = step.catalog
    hard_negatives = step.path("hard_negatives") if step.config.training.hard_negatives.num else None
    inputs = note_inputs(step, images=step.config.trains_vision)
    start = None
    if catalog.start is not None:
        release = open_release(catalog.lake, catalog.start)
        start = Start(release.path / "model", release.id, tuple(release.lineage["weeks"]))

    def train(config: Config, run_dir: Path, reports: Reports, *options: str) -> None:
        paths = Paths(inputs, step.path("pair_datasets"), run_dir, step.out, hard_negatives, start)
        file, days = write_config(catalog, config), catalog.window.train.iso()
        step.command([*launch_command(file, config.training, paths, reports, days), *options], reports=True)

    def try_out(config: Config, run_dir: Path, share: float) -> None:
        try:
            train(config, run_dir, NO_REPORTS, "--share", str(share))
        except dg.Failure:
            if not has_diverged(run_dir):
                raise

    config, run_dir = step.config, step.work
    trials: list[dict[str, Any]] = []
    if config.training.learning_rate == "auto":
        config, run_dir, trials = choose_rates(config, step.work, try_out, step.context.log.info)
    train(config, run_dir, Reports(mlflow_uri=step.run.uri, mlflow_run_id=step.run.run_id))
    metrics = json.loads((step.out / "training.json").read_text())
    return {**metrics, "trials": trials} if trials else metrics
