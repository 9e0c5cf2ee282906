"""Validation during training: the loss, and recall@10 of the validation pairs among their notes.

Shapes: V pairs over n notes, D width of an embedding.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.micro_batches import share_out
from notellm2_core.training.objective.gather import gather
from notellm2_core.training.objective.gradcache import embed
from notellm2_core.training.objective.losses import capped_tau
from notellm2_core.training.objective.views import batch_losses, views_of
from notellm2_core.training.state.metrics import RECALL, RECALL_K
from notellm2_core.training.state.save import gathered

MAX_PAIRS = 1024  # enough for 2 points of recall, and quick


def validation_sample(data: PairDataset, seed: int) -> np.ndarray:
    """The validation pairs [V, 2] to evaluate: all, or a fixed sample of MAX_PAIRS."""
    pairs = data.validation_pairs
    return pairs[np.sort(np.random.default_rng([seed, 2]).permutation(len(pairs))[:MAX_PAIRS])]


@torch.no_grad()
def validate(
    engine: Any, data: PairDataset, pairs: np.ndarray, config: Config, device: torch.device
) -> dict[str, float]:
    """`validation_loss` and `validation_recall_at_10` on `pairs` [V, 2]; the ranks divide the notes among them."""
    notes, note_index = np.unique(pairs, return_inverse=True)  # [n], [V, 2]
    engine.eval()
    rows = _embed(engine, data, notes, config, device)  # [n, V D]
    tau = _tau(engine)
    engine.train()
    total = 0.0
    for i in range(0, len(pairs), config.training.batch_pairs):
        batch = note_index[i : i + config.training.batch_pairs].reshape(-1)
        labels = data.labels(notes[batch], config.training.known_positives)
        total += batch_losses(config, rows[batch], tau, labels).total.item() * len(batch)
    multimodal = views_of(get_method(config.model.method), rows)["multimodal"]
    if config.training.centre_embeddings:  # as in the loss, and in the saved model by the mean of training notes
        multimodal = multimodal - multimodal.mean(dim=0)
    return {
        "validation_loss": total / note_index.size,
        RECALL: recall_at(multimodal, torch.from_numpy(note_index), RECALL_K),
    }


@torch.no_grad()
def centre_projector(engine: Any, data: PairDataset, notes: np.ndarray, config: Config, device: torch.device) -> None:
    """Change the projector's bias so that the embeddings of `notes` [n] have the mean 0. Called on all ranks, which
    have the same weights.
    """
    engine.eval()
    rows = _embed(engine, data, notes, config, device)  # [n, V D]
    mean = views_of(get_method(config.model.method), rows)["multimodal"].mean(dim=0)
    bias = engine.module.model.projector.bias
    with gathered([bias], modifier_rank=0):
        bias.sub_(mean.to(bias))


def recall_at(embeddings: Tensor, pairs: Tensor, k: int) -> float:
    """Share of pairs [V, 2] whose target is among the k rows of `embeddings` [n, D] nearest to the query by cosine.

    The query itself is no candidate. Ties count as `evaluation.recall` counts them: by their expected rank.
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
    """tau on every rank; under ZeRO-3 a weight is complete only while it is gathered."""
    with gathered([engine.module.model.tau]):
        return capped_tau(engine.module.model.tau.detach().float().cpu().clone())


def _embed(engine: Any, data: PairDataset, notes: np.ndarray, config: Config, device: torch.device) -> Tensor:
    """The embeddings [n, V D] of `notes`, on every rank's CPU. The last batch repeats notes to give equal shares."""
    num_ranks, inputs = dist.get_world_size(), get_method(config.model.method).inputs
    batch_notes = 2 * config.training.batch_pairs
    chunks = []
    for i in range(0, len(notes), batch_notes):
        chunk = notes[i : i + batch_notes]
        filled = np.resize(chunk, math.ceil(len(chunk) / num_ranks) * num_ranks)
        share = share_out(data, filled, inputs, config.training.micro_batch_tokens, device)
        embedded = torch.cat([micro.rows for micro in embed(engine, share.micro_batches())])
        chunks.append(gather(embedded)[share.batch_order][: len(chunk)].cpu())
    return torch.cat(chunks)
