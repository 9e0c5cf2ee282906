"""Saliency (Eq. 3-6): how much of what the final compressed word reads comes directly from the image.

Shapes: N notes, H heads, T tokens, c the position of the final compressed word.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from notellm2_core.model.mlrm import MLRMModel, MLRMOutput
from notellm2_core.notes.processor import NoteBatch

Loss = Callable[[MLRMOutput], Tensor]  # the contrastive loss of one batch, a scalar


class Scores(NamedTuple):
    """S_v, S_t and S_o of each note; NaN if the set to average over is empty."""

    visual: Tensor  # [N]
    text: Tensor  # [N]
    other: Tensor  # [N]


@dataclass(frozen=True)
class Measurement:
    """The result of `measure`."""

    layers: tuple[dict[str, float | None], ...]  # first layer first: mean over the notes; None: undefined for all
    num_defined: dict[str, int]  # by score, the notes that have it
    num_notes: int  # that were measured
    num_without_image: int  # notes of the batches that were not


def saliency_scores(
    attention: Tensor, gradient: Tensor, visual_mask: Tensor, attention_mask: Tensor, last_index: Tensor
) -> Scores:
    """Eq. 4-6: the mean of I_l over P_v, P_t and P_o, for each note of a batch.

        I_l(i, j) = sum_h |A_h(i, j) dL/dA_h(i, j)|                     Eq. 3, element-wise; from token j to token i
        P_v = (c, j), j in E_v    P_t = (c, j), j < c, not in E_v    P_o = (i, j), j < i, neither of the two

    None of them contains padding or the diagonal.

    Args:
        attention, gradient: [N, H, T, T], A after the softmax, and dL/dA.
        visual_mask: [N, T] bool, E_v. attention_mask: [N, T], 0 on padding. last_index: [N], c.
    """
    flow = (attention * gradient).abs().sum(dim=1)  # [N, T, T] I_l
    positions = torch.arange(flow.shape[1], device=flow.device)
    real = attention_mask.bool()  # [N, T]
    causal = (positions[:, None] > positions) & real[:, :, None] & real[:, None, :]  # [N, T, T]
    into_last = (positions == last_index[:, None])[:, :, None]  # [N, T, 1]
    visual = visual_mask[:, None, :]  # [N, 1, T]
    return Scores(
        visual=_mean(flow, causal & into_last & visual),
        text=_mean(flow, causal & into_last & ~visual),
        other=_mean(flow, causal & ~into_last),
    )


def visual_positions(batch: NoteBatch) -> Tensor:
    """E_v as [N, T] bool: the visual embeddings, and with mICL the visual compressed word (section 4.2)."""
    positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return batch.image_mask | (positions == batch.visual_index[:, None])


def measure(model: MLRMModel, batches: Iterable[tuple[NoteBatch, Loss]]) -> Measurement:
    """Eq. 3-6 in every layer of `model`: the mean over the notes of all `batches`, each with its loss.

    A note without an image takes part in the loss, as in training, but is not measured: its visual embeddings are
    zeros, and S_v can be compared with S_t and S_o only over the same notes. S_v is None if the LLM sees no image
    embeddings. Dropout is off; the model's weights, gradients and settings do not change. One batch is in memory at a
    time. Raises ValueError if a gradient is not finite.
    """
    sums: Tensor | None = None  # [layers, 3]
    defined = torch.zeros(len(Scores._fields), dtype=torch.int64)
    num_notes = num_without_image = 0
    with _prepared(model):
        for batch, loss in batches:
            has_image = batch.has_image
            num_notes += int(has_image.sum())
            num_without_image += int((~has_image).sum())
            layers = []
            for attention, gradient in attention_gradients(model, batch, loss):
                if not gradient.isfinite().all():
                    raise ValueError("the gradient of the attention is not finite: lower training.learning_rate.")
                sets = visual_positions(batch), batch.attention_mask, batch.last_index
                scores = saliency_scores(attention, gradient, *sets)
                layers.append(torch.stack([score[has_image].double().cpu() for score in scores]))  # [3, n]
            values = torch.stack(layers)  # [layers, 3, n]
            sums = values.nansum(dim=2) + (0 if sums is None else sums)
            defined += (~values[0].isnan()).sum(dim=1)  # which sets are empty is the same in every layer
    assert sums is not None, "no batch to measure"
    counts = dict(zip(Scores._fields, defined.tolist(), strict=True))
    means = (sums / defined).tolist()
    return Measurement(
        layers=tuple(
            {name: mean if counts[name] else None for name, mean in zip(Scores._fields, layer, strict=True)}
            for layer in means
        ),
        num_defined=counts,
        num_notes=num_notes,
        num_without_image=num_without_image,
    )


def attention_gradients(model: MLRMModel, batch: NoteBatch, loss: Loss) -> list[tuple[Tensor, Tensor]]:
    """(A, dL/dA) of each layer of the LLM, first layer first, [N, H, T, T] each. The LLM's attention must be eager.

    Hooks collect the attention, so the model's forward needs no code for it. Raises ValueError for an LLM that has
    layers without attention.
    """
    attentions: list[Tensor] = []

    def request(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs["inputs_embeds"].requires_grad_()  # so there is a gradient even if every weight is frozen
        return args, {**kwargs, "output_attentions": True}

    def collect(module: Any, args: Any, output: Any) -> None:
        maps = getattr(output, "attentions", None) or ()
        if not maps or any(attention is None for attention in maps):
            raise ValueError(
                f"this LLM, a {model.llm.config.model_type}, has layers without attention, so there is no saliency to "
                "measure; set evaluation.saliency_pairs to 0."
            )
        attentions.extend(maps)

    handles = [model.llm.register_forward_pre_hook(request, with_kwargs=True), model.llm.register_forward_hook(collect)]
    try:
        with torch.enable_grad():
            value = loss(model(batch))
            gradients = torch.autograd.grad(value, attentions)  # not backward(): no weight's gradient changes
    finally:
        for handle in handles:
            handle.remove()
    return [(attention.detach(), gradient) for attention, gradient in zip(attentions, gradients, strict=True)]


@contextmanager
def _prepared(model: MLRMModel) -> Iterator[None]:
    """Inside, dropout is off, the LLM's attention is eager, and no weight requires a gradient (half the graph)."""
    was_training, attention = model.training, model.llm.config._attn_implementation
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        model.llm.set_attn_implementation("eager")
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.llm.set_attn_implementation(attention)
        model.train(was_training)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """[N]: the mean of `values` [N, T, T] over `where`; NaN if that is empty."""
    return values.masked_fill(~where, 0).sum(dim=(1, 2)) / where.sum(dim=(1, 2))
