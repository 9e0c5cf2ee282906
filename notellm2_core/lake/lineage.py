"""The lineage: one row per dataset with its inputs, the settings that its code reads, and the version of its code."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from notellm2_core.config.data import (
    ClickTimeSettings,
    FilterSettings,
    HoldOutSettings,
    LengthSettings,
    ScoringSettings,
    WordSettings,
)
from notellm2_core.config.model import ModelSettings
from notellm2_core.config.promotion import GateSettings
from notellm2_core.config.section import Section
from notellm2_core.config.settings import Config, ExportSettings, ReplaySettings, ReportSettings, SaliencySettings
from notellm2_core.config.source import EventReadingSettings, EventSettings, NoteReadingSettings
from notellm2_core.config.training import MiningSettings, RunSettings, SelectionSettings, TrainingSettings
from notellm2_core.runtime.nested import get_settings

Condition = Callable[[Config], bool]


@dataclass(frozen=True)
class Stage:
    """How one dataset is made."""

    inputs: tuple[str, ...]  # the datasets that it reads
    settings: tuple[str, ...]  # dotted names of the settings that its code reads, without those of its inputs
    version: int = 1  # raise it when the code that makes the dataset changes its result
    when: Mapping[str, Condition] = field(default_factory=dict)  # inputs and settings that are read only under one

    def counts(self, name: str, config: Config) -> bool:
        """Whether the input or setting `name` is read with these settings. One that is not makes nothing stale."""
        return name not in self.when or self.when[name](config)


def settings_of(section: str, group: type[Section], *, but: Container[str] = ()) -> tuple[str, ...]:
    """The dotted names of all settings of `group` in `section`: a new setting enters all rows that list its group."""
    return tuple(f"{section}.{name}" for name in group.model_fields if name not in but)


def stage_settings(name: str, config: Config) -> dict[str, Any]:
    """The settings that the dataset `name` itself depends on, by their dotted names."""
    tree, stage = config.model_dump(mode="json"), STAGES[name]
    return get_settings(tree, (key for key in stage.settings if stage.counts(key, config)))


def _mines(config: Config) -> bool:
    return config.training.hard_negatives.num > 0 and config.training.hard_negatives.file is None


def _reads_negatives(config: Config) -> bool:
    return config.training.hard_negatives.num > 0 and config.training.hard_negatives.file is not None


_WORDS = settings_of("text", WordSettings)


_MODEL = ("seed", *_WORDS, *settings_of("model", ModelSettings, but=("lora", "license")))


_EXPORT = settings_of("export", ExportSettings, but=("num_ranks",))


_TRAINING = (
    *settings_of("training", TrainingSettings, but=(*RunSettings.model_fields, "hard_negatives")),
    "training.hard_negatives.num",  # how many a pair takes; the dataset hard_negatives holds the candidates
)
_SELECTION: Mapping[str, Condition] = {
    "training.num_epochs": lambda config: config.training.num_epochs is not None,
    "training.centre_embeddings": lambda config: config.training.centre_embeddings,
    **dict.fromkeys(settings_of("training", SelectionSettings), lambda config: config.training.selects),
}


_MINING = (*settings_of("training.hard_negatives", MiningSettings), "training.precision", *_EXPORT)
_HARD_NEGATIVES: Mapping[str, Condition] = {
    **dict.fromkeys(("initial_model", "note_tokens", "vision_features", *_MINING), _mines),
    **dict.fromkeys(("pair_datasets", "note_split"), lambda config: config.training.hard_negatives.num > 0),
    "training.hard_negatives.file": _reads_negatives,
}


STAGES: Mapping[str, Stage] = {
    "raw_events": Stage((), ("source.partition", *settings_of("source", EventReadingSettings)), version=12),
    "notes": Stage((), settings_of("source", NoteReadingSettings), version=3),
    "interactions": Stage(
        ("raw_events", "notes"),
        (*settings_of("source", EventSettings), *settings_of("pairs", ClickTimeSettings), "window"),
        version=5,
    ),
    "weekly_activity": Stage(("raw_events", "interactions"), ()),
    "vision_features": Stage(("notes",), ("model.vision", "source.max_image_pixels"), version=4),
    "cooccurrence": Stage(("interactions",), settings_of("pairs", ScoringSettings), version=4),
    "note_split": Stage(("notes", "interactions", "vision_features"), settings_of("split", HoldOutSettings), version=3),
    "related_pairs": Stage(("cooccurrence", "note_split"), settings_of("pairs", FilterSettings), version=2),
    "pair_datasets": Stage(("related_pairs", "note_split"), ("split.validation_share",), version=2),
    "data_profile": Stage(("notes", "vision_features", "pair_datasets"), ()),
    "data_card": Stage(
        ("raw_events", "notes", "interactions", "cooccurrence", "related_pairs", "pair_datasets"), ("text.word_unit",),
        version=3,
    ),
    "note_tokens": Stage(("notes",), (*_WORDS, "model.llm.name"), version=2),
    "initial_model": Stage(("note_tokens", "vision_features", "pair_datasets"), _MODEL, version=5),
    "hard_negatives": Stage(
        ("initial_model", "note_tokens", "vision_features", "pair_datasets", "note_split"),
        (*_MINING, "training.hard_negatives.file"), version=4, when=_HARD_NEGATIVES,
    ),
    "checkpoint": Stage(
        ("note_tokens", "vision_features", "pair_datasets", "hard_negatives"),
        (*_MODEL, "model.lora", *_TRAINING), when=_SELECTION,
        version=7,
    ),
    "initial_embeddings": Stage(
        ("initial_model", "note_tokens", "vision_features", "pair_datasets"), (*_EXPORT, "training.precision")
    ),
    "baseline_embeddings": Stage(("notes", "pair_datasets"), ("evaluation.baselines",)),
    "note_embeddings": Stage(("checkpoint", "note_tokens", "vision_features", "pair_datasets"), _EXPORT),
    "faiss_index": Stage(("note_embeddings",), ("index",), version=5),
    "saliency": Stage(
        ("checkpoint", "note_tokens", "vision_features", "pair_datasets"),
        settings_of("evaluation", SaliencySettings), version=2,
    ),
    "eval_recall": Stage(
        ("note_embeddings", "faiss_index", "initial_embeddings", "baseline_embeddings", "pair_datasets", "cooccurrence",
         "checkpoint", "notes", "saliency"),
        (*settings_of("evaluation", ReportSettings), *settings_of("text", LengthSettings), "seed", "model.license"),
        version=3,
    ),
    "rival_embeddings": Stage(("notes", "vision_features", "pair_datasets"), (*_EXPORT, "training.precision")),
    "canary": Stage(("checkpoint", "faiss_index", "note_embeddings", "pair_datasets", "notes"), ()),
    "verdict": Stage(
        ("notes", "weekly_activity", "pair_datasets", "data_profile", "checkpoint", "note_embeddings", "faiss_index",
         "eval_recall", "rival_embeddings", "canary"),
        (*settings_of("promotion", GateSettings), *settings_of("text", LengthSettings), "evaluation.ks",
         "checks.max_mean_cosine", "checks.accepted_drift"),
        version=3,
    ),
    "release": Stage(
        ("checkpoint", "note_embeddings", "faiss_index", "eval_recall", "pair_datasets", "verdict", "canary"), (),
        version=2,
    ),
    "offline_replay": Stage(
        ("release", "rival_embeddings", "interactions"), settings_of("evaluation", ReplaySettings)
    ),
}  # fmt: skip


# The parts of the log have versions of their own; raise with them the version of raw_events or of interactions.
INGESTION_VERSION = 6  # notellm2_core.tables, spark_jobs.source, spark_jobs.ingest
PARTITION_VERSION = 3  # spark_jobs.clean, spark_jobs.interactions
WORLD_VERSION = 2  # notellm2_core.demo
RENAMED = {  # earlier names of datasets, which nothing reads any more
    "events": "interactions",
    "note_sides": "note_split",
    "start_model": "initial_model",
    "start_embeddings": "initial_embeddings",
    "landing": "ingestion",
    "period": "log_partition",
}
