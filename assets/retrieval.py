"""Embeddings by each model, and the FAISS index."""

import sys

from assets.resources.export import INPUTS, MULTIMODAL, export, export_metrics
from assets.resources.steps import GPU, PROCESS, Metrics, Step, dataset
from notellm2_core.config.baselines import encoders
from notellm2_core.schema import INDEX_FOLDER, NEIGHBOURS_FOLDER, NOTES_TABLE, POOL_TABLE


@dataset("retrieval", {"pytorch", "parquet"}, on=GPU)
def initial_embeddings(step: Step) -> Metrics:
    """Embeddings of the pool by the initial model, for the zero-shot rows."""
    export(step, step.path("initial_model"), INPUTS, step.path("pair_datasets", POOL_TABLE))
    return export_metrics(step.out)


@dataset("retrieval", {"pytorch", "parquet"}, on=GPU)
def note_embeddings(step: Step) -> Metrics:
    """Embeddings of all notes by the fine-tuned model; for the pool also with image-only and text-only input."""
    pool = step.path("pair_datasets", POOL_TABLE)
    export(step, step.path("checkpoint"), INPUTS, single_modality_note_ids=pool)
    return export_metrics(step.out)


@dataset("retrieval", {"pytorch", "parquet"}, on=GPU)
def baseline_embeddings(step: Step) -> Metrics:
    """Embeddings of the pool by each plain sentence encoder that `evaluation.baselines` names."""
    for name in encoders(step.config.evaluation.baselines):
        step.command([sys.executable, "-m", "notellm2_core.baselines.encoders", "--encoder", name,
                      "--notes", step.path("notes", NOTES_TABLE), "--note-ids", step.path("pair_datasets", POOL_TABLE),
                      "--out", step.out / name])  # fmt: skip
    return {}


@dataset("retrieval", {"faiss"}, on=PROCESS)
def faiss_index(step: Step) -> Metrics:
    """The ANN index of all notes' multimodal embeddings, with its recall against exact search, and the table of each
    note's nearest neighbours.
    """
    from notellm2_core.retrieval.build import build_index
    from notellm2_core.retrieval.neighbour_table import write_neighbours_of

    embeddings, index = step.path("note_embeddings", MULTIMODAL), step.out / INDEX_FOLDER
    built = build_index(embeddings, index, step.config.index)
    table = write_neighbours_of(index, embeddings, step.out / NEIGHBOURS_FOLDER)
    return built | {"neighbours": table["width"], "neighbours_recall": table["recall"]}
