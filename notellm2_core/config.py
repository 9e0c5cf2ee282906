"""The settings: one frozen tree, read from YAML. The only place with defaults, which are the paper's where it has one.

An unknown key, a wrong type or an unknown choice is an error that names the file and the setting. Units are in the
names or the field comments; counts are `num_*`.
"""

import math
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Part = Literal["llm", "word_embeddings", "connector", "fusion", "projector", "temperature", "vision"]
KnownPositives = Literal["mask", "count", "ignore"]
PARTS: tuple[Part, ...] = tuple(part for part in get_args(Part) if part != "vision")  # of the model itself


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DemoWorld(Section):
    """The embedded source (`notellm2_core.demo`), generated where `source.path` is not set."""

    num_notes: int = Field(2600, ge=50)
    num_users: int = Field(2500, ge=20)
    num_days: int = Field(21, ge=14)
    seed: int = 0


def _is_a_folder(value: Any) -> Any:
    if "://" in str(value):
        raise ValueError(f"{value} is an address: name a folder, where the storage is mounted")
    return value


class Source(Section):
    """Where the notes and logs are, and how to read them."""

    path: Annotated[str | None, BeforeValidator(_is_a_folder)] = None  # notes.parquet, events.csv.gz or events/, images
    demo: DemoWorld | None = DemoWorld()  # what stands in for a missing path; null: nothing does
    view_events: tuple[str, ...] = ("view", "click")  # event names that count as "viewed"
    click_events: tuple[str, ...] = ("click",)  # event names that count as "clicked"; a clicked note counts as viewed
    ignored_events: tuple[str, ...] = ()  # known names that are neither; any other name is quarantined
    max_events_per_day: int | None = Field(5000, gt=0)  # a user with more on any day is a robot; None: nobody is
    first_day: date = date(1990, 1, 1)  # first partition of the raw events
    partition: Literal["week", "year"] = "week"  # how the raw events are cut (years for logs that spread over decades)
    max_image_pixels: int = Field(50_000_000, gt=0)  # larger images are counted as too large, never decoded

    @model_validator(mode="after")
    def _events(self) -> "Source":
        if both := {*self.ignored_events} & {*self.view_events, *self.click_events}:
            raise ValueError(f"{min(both)} is in ignored_events and in view_events or click_events")
        return self


class Window(Section):
    """Which days are read. `end` is exclusive, 00:00 UTC; the test days come last, the training days before them."""

    end: date | None = None  # None: the end of the last complete week of the source
    train_days: int = Field(14, gt=0)
    test_days: int | None = Field(7, gt=0)  # None: test pairs come from the training days (needs split.by = hash)


class Pairs(Section):
    """Eq. 2 and section 2.3: which notes are related."""

    score: Literal["cooccurrence", "swing"] = "cooccurrence"  # Eq. 2 (the paper), or Swing, which knows no order
    swing_alpha: float = Field(1.0, gt=0)  # the larger, the less it counts what else two users have in common
    swing_max_users: int = Field(1000, gt=1, le=5000)  # of a note: those that clicked the fewest; a table of users^2
    simultaneous: bool = False  # whether a click at the time of the view counts as subsequent (day-resolution logs)
    # Of each user, the notes viewed last and the notes clicked last that make pairs; None: all of them.
    max_user_notes: int | None = Field(2000, gt=0)
    low: float = 0.01  # scores below are outliers; inclusive bound
    up: float = 30.0  # scores above are outliers; inclusive bound
    bounds: Literal["absolute", "quantile"] = "absolute"  # quantile: low and up are shares of the score distribution
    top_t: int = Field(3, gt=0)
    popularity_power: float = Field(0.0, ge=0)  # divide a score by (its target's users) ** power; 0: the paper
    min_users: int = Field(1, gt=0)  # pairs seen by fewer users are dropped

    @model_validator(mode="after")
    def _bounds(self) -> "Pairs":
        if self.low > self.up:
            raise ValueError(f"low = {self.low} is above up = {self.up}")
        if self.bounds == "quantile" and not (self.low >= 0 and self.up <= 1):
            raise ValueError(f"with bounds = quantile, low and up are shares in [0, 1], got {self.low} and {self.up}")
        return self


class Split(Section):
    """How notes are kept apart: no note, and no near-duplicate, is on both sides."""

    by: Literal["time", "hash"] = "time"  # time: the pool is what the training days have not seen; hash: by note group
    pool_share: float = Field(0.3, gt=0, lt=1)  # of the note groups, where by = hash
    validation_share: float = Field(0.1, ge=0, lt=1)  # of the training pairs (the paper), cut by connected component
    max_pool_notes: int | None = Field(None, gt=1)  # the pool is cut to this many notes by hash; None: all


class Checks(Section):
    """Thresholds of the blocking asset checks."""

    max_dropped_share: float = Field(0.2, ge=0, le=1)  # of the notes or events, quarantined
    min_train_pairs: int = Field(50, ge=1)
    min_test_pairs: int = Field(20, ge=1)
    max_mean_cosine: float = Field(0.95, gt=0, le=1)  # of random pairs of embeddings; above: collapsed


class Text(Section):
    """Section 2.3: how much of a note is read."""

    title_words: int = Field(20, gt=0)
    content_words: int = Field(80, gt=0)
    topic_words: int = Field(20, gt=0)  # over all topics together; the paper truncates titles and contents only
    word_unit: Literal["auto", "space", "character"] = "auto"  # auto: a CJK character is a word, else split at spaces
    short_tokens: int = Field(50, gt=0)  # a note with fewer tokens of text is short
    long_tokens: int = Field(165, gt=0)  # a note with more is long
    length_tokenizer: str | None = None  # pinned tokenizer for the two lengths; None: the LLM's


class Vision(Section):
    """The encoder V_theta, frozen unless training.parts names vision."""

    library: Literal["open_clip", "timm", "transformers", "tiny"] = "open_clip"  # tiny: random weights for tests
    name: str = "ViT-B-16"  # as the library calls it; transformers: a hub name or a folder
    # open_clip's or timm's tag, a file or a folder; "package:efficientnet-lite0" reads pip's weights; null for
    # transformers, whose name says it all. What is left out is openai for open_clip, null for the others.
    pretrained: str | None = "openai"
    batch_size: int = Field(32, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _openai_is_a_tag_of_open_clip(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("library", "open_clip") != "open_clip":
            return {"pretrained": None} | raw
        return raw


class LLM(Section):
    """The decoder LLM_mu."""

    name: str  # hub name, folder, GGUF file, "package:smollm2" (pip's weights), or "tiny" (random, for tests)
    num_layers: int | None = Field(None, gt=0)  # keep the first N layers; None: all
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    config: dict[str, Any] | None = None  # its architecture (model_type and sizes), so that `describe` needs no hub


class Connector(Section):
    """The Q-Former C_pi (Table 9); `mlp` and `linear` map each patch by itself and read none of the sizes."""

    kind: Literal["qformer", "mlp", "linear"] = "qformer"
    num_queries: int = Field(16, gt=0)  # L_c
    num_layers: int = Field(6, gt=0)
    hidden_size: int = Field(768, gt=0)
    num_heads: int = Field(12, gt=0)
    intermediate_size: int = Field(3072, gt=0)
    cross_attention_every: int = Field(2, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads(self) -> "Connector":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}")
        return self


class Start(Section):
    """How the new modules start. All off in the paper; small models with short runs need them (docs/paper_map.md)."""

    pca_projector: bool = False  # projector = PCA of training notes' states, instead of random
    num_pca_notes: int = Field(512, gt=1)
    fusion_scale: float | None = Field(None, gt=0)  # spread behind the projector: late-fusion branch / LLM
    gate_bias: float = 0.0  # below zero: the gate starts nearer to the LLM's state
    visual_token_gain: float | None = Field(None, gt=0)  # length of the visual embeddings / of the word embeddings


class LoRA(Section):
    """Adapters for the decoder's linear layers (Hu et al. 2021): W x + (alpha / rank) B A x, W frozen.

    The experts of a mixture that are no linear layers of their own get none.
    """

    rank: int = Field(8, gt=0)
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)  # of x, before A
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"


class Model(Section):
    """The MLRM."""

    method: Literal["basic", "micl", "late_fusion", "notellm2", "only_late_fusion", "omni_retrieval"] = (
        "notellm2"  # the rows of notellm2_core.model.methods (Table 4)
    )
    llm: LLM
    vision: Vision = Vision()
    connector: Connector = Connector()
    projection_dim: int = Field(64, gt=0)
    matryoshka_dims: tuple[Annotated[int, Field(gt=0)], ...] = ()  # shorter embeddings to train and report, e.g. 16, 32
    temperature: float = Field(3.0, le=math.log(100), allow_inf_nan=False)  # tau at the start (Eq. 1)
    start: Start = Start()
    lora: LoRA | None = None  # null: full fine-tuning of the LLM
    license: str | None = None  # of the model card, as the hub writes it ("apache-2.0"); None: "other", none is stated

    @model_validator(mode="after")
    def _dims(self) -> "Model":
        if len({*self.matryoshka_dims}) < len(self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims names a number twice: {list(self.matryoshka_dims)}")
        if wrong := [d for d in self.matryoshka_dims if d >= self.projection_dim]:
            raise ValueError(
                f"matryoshka_dims names {wrong[0]}, which is not below projection_dim = {self.projection_dim}"
            )
        return self


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in get_args(Part) if part in parts)


class HardNegatives(Section):
    """Notes that a model takes for related to a pair's query and that are not: negatives of the whole batch. The paper
    has none.
    """

    num: int = Field(0, ge=0)  # of each pair; 0: none
    first_rank: int = Field(10, gt=0)  # they are neighbours of the query from this rank on: nearer ones may be related
    last_rank: int = Field(100, gt=0)
    model: Path | None = None  # folder of the trained model that looks for them; None: the untrained start
    factory: str = "HNSW32"  # FAISS factory string of the index that it looks into

    @model_validator(mode="after")
    def _window(self) -> "HardNegatives":
        if self.first_rank > self.last_rank:
            raise ValueError(f"first_rank = {self.first_rank} is above last_rank = {self.last_rank}")
        return self


class Training(Section):
    """Appendix A, Table 8."""

    num_steps: int = Field(7956, gt=0)
    batch_pairs: int = Field(128, gt=1)  # B, over all ranks
    num_ranks: int = Field(1, gt=0)  # processes on each node
    num_nodes: int = Field(1, gt=0)  # with more, every node runs the same command, or `hostfile` names them
    rendezvous: str | None = Field(None, pattern=r"^[^\s:]+:\d+$")  # host:port of one of several nodes, seen by all
    hostfile: Path | None = None  # DeepSpeed's: a line "HOST slots=N" for each node; it starts them all by ssh
    zero_stage: Literal[0, 1, 2, 3] = 3  # in bf16 on a GPU, 2 takes the place of 0 and 1
    precision: Literal["bf16", "fp32", "auto"] = "bf16"  # auto: bf16 on a GPU that has it; else the faster, timed
    learning_rate: float = Field(3e-6, gt=0)  # peak, of the LLM, and of the vision encoder where it is trained
    new_module_learning_rate: float | None = Field(None, gt=0)  # connector, fusion, projector; None: learning_rate
    temperature_learning_rate: float | None = Field(None, gt=0)  # tau; None: learning_rate
    # The trained parts; the others stay as they start. None: all but the vision encoder; with LoRA, nor the word
    # embeddings. With vision, pictures are encoded at every step, and no stored features are read.
    parts: Annotated[tuple[Part, ...], Field(min_length=1), AfterValidator(_in_order)] | None = None
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    alpha: float = Field(9.0, ge=0)  # Eq. 9
    # A note's other known positives in the batch: no negatives; positives too; or, as in the paper, negatives.
    known_positives: KnownPositives = "mask"
    hard_negatives: HardNegatives = HardNegatives()
    # Tokens that a rank holds activations of at a time; a batch with more is embedded twice (GradCache). None: all.
    # (Plain gradient accumulation would add no negatives: there is no setting for it.) After an out-of-memory, a
    # training may go on with fewer, or with gradient_checkpointing.
    micro_batch_tokens: int | None = Field(None, gt=0)
    gradient_checkpointing: bool = False
    checkpoint_every_steps: int = Field(500, gt=0)
    checkpoint_every_minutes: float | None = Field(None, gt=0)  # whichever comes first
    num_checkpoints: int = Field(2, gt=0)  # kept: the last of them
    validate_every_steps: int = Field(500, gt=0)
    log_every_steps: int = Field(10, gt=0)


class Export(Section):
    batch_notes: int = Field(64, gt=0)
    shard_notes: int = Field(4096, gt=0)
    num_ranks: int | None = Field(None, gt=0)  # processes, one for each device; None: as many as training.num_ranks


class Index(Section):
    factory: str = "HNSW32"  # a FAISS factory string; inner product on unit vectors
    search_k: int = Field(10, gt=0)  # ANN recall is measured against the exact k nearest


class Evaluation(Section):
    ks: tuple[Annotated[int, Field(gt=0)], ...] = Field((100, 1000, 10000), min_length=1)
    baselines: tuple[Literal["random", "popularity", "bm25", "minilm", "zero_shot"], ...] = (
        "random", "popularity", "bm25", "zero_shot",
    )  # fmt: skip
    saliency_batch_pairs: int = Field(16, gt=1)  # contrasted at a time, in fp32 with every attention map in memory
    num_sheet_queries: int = Field(6, gt=0)  # rows of the picture of neighbours
    saliency_pairs: int = Field(32, ge=0)  # training pairs that Eq. 3-6 are measured on; 0: off

    @model_validator(mode="after")
    def _pairs_to_contrast(self) -> "Evaluation":
        if self.saliency_pairs == 1:
            raise ValueError("saliency_pairs = 1: a single pair has no negatives; use 0 (off) or at least 2")
        return self


class Tracking(Section):
    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else sqlite inside the lake
    experiment: str = "notellm2"
    timeout_seconds: float = Field(10, gt=0)  # a server that does not answer delays an asset by a few of these


class Spark(Section):
    master: str = "local[*]"
    driver_memory: str = "2g"
    # Tasks of a stage, and blocks of the pairs; None: the server's where Spark is started elsewhere, else 8.
    shuffle_partitions: int | None = Field(None, gt=0)
    extra: dict[str, str] = {}


class Config(Section):
    name: str
    seed: int = 42
    lake: Annotated[Path, BeforeValidator(_is_a_folder)] = Path(".dagster/lake")
    source: Source = Source()
    window: Window = Window()
    pairs: Pairs = Pairs()
    split: Split = Split()
    checks: Checks = Checks()
    text: Text = Text()
    model: Model
    training: Training = Training()
    export: Export = Export()
    index: Index = Index()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    spark: Spark = Spark()

    @model_validator(mode="after")
    def _whole(self) -> "Config":
        if self.window.test_days is None and self.split.by == "time":
            raise ValueError("window.test_days = null needs split.by = hash: one window cannot be split by time")
        training = self.training
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
    def trained_parts(self) -> tuple[Part, ...]:
        """What `training.parts` stands for; a part that the method lacks may be among them."""
        if self.training.parts is not None:
            return self.training.parts
        return tuple(part for part in PARTS if part != "word_embeddings" or self.model.lora is None)

    @property
    def trains_vision(self) -> bool:
        return "vision" in self.trained_parts
