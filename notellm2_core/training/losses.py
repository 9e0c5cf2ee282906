"""The contrastive losses: Eq. 1, 8, 9 and Omni-Retrieval as pure functions over the 2B notes of a global batch.

Rows 2k and 2k + 1 are the two notes of pair k, so the positive of row i is row `i ^ 1`.

Shapes: N = 2B notes, D = width of an embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MAX_TAU = math.log(100)  # the similarity scale e^tau never exceeds 100


@dataclass
class Losses:
    """What is minimised and its parts, scalars in fp32."""

    total: Tensor
    multimodal: Tensor  # L^m
    visual: Tensor | None = None  # L^v (Eq. 8); None where the method has no visual embedding
    cross: Tensor | None = None  # the other eight terms of Omni-Retrieval


def contrastive_loss(
    embeddings: Tensor,
    tau: Tensor,
    known: Tensor | None = None,
    valid: Tensor | None = None,
    targets: Tensor | None = None,
    valid_targets: Tensor | None = None,
) -> Tensor:
    """Eq. 1: every note finds its related note among the 2B - 1 others of the batch; the mean over the notes.

        -mean_i log( e^{s_ip} / sum_{j != i} e^{s_ij} ),  s_ij = cos(n_i, n_j) e^tau,  p = i ^ 1

    Worked example (B = 2, tau = ln 2, D = 2): rows (1,0), (1,0), (0,1), (0,1). s is 2 inside a pair and 0 across, so
    each row's loss is -log(e^2 / (e^2 + 1 + 1)) = log(1 + 2 e^-2) = 0.2395. If row 2 is a known positive of row 0, the
    loss of row 0 is log(1 + e^-2) = 0.1269.

    Args:
        embeddings: [N, D], any scale and precision; cosine and softmax are computed in fp32.
        tau: [1], the logarithm of the scale.
        known: [N, N] bool, pairs of notes that belong together without being each other's positive in this batch:
            taken out of the denominator. The diagonal and the positives are handled here whatever `known` says.
        valid: [N] bool, rows that have an embedding (None: all). The others are neither queries nor negatives, and a
            row whose positive has none is no query either.
        targets, valid_targets: [N, D] and [N] bool, other embeddings of the same notes, among which the related note
            is to be found (None: `embeddings` and `valid`). A note's own other embedding is left out like itself.

    Returns a scalar; 0 (with a gradient of 0) where no row is a query. Raises ValueError for an odd N.
    """
    num_rows = embeddings.shape[0]
    if num_rows % 2:
        raise ValueError(f"a batch of pairs has an even number of rows, got {num_rows}")
    rows = torch.arange(num_rows, device=embeddings.device)
    positive = rows ^ 1
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = functional.normalize(embeddings.float(), dim=-1)  # [N, D]
        others = unit if targets is None else functional.normalize(targets.float(), dim=-1)  # [N, D]
        scores = unit @ others.T * tau.float().exp()  # [N, N]
        left_out = torch.eye(num_rows, dtype=torch.bool, device=embeddings.device)  # i is not compared to itself
        if known is not None:
            left_out = left_out | known
        queries = torch.ones_like(rows, dtype=torch.bool)
        columns = valid if targets is None else valid_targets
        if columns is not None:
            left_out = left_out | ~columns
            queries = columns[positive]
        if valid is not None:
            queries = queries & valid
        left_out = left_out.scatter(1, positive[:, None], False)
        # A finite fill, not -inf: rows that are no queries must not turn the gradient into NaN.
        log_denominator = scores.masked_fill(left_out, torch.finfo(torch.float32).min).logsumexp(dim=1)  # [N]
        losses = log_denominator - scores[rows, positive]  # [N]
        return torch.where(queries, losses, 0.0).sum() / queries.sum().clamp(min=1)


def note_losses(
    multimodal: Tensor,
    visual: Tensor | None,
    tau: Tensor,
    alpha: float,
    known_multimodal: Tensor | None = None,
    known_visual: Tensor | None = None,
    has_image: Tensor | None = None,
) -> Losses:
    """Eq. 9: L = (L^v + alpha L^m) / (1 + alpha), where L^v (Eq. 8) is Eq. 1 on the visual note embeddings.

    Worked example: L^v = 2, L^m = 1, alpha = 9 gives (2 + 9) / 10 = 1.1. Without visual embeddings L = L^m (Eq. 1).

    Args:
        multimodal, visual: [N, D] each. A note without an image (`has_image` [N] bool) has no visual embedding, so it
            takes no part in L^v.
        known_multimodal, known_visual: [N, N] bool, see `contrastive_loss`; what belongs together differs by view.
    """
    loss_m = contrastive_loss(multimodal, tau, known_multimodal)
    if visual is None:
        return Losses(loss_m, loss_m)
    loss_v = contrastive_loss(visual, tau, known_visual, has_image)
    return Losses((loss_v + alpha * loss_m) / (1 + alpha), loss_m, loss_v)


def omni_losses(
    views: Mapping[str, Tensor],
    tau: Tensor,
    known: Mapping[str, Tensor] | None = None,
    valid: Mapping[str, Tensor] | None = None,
) -> Losses:
    """Omni-Retrieval (Yu et al. 2022, "nine cross-modal and cross-pair retrieval tasks"): the mean of Eq. 1 over all
    ordered pairs (a, b) of inputs, where the related note's b is to be found by a note's a.

    Worked example: with one-hot views that are equal for related notes and the same for all inputs, each of the nine
    terms is Eq. 1 of one view, and so is their mean.

    Args:
        views: [N, D] for each of "multimodal", "image", "text": the same notes with that input alone.
        known: [N, N] bool by input, see `contrastive_loss`. Within an input, its own; across two, the multimodal one:
            the same picture under another text is a false negative of a picture, not of a text.
        valid: [N] bool by input, the notes that have it; an input that is not named here, all have.
    """
    known, valid = known or {}, valid or {}
    terms = {
        (a, b): contrastive_loss(
            views[a], tau, known.get(a if a == b else "multimodal"), valid.get(a), views[b], valid.get(b)
        )
        for a in views
        for b in views
    }
    multimodal = terms.pop(("multimodal", "multimodal"))
    cross = torch.stack(list(terms.values()))
    return Losses((multimodal + cross.sum()) / (1 + len(cross)), multimodal, cross=cross.mean())


class _CappedTau(torch.autograd.Function):
    """min(tau, MAX_TAU), whose gradient never pushes tau further above the cap but can always bring it back.

    Clamping the weight itself after each step would mean reaching into the optimiser's partitions under ZeRO; a plain
    `clamp` would hold tau at the cap for ever, as its gradient there is 0.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tau: Tensor) -> Tensor:
        ctx.save_for_backward(tau >= MAX_TAU)
        return tau.clamp(max=MAX_TAU)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (at_cap,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where(at_cap & (gradient < 0), 0.0, gradient)


def capped_tau(tau: Tensor) -> Tensor:
    """tau, at most ln 100 (the scale at most 100). Every rank must hold the whole gradient of tau (see gather.py)."""
    return _CappedTau.apply(tau)
