"""What one training step computes, as one module: DeepSpeed hooks its forward and finds every weight in it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.batch import NoteBatch
from notellm2_core.training.data import KnownPositives
from notellm2_core.training.gather import gather
from notellm2_core.training.losses import Losses, capped_tau, note_losses


@dataclass(frozen=True)
class Embedded:
    """The rows of all ranks: [N, D] each, fp32, not normalised; `gate_mean` is this rank's."""

    multimodal: Tensor
    visual: Tensor | None
    gate_mean: Tensor | None


class TrainingStep(nn.Module):
    """MLRM -> gather -> Eq. 9."""

    def __init__(self, model: MLRMModel, alpha: float, with_visual: bool, autocast: bool) -> None:
        """`with_visual`: the method has L^v. `autocast`: the model's forward runs under torch's bf16 autocast."""
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.with_visual = with_visual
        self.autocast = autocast

    def forward(
        self,
        batch: NoteBatch,
        known: KnownPositives | None = None,
        has_image: Tensor | None = None,
        embed_only: bool = False,
    ) -> tuple[Embedded, Losses | None, Tensor | None]:
        """Embeddings of the global batch, its losses and the tau they were computed with (None with `embed_only`).

        `batch` holds this rank's rows; `known` and `has_image` [N] are of the global batch.
        """
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(batch)
        views = [output.multimodal, output.visual] if self.with_visual else [output.multimodal]
        rows = gather(torch.cat([view.float() for view in views], dim=1))  # one gather for both views
        multimodal, *rest = rows.split(output.multimodal.shape[1], dim=1)
        embedded = Embedded(multimodal, rest[0] if rest else None, output.gate_mean)
        if embed_only:
            return embedded, None, None
        tau = capped_tau(self.model.tau)
        known_m, known_v = (known.multimodal, known.visual) if known is not None else (None, None)
        losses = note_losses(embedded.multimodal, embedded.visual, tau, self.alpha, known_m, known_v, has_image)
        return embedded, losses, tau.detach()
