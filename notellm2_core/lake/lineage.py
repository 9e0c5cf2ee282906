"""The lineage: one row per dataset with its inputs, the settings that its code reads, and the version of its code."""

from collections.abc import Container, Mapping
from dataclasses import dataclass

from notellm2_core.config.data import (
    EventSettings,
    FilterSettings,
    HoldOutSettings,
    LengthSettings,
    ScoringSettings,
    WordSettings,
)
from notellm2_core.config.model import ModelSettings
from notellm2_core.config.section import Section
from notellm2_core.config.settings import ExportSettings, ReportSettings, SaliencySettings
from notellm2_core.config.training import HardNegativeSettings, RunSettings, TrainingSettings


@dataclass(frozen=True)
class Stage:
    """How one dataset is made."""

    inputs: tuple[str, ...]  # the datasets that it reads
    settings: tuple[str, ...]  # dotted names of the settings that its code reads, without those of its inputs
    version: int = 1  # raise it when the code that makes the dataset changes its result


def settings_of(section: str, group: type[Section], *, but: Container[str] = ()) -> tuple[str, ...]:
    """The dotted names of all settings of `group` in `section`: a new setting enters all rows that list its group."""
    return tuple(f"{section}.{name}" for name in group.model_fields if name not in but)


_WORDS = settings_of("text", WordSettings)


_MODEL = ("seed", *_WORDS, *settings_of("model", ModelSettings, but=("lora", "license")))


_EXPORT = settings_of("export", ExportSettings, but=("num_ranks",))


_TRAINING = (
    *settings_of("training", TrainingSettings, but=(*RunSettings.model_fields, "hard_negatives")),
    "training.hard_negatives.num",  # how many a pair takes; the dataset hard_negatives holds the candidates
)


STAGES: Mapping[str, Stage] = {
    "raw_events": Stage((), ("source.partition",), version=8),
    "notes": Stage((), ()),
    "interactions": Stage(("raw_events", "notes"), (*settings_of("source", EventSettings), "window"), version=4),
    "vision_features": Stage(("notes",), ("model.vision", "source.max_image_pixels"), version=3),
    "cooccurrence": Stage(("interactions",), settings_of("pairs", ScoringSettings), version=4),
    "note_split": Stage(("notes", "interactions", "vision_features"), settings_of("split", HoldOutSettings), version=3),
    "related_pairs": Stage(("cooccurrence", "note_split"), settings_of("pairs", FilterSettings), version=2),
    "pair_datasets": Stage(("related_pairs", "note_split"), ("split.validation_share",), version=2),
    "data_card": Stage(
        ("raw_events", "notes", "interactions", "cooccurrence", "related_pairs", "pair_datasets"), ("text.word_unit",),
        version=2,
    ),
    "note_tokens": Stage(("notes",), (*_WORDS, "model.llm.name"), version=2),
    "initial_model": Stage(("note_tokens", "vision_features", "pair_datasets"), _MODEL, version=5),
    "hard_negatives": Stage(
        ("initial_model", "note_tokens", "vision_features", "pair_datasets", "note_split"),
        (*settings_of("training.hard_negatives", HardNegativeSettings, but=("num",)), "training.precision", *_EXPORT),
        version=2,
    ),
    "checkpoint": Stage(
        ("note_tokens", "vision_features", "pair_datasets", "hard_negatives"),
        (*_MODEL, "model.lora", *_TRAINING),
        version=7,
    ),
    "initial_embeddings": Stage(
        ("initial_model", "note_tokens", "vision_features", "pair_datasets"), (*_EXPORT, "training.precision")
    ),
    "baseline_embeddings": Stage(("notes", "pair_datasets"), ("evaluation.baselines",)),
    "note_embeddings": Stage(("checkpoint", "note_tokens", "vision_features", "pair_datasets"), _EXPORT),
    "faiss_index": Stage(("note_embeddings",), ("index",), version=2),
    "saliency": Stage(
        ("checkpoint", "note_tokens", "vision_features", "pair_datasets"),
        settings_of("evaluation", SaliencySettings), version=2,
    ),
    "eval_recall": Stage(
        ("note_embeddings", "faiss_index", "initial_embeddings", "baseline_embeddings", "pair_datasets", "cooccurrence",
         "checkpoint", "notes", "saliency"),
        (*settings_of("evaluation", ReportSettings), *settings_of("text", LengthSettings), "seed", "model.license"),
        version=2,
    ),
}  # fmt: skip


# The parts of the log have versions of their own; raise with them the version of raw_events or of interactions.
INGESTION_VERSION = 3  # spark_jobs.source, spark_jobs.ingest
PARTITION_VERSION = 2  # spark_jobs.clean, spark_jobs.interactions
WORLD_VERSION = 1  # notellm2_core.demo
RENAMED = {  # earlier names of datasets, which nothing reads any more
    "events": "interactions",
    "note_sides": "note_split",
    "start_model": "initial_model",
    "start_embeddings": "initial_embeddings",
    "landing": "ingestion",
    "period": "log_partition",
}
