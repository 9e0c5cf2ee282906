"""Gradients of micro-batches with dropout equal those of one graph. (On ranks under ZeRO: test_ranks.py.)"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from notellm2_core.training.objective.gradcache import backward
from notellm2_core.training.objective.losses import Losses, capped_tau, contrastive_loss
from notellm2_core.training.objective.views import Embedded


class Engine(nn.Module):
    """The part of DeepSpeed's engine that GradCache uses, around a model with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(6, 4), nn.Dropout(0.5)
        self.tau = nn.Parameter(torch.tensor([2.0]))
        self.boundaries: list[bool] = []

    def forward(self, batch: Any) -> Embedded:
        return Embedded(self.dropout(self.layer(batch.x)), capped_tau(self.tau), batch.x.mean().reshape(1))

    def set_gradient_accumulation_boundary(self, value: bool) -> None:
        self.boundaries.append(value)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def test_gradients_with_dropout_are_those_of_one_graph() -> None:
    """Three micro-batches of 4, 4 and 2 notes have different dropout; both passes of a micro-batch have the same."""
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    batches = [SimpleNamespace(x=part) for part in x.split([4, 4, 2])]
    seeds = [11, 12, 13]

    def loss_of(rows: Tensor, tau: Tensor) -> Losses:
        loss = contrastive_loss(functional.normalize(rows + 1e-3), tau)
        return Losses(loss, loss)

    plain = Engine()
    parts = []
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        parts.append(plain(batch))
    expected = loss_of(torch.cat([part.rows for part in parts]), parts[0].tau)
    expected.total.backward()

    cached = Engine()
    step = backward(cached, lambda: batches, loss_of, seeds)  # type: ignore[arg-type]
    assert cached.boundaries == [False, False, True]
    assert step.losses.total.item() == expected.total.item() and step.tau.item() == 2.0
    assert step.gate_mean is not None and torch.isclose(step.gate_mean, x.mean())
    for (name, ours), theirs in zip(cached.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.any()
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
