"""Embedding notes as a step: in a folder that outlives a kill, with the vectors of earlier exports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assets.resources.arguments import note_inputs, write_config
from assets.resources.steps import Step
from notellm2_core.runtime.files import link_or_copy, parquet_files
from notellm2_core.training.launch import torchrun

MULTIMODAL = "multimodal"
INPUTS = (MULTIMODAL, "image", "text")


def export(step: Step, model: Path, kinds: Sequence[str], note_ids: Path | None = None) -> None:
    """Embed into `step.work`, from which the next run resumes after a kill, and link the result into the dataset.

    Earlier datasets of this asset lend the vectors of notes that have not changed since; which datasets these are is
    settled before the export starts.
    """
    config, catalog = step.config, step.catalog
    earlier = [dataset.path for dataset in catalog.lake.datasets(step.name)]
    launcher = torchrun("notellm2_core.inference.export", config.export.num_ranks or config.training.num_ranks)
    only: list[str | Path] = ["--note-ids", note_ids] if note_ids else []
    step.command([*launcher, "--config", write_config(catalog), *note_inputs(step).arguments(), "--model", model,
                  "--inputs", ",".join(kinds), "--out", step.work, "--reuse", *earlier, *only])  # fmt: skip
    for kind in kinds:
        (step.out / kind).mkdir()
        for shard in parquet_files(step.work / kind):
            link_or_copy(shard, step.out / kind / shard.name)


def export_metrics(out: Path) -> dict[str, Any]:
    """By kind of input, how many vectors were reused, and how alike random pairs are (1: collapsed)."""
    from notellm2_core.embeddings.shards import num_reused
    from notellm2_core.embeddings.table import mean_cosine, read_embeddings

    tables = {inputs: read_embeddings(out / inputs) for inputs in INPUTS}
    return {
        "num_notes": len(tables[MULTIMODAL].note_ids),
        "num_reused": {inputs: num_reused(out / inputs) for inputs in INPUTS},
        "mean_cosine": {inputs: mean_cosine(table.vectors) for inputs, table in tables.items()},
    }
