"""Eq. 1, 8 and 9 equal worked examples, and a loop that follows the paper line by line."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from notellm2_core.config.methods import METHODS, get_method
from notellm2_core.training.objective.losses import (
    MAX_TAU,
    BatchLabels,
    PairMasks,
    capped_tau,
    contrastive_loss,
    info_nce,
    note_losses,
    omni_losses,
)
from notellm2_core.training.objective.views import batch_losses, method_losses
from tests.support.world import tiny_config

TAU = torch.tensor([3.0])


def loop_loss(
    x: Tensor,
    tau: Tensor,
    known: Tensor,
    valid: Tensor,
    y: Tensor | None = None,
    valid_y: Tensor | None = None,
    num_paired: int | None = None,
    count: bool = False,
) -> Tensor:
    """Eq. 1, one row and one column at a time, in fp64; the positive of a row of `x` is in `y`."""
    y, valid_y = (x, valid) if y is None or valid_y is None else (y, valid_y)
    x, y, tau = x.double(), y.double(), tau.double().squeeze()

    def similarity(i: int, j: int) -> Tensor:
        return x[i] @ y[j] / (x[i].norm() * y[j].norm()) * tau.exp()

    losses = []
    for i in range(len(x) if num_paired is None else num_paired):
        p = i + 1 if i % 2 == 0 else i - 1
        if not (valid[i] and valid_y[p]):
            continue
        others = [j for j in range(len(x)) if j == p or (j != i and valid_y[j])]
        related = [j for j in others if j != p and known[i, j]]
        denominator = sum(similarity(i, j).exp() for j in others if count or j not in related)
        positives = [p, *related] if count else [p]
        losses.append(-sum((similarity(i, j).exp() / denominator).log() for j in positives) / len(positives))
    return sum(losses) / len(losses) if losses else 0 * (x.sum() + y.sum() + tau)


def test_worked_example() -> None:
    """Two pairs of equal notes, orthogonal to each other, at scale e^tau = 2: each row is -log(e^2 / (e^2 + 2))."""
    x = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 0.1]])  # lengths do not matter
    tau = torch.tensor([math.log(2)])
    each = math.log(1 + 2 * math.exp(-2))
    assert contrastive_loss(x, tau).item() == pytest.approx(each, abs=1e-6)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[0, 2] = True  # row 0 has one negative left: log(1 + e^-2)
    expected = (math.log(1 + math.exp(-2)) + 3 * each) / 4
    assert contrastive_loss(x, tau, PairMasks(false_negatives=known)).item() == pytest.approx(expected, abs=1e-6)
    # As a second positive it has the score 0, so the mean of the positives is 1: log(e^2 + 2) - 1.
    expected = (math.log(math.exp(2) + 2) - 1 + 3 * each) / 4
    assert contrastive_loss(x, tau, PairMasks(also_positive=known)).item() == pytest.approx(expected, abs=1e-6)
    # A fifth row, equal to the first two, is a negative of all and no query: it adds e^2 to rows 0 and 1, 1 to others.
    five = torch.cat([x, x[:1]])
    expected = (math.log(2 + 2 * math.exp(-2)) + math.log(1 + 3 * math.exp(-2))) / 2
    assert contrastive_loss(five, tau, num_paired=4).item() == pytest.approx(expected, abs=1e-6)


def test_info_nce_worked_example() -> None:
    """Logits 2, 0, 0, with the first as positive: the loss is log(e^2 + 2) - 2 with both others as negatives,
    log(e^2 + 1) - 2 with one, and log(e^2 + 2) - (2 + 0) / 2 if one is a positive too. The third query does not count.
    """
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [5.0, 1.0, -7.0]], requires_grad=True)
    positive, both = torch.tensor([0, 1, 2]), ~torch.eye(3, dtype=torch.bool)
    last = torch.tensor([[False, False, True]] * 3)
    is_query = torch.tensor([True, True, False])
    for is_negative, also_positive, expected in [
        (both, None, math.log(math.exp(2) + 2) - 2),
        (last, None, math.log(math.exp(2) + 1) - 2),
        (both & ~last, last, math.log(math.exp(2) + 2) - 1),
    ]:
        loss = info_nce(logits, positive, is_negative, is_query, also_positive)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[:2].abs().sum() > 0.1 and not gradient[2].any()


@given(
    num_pairs=st.integers(1, 6), dim=st.integers(2, 8), seed=st.integers(0, 10_000), tau=st.floats(-1, 4),
    known_share=st.floats(0, 1), valid_share=st.floats(0, 1), repeats=st.integers(1, 4), more=st.integers(0, 5),
    count=st.booleans(), other=st.booleans(),
)  # fmt: skip
@settings(max_examples=100)
def test_equals_the_loop(
    num_pairs: int, dim: int, seed: int, tau: float, known_share: float, valid_share: float, repeats: int, more: int,
    count: bool, other: bool,
) -> None:  # fmt: skip
    """The loss and all gradients equal the loop's, for any number of pairs, `more` rows after them, `other` candidates
    or the same, any masks, and ties: `repeats` rows in a row share a vector.
    """
    generator = torch.Generator().manual_seed(seed)
    n = 2 * num_pairs + more
    x, y = torch.randn(2, n, dim, generator=generator)[:, torch.arange(n) // repeats]
    known = torch.rand(n, n, generator=generator) < known_share
    valid, valid_y = torch.rand(2, n, generator=generator) < valid_share
    masks = PairMasks(valid, valid_y if other else valid, *((None, known) if count else (known, None)))
    actual, expected = ([t.clone().requires_grad_() for t in (x, y, torch.tensor([tau]))] for _ in range(2))
    loss = contrastive_loss(actual[0], actual[2], masks, actual[1] if other else None, 2 * num_pairs)
    loop = loop_loss(
        expected[0], expected[2], known, valid, *((expected[1], valid_y) if other else ()),
        num_paired=2 * num_pairs, count=count,
    )  # fmt: skip
    assert loss.item() == pytest.approx(loop.item(), rel=1e-4, abs=1e-5)
    ours, theirs = (
        torch.autograd.grad(value, inputs, materialize_grads=True)
        for value, inputs in ((loss, actual), (loop, expected))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert other or not ours[0][~valid].any()  # L_v has no gradient for a note without an image


def test_gradients_by_finite_differences() -> None:
    """Gradients of a row and of tau, with masks, equal finite differences of the loop in fp64, to 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 5, generator=generator)
    known = torch.rand(8, 8, generator=generator) < 0.2
    rows, tau = x.clone().requires_grad_(), torch.tensor([1.0], requires_grad=True)
    contrastive_loss(rows, tau, PairMasks(false_negatives=known)).backward()
    valid = torch.ones(8, dtype=torch.bool)

    def loss_at(x: Tensor, tau: float) -> float:
        return loop_loss(x.double(), torch.tensor(tau, dtype=torch.float64), known, valid).item()

    step = torch.zeros(8, 5, dtype=torch.float64)
    step[3, 2] = 1e-4
    assert rows.grad is not None and tau.grad is not None
    assert rows.grad[3, 2].item() == pytest.approx((loss_at(x + step, 1.0) - loss_at(x - step, 1.0)) / 2e-4, abs=1e-4)
    assert tau.grad.item() == pytest.approx((loss_at(x, 1.0 + 1e-4) - loss_at(x, 1.0 - 1e-4)) / 2e-4, abs=1e-4)


def test_no_query_left_gives_zero_and_no_nan() -> None:
    rows = torch.zeros(4, 3, requires_grad=True)
    has = torch.tensor([True, False, False, True])
    loss = contrastive_loss(rows, TAU, PairMasks(has, has))
    loss.backward()
    assert loss.item() == 0 and rows.grad is not None and (rows.grad == 0).all()


def test_half_precision_is_computed_in_fp32() -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(x, TAU)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(contrastive_loss(x.float(), TAU).item(), abs=1e-6)


def test_odd_number_of_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        contrastive_loss(torch.ones(3, 2), TAU)


def test_eq_8_and_9_worked_example() -> None:
    """Scale e^tau = 2. Multimodal: (1,0), (1,0), (0,1), (0,1), each row log(1 + 2 e^-2) = 0.2395 (see above).

    Visual: all rows are equal, so every score is 2 and each row has 3 equal candidates: log 3 = 1.0986. If row 3 has no
    image, rows 0 and 1 have two candidates, log 2 = 0.6931, row 2 has no positive and row 3 is no query.
    Eq. 9 with alpha = 3: (1.0986 + 3 x 0.2395) / 4 = 0.4543, and (0.6931 + 3 x 0.2395) / 4 = 0.3529.
    """
    m, v = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.ones(4, 2)
    tau = torch.tensor([math.log(2)])
    losses = note_losses(m, v, tau, 3.0, BatchLabels({}))
    assert losses.visual is not None and losses.visual.item() == pytest.approx(1.0986, abs=1e-4)
    assert (losses.multimodal.item(), losses.total.item()) == pytest.approx((0.2395, 0.4543), abs=1e-4)
    losses = note_losses(m, v, tau, 3.0, BatchLabels({"image": torch.tensor([True, True, True, False])}))
    assert losses.visual is not None and losses.visual.item() == pytest.approx(0.6931, abs=1e-4)
    assert losses.total.item() == pytest.approx(0.3529, abs=1e-4)


@given(
    num_pairs=st.integers(1, 5), seed=st.integers(0, 10_000), share=st.floats(0, 1), repeats=st.integers(1, 3),
    alpha=st.floats(0, 20), count=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_eq_8_and_9_equal_the_loop(
    num_pairs: int, seed: int, share: float, repeats: int, alpha: float, count: bool
) -> None:
    """The losses equal the loop's for any number of pairs, any alpha, ties, masks per view, and notes without image."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * num_pairs
    m, v = torch.randn(2, n, 4, generator=generator)[:, torch.arange(n) // repeats]
    known_m, known_v = torch.rand(2, n, n, generator=generator) < share
    has_image = torch.rand(n, generator=generator) < 0.7
    labels = BatchLabels({"image": has_image}, {"multimodal": known_m, "image": known_v}, count_known=count)
    losses = note_losses(m, v, TAU, alpha, labels)
    loss_m = loop_loss(m, TAU, known_m, torch.ones(n, dtype=torch.bool), count=count).item()
    loss_v = loop_loss(v, TAU, known_v, has_image, count=count).item()
    assert losses.visual is not None and losses.visual.item() == pytest.approx(loss_v, rel=1e-4, abs=1e-5)
    assert losses.total.item() == pytest.approx((loss_v + alpha * loss_m) / (1 + alpha), rel=1e-4, abs=1e-5)
    alone = note_losses(m, None, TAU, alpha, labels)
    assert alone.visual is None and alone.total.item() == pytest.approx(loss_m, rel=1e-4, abs=1e-5)


@given(
    num_pairs=st.integers(1, 5), seed=st.integers(0, 10_000), share=st.floats(0, 1), repeats=st.integers(1, 3),
    count=st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_omni_retrieval_equals_nine_loops(num_pairs: int, seed: int, share: float, repeats: int, count: bool) -> None:
    """The loss is the mean of the nine directed losses. `repeats` rows share a vector, so scores tie."""
    generator = torch.Generator().manual_seed(seed)
    n, kinds = 2 * num_pairs, ("multimodal", "image", "text")
    x = {k: torch.randn(n, 4, generator=generator)[torch.arange(n) // repeats] for k in kinds}
    known = {k: torch.rand(n, n, generator=generator) < share for k in kinds}
    has = {k: torch.rand(n, generator=generator) < 0.7 for k in kinds[1:]}
    valid = {"multimodal": torch.ones(n, dtype=torch.bool), **has}
    losses = omni_losses(x, TAU, BatchLabels(has, known, count_known=count))
    terms = {
        (a, b): loop_loss(x[a], TAU, known[a if a == b else "multimodal"], valid[a], x[b], valid[b], count=count).item()
        for a in kinds
        for b in kinds
    }
    assert losses.total.item() == pytest.approx(sum(terms.values()) / 9, rel=1e-4, abs=1e-5)
    assert losses.multimodal.item() == pytest.approx(terms["multimodal", "multimodal"], rel=1e-4, abs=1e-5)
    assert losses.cross is not None
    rest = sum(terms.values()) - terms["multimodal", "multimodal"]
    assert losses.cross.item() == pytest.approx(rest / 8, rel=1e-4, abs=1e-5)


def test_omni_retrieval_worked_example() -> None:
    """Two pairs with equal inputs, (1,0), (1,0), (0,1), (0,1) at scale 2: each of the nine terms is log(1 + 2/e^2).

    Without row 3's image: if images are the candidates, rows 0 and 1 have one negative less, log(1 + 1/e^2), row 2 has
    no positive, and row 3 has as many candidates as before. If images are the queries, row 3 is none. So image to image
    is log(1 + 1/e^2), text or whole to image is (2 log(1 + 1/e^2) + log(1 + 2/e^2)) / 3, and all others are
    log(1 + 2/e^2).
    """
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    tau = torch.tensor([math.log(2)])
    views = dict.fromkeys(("multimodal", "image", "text"), x)
    one, two = math.log(1 + math.exp(-2)), math.log(1 + 2 * math.exp(-2))
    assert omni_losses(views, tau, BatchLabels({})).total.item() == pytest.approx(two, abs=1e-6)
    losses = omni_losses(views, tau, BatchLabels({"image": torch.tensor([True, True, True, False])}))
    expected = (one + 2 * (2 * one + two) / 3 + 6 * two) / 9
    assert losses.total.item() == pytest.approx(expected, abs=1e-6)


@given(num_pairs=st.integers(1, 6), seed=st.integers(0, 10_000), method=st.sampled_from(sorted(METHODS)))
@settings(max_examples=40)
def test_the_order_of_the_pairs_does_not_matter(num_pairs: int, seed: int, method: str) -> None:
    """The loss of every method stays if pairs, and the two notes of a pair, change places."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * num_pairs
    views = {k: torch.randn(n, 4, generator=generator) for k in ("multimodal", "visual", "image", "text")}
    compared = {*get_method(method).inputs, *(name for name in METHODS[method].losses if name == "visual")}
    views = {k: v for k, v in views.items() if k in compared}
    known = {k: torch.rand(n, n, generator=generator) < 0.2 for k in ("multimodal", "image", "text")}
    has = {k: torch.rand(n, generator=generator) < 0.8 for k in ("image", "text")}
    order = torch.randperm(num_pairs, generator=generator)
    order = torch.stack([2 * order + 1, 2 * order], dim=1).flatten()  # both notes of a pair change places
    reordered = BatchLabels({k: v[order] for k, v in has.items()}, {k: v[order][:, order] for k, v in known.items()})
    before = method_losses(METHODS[method], views, TAU, 9.0, BatchLabels(has, known), (2,))
    after = method_losses(METHODS[method], {k: v[order] for k, v in views.items()}, TAU, 9.0, reordered, (2,))
    assert after.total.item() == pytest.approx(before.total.item(), rel=1e-4, abs=1e-6)


def test_matryoshka_is_the_mean_over_the_lengths() -> None:
    """With lengths 4, 2 and 1 of D = 4 the loss is the mean of three, each on embeddings cut and normalised again."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    labels = BatchLabels({"image": torch.ones(8, dtype=torch.bool)}, None)
    losses = method_losses(METHODS["basic"], {"multimodal": x}, TAU, 9.0, labels, dims=(2, 1))
    each = [contrastive_loss(x[:, :d], TAU).item() for d in (4, 2, 1)]
    assert losses.total.item() == pytest.approx(sum(each) / 3, rel=1e-6)
    assert losses.multimodal.item() == pytest.approx(each[0], rel=1e-6)


def test_centred_embeddings_have_no_common_direction() -> None:
    """With training.centre_embeddings, the losses are those of each view less its mean, so what all notes share changes
    no loss, and no gradient points along it. Without, equal embeddings are chance: ln(2B - 1).
    """
    views = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    labels = BatchLabels({"image": torch.ones(8, dtype=torch.bool)}, None)
    config = tiny_config({"centre_embeddings": True}, method="notellm2", projection_dim=6)
    losses = batch_losses(config, views, TAU, labels)
    m, v = (x - x.mean(dim=0) for x in views.chunk(2, dim=1))
    by_hand = note_losses(m, v, TAU, config.training.alpha, labels)
    assert losses.total.item() == pytest.approx(by_hand.total.item(), rel=1e-6)

    shared = (1000 * torch.randn(12, generator=torch.Generator().manual_seed(1))).requires_grad_()
    moved = batch_losses(config, views + shared, TAU, labels)
    assert moved.total.item() == pytest.approx(by_hand.total.item(), rel=1e-3)
    (gradient,) = torch.autograd.grad(moved.total, shared)
    assert gradient.abs().max() < 1e-5
    paper = batch_losses(tiny_config(method="notellm2", projection_dim=6), views + shared, TAU, labels)
    assert paper.multimodal.item() == pytest.approx(math.log(7), rel=1e-2)


def test_notes_without_an_image_take_no_part_in_the_centred_visual_loss() -> None:
    """Their n_v is one vector. Wherever it lies, L^v and its gradients are those of the four notes with an image."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(8, 12, generator=generator)
    has_image = torch.tensor([True] * 4 + [False] * 4)
    config = tiny_config({"centre_embeddings": True}, method="notellm2", projection_dim=6)
    alone = batch_losses(config, views[:4], TAU, BatchLabels({"image": has_image[:4]}))
    for place in (0.0, 50.0):
        views[4:, 6:] = place
        rows = views.clone().requires_grad_()
        losses = batch_losses(config, rows, TAU, BatchLabels({"image": has_image}))
        assert losses.visual is not None and alone.visual is not None
        assert losses.visual.item() == pytest.approx(alone.visual.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(losses.visual, rows)
        assert gradient[4:].abs().max() == 0 and gradient[:4, 6:].abs().max() > 1e-3
    nobody = batch_losses(config, views, TAU, BatchLabels({"image": torch.zeros(8, dtype=torch.bool)}))
    assert nobody.visual is not None and nobody.visual.item() == 0


@pytest.mark.parametrize(("tau", "pull", "expected"), [(3.0, -1.0, -1.0), (5.0, -1.0, 0.0), (5.0, 1.0, 1.0)])
def test_tau_is_capped_at_a_scale_of_100(tau: float, pull: float, expected: float) -> None:
    """Below ln 100 tau does not change. Above, its value is ln 100, and only a gradient that lowers tau passes."""
    weight = torch.tensor([tau], requires_grad=True)
    capped = capped_tau(weight)
    assert capped.item() == pytest.approx(min(tau, MAX_TAU))
    (capped * pull).backward()
    assert weight.grad is not None and weight.grad.item() == expected
