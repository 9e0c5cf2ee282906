"""Settings of the training: what is trained and how, and how the run is spread, saved and logged."""

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from notellm2_core.config_section import Section

Part = Literal["llm", "word_embeddings", "connector", "fusion", "projector", "temperature", "vision"]
KnownPositives = Literal["mask", "count", "ignore"]
PARTS: tuple[Part, ...] = tuple(part for part in get_args(Part) if part != "vision")  # of the model itself


def _in_order(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in get_args(Part) if part in parts)


class HardNegativeSettings(Section):
    """Notes that a model takes for related to a pair's query and that are not: negatives of the whole batch. The paper
    has none.
    """

    num: int = Field(0, ge=0, description="Hard negatives of each pair. 0: none (paper).")
    first_rank: int = Field(
        10, gt=0, description="They are neighbours of the query from this rank on: nearer ones may be related."
    )
    last_rank: int = Field(100, gt=0, description="They are neighbours of the query up to this rank.")
    model: Path | None = Field(
        None, description="Folder of the trained model that looks for them. null: the untrained start."
    )
    factory: str = Field("HNSW32", description="FAISS factory string of the index that it looks into.")

    @model_validator(mode="after")
    def _window(self) -> "HardNegativeSettings":
        if self.first_rank > self.last_rank:
            raise ValueError(f"first_rank = {self.first_rank} is above last_rank = {self.last_rank}")
        return self


class RunSettings(Section):
    """How a training is run. They change no weight by more than rounding (and the draws of dropout), so a killed
    training may go on with others.
    """

    num_ranks: int = Field(1, gt=0, description="Processes on each node, one for each GPU.")
    num_nodes: int = Field(1, gt=0, description="Machines. More than one need `rendezvous` or `hostfile`.")
    rendezvous: str | None = Field(
        None,
        pattern=r"^[^\s:]+:\d+$",
        description="`HOST:PORT` of one of several nodes, seen by all; each runs the same command. null: one node.",
    )
    hostfile: Path | None = Field(
        None,
        description="DeepSpeed's list of nodes, a line `HOST slots=N` for each, that it starts by ssh. null: one node.",
    )
    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens whose activations a rank holds at a time. A batch with more is embedded twice (GradCache), "
        "and all its notes are still negatives of each other. Lower it when memory runs out. null: all.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Whether activations are computed twice instead of kept. Saves memory, costs time."
    )
    checkpoint_every_steps: int = Field(500, gt=0, description="Steps between two checkpoints.")
    checkpoint_every_minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes between two checkpoints, if these pass sooner than the steps. null: steps alone.",
    )
    num_checkpoints: int = Field(2, gt=0, description="Checkpoints that are kept, the last ones.")
    validate_every_steps: int = Field(500, gt=0, description="Steps between two validations.")
    log_every_steps: int = Field(10, gt=0, description="Steps between two points of the curves.")


class TrainingSettings(RunSettings):
    """Fine-tuning (appendix A)."""

    num_steps: int = Field(7956, gt=0, description="Steps of the optimiser (paper: Table 8).")
    batch_pairs: int = Field(
        128, gt=1, description="B, the pairs of a batch over all ranks: a multiple of their number (paper: Table 8)."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        3, description="DeepSpeed's ZeRO stage (paper: appendix A). In bf16 on a GPU, 2 takes the place of 0 and 1."
    )
    precision: Literal["bf16", "fp32", "auto"] = Field(
        "bf16",
        description="Numbers of the forward and backward pass (paper: Table 8). `auto`: bf16 on a GPU that has it, "
        "elsewhere the faster one, which is timed.",
    )
    learning_rate: float = Field(
        3e-6,
        gt=0,
        description="Peak learning rate of the LLM, and of the vision encoder where it is trained (paper: Table 8).",
    )
    new_module_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of connector, fusion and projector. null: learning_rate (paper)."
    )
    temperature_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of tau. null: learning_rate (paper)."
    )
    parts: Annotated[tuple[Part, ...], Field(min_length=1), AfterValidator(_in_order)] | None = Field(
        None,
        description="The parts that are trained; the others stay as they start. With vision, pictures are encoded at "
        "every step and no stored features are read. null: all but vision (paper); with LoRA, nor word_embeddings.",
    )
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps in which the learning rates rise (paper: Table 8)."
    )
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's weight decay, of matrices alone (paper: Table 8).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas (paper: Table 8).")
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon (paper: Table 8).")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm that gradients are clipped to (paper: Table 8).")
    alpha: float = Field(9.0, ge=0, description="Weight of the multimodal loss in Eq. 9 (paper: Table 6).")
    known_positives: KnownPositives = Field(
        "mask",
        description="What a note's other known positives in the batch are. `mask`: no negatives. `count`: positives, "
        "too. `ignore`: negatives (paper).",
    )
    hard_negatives: HardNegativeSettings = HardNegativeSettings()
