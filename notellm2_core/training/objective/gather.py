"""The one differentiable gather: every rank's embeddings to every rank.

Each rank computes the whole loss of the global batch from the gathered rows: N^2 products of 64 numbers, negligible
beside one layer of the LLM. The loss, tau's gradient, and so the decision to stop at a NaN, are then the same on every
rank without further communication.

DeepSpeed averages every gradient over the R ranks:
- tau: each rank holds the whole dL/dtau; the mean is dL/dtau.
- other weights: rank r holds (dL/dX_r)(dX_r/dw), as its weights computed the rows X_r only. The true gradient is
  the *sum* of these over the ranks, and the mean is 1/R of it. So the backward of the gather multiplies by R; a factor
  on the loss would do the same for the weights, but multiply tau's gradient too.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather(rows: Tensor) -> Tensor:
    """[n, ...] on each of R ranks -> [R n, ...] on all, in the order of the ranks. n is the same on every rank.

    For gradients that are averaged over the ranks afterwards (DeepSpeed, DDP): see above.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered
