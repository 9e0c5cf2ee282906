"""One contrastive step over a global batch of any size, in the memory of one micro-batch (GradCache, Gao et al. 2021).

In-batch negatives need all embeddings of the batch at once, but not all activations. So:
  1. every micro-batch is embedded without a graph;
  2. the loss of the whole batch gives the gradient at its embeddings (and at tau);
  3. every micro-batch is embedded again, with a graph, and that gradient is sent back through it.
Gradients add up to those of the plain step. (Gradient accumulation alone would not do: each of its parts has only its
own negatives.) One micro-batch needs neither 1 nor 3: it is embedded once, with its graph.

The three ways out that DeepSpeed leaves open are used: weights stay gathered by its hooks in every forward, gradients
are reduced after each backward and added to those before (ZeRO-2 and 3 could not hold them otherwise), and clipping and
the update wait for the last (`set_gradient_accumulation_boundary`).

Shapes: N notes of the global batch, n of this rank, V D numbers of each.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from notellm2_core.notes.processor import NoteBatch
from notellm2_core.training.objective.gather import gather
from notellm2_core.training.objective.losses import Losses
from notellm2_core.training.objective.views import Embedded

MicroBatches = Callable[[], Iterable[NoteBatch]]
BatchLoss = Callable[[Tensor, Tensor], Losses]  # of the rows [N, V D] of all ranks, in the order of the ranks, and tau


class Step(NamedTuple):
    """What is told of a step."""

    losses: Losses
    tau: Tensor  # [1]
    gate_mean: Tensor | None  # [1], of this rank


def backward(engine: Any, micro_batches: MicroBatches, loss_of: BatchLoss, seeds: Sequence[int]) -> Step:
    """The gradient of the global batch's loss in the weights' gradients, ready for `engine.step()`.

    Args:
        micro_batches: makes this rank's, each time it is called; as many on every rank.
        seeds: one for each micro-batch, so that dropout is the same when it is embedded again.
    """
    if len(seeds) == 1:
        torch.manual_seed(seeds[0])
        (batch,) = micro_batches()
        embedded: Embedded = engine(batch)
        losses = loss_of(gather(embedded.rows), embedded.tau)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(losses.total)
        return Step(losses, embedded.tau.detach(), embedded.gate_mean)

    parts = embed(engine, micro_batches(), seeds)
    rows = torch.cat([part.rows for part in parts]).requires_grad_()  # [n, V D]
    tau = parts[0].tau.requires_grad_()
    losses = loss_of(gather(rows), tau)
    of_rows, of_tau = torch.autograd.grad(losses.total, (rows, tau))

    upstream = of_rows.split([len(part.rows) for part in parts])
    for number, (batch, seed) in enumerate(zip(micro_batches(), seeds, strict=True), start=1):
        torch.manual_seed(seed)
        embedded = engine(batch)
        engine.set_gradient_accumulation_boundary(number == len(seeds))
        # Its gradient is that of the loss; tau's comes with the first, and 0 with the others: every weight has one
        # every time, and in 16 bits nothing is lost on the way.
        of_tau_here = of_tau if number == 1 else torch.zeros_like(of_tau)
        engine.backward((embedded.rows * upstream[number - 1]).sum() + (embedded.tau * of_tau_here).sum())
    return Step(losses, tau.detach(), _mean_gate(parts))


@torch.no_grad()
def embed(engine: Any, micro_batches: Iterable[NoteBatch], seeds: Sequence[int] = ()) -> list[Embedded]:
    """Every micro-batch, without a graph."""
    parts = []
    for number, batch in enumerate(micro_batches):
        if seeds:
            torch.manual_seed(seeds[number])
        parts.append(engine(batch))
    return parts


def _mean_gate(parts: Sequence[Embedded]) -> Tensor | None:
    """Over the notes of all micro-batches."""
    sums = [part.gate_mean * len(part.rows) for part in parts if part.gate_mean is not None]
    return torch.stack(sums).sum(dim=0) / sum(len(part.rows) for part in parts) if sums else None
