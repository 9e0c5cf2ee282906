"""Settings of the model: vision encoder, LLM, connector, initialisation of the new modules, adapters."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from notellm2_core.config.methods import METHODS, get_method
from notellm2_core.config.section import Section

VisionLibrary = Literal["open_clip", "timm", "transformers", "tiny"]


class VisionSettings(Section):
    """The vision encoder V_theta, frozen unless `training.trainable` names vision."""

    library: VisionLibrary = Field(
        "open_clip", description="Library that provides the encoder. `tiny`: random weights, for tests."
    )
    name: str = Field(
        "ViT-B-16",
        description="Name of the encoder in its library; for transformers, a hub name or a folder (paper: CLIP ViT-B, "
        "Table 9).",
    )
    pretrained: str | None = Field(
        "openai",
        description="Weights: a tag of open_clip or timm, a file, a folder, or `package:efficientnet-lite0` "
        "(installed with this project). With a library other than open_clip, the default is null; transformers needs "
        "none.",
    )
    batch_size: int = Field(32, gt=0, description="Images encoded at a time.")

    @model_validator(mode="before")
    @classmethod
    def _openai_is_a_tag_of_open_clip(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("library", "open_clip") != "open_clip":
            return {"pretrained": None} | raw
        return raw


class LLMSettings(Section):
    """The decoder LLM_mu."""

    name: str = Field(
        description="Any causal decoder: a hub name, a folder, a GGUF file, `package:smollm2` (installed with this "
        "project), or `tiny` (random weights, for tests)."
    )
    num_layers: int | None = Field(None, gt=0, description="Number of layers to keep, from the first. null: all.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation of transformers. Gemma 2 needs `eager`."
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Architecture (`model_type` and sizes); with it, `notellm2 describe` needs no hub. null: it is "
        "read beside the weights.",
    )


class ConnectorSettings(Section):
    """The connector C_pi. `mlp` and `linear` read none of the sizes of the Q-Former."""

    kind: Literal["qformer", "mlp", "linear"] = Field(
        "qformer",
        description="`qformer` (paper). `mlp` and `linear`, for ablation, map each patch to one visual embedding.",
    )
    num_queries: int = Field(
        16, gt=0, description="Learnable queries L_c, the visual embeddings of a note (paper: Table 9)."
    )
    num_layers: int = Field(6, gt=0, description="Number of layers (paper: Table 9).")
    hidden_size: int = Field(
        768, gt=0, description="Width h_q of the layers, a multiple of num_heads (paper: Table 9)."
    )
    num_heads: int = Field(12, gt=0, description="Attention heads of a layer (paper: Table 9).")
    intermediate_size: int = Field(3072, gt=0, description="Width of the feed-forward layers (paper: Table 9).")
    cross_attention_every: int = Field(
        2,
        gt=0,
        description="One in this many layers attends to the patches, beginning with the first (paper: Table 9).",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout rate of the attention and feed-forward layers in training."
    )

    @model_validator(mode="after")
    def _heads(self) -> "ConnectorSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}")
        return self


class InitSettings(Section):
    """How the new modules are initialised. The paper uses none of it; small models in short runs need it
    ([why](paper_map.md)).
    """

    pca_projector: bool = Field(
        False, description="Whether the projector starts as a PCA of training notes' states instead of at random."
    )
    num_pca_notes: int = Field(
        512,
        gt=1,
        description="Number of training notes that these values, and the mean of `training.centre_embeddings`, are "
        "measured on.",
    )
    fusion_scale: float | None = Field(
        None,
        gt=0,
        description="Spread of the late-fusion branch behind the projector, relative to the LLM's. null: not scaled.",
    )
    gate_bias: float = Field(
        0.0, description="Bias of the gate in Eq. 7. Below 0, the fused state starts closer to the LLM's."
    )
    visual_token_gain: float | None = Field(
        None,
        gt=0,
        description="Length of the visual embeddings, relative to that of word embeddings. null: not scaled.",
    )


class LoRASettings(Section):
    """Adapters for the LLM's linear layers (Hu et al. 2021): W x + (alpha / rank) B A x, with W frozen.

    Experts of a mixture that are not linear layers of their own get none.
    """

    rank: int = Field(8, gt=0, description="Rank of the adapters.")
    alpha: int = Field(16, gt=0, description="The adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout rate of the adapters' input in training.")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear", description="Names of the layers that get adapters. `all-linear`: all linear layers."
    )


def _require_method(name: str) -> str:
    get_method(name)
    return name


class ModelSettings(Section):
    """The multimodal representation model (MLRM)."""

    method: Annotated[str, AfterValidator(_require_method)] = Field(
        "notellm2",
        description="A method of Table 4; `notellm2` is the one that the paper proposes.",
        json_schema_extra={"enum": [*METHODS]},
    )
    llm: LLMSettings
    vision: VisionSettings = VisionSettings()
    connector: ConnectorSettings = ConnectorSettings()
    projection_dim: int = Field(64, gt=0, description="Dimension of the embeddings (paper: section 2.3).")
    matryoshka_dims: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (),
        description="Dimensions of shorter embeddings that are trained, too (Matryoshka): below projection_dim, such "
        "as `[16, 32]`. The paper has none.",
    )
    temperature: float = Field(
        3.0,
        le=math.log(100),
        allow_inf_nan=False,
        description="Initial tau, the logarithm of the logit scale, which is learned: cosines are multiplied by e^tau "
        "(paper: section 2.3).",
    )
    init: InitSettings = InitSettings()
    lora: LoRASettings | None = Field(
        None,
        description="Train adapters in place of the LLM's weights; a saved model has them merged. null: train the "
        "weights (paper).",
    )
    license: str | None = Field(
        None,
        description="Licence of the trained weights for the model card, in the hub's spelling (`apache-2.0`). null: "
        "none is stated.",
    )

    @model_validator(mode="after")
    def _dims(self) -> "ModelSettings":
        if len({*self.matryoshka_dims}) < len(self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims names a number twice: {list(self.matryoshka_dims)}")
        if wrong := [d for d in self.matryoshka_dims if d >= self.projection_dim]:
            raise ValueError(
                f"matryoshka_dims names {wrong[0]}, which is not below projection_dim = {self.projection_dim}"
            )
        return self
