"""What one training step computes, as one module: DeepSpeed hooks its forward and finds every weight in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from notellm2_core.model.methods import Method
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.batch import NoteBatch
from notellm2_core.training.data import RowFacts
from notellm2_core.training.gather import gather
from notellm2_core.training.losses import Losses, capped_tau, note_losses, omni_losses

Views = Mapping[str, Tensor]  # [N, D] each: "multimodal", and "visual" (n_v) or "image" and "text" (other inputs)


@dataclass(frozen=True)
class Embedded:
    """The rows of all ranks, fp32, not normalised; `gate_mean` is this rank's."""

    views: Views
    gate_mean: Tensor | None


class TrainingStep(nn.Module):
    """MLRM -> gather -> the method's loss."""

    def __init__(
        self, model: MLRMModel, method: Method, alpha: float, dims: Sequence[int] = (), autocast: bool = False
    ) -> None:
        """`dims`: shorter embeddings that are trained too. `autocast`: the forward runs under torch's bf16 autocast."""
        super().__init__()
        self.model = model
        self.method = method
        self.alpha = alpha
        self.dims = tuple(dims)
        self.autocast = autocast

    def forward(
        self, batch: NoteBatch, facts: RowFacts | None = None, embed_only: bool = False
    ) -> tuple[Embedded, Losses | None, Tensor | None]:
        """Embeddings of the global batch, its losses and the tau they were computed with (None with `embed_only`).

        `batch` holds this rank's rows, once for each of the method's inputs; `facts` are of the global batch.
        """
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(batch)
        views = dict(zip(self.method.inputs, output.multimodal.chunk(len(self.method.inputs)), strict=True))
        if "visual" in self.method.losses:
            assert output.visual is not None
            views["visual"] = output.visual
        rows = gather(torch.cat([view.float() for view in views.values()], dim=1))  # one gather for all views
        embedded = Embedded(dict(zip(views, rows.chunk(len(views), dim=1), strict=True)), output.gate_mean)
        if embed_only:
            return embedded, None, None
        assert facts is not None
        tau = capped_tau(self.model.tau)
        return embedded, method_losses(self.method, embedded.views, tau, self.alpha, facts, self.dims), tau.detach()


def method_losses(
    method: Method, views: Views, tau: Tensor, alpha: float, facts: RowFacts, dims: Sequence[int] = ()
) -> Losses:
    """The method's loss on `views`; with `dims` (Matryoshka, Kusupati et al. 2022) the mean over it and over that of
    the first d numbers of each embedding, for each d. The parts are those of the whole embeddings.
    """
    losses = _losses(method, views, tau, alpha, facts)
    shorter = [_losses(method, {k: v[:, :d] for k, v in views.items()}, tau, alpha, facts).total for d in dims]
    losses.total = torch.stack([losses.total, *shorter]).mean()
    return losses


def _losses(method: Method, views: Views, tau: Tensor, alpha: float, facts: RowFacts) -> Losses:
    known = facts.known or {}
    if "omni" in method.losses:
        return omni_losses(views, tau, known, facts.has)
    return note_losses(
        views["multimodal"], views.get("visual"), tau, alpha, known.get("multimodal"), known.get("image"),
        facts.has["image"],
    )  # fmt: skip
