"""From the notes of a global batch to the gradient of its losses: what is made ahead of a step, and its middle."""

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


def prepare(data: PairDataset, rows: np.ndarray, config: Config, device: torch.device) -> tuple[Share, BatchLabels]:
    """What this rank embeds of the global batch `rows`, and the labels of all of it."""
    training, method = config.training, get_method(config.model.method)
    labels = data.labels(rows, training.known_positives, 2 * training.batch_pairs, compared_kinds(method))
    return share_out(data, rows, method.inputs, training.micro_batch_tokens, device), labels.to(device)


def batch_gradient(engine: Any, share: Share, labels: BatchLabels, config: Config, seed: Sequence[int]) -> Step:
    """The gradient of the losses over a global batch, ready for the optimiser. Share and labels are those of `prepare`.

    Losses and tau are the same on every rank, and so is the sum of the gradients, whatever their number.
    """
    seeds = np.random.SeedSequence([*seed, dist.get_rank()]).generate_state(len(share.parts)).tolist()

    def loss_of(embedded: Tensor, tau: Tensor) -> Losses:
        return batch_losses(config, embedded[share.places], tau, labels)

    return backward(engine, share.micro_batches, loss_of, seeds)


def idle_step(engine: Any, data: PairDataset, rows: np.ndarray, config: Config, device: torch.device) -> None:
    """A step on the notes `rows` [2B] that changes no weight."""
    batch_gradient(engine, *prepare(data, rows, config, device), config, seed=(config.seed,))
    engines.set_learning_rate(engine.optimizer, 0.0)
    engines.optimizer_step(engine)
