"""The contrastive losses: Eq. 1, 8, 9 and Omni-Retrieval as pure functions over the notes of a global batch.

All are InfoNCE (van den Oord et al. 2018) with in-batch negatives, as in DPR, SimCLR and CLIP.

Shapes: N notes, 2B of them in pairs, D = width of an embedding, Q queries.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

MAX_TAU = math.log(100)  # the logit scale e^tau never exceeds 100


@dataclass(frozen=True)
class Losses:
    """The loss that is minimised and its terms, scalars in fp32."""

    total: Tensor
    multimodal: Tensor  # L^m
    visual: Tensor | None = None  # L^v (Eq. 8); None if the method has no visual embedding
    cross: Tensor | None = None  # mean of the other eight terms of Omni-Retrieval


@dataclass(frozen=True)
class PairMasks:
    """Which of N notes one contrastive loss compares. None: all of them, and no known positives."""

    has_query: Tensor | None = None  # [N] bool, notes with an embedding to search with
    has_candidate: Tensor | None = None  # [N] bool, notes with an embedding to be found
    false_negatives: Tensor | None = None  # [N, N] bool, known positives, which are left out of the denominator
    also_positive: Tensor | None = None  # [N, N] bool, known positives that count as positives


@dataclass(frozen=True)
class BatchLabels:
    """Inputs and known positives of the N notes of a global batch, by kind of input: "multimodal", "image", "text"."""

    has: Mapping[str, Tensor]  # [N] bool, the notes that have this input; all have a kind that is not listed
    known_positives: Mapping[str, Tensor] | None = None  # [N, N] bool, the same or related notes; None: ignored
    num_paired: int | None = None  # 2B, the notes after them are hard negatives; None: all notes are in pairs
    count_known: bool = False  # known positives count as positives; False: they are false negatives

    def to(self, device: torch.device) -> "BatchLabels":
        positives = None if self.known_positives is None else {k: v.to(device) for k, v in self.known_positives.items()}
        return replace(self, has={k: v.to(device) for k, v in self.has.items()}, known_positives=positives)

    def masks(self, query: str, candidate: str | None = None) -> PairMasks:
        """The masks of the loss that searches with one kind of input for another (None: the same).

        Known positives within a kind are those of that kind. Across two kinds they are those of the whole note: the
        same image with another text is a false negative of an image, but a negative of a text.
        """
        candidate = query if candidate is None else candidate
        positives = (self.known_positives or {}).get(query if query == candidate else "multimodal")
        false_negatives, also_positive = (None, positives) if self.count_known else (positives, None)
        return PairMasks(self.has.get(query), self.has.get(candidate), false_negatives, also_positive)


def info_nce(
    logits: Tensor, positive: Tensor, is_negative: Tensor, is_query: Tensor, also_positive: Tensor | None = None
) -> Tensor:
    """InfoNCE with masks, the mean over the queries:

        -log( e^{s_p} / (e^{s_p} + sum over negatives of e^{s_n}) )

    With several positives, log e^{s_p} is their mean and the denominator has all of them (L_out of Khosla et al. 2020,
    Supervised Contrastive Learning, Eq. 2).

    Worked example: logits 2, 0, 0 and positive 0. With both others as negatives the loss is log(e^2 + 2) - 2 = 0.2395;
    with one of them, log(e^2 + 1) - 2 = 0.1269; with one as a negative and one as a positive too,
    log(e^2 + 2) - (2 + 0) / 2 = 1.2395.

    Args:
        logits: [Q, N] fp32.
        positive: [Q], the column of each query's positive.
        is_negative: [Q, N] bool. A positive that is marked as a negative stays a positive.
        is_query: [Q] bool, the rows that count.
        also_positive: [Q, N] bool, further positives.

    Returns a scalar; 0, with a gradient of 0, if no row is a query.
    """
    is_positive = torch.zeros_like(logits, dtype=torch.bool).scatter(1, positive[:, None], True)  # [Q, N]
    if also_positive is not None:
        is_positive = is_positive | also_positive
    # A finite fill, not -inf: rows that are no queries must not turn the gradient into NaN.
    lowest = torch.finfo(logits.dtype).min
    log_denominator = torch.where(is_negative | is_positive, logits, lowest).logsumexp(dim=1)  # [Q]
    positive_logit = torch.where(is_positive, logits, 0.0).sum(dim=1) / is_positive.sum(dim=1)  # [Q]
    return torch.where(is_query, log_denominator - positive_logit, 0.0).sum() / is_query.sum().clamp(min=1)


def contrastive_loss(
    embeddings: Tensor,
    tau: Tensor,
    masks: PairMasks = PairMasks(),
    candidates: Tensor | None = None,
    num_paired: int | None = None,
) -> Tensor:
    """Eq. 1: every note finds its related note among the 2B - 1 others of the batch; the mean over the notes.

        -mean_i log( e^{s_ip} / sum_{j != i} e^{s_ij} ),  s_ij = cos(n_i, n_j) e^tau

    In plain terms: rows 2k and 2k + 1 are the two notes of pair k, so the positive p of row i is row i ^ 1. All other
    rows are its in-batch negatives, and the loss is low if row i is more similar to its positive than to any of them.
    Rows that are known to be related to row i are no true negatives: these known positives are left out of the
    denominator (false-negative masking), or count as positives.

    Worked example (B = 2, tau = ln 2, D = 2): rows (1,0), (1,0), (0,1), (0,1). s is 2 inside a pair and 0 across, so
    each row's loss is -log(e^2 / (e^2 + 1 + 1)) = log(1 + 2 e^-2) = 0.2395. If row 2 is a known positive of row 0, the
    loss of row 0 is log(1 + e^-2) = 0.1269. If it counts, row 0 has two positives of 2 and 0 before the same
    denominator: log(e^2 + 2) - (2 + 0) / 2 = 1.2395.

    Args:
        embeddings: [N, D], any scale and precision; cosine and softmax are computed in fp32.
        tau: [1], the logarithm of the logit scale (one over the temperature).
        masks: a note without a query embedding, or whose positive has no candidate embedding, is no query. A note is
            never a candidate of its own, and row i ^ 1 stays the positive of row i.
        candidates: [N, D], the embeddings of the same notes that `embeddings` search. None: `embeddings`.
        num_paired: 2B; the rows after them are hard negatives of all queries. None: all rows are in pairs.

    Returns a scalar; 0 (with a gradient of 0) if no row is a query. Raises ValueError if 2B is odd.
    """
    num_queries = embeddings.shape[0] if num_paired is None else num_paired
    if num_queries % 2:
        raise ValueError(f"a batch of pairs has an even number of rows, got {num_queries}")
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = functional.normalize(embeddings.float(), dim=-1)  # [N, D]
        others = unit if candidates is None else functional.normalize(candidates.float(), dim=-1)  # [N, D]
        logits = unit[:num_queries] @ others.T * tau.float().exp()  # [2B, N]

        row, column = (torch.arange(size, device=logits.device) for size in logits.shape)
        positive = row ^ 1
        all_notes = torch.ones_like(column, dtype=torch.bool)  # [N]
        has_query = all_notes if masks.has_query is None else masks.has_query
        has_candidate = all_notes if masks.has_candidate is None else masks.has_candidate
        is_query = has_query[:num_queries] & has_candidate[positive]  # [2B]
        comparable = has_candidate & (row[:, None] != column)  # [2B, N]
        is_negative, also_positive = comparable, None
        if masks.false_negatives is not None:
            is_negative = comparable & ~masks.false_negatives[:num_queries]
        if masks.also_positive is not None:
            also_positive = comparable & masks.also_positive[:num_queries]
        return info_nce(logits, positive, is_negative, is_query, also_positive)


def chance_loss(labels: BatchLabels) -> Tensor:
    """The multimodal loss of a model that gives all notes the same embedding: ln(2B - 1) without known positives and
    hard negatives, as Eq. 1 then compares 2B - 1 equal similarities. A scalar.
    """
    has_image = labels.has["image"]
    same, tau = has_image.new_ones(len(has_image), 1, dtype=torch.float32), has_image.new_zeros(1, dtype=torch.float32)
    return contrastive_loss(same, tau, labels.masks("multimodal"), num_paired=labels.num_paired)


def note_losses(
    multimodal: Tensor,
    visual: Tensor | None,
    tau: Tensor,
    alpha: float,
    labels: BatchLabels,
) -> Losses:
    """Eq. 9: L = (L^v + alpha L^m) / (1 + alpha), where L^v (Eq. 8) is Eq. 1 on the visual note embeddings.

    Worked example: L^v = 2, L^m = 1, alpha = 9 gives (2 + 9) / 10 = 1.1. Without visual embeddings L = L^m (Eq. 1).

    Args:
        multimodal, visual: [N, D] each. A note without an image has no visual embedding, so it takes no part in L^v.
        labels: known positives differ by view: they are those of the whole content in L^m, of the image alone in L^v.
    """
    loss_m = contrastive_loss(multimodal, tau, labels.masks("multimodal"), num_paired=labels.num_paired)
    if visual is None:
        return Losses(loss_m, loss_m)
    loss_v = contrastive_loss(visual, tau, labels.masks("image"), num_paired=labels.num_paired)
    return Losses((loss_v + alpha * loss_m) / (1 + alpha), loss_m, loss_v)


def omni_losses(
    views: Mapping[str, Tensor],
    tau: Tensor,
    labels: BatchLabels,
) -> Losses:
    """Omni-Retrieval (Yu et al. 2022, "nine cross-modal and cross-pair retrieval tasks"): the mean of Eq. 1 over all
    ordered pairs (a, b) of inputs, where a note's a searches for its related note's b.

    Worked example: with one-hot views that are equal for related notes and the same for all inputs, each of the nine
    terms is Eq. 1 of one view, and so is their mean.

    Args:
        views: [N, D] for each of "multimodal", "image", "text": the same notes with that input alone.
    """
    terms = {
        (a, b): contrastive_loss(views[a], tau, labels.masks(a, b), views[b], labels.num_paired)
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
    """tau [1] -> [1], at most ln 100, so that the logit scale is at most 100.

    Every rank must hold the whole gradient of tau (see gather.py).
    """
    return _CappedTau.apply(tau)
