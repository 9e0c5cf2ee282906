"""Training settings: what is trained, how, and how a training run is executed."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from notellm2_core.config.section import Section, is_pretrained

Part = Literal["llm", "word_embeddings", "connector", "fusion", "projector", "temperature", "vision"]
KnownPositives = Literal["mask", "count", "ignore"]
PARTS: tuple[Part, ...] = tuple(part for part in get_args(Part) if part != "vision")  # of the model itself


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in get_args(Part) if part in parts)


class MiningSettings(Section):
    """Mining: the notes that a model ranks near a pair's query although they are unrelated to it."""

    first_rank: int = Field(
        10, gt=0, description="Lowest rank among the query's neighbours to take: closer ones may be related."
    )
    last_rank: int = Field(100, gt=0, description="Highest rank among the query's neighbours to take.")
    model: Path | None = Field(
        None, description="Folder of the trained model that ranks them. null: the initial model, untrained."
    )
    factory: str = Field("HNSW32", description="FAISS factory string of the index that is searched for them.")

    @model_validator(mode="after")
    def _window(self) -> Self:
        if self.first_rank > self.last_rank:
            raise ValueError(f"first_rank = {self.first_rank} is above last_rank = {self.last_rank}")
        return self


class HardNegativeSettings(MiningSettings):
    """Notes that look related to a pair's query and are not. They are negatives of every query in the batch. The paper
    has none.
    """

    num: int = Field(0, ge=0, description="Hard negatives of each pair. 0: none (paper).")
    file: Path | None = Field(
        None,
        description="Hard negatives of your own in place of mined ones: a Parquet or CSV file with the columns note_id "
        "and negative_id (text or whole numbers). null: they are mined.",
    )


class RunSettings(Section):
    """How a training run is executed. None of these settings changes the weights by more than rounding (and the draws
    of dropout), so a killed run may resume with other values.
    """

    num_ranks: int = Field(1, gt=0, description="Processes of each node, one per GPU.")
    num_nodes: int = Field(1, gt=0, description="Number of machines. Several need rendezvous or hostfile.")
    rendezvous: str | None = Field(
        None,
        pattern=r"^[^\s:]+:\d+$",
        description="`HOST:PORT` of one node that all of them reach; the same command is run on each. null: hostfile, "
        "or a single node.",
    )
    hostfile: Path | None = Field(
        None,
        description="DeepSpeed's hostfile, with a line `HOST slots=N` for each node; its launcher starts them by ssh. "
        "null: rendezvous, or a single node.",
    )
    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens whose activations a rank holds at a time. A larger batch is embedded in micro-batches "
        "(GradCache), with the same negatives and gradients. Lower it where memory runs out. null: the whole batch.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Whether activations are recomputed in the backward pass: less memory, more time."
    )
    checkpoint_every_steps: int = Field(500, gt=0, description="Steps between checkpoints.")
    checkpoint_every_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes between checkpoints, where these pass before the steps. null: only steps count.",
    )
    num_checkpoints: int = Field(2, gt=0, description="Number of checkpoints to keep, the latest ones.")
    log_every_steps: int = Field(10, gt=0, description="Steps between points of the curves.")


class SelectionSettings(Section):
    """Validation during a run, and which of the run's weights become the model. Before the first step, the model is
    validated too.
    """

    validate_every_steps: int = Field(500, gt=0, description="Steps between validations.")
    select: Literal["best", "last"] = Field(
        "last",
        description="`last`: the weights after the last step (paper). `best`: those of the validation with the highest "
        "recall, the first of equals.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="Early stopping: the run ends after this many validations in a row without a higher recall than "
        "the best before. The learning rates follow the planned number of steps. null: it never ends early.",
    )

    @property
    def selects(self) -> bool:
        """Whether the validations decide which weights become the model."""
        return self.select == "best" or self.patience is not None


Rate = Annotated[float, Field(gt=0)]


class Rates(NamedTuple):
    """Peak learning rates of the parts of a model."""

    llm: float
    new_modules: float
    temperature: float


class TrainingSettings(SelectionSettings, RunSettings):
    """Fine-tuning (appendix A of the paper)."""

    num_steps: int | None = Field(
        7956, gt=0, description="Optimiser steps (paper: Table 8). null: num_epochs says how many."
    )
    num_epochs: int | None = Field(
        None,
        gt=0,
        description="Passes over the training pairs, in place of num_steps. An epoch is (training pairs / batch_pairs) "
        "steps, rounded up. null: num_steps.",
    )
    start_from: Literal["pretrained", "champion"] = Field(
        "pretrained",
        exclude_if=is_pretrained,
        description="`pretrained`: the pretrained LLM, with new modules around it (paper). `champion`: the release "
        "that was live in the weeks before; without one, as pretrained ([warm start](releases.md#warm-start)).",
    )
    batch_pairs: int = Field(
        128, gt=1, description="Pairs of a batch, B, over all ranks; a multiple of their number (paper: Table 8)."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3, description="ZeRO stage of DeepSpeed (paper: appendix A). In bf16 on a GPU, 2 replaces 0 and 1."
    )
    precision: Literal["bf16", "fp32", "auto"] = Field(
        "bf16",
        description="Precision of the forward and backward pass (paper: Table 8). `auto`: bf16 on a GPU that supports "
        "it, elsewhere the faster of the two, which is measured.",
    )
    learning_rate: Rate | Literal["auto"] = Field(
        3e-6,
        description="Peak learning rate of the LLM, and of the vision encoder where it is trained (paper: Table 8). "
        "`auto`: the best of several by [trial runs](training.md#learning-rates-by-trial), together with that of the "
        "new modules unless it is set; it takes about three times as long.",
    )
    new_module_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of connector, fusion and projector. null: learning_rate (paper)."
    )
    temperature_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of tau. null: learning_rate (paper)."
    )
    trainable: Annotated[tuple[Part, ...], Field(min_length=1), AfterValidator(_in_order)] | None = Field(
        None,
        description="Parts that are trained; the others keep their initial weights. With vision, images are encoded "
        "at every step and stored features are not read. null: all but vision (paper), and with LoRA all but vision "
        "and word_embeddings.",
    )
    warmup_ratio: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rates rise; after them they decay linearly (paper: "
        "Table 8).",
    )
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's weight decay, for matrices only (paper: Table 8).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas (paper: Table 8).")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon (paper: Table 8).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm (paper: Table 8).")
    alpha: float = Field(9.0, ge=0, description="Weight of the multimodal loss in Eq. 9 (paper: Table 6).")
    centre_embeddings: bool = Field(
        False,
        description="Whether the loss compares the embeddings of a batch less their mean, so that they cannot fall to "
        "one point ([why](training.md#embeddings-that-fall-to-one-point)). The saved projector, even a frozen "
        "one, takes the mean of training notes out. The paper does not.",
    )
    known_positives: KnownPositives = Field(
        "mask",
        description="Role of a note's other known positives in the batch. `mask`: neither positives nor negatives "
        "(false-negative masking). `count`: positives. `ignore`: negatives (paper).",
    )
    hard_negatives: HardNegativeSettings = HardNegativeSettings()

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_epochs") is not None:
            return {"num_steps": None, **values}
        return values

    @property
    def rates(self) -> Rates:
        """The peak learning rates. Raises ValueError for `auto`, which only the pipeline's trial runs can resolve."""
        if self.learning_rate == "auto":
            raise ValueError(
                "training.learning_rate = auto has no value here: the asset checkpoint chooses one by trial"
            )
        llm = self.learning_rate
        return Rates(llm, self.new_module_learning_rate or llm, self.temperature_learning_rate or llm)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSettings":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(
                f"training.num_steps = {self.num_steps} and training.num_epochs = {self.num_epochs} are two ways to "
                "say how long to train: set one of them"
            )
        return self
