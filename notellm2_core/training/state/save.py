"""Saves the trained model as a self-contained Hugging Face folder."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.model.card import CARD, CARD_FIELDS, Architecture, card_fields, model_card
from notellm2_core.model.lora import adapted_layers, is_adapter, merge
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.runtime.files import write_atomically
from notellm2_core.schema import VISION_FOLDER
from notellm2_core.training.objective.losses import MAX_TAU
from notellm2_core.vision.encoder import VisionEncoder, saved_encoder_id

DONE = "training.json"


def save_model(
    model: MLRMModel,
    processor: MLRMProcessor,
    vision: VisionEncoder | Path,
    out: Path,
    config: Config,
    train_days: Sequence[str] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Write model, processor, vision encoder and the model card into `out`; training.json comes last.

    `vision`: the trained encoder, or the folder of a frozen one, which is copied. `summary`: the metrics of the run,
    for training.json and the card; None: an untrained, initial model. Called on all ranks; rank 0 writes. The weights
    have the precision of their training: fp32 on a CPU, bf16 on a GPU (except the encoder's: fp32).

    Raises ValueError if a weight is not finite or the folder `vision` holds no encoder, OSError if the disk is full.
    """
    weights = plain_weights(model)
    encoder_weights = full_weights(vision) if isinstance(vision, VisionEncoder) else None
    if weights is not None:
        if wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]:
            raise ValueError(
                f"{len(wrong)} trained weights, {wrong[0]} the first, are not finite: lower the learning rates"
            )
        out.mkdir(parents=True, exist_ok=True)
        (out / DONE).unlink(missing_ok=True)
        if isinstance(vision, Path):
            shutil.copytree(vision, out / VISION_FOLDER, dirs_exist_ok=True)
        elif encoder_weights is not None:
            vision.with_weights(encoder_weights).save_pretrained(out / VISION_FOLDER)
        model.config.encoder_id = saved_encoder_id(out / VISION_FOLDER)
        processor.save_pretrained(out)
        sizes = {name: weight.numel() for name, weight in weights.items()}
        try:
            model.save_pretrained(out, state_dict=weights, safe_serialization=True)
        except SafetensorError as e:  # a full disk
            raise OSError(f"the model could not be written into {out}: {e}") from e
        card = card_fields(config, _architecture(model, processor), sizes, train_days, summary)
        (out / CARD_FIELDS).write_text(json.dumps(card, indent=1))
        (out / CARD).write_text(model_card(card))
        if summary is not None:
            write_atomically(out / DONE, json.dumps(summary, indent=1))
    if dist.is_initialized():
        dist.barrier()


def _architecture(model: MLRMModel, processor: MLRMProcessor) -> Architecture:
    return Architecture(
        encoder_id=model.config.encoder_id,
        num_patches=processor.num_patches,
        vision_width=processor.vision_width,
        num_visual_words=processor.num_queries if get_method(model.config.method).visual_prompt else 0,
        num_layers=model.llm.config.num_hidden_layers,
        llm_width=model.projector.in_features,
        projection_dim=model.projector.out_features,
    )


def plain_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """`full_weights` with the adapters merged into their layers: names and shapes of a model without adapters."""
    weights = full_weights(model)
    for name, layer in adapted_layers(model).items():
        with gathered([p for n, p in layer.named_parameters(prefix=name) if is_adapter(n)]):
            if weights is not None:
                merge(weights, name, layer)
    return weights


def full_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Name -> tensor of every parameter and buffer of `model`, frozen ones too, on rank 0's CPU; None on other ranks.

    The tensors have their whole shapes: under ZeRO-3 one parameter at a time is gathered from the ranks. tau is at most
    ln 100.
    """
    weights = _whole(model.named_parameters())
    if weights is None:
        return None
    if "tau" in weights:
        weights["tau"].clamp_(max=MAX_TAU)
    saved = model.state_dict()
    return weights | {name: b.detach().cpu() for name, b in model.named_buffers() if name in saved}


def trained_weights(module: nn.Module) -> dict[str, Tensor] | None:
    """Name -> tensor of every trained parameter of `module`, as `full_weights`; adapters stay apart."""
    return _whole((name, p) for name, p in module.named_parameters() if p.requires_grad)


def load_trained(module: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Give `module`, on all ranks, the `trained_weights` of rank 0, for saving it: the optimiser keeps its own."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter], modifier_rank=0):
                if weights is not None:
                    parameter.data.copy_(weights[name])
                dist.broadcast(parameter.data, src=0)  # for ZeRO-0 to 2, where nothing is gathered


def _whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor] | None:
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, Tensor] = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            if is_first:
                weights[name] = parameter.detach().cpu().clone()
    return weights if is_first else None


def gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager[None]:
    """Inside, these parameters are complete on every rank, at every ZeRO stage.

    `modifier_rank`: the rank whose changes all ranks have afterwards, under ZeRO-3.
    """
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    return _gathered(parameters, modifier_rank)


@contextmanager
def _gathered(parameters: Sequence[nn.Parameter], modifier_rank: int | None) -> Iterator[None]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank):
        yield
