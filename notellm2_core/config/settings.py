"""The settings: one frozen tree, read from YAML. Each is declared once, in this folder.

Defaults are the paper's where it has one. An unknown key, a wrong type or an unknown choice is an error that names the
file and the setting. Units are in the names or the descriptions; counts are `num_*`. `notellm2_core.config.docs` writes
docs/settings.md from the declarations.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from notellm2_core.config.baselines import BASELINES, require_baseline
from notellm2_core.config.data import CheckSettings, PairSettings, SplitSettings, TextSettings, WindowSettings
from notellm2_core.config.messages import MessageSettings
from notellm2_core.config.methods import get_method
from notellm2_core.config.milvus import require_milvus_url, without_password
from notellm2_core.config.model import ModelSettings
from notellm2_core.config.promotion import PromotionSettings, RetentionSettings
from notellm2_core.config.section import Section, http_address, no_address
from notellm2_core.config.source import SourceSettings
from notellm2_core.config.training import PARTS, Part, TrainingSettings


class ExportSettings(Section):
    """The embedding of all notes."""

    batch_notes: int = Field(64, gt=0, description="Notes embedded at a time.")
    shard_notes: int = Field(
        4096, gt=0, description="Notes per file of embeddings. A killed export resumes after the last whole file."
    )
    num_ranks: int | None = Field(
        None, gt=0, description="Number of processes, one per device. null: training.num_ranks."
    )


class IndexSettings(Section):
    """The FAISS index: inner products of unit vectors."""

    factory: str = Field("HNSW32", description="FAISS factory string. `Flat`: exact search.")
    search_k: int = Field(
        10, gt=0, description="Nearest notes that a search usually asks for. The recall of the index is checked there."
    )
    target_recall: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Least share of the exact nearest notes that a search finds. The build chooses the search "
        "parameters (efSearch, nprobe, ...) for it.",
    )


class ServingSettings(Section):
    """The online phase."""

    log: str | None = Field(
        None,
        description="URL of the log of notes, `sqlite:///FILE` or `postgresql://HOST/DATABASE`; a password comes from "
        "PGPASSWORD. null: a file beside the ledger.",
    )
    events: Path | None = Field(
        None,
        description="Folder for what users saw and did (`POST /events`), as Parquet files of the "
        "[contract](own_data.md); with `events` of the source folder, the next week is trained on them. null: events "
        "are not taken.",
    )
    engine: Annotated[str | None, AfterValidator(require_milvus_url)] = Field(
        None,
        repr=False,
        description="URL of a Milvus that searches the release, `milvus://USER@HOST:PORT` or `milvus://./FILE.db` "
        "(milvus-lite); a password comes from MILVUS_PASSWORD. null: FAISS, in the service's process.",
    )
    embedder: Annotated[str | None, AfterValidator(http_address)] = Field(
        None,
        description="URL of an embedder (`notellm2 embedder`), which has the models; its key comes from "
        "NOTELLM2_EMBEDDER_KEY. null: the models run in processes of the service's machine.",
    )

    @field_serializer("engine")
    def _shown(self, engine: str | None) -> str | None:
        return without_password(engine)


class ReportSettings(Section):
    """What `eval_recall` reports."""

    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (100, 1000, 10000), min_length=1, description="The k of Recall@k (paper: section 2.3) and of the other metrics."
    )
    baselines: tuple[
        Annotated[str, AfterValidator(require_baseline), Field(json_schema_extra={"enum": [*BASELINES]})], ...
    ] = Field(
        ("random", "popularity", "bm25", "zero_shot"),
        description="Baselines to compare with. `zero_shot`: the model before training.",
    )
    num_sheet_queries: int = Field(6, gt=0, description="Query notes of the contact sheet of neighbours.")


class SaliencySettings(Section):
    """What Eq. 3-6 are measured on."""

    saliency_pairs: int = Field(32, ge=0, description="Training pairs to measure, at least 2. 0: none.")
    saliency_batch_pairs: int = Field(
        16, gt=1, description="Pairs per batch, in fp32 with every attention map in memory."
    )

    @model_validator(mode="after")
    def _pairs_to_contrast(self) -> "SaliencySettings":
        if self.saliency_pairs == 1:
            raise ValueError("saliency_pairs = 1: a single pair has no negatives; use 0 (off) or at least 2")
        return self


class ReplaySettings(Section):
    """What `offline_replay` asks the new release and the champion."""

    replay_clicks: int = Field(
        2000, ge=0, description="Held-out clicks, about: of random users, all of each one's. 0: nothing is asked."
    )
    replay_history: int = Field(50, gt=0, le=500, description="Newest clicked notes before a click that are sent.")
    replay_k: int = Field(100, gt=0, le=1000, description="Notes of an answer.")


class EvaluationSettings(SaliencySettings, ReportSettings, ReplaySettings):
    """How a trained model is measured."""


class TrackingSettings(Section):
    """MLflow."""

    uri: str | None = Field(
        None, description="Address of the tracking server. null: MLFLOW_TRACKING_URI, or else sqlite in the lake."
    )
    experiment: str = Field("notellm2", description="Name of the experiment.")
    timeout_seconds: float = Field(
        10, gt=0, description="Seconds to wait for an answer. A dead server delays each asset by a few times this."
    )


class SparkSettings(Section):
    """The Spark session."""

    master: str = Field("local[*]", description="Address of the master.")
    driver_memory: str = Field("2g", description="Memory of the driver; with a local master, of all tasks.")
    shuffle_partitions: int | None = Field(
        None,
        gt=0,
        description="Tasks of a Spark stage, and blocks of the pairs. null: the server's setting where Spark runs "
        "elsewhere, or else 8.",
    )
    extra: dict[str, str] = Field({}, description="Further Spark settings, by their names.")


class Config(Section):
    """A whole configuration: three settings of its own, and the sections."""

    name: str = Field(description="Name of the configuration, which MLflow runs and reports carry.")
    seed: int = Field(42, description="Random seed (paper: 42, 43 and 44).")
    lake: Annotated[Path, BeforeValidator(no_address)] = Field(
        Path(".dagster/lake"), description="Folder of all datasets. On several machines, one that all of them see."
    )
    source: SourceSettings = SourceSettings()
    window: WindowSettings = WindowSettings()
    pairs: PairSettings = PairSettings()
    split: SplitSettings = SplitSettings()
    checks: CheckSettings = CheckSettings()
    text: TextSettings = TextSettings()
    model: ModelSettings
    training: TrainingSettings = TrainingSettings()
    export: ExportSettings = ExportSettings()
    index: IndexSettings = IndexSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    promotion: PromotionSettings = PromotionSettings()
    messages: MessageSettings = MessageSettings()
    retention: RetentionSettings = RetentionSettings()
    serving: ServingSettings = ServingSettings()
    tracking: TrackingSettings = TrackingSettings()
    spark: SparkSettings = SparkSettings()

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.window.test_days is None and self.split.by == "time":
            raise ValueError("window.test_days = null needs split.by = hash: one window cannot be split by time")
        training = self.training
        if training.centre_embeddings and "omni" in get_method(self.model.method).losses:
            raise ValueError(
                f"training.centre_embeddings = true does not go with model.method = {self.model.method}, which "
                "compares images with texts: each kind has a mean of its own, and the saved projector takes out one"
            )
        if training.batch_pairs % (training.num_ranks * training.num_nodes):
            raise ValueError(
                f"training.batch_pairs = {training.batch_pairs} is not a multiple of training.num_ranks = "
                f"{training.num_ranks}" + (f" x {training.num_nodes} nodes" if training.num_nodes > 1 else "")
            )
        if (training.num_nodes > 1) == (training.rendezvous is None and training.hostfile is None):
            raise ValueError(
                f"training.num_nodes = {training.num_nodes} and training.rendezvous or hostfile belong together: "
                "several nodes need one of them, a single one needs none"
            )
        if training.rendezvous is not None and training.hostfile is not None:
            raise ValueError(
                f"training.rendezvous = {training.rendezvous} and training.hostfile = {training.hostfile} are two ways "
                "to start several nodes: set one of them"
            )
        return self

    @property
    def trainable_parts(self) -> tuple[Part, ...]:
        """`training.trainable`, or its default. It may name parts that the method does not have."""
        if self.training.trainable is not None:
            return self.training.trainable
        return tuple(part for part in PARTS if part != "word_embeddings" or self.model.lora is None)

    @property
    def promotion_k(self) -> int:
        """The k of the recall that releases are compared by."""
        return self.promotion.k or min(self.evaluation.ks)

    @property
    def trains_vision(self) -> bool:
        """Whether the vision encoder is trained with the model."""
        return "vision" in self.trainable_parts


# What a new configuration sets first, in the order of docs/settings.md.
FIRST_SETTINGS = (
    "name",
    "source.path",
    "source.view_events",
    "source.click_events",
    "window.train_days",
    "model.llm.name",
    "model.vision.name",
    "training.num_steps",
    "training.batch_pairs",
    "training.learning_rate",
    "training.num_ranks",
    "evaluation.ks",
)
