"""The views of the notes in a step: the module that embeds them, which DeepSpeed wraps, and the losses on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from notellm2_core.config.methods import InputKind, Method, get_method
from notellm2_core.config.settings import Config
from notellm2_core.model.encode_images import with_features
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.processor import NoteBatch
from notellm2_core.training.objective.losses import BatchLabels, Losses, capped_tau, note_losses, omni_losses
from notellm2_core.vision.encoder import VisionEncoder

Views = Mapping[str, Tensor]  # [N, D] each: "multimodal", and "visual" (n_v) or "image" and "text" (other inputs)


class Embedded(NamedTuple):
    """The model's output for a batch of n notes."""

    rows: Tensor  # [n, V D] fp32, not normalised: the V views of each note, one after the other
    tau: Tensor  # [1] fp32, at most ln 100
    gate_mean: Tensor | None  # [1]


class TrainingStep(nn.Module):
    """MLRM and tau as one module: DeepSpeed hooks its forward and finds every weight in it."""

    def __init__(
        self, model: MLRMModel, method: Method, autocast: bool = False, encoder: VisionEncoder | None = None
    ) -> None:
        """`autocast`: the forward runs under torch's bf16 autocast. `encoder`: if it is trained with the model."""
        super().__init__()
        self.model = model
        self.method = method
        self.autocast = autocast
        self.encoder = encoder

    def forward(self, batch: NoteBatch) -> Embedded:
        """`batch` holds the n notes once for each of the method's inputs, one after the other."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(with_features(batch, self.encoder))
        views = [*output.multimodal.chunk(len(self.method.inputs))]
        if "visual" in self.method.losses:
            assert output.visual is not None
            views.append(output.visual)
        rows = torch.cat([view.float() for view in views], dim=1)
        return Embedded(rows, capped_tau(self.model.tau).float(), output.gate_mean)


def compared_kinds(method: Method) -> tuple[InputKind, ...]:
    """The kinds of input whose known positives the method's losses use."""
    if "omni" in method.losses:
        return get_args(InputKind)
    return ("multimodal", "image") if "visual" in method.losses else ("multimodal",)


def batch_losses(config: Config, rows: Tensor, tau: Tensor, labels: BatchLabels) -> Losses:
    """The losses of the embedded notes `rows` [N, V D] of a batch."""
    method = get_method(config.model.method)
    views = views_of(method, rows)
    if config.training.centre_embeddings:
        views = centred(views, labels)
    return method_losses(method, views, tau, config.training.alpha, labels, config.model.matryoshka_dims)


def views_of(method: Method, rows: Tensor) -> Views:
    """The views by name of `rows` [N, V D]."""
    names = [*method.inputs, *(["visual"] if "visual" in method.losses else [])]
    return dict(zip(names, rows.chunk(len(names), dim=1), strict=True))


def centred(views: Views, labels: BatchLabels) -> Views:
    """The views less their means (`training.centre_embeddings`): n_v less that over the notes with an image.

    Without an image n_v is the same for all notes, and takes no part in a loss.
    """
    has = {"visual": labels.has.get("image")}
    return {name: view - _mean(view, has.get(name)) for name, view in views.items()}


def _mean(rows: Tensor, counts: Tensor | None) -> Tensor:
    """[D] The mean of the `rows` [N, D] that count, all of them for None; 0 if none does."""
    return rows.mean(dim=0) if counts is None else counts.to(rows) @ rows / counts.sum().clamp(min=1)


def method_losses(
    method: Method, views: Views, tau: Tensor, alpha: float, labels: BatchLabels, dims: Sequence[int] = ()
) -> Losses:
    """The method's losses on `views`.

    With `dims` (Matryoshka, Kusupati et al. 2022), `total` is the mean of the loss of the whole embeddings and of the
    losses of their first d dimensions, for each d. The other terms are those of the whole embeddings.
    """
    losses = _losses(method, views, tau, alpha, labels)
    shorter = [_losses(method, {k: v[:, :d] for k, v in views.items()}, tau, alpha, labels).total for d in dims]
    return replace(losses, total=torch.stack([losses.total, *shorter]).mean())


def _losses(method: Method, views: Views, tau: Tensor, alpha: float, labels: BatchLabels) -> Losses:
    if "omni" in method.losses:
        return omni_losses(views, tau, labels)
    return note_losses(views["multimodal"], views.get("visual"), tau, alpha, labels)
