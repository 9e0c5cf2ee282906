"""One contrastive step over a global batch of any size, in the memory of one micro-batch (GradCache, Gao et al. 2021).

In-batch negatives need all embeddings of the batch at once, but not all activations. So:
  1. every micro-batch is embedded without a graph;
  2. the loss of the whole batch gives the gradient at its embeddings (and at tau);
  3. every micro-batch is embedded again, with a graph, and that gradient is sent back through it.
Gradients add up to those of the plain step. (Gradient accumulation would not do: each micro-batch would have only its
own negatives.) A single micro-batch needs neither 1 nor 3: it is embedded once, with its graph.

Under DeepSpeed, its hooks gather the weights in every forward, gradients are reduced after each backward and added to
the earlier ones (ZeRO-2 and 3 could not hold them otherwise), and clipping and the update wait for the last micro-batch
(`set_gradient_accumulation_boundary`).

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
    """The losses of one step, and what is reported beside them."""

    losses: Losses
    tau: Tensor  # [1]
    gate_mean: Tensor | None  # [1], of this rank


def backward(engine: Any, micro_batches: MicroBatches, loss_of: BatchLoss, seeds: Sequence[int]) -> Step:
    """Compute the gradient of the global batch's loss, left in the weights' `.grad` for `engine.step()`.

    Args:
        micro_batches: yields this rank's micro-batches each time it is called; their number is the same on every rank.
        loss_of: the losses of the whole batch, from the gathered rows [N, V D] and tau.
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

    outputs = embed(engine, micro_batches(), seeds)
    rows = torch.cat([output.rows for output in outputs]).requires_grad_()  # [n, V D]
    tau = outputs[0].tau.requires_grad_()
    losses = loss_of(gather(rows), tau)
    rows_gradient, tau_gradient = torch.autograd.grad(losses.total, (rows, tau))

    upstream = rows_gradient.split([len(output.rows) for output in outputs])
    for number, (batch, seed) in enumerate(zip(micro_batches(), seeds, strict=True), start=1):
        torch.manual_seed(seed)
        embedded = engine(batch)
        engine.set_gradient_accumulation_boundary(number == len(seeds))
        # The gradient of this sum is that of the loss. tau's gradient goes with the first micro-batch, zeros with the
        # others. Every weight then has a gradient in each backward, and tau's is rounded to 16 bits once.
        tau_upstream = tau_gradient if number == 1 else torch.zeros_like(tau_gradient)
        engine.backward((embedded.rows * upstream[number - 1]).sum() + (embedded.tau * tau_upstream).sum())
    return Step(losses, tau.detach(), _mean_gate(outputs))


@torch.no_grad()
def embed(engine: Any, micro_batches: Iterable[NoteBatch], seeds: Sequence[int] = ()) -> list[Embedded]:
    """Embed every micro-batch without a graph; `seeds`: one for each, for dropout."""
    outputs = []
    for number, batch in enumerate(micro_batches):
        if seeds:
            torch.manual_seed(seeds[number])
        outputs.append(engine(batch))
    return outputs


def _mean_gate(outputs: Sequence[Embedded]) -> Tensor | None:
    """[1] `gate_mean` over the notes of all micro-batches; None if the method has no gate."""
    sums = [output.gate_mean * len(output.rows) for output in outputs if output.gate_mean is not None]
    return torch.stack(sums).sum(dim=0) / sum(len(output.rows) for output in outputs) if sums else None
