"""How good the model is on the validation pairs: Eq. 9 and recall@10 among the validation notes.

Shapes: V pairs over n notes, D width of an embedding.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from notellm2_core.config import Config
from notellm2_core.training.data import TrainingData, rank_slice
from notellm2_core.training.losses import capped_tau, note_losses
from notellm2_core.training.save import gathered

MAX_PAIRS = 1024  # enough for 2 points of recall, and quick
RECALL_K = 10


def validation_sample(data: TrainingData, seed: int) -> np.ndarray:
    """The validation pairs [V, 2] that are looked at: all, or a fixed sample of MAX_PAIRS."""
    pairs = data.validation_pairs
    return pairs[np.sort(np.random.default_rng([seed, 2]).permutation(len(pairs))[:MAX_PAIRS])]


@torch.no_grad()
def validate(
    engine: Any, data: TrainingData, pairs: np.ndarray, config: Config, device: torch.device
) -> dict[str, float]:
    """`validation_loss` and `validation_recall_at_10` on `pairs` [V, 2]; the notes are shared out over the ranks."""
    notes, places = np.unique(pairs, return_inverse=True)  # [n], [V, 2]
    engine.eval()
    multimodal, visual = _embed(engine, data, notes, config.training.batch_pairs * 2, device)
    tau = _tau(engine)
    engine.train()
    total = 0.0
    for i in range(0, len(pairs), config.training.batch_pairs):
        batch = places[i : i + config.training.batch_pairs].reshape(-1)
        known = data.known_positives(notes[batch])
        has_image = torch.from_numpy(data.has_image(notes[batch]))
        views = multimodal[batch], None if visual is None else visual[batch]
        losses = note_losses(*views, tau, config.training.alpha, known.multimodal, known.visual, has_image)
        total += losses.total.item() * len(batch)
    return {
        "validation_loss": total / places.size,
        f"validation_recall_at_{RECALL_K}": recall_at(multimodal, torch.from_numpy(places), RECALL_K),
    }


def recall_at(embeddings: Tensor, pairs: Tensor, k: int) -> float:
    """Share of pairs [V, 2] whose target is among the k rows of `embeddings` [n, D] nearest to the query by cosine.

    The query itself is no candidate. Ties count as `evaluation.recall` counts them: by their expected place.
    """
    unit = functional.normalize(embeddings.float(), dim=1)
    queries, targets = pairs.unbind(dim=1)
    scores = unit[queries] @ unit.T  # [V, n]
    target_scores = scores.gather(1, targets[:, None])
    scores.scatter_(1, queries[:, None], -2.0)
    higher = (scores > target_scores).sum(dim=1)
    tied = (scores == target_scores).sum(dim=1)  # the target among them
    return float(((k - higher) / tied).clamp(0, 1).mean())


def _tau(engine: Any) -> Tensor:
    """tau on every rank; under ZeRO-3 a weight is whole only while it is gathered."""
    with gathered([engine.module.model.tau]):
        return capped_tau(engine.module.model.tau.detach().float().cpu().clone())


def _embed(
    engine: Any, data: TrainingData, notes: np.ndarray, batch_notes: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Both views of `notes`, [n, D] on the CPU. Every rank runs the same number of batches; the last repeats notes."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    multimodal, visual = [], []
    for i in range(0, len(notes), batch_notes):
        part = notes[i : i + batch_notes]
        rows = np.resize(part, math.ceil(len(part) / num_ranks) * num_ranks)
        embedded, _, _ = engine(data.note_batch(rank_slice(rows, rank, num_ranks)).to(device), embed_only=True)
        multimodal.append(embedded.multimodal[: len(part)].cpu())
        if embedded.visual is not None:
            visual.append(embedded.visual[: len(part)].cpu())
    return torch.cat(multimodal), torch.cat(visual) if visual else None
