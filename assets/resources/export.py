"""Embed notes as a step: in a folder that outlives a kill, with vectors reused from earlier exports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from assets.resources.arguments import note_inputs, write_config
from assets.resources.steps import Step
from notellm2_core.embeddings.table import read_note_ids
from notellm2_core.runtime.files import link_or_copy, parquet_files
from notellm2_core.training.launch import torchrun

MULTIMODAL = "multimodal"
INPUTS = (MULTIMODAL, "image", "text")
_NUM_EARLIER = 4  # last exports whose vectors are reused: an older one is hardly of the same model, and each is read


def export(
    step: Step,
    model: Path,
    kinds: Sequence[str],
    note_ids: Path | None = None,
    single_modality_note_ids: Path | None = None,
) -> None:
    """Embed `note_ids` (None: all notes) by `model` with each kind of input, and link the shards into the dataset.

    `single_modality_note_ids`: the notes of the inputs image and text; None: the same. The shards are written in
    `step.work`, so a killed export resumes. Vectors of unchanged notes are reused from the last datasets of this
    asset, which are listed before the export starts.
    """
    config, catalog = step.config, step.catalog
    earlier = [dataset.path for dataset in catalog.lake.datasets(step.name)[-_NUM_EARLIER:]]
    launcher = torchrun("notellm2_core.inference.export", config.export.num_ranks or config.training.num_ranks)
    subsets = {"--note-ids": note_ids, "--single-modality-note-ids": single_modality_note_ids}
    step.command([*launcher, "--config", write_config(catalog), *note_inputs(step).arguments(), "--model", model,
                  "--inputs", ",".join(kinds), "--out", step.work, "--reuse", *earlier,
                  *(part for option, subset in subsets.items() if subset for part in (option, subset))])  # fmt: skip
    for kind in kinds:
        (step.out / kind).mkdir()
        for shard in parquet_files(step.work / kind):
            link_or_copy(shard, step.out / kind / shard.name)
        num_embedded = sum(pq.read_metadata(shard).num_rows for shard in parquet_files(step.out / kind))
        subset = note_ids if kind == MULTIMODAL else single_modality_note_ids or note_ids
        num_notes = len(read_note_ids(subset)) if subset else step.inputs["note_tokens"].manifest.metrics["notes"]
        if num_embedded != num_notes:
            raise RuntimeError(f"the export has {num_embedded} {kind} vectors of {num_notes} notes")


def export_metrics(out: Path) -> dict[str, Any]:
    """num_notes; by kind of input, num_reused (vectors) and mean_cosine of random pairs (1: collapsed)."""
    from notellm2_core.embeddings.shards import num_reused
    from notellm2_core.embeddings.table import mean_cosine, read_embeddings

    tables = {inputs: read_embeddings(out / inputs) for inputs in INPUTS}
    return {
        "num_notes": len(tables[MULTIMODAL].note_ids),
        "num_reused": {inputs: num_reused(out / inputs) for inputs in INPUTS},
        "mean_cosine": {inputs: mean_cosine(table.vectors) for inputs, table in tables.items()},
    }
