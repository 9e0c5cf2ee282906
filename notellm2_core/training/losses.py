"""The contrastive losses: Eq. 1, 8, 9 and Omni-Retrieval as pure functions over the notes of a global batch.

Rows 2k and 2k + 1 are the two notes of pair k, so the positive of row i is row `i ^ 1`. Rows after the 2B of the pairs
are negatives of all of them, and no more.

Shapes: N notes, 2B of them in pairs, D = width of an embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class RowFacts:
    """What the losses have to know of the N notes of a batch, by kind of input: "multimodal", "image", "text"."""

    has: Mapping[str, Tensor]  # [N] bool, the notes that have it; a kind that is not named here, all have
    known: Mapping[str, Tensor] | None = None  # [N, N] bool: who belongs together, by pair, note or what is shown
    num_paired: int | None = None  # 2B; None: all
    count_known: bool = False  # whether who belongs together are positives; else they are only no negatives

    def to(self, device: torch.device) -> "RowFacts":
        known = None if self.known is None else {k: v.to(device) for k, v in self.known.items()}
        return replace(self, has={k: v.to(device) for k, v in self.has.items()}, known=known)

    def related(self, kind: str) -> dict[str, Any]:
        """The arguments of `contrastive_loss` that say who belongs together."""
        known = None if self.known is None else self.known.get(kind)
        return {"known": known, "num_paired": self.num_paired, "count_known": self.count_known}


def contrastive_loss(
    embeddings: Tensor,
    tau: Tensor,
    known: Tensor | None = None,
    valid: Tensor | None = None,
    targets: Tensor | None = None,
    valid_targets: Tensor | None = None,
    *,
    num_paired: int | None = None,
    count_known: bool = False,
) -> Tensor:
    """Eq. 1: every note finds its related note among the 2B - 1 others of the batch; the mean over the notes.

        -mean_i log( e^{s_ip} / sum_{j != i} e^{s_ij} ),  s_ij = cos(n_i, n_j) e^tau,  p = i ^ 1

    Worked example (B = 2, tau = ln 2, D = 2): rows (1,0), (1,0), (0,1), (0,1). s is 2 inside a pair and 0 across, so
    each row's loss is -log(e^2 / (e^2 + 1 + 1)) = log(1 + 2 e^-2) = 0.2395. If row 2 is a known positive of row 0, the
    loss of row 0 is log(1 + e^-2) = 0.1269. If it counts, row 0 has two positives of 2 and 0 before the same
    denominator: log(e^2 + 2) - (2 + 0) / 2 = 1.2395.

    Args:
        embeddings: [N, D], any scale and precision; cosine and softmax are computed in fp32.
        tau: [1], the logarithm of the scale.
        known: [N, N] bool, notes that belong together without being each other's positive in this batch: taken out of
            the denominator. The diagonal and the positives are handled here whatever `known` says.
        valid: [N] bool, rows that have an embedding (None: all). The others are neither queries nor negatives, and a
            row whose positive has none is no query either.
        targets, valid_targets: [N, D] and [N] bool, other embeddings of the same notes, among which the related note
            is to be found (None: `embeddings` and `valid`). A note's own other embedding is left out like itself.
        num_paired: 2B; the rows after them are negatives alone (None: there are none).
        count_known: known positives stay, as positives like p: log e^{s_ip} is the mean over all of them (L_out of
            Khosla et al. 2020, Supervised Contrastive Learning, Eq. 2).

    Returns a scalar; 0 (with a gradient of 0) where no row is a query. Raises ValueError for an odd number in pairs.
    """
    num_rows = embeddings.shape[0] if num_paired is None else num_paired
    if num_rows % 2:
        raise ValueError(f"a batch of pairs has an even number of rows, got {num_rows}")
    rows = torch.arange(num_rows, device=embeddings.device)
    positive = rows ^ 1
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = functional.normalize(embeddings.float(), dim=-1)  # [N, D]
        others = unit if targets is None else functional.normalize(targets.float(), dim=-1)  # [N, D]
        scores = unit[:num_rows] @ others.T * tau.float().exp()  # [2B, N]
        left_out = rows[:, None] == torch.arange(len(others), device=rows.device)  # i is not compared to itself
        queries = torch.ones_like(rows, dtype=torch.bool)
        columns = valid if targets is None else valid_targets
        if columns is not None:
            left_out = left_out | ~columns
            queries = columns[positive]
        if valid is not None:
            queries = queries & valid[:num_rows]
        of_positives = scores[rows, positive]  # [2B]
        if known is not None and count_known:
            counted = (known[:num_rows] & ~left_out).scatter(1, positive[:, None], True)  # [2B, N]
            of_positives = (scores * counted).sum(dim=1) / counted.sum(dim=1)
        elif known is not None:
            left_out = left_out | known[:num_rows]
        left_out = left_out.scatter(1, positive[:, None], False)
        # A finite fill, not -inf: rows that are no queries must not turn the gradient into NaN.
        log_denominator = scores.masked_fill(left_out, torch.finfo(torch.float32).min).logsumexp(dim=1)  # [2B]
        return torch.where(queries, log_denominator - of_positives, 0.0).sum() / queries.sum().clamp(min=1)


def note_losses(
    multimodal: Tensor,
    visual: Tensor | None,
    tau: Tensor,
    alpha: float,
    facts: RowFacts,
) -> Losses:
    """Eq. 9: L = (L^v + alpha L^m) / (1 + alpha), where L^v (Eq. 8) is Eq. 1 on the visual note embeddings.

    Worked example: L^v = 2, L^m = 1, alpha = 9 gives (2 + 9) / 10 = 1.1. Without visual embeddings L = L^m (Eq. 1).

    Args:
        multimodal, visual: [N, D] each. A note without an image has no visual embedding, so it takes no part in L^v.
        facts: who belongs together differs by view: by the whole content in L^m, by the image alone in L^v.
    """
    loss_m = contrastive_loss(multimodal, tau, **facts.related("multimodal"))
    if visual is None:
        return Losses(loss_m, loss_m)
    loss_v = contrastive_loss(visual, tau, valid=facts.has.get("image"), **facts.related("image"))
    return Losses((loss_v + alpha * loss_m) / (1 + alpha), loss_m, loss_v)


def omni_losses(
    views: Mapping[str, Tensor],
    tau: Tensor,
    facts: RowFacts,
) -> Losses:
    """Omni-Retrieval (Yu et al. 2022, "nine cross-modal and cross-pair retrieval tasks"): the mean of Eq. 1 over all
    ordered pairs (a, b) of inputs, where the related note's b is to be found by a note's a.

    Worked example: with one-hot views that are equal for related notes and the same for all inputs, each of the nine
    terms is Eq. 1 of one view, and so is their mean.

    Args:
        views: [N, D] for each of "multimodal", "image", "text": the same notes with that input alone.
        facts: who belongs together, within an input, by that input; across two, by the whole content: the same picture
            under another text is a false negative of a picture, not of a text.
    """
    terms = {
        (a, b): contrastive_loss(
            views[a],
            tau,
            valid=facts.has.get(a),
            targets=views[b],
            valid_targets=facts.has.get(b),
            **facts.related(a if a == b else "multimodal"),
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
