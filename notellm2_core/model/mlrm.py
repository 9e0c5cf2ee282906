"""The multimodal large representation model (Fig. 2): the whole forward on one page.

The vision encoder is outside: usually it is frozen, and its features are computed once per image.

Shapes: N notes, T tokens, L patches of width h_v, L_c visual embeddings, h_t the LLM's width, d = 64.
"""

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from notellm2_core.config.methods import get_method
from notellm2_core.config.model import ConnectorSettings
from notellm2_core.model.connector import Connector, init_linear
from notellm2_core.model.fusion import LateFusion
from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.model.packed_llm import can_be_packed, packed_states
from notellm2_core.notes.processor import MLRMProcessor, NoteBatch
from notellm2_core.runtime.pretrained import require_complete


class MLRMConfig(PreTrainedConfig):
    """The model's architecture. `llm` and `connector` are plain dicts, so that config.json is complete."""

    model_type = "mlrm"

    llm: dict[str, Any] | None = None  # the decoder's config, model_type included
    connector: dict[str, Any] | None = None  # ConnectorSettings, and vision_width (h_v)
    num_patches: int = 0  # L
    method: str = "notellm2"
    projection_dim: int = 64  # d
    matryoshka_dims: list[int] | None = None  # shorter embeddings that were trained too
    temperature: float = 3.0  # tau at the start
    attention: str = "sdpa"
    encoder_id: str = ""  # the vision encoder it was trained with, as `VisionEncoder.encoder_id` names it

    def connector_settings(self) -> tuple[ConnectorSettings, int]:
        """The settings of the connector, and h_v. Raises ValueError where one is missing or unknown."""
        settings = dict(self.connector or {})
        if wrong := sorted({*ConnectorSettings.model_fields, "vision_width"} ^ settings.keys()):
            raise ValueError(
                f"the connector in the model's config.json cannot be read: {wrong[0]} is missing or unknown; use a "
                "complete copy"
            )
        vision_width = settings.pop("vision_width")
        return ConnectorSettings(**settings), vision_width


class States(NamedTuple):
    """The representations before the projector."""

    multimodal: Tensor  # [N, h_t] n_m, fused if the method fuses
    visual: Tensor | None  # [N, h_t] n_v, likewise; None if the prompt has no visual word
    llm_multimodal: Tensor  # [N, h_t] n_m before the fusion
    global_branch: Tensor | None  # [N, h_t] v of Eq. 7
    gate_mean: Tensor | None  # [1] mean of z over the multimodal gate


class MLRMOutput(NamedTuple):
    """The representations after the projector, not normalised."""

    multimodal: Tensor  # [N, d]
    visual: Tensor | None  # [N, d]
    gate_mean: Tensor | None  # [1]


class MLRMModel(PreTrainedModel):
    """LLM_mu with connector C_pi, late fusion, projector and temperature."""

    config_class = MLRMConfig
    supports_gradient_checkpointing = True  # the LLM's layers do it
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MLRMConfig, llm: PreTrainedModel | None = None) -> None:
        """`llm`: the pretrained decoder; None: a random one of `config.llm`, to be filled by a checkpoint.

        Raises ValueError if `config` lacks the LLM or the connector, or names an unknown method.
        """
        super().__init__(config)
        if config.llm is None or config.connector is None:
            raise ValueError("the config.json of the model lacks llm or connector; use a complete copy")
        method = get_method(config.method)
        connector, vision_width = config.connector_settings()
        self.llm = llm if llm is not None else _random_llm(config)
        words = self.llm.get_input_embeddings()
        assert isinstance(words, nn.Embedding)
        width = words.embedding_dim  # an OPT's hidden_size can differ
        self._takes_positions = "position_ids" in inspect.signature(self.llm.forward).parameters  # ALiBi has none
        if can_be_packed(self.llm):
            self.llm.set_attn_implementation(PACKED_SDPA)
        self.connector = Connector(connector, vision_width, width) if method.visual_prompt else None
        self.fusion = LateFusion(vision_width, width) if method.late_fusion else None
        self.projector = nn.Linear(width, config.projection_dim)
        init_linear(self.projector)
        self.tau = nn.Parameter(torch.full((1,), config.temperature))  # [1], not []: 0-d tensors break bf16 broadcasts
        self.post_init()

    def forward(self, batch: NoteBatch, num_shared: int = 0) -> MLRMOutput:
        """Notes -> embeddings after the projector. The caller normalises them, in fp32, before comparing.

        num_shared: length of the prefix that all notes share, before the image; packed notes compute it only once.
        """
        states = self.states(batch, num_shared)
        with _without_autocast(states.multimodal):
            return MLRMOutput(
                multimodal=self.projector(states.multimodal),  # [N, d]
                visual=None if states.visual is None else self.projector(states.visual),  # [N, d]
                gate_mean=states.gate_mean,
            )

    def states(self, batch: NoteBatch, num_shared: int = 0) -> States:
        """Sections 2.2 and 3 up to the projector."""
        dtype = self.projector.weight.dtype  # features are fp32, the weights may be bf16
        has_image = batch.has_image.to(dtype)[:, None]  # [N, 1]; zero without an image, but every module runs

        words = self.llm.get_input_embeddings()(batch.input_ids)  # [N, T, h_t]
        if self.connector is not None:
            visual_words = self.connector(batch.patches.to(dtype)) * has_image[:, :, None]  # [N, L_c, h_t]
            words = words.masked_scatter(batch.image_mask[:, :, None], visual_words.to(words.dtype))  # [N, T, h_t]

        has_visual_word = get_method(self.config.method).prompt == "micl"
        needed = [batch.last_index, batch.visual_index] if has_visual_word else [batch.last_index]
        hidden = self._hidden_states(words, batch.attention_mask, num_shared, torch.stack(needed, dim=1))  # [N, T, h_t]
        rows = torch.arange(len(batch), device=hidden.device)
        n_m = hidden[rows, batch.last_index].to(dtype)  # [N, h_t]
        n_v = hidden[rows, batch.visual_index].to(dtype) if has_visual_word else None  # [N, h_t]
        if self.fusion is None:
            return States(n_m, n_v, n_m, None, None)
        with _without_autocast(n_m):
            v = self.fusion.project(batch.global_feature.to(dtype)) * has_image  # [N, h_t]
            fused_m, z = self.fusion(v, n_m)
            fused_v = None if n_v is None else self.fusion(v, n_v)[0]
        return States(fused_m, fused_v, n_m, v, z.detach().float().mean().reshape(1))

    @property
    def packs_notes(self) -> bool:
        """Whether the LLM gets the notes of a batch as one row without padding; depends on its current attention."""
        return bool(self.llm.config._attn_implementation == PACKED_SDPA)

    def _hidden_states(
        self, words: Tensor, attention_mask: Tensor, num_shared: int, needed_positions: Tensor
    ) -> Tensor:
        """Word embeddings -> last hidden states of the LLM, [N, T, h_t] each. Only those at `needed_positions` [N, n]
        are used.
        """
        if self.packs_notes:
            return packed_states(self.llm, words, attention_mask, num_shared, needed_positions)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # the same, wherever the padding is
        output = self.llm(
            inputs_embeds=words,
            attention_mask=attention_mask,
            use_cache=False,
            **({"position_ids": positions} if self._takes_positions else {}),
        )
        states: Tensor = output.last_hidden_state
        return states

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by how they are trained: "llm", "new" (connector, fusion, projector), "tau"."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"llm": [], "new": [], "tau": []}
        for name, parameter in self.named_parameters():
            groups["tau" if name == "tau" else "llm" if name.startswith("llm.") else "new"].append((name, parameter))
        return groups

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Apply `fn`, as `.to(device, dtype)` does, except that the frequencies of the rotary positions stay in fp32.

        In bf16's 8 bits, position 200 would be off by up to a quarter of a radian, and vectors by several times the
        error of bf16 weights. In training they stay in fp32 too: DeepSpeed casts weights only.
        """
        exact = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name.endswith("inv_freq") and buffer.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        for (module, name), before in exact.items():
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, from safetensors only. Raises ValueError for a weight that is missing, damaged or of
        another shape, where transformers would take a random one.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True}
        try:
            # Weights of another shape are listed in the report.
            loaded: Any = super().from_pretrained(
                *args, **kwargs, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except SafetensorError as e:
            raise ValueError(f"the weights of {args[0]} cannot be read: {e}") from e
        model, report = loaded
        require_complete(report, str(args[0]))
        if report["unexpected_keys"]:
            raise ValueError(
                f"{args[0]} has weights that its config.json does not describe: {min(report['unexpected_keys'])}"
            )
        return (model, report) if wants_report else model

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: each part initialises itself, and an incomplete checkpoint is refused."""


def _without_autocast(states: Tensor) -> AbstractContextManager[None]:
    """Inside, modules compute in the precision of their weights.

    The states of all notes are nearly the same vector (cosines of 0.94 to 0.999); what distinguishes notes is the small
    rest. Rounding them to bf16 before the gate and the projector loses much of it: the demo's first loss is then 7.53,
    not the 7.32 of fp32.
    """
    context: AbstractContextManager[None] = torch.autocast(states.device.type, enabled=False)
    return context


def _random_llm(config: MLRMConfig) -> PreTrainedModel:
    fields = dict(config.llm or {})
    llm_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    attention = config.attention
    if attention == "flash_attention_2" and not is_flash_attn_2_available():  # trained on another machine
        warnings.warn(
            "flash-attn is not installed: the model uses sdpa, with the same result up to rounding", stacklevel=2
        )
        attention = "sdpa"
    return AutoModel.from_config(llm_config, attn_implementation=attention)


AutoConfig.register("mlrm", MLRMConfig)
AutoModel.register(MLRMConfig, MLRMModel)
AutoProcessor.register(MLRMConfig, MLRMProcessor)
