"""One training step up to its gradient: the batch is prepared ahead, then embedded, compared and sent backward."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.micro_batches import Share, share_out
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.objective.gradcache import Step, backward
from notellm2_core.training.objective.losses import BatchLabels, Losses
from notellm2_core.training.objective.views import batch_losses, compared_kinds


def prepare(data: PairDataset, notes: np.ndarray, config: Config, device: torch.device) -> tuple[Share, BatchLabels]:
    """This rank's share of the global batch `notes` [N], and the labels of the whole batch."""
    training, method = config.training, get_method(config.model.method)
    labels = data.labels(notes, training.known_positives, 2 * training.batch_pairs, compared_kinds(method))
    return share_out(data, notes, method.inputs, training.micro_batch_tokens, device), labels.to(device)


def batch_gradient(engine: Any, share: Share, labels: BatchLabels, config: Config, seed: Sequence[int]) -> Step:
    """Compute the gradient of the loss over a global batch, ready for the optimiser. Share and labels: see `prepare`.

    The losses and tau are the same on every rank, and the summed gradient does not depend on the number of ranks.
    """
    seeds = np.random.SeedSequence([*seed, dist.get_rank()]).generate_state(len(share.micro_batch_notes)).tolist()

    def loss_of(embedded: Tensor, tau: Tensor) -> Losses:
        return batch_losses(config, embedded[share.batch_order], tau, labels)

    return backward(engine, share.micro_batches, loss_of, seeds)


def idle_step(engine: Any, data: PairDataset, notes: np.ndarray, config: Config, device: torch.device) -> None:
    """A step on `notes` [2B] with learning rates of 0, which changes no weight."""
    batch_gradient(engine, *prepare(data, notes, config, device), config, seed=(config.seed,))
    engines.set_learning_rate(engine.optimizer, 0.0)
    engines.optimizer_step(engine)
