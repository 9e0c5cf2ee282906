"""The paired bootstrap by queries: worked examples, its error rates, and Holm's procedure."""

import numpy as np
import pytest

from notellm2_core.evaluation.recall import Ranks
from notellm2_core.release.comparison import CONFIDENCE, NUM_SAMPLES, compare, hits, significant


def test_hits_are_the_probability_of_the_top_k() -> None:
    """Ranks 1; 3 to 4 (one tie) at k = 3: half of the orders; 9."""
    ranks = Ranks(np.array([0, 2, 8]), np.array([0, 1, 0]), np.full(3, 20), np.arange(3), np.ones(3))
    assert hits(ranks, 3).tolist() == [1.0, 0.5, 0.0]


def test_the_difference_is_that_of_the_means() -> None:
    found = compare(np.array([1, 1, 0, 0.5]), np.array([1, 0, 0, 0]), np.array([7, 7, 8, 9]), "some")
    assert (found.slice, found.num_pairs, found.num_queries) == ("some", 4, 3)
    assert (found.challenger, found.rival, found.points) == (62.5, 25.0, 37.5)
    assert found.lower <= found.points <= found.upper and found.p_loss == 1.0


def test_equal_models_differ_by_nothing_and_a_loss_everywhere_is_certain() -> None:
    queries = np.repeat(np.arange(50), 2)
    same = compare(np.ones(100), np.ones(100), queries)
    assert (same.lower, same.upper, same.p_loss, same.least_loss) == (0, 0, 1, 0)
    lost = compare(np.zeros(100), np.ones(100), queries)
    assert (lost.lower, lost.upper) == (-100, -100) and lost.p_loss == 1 / (1 + NUM_SAMPLES)
    with pytest.raises(ValueError, match="slice all has no pairs"):
        compare(np.zeros(0), np.zeros(0), np.zeros(0))


def test_whole_queries_are_resampled() -> None:
    """One query holds half of the pairs: the interval is far wider than that of independent pairs."""
    queries = np.concatenate([np.zeros(100), np.arange(1, 101)])
    gain = np.concatenate([np.ones(100), np.zeros(100)])
    clustered, independent = (compare(gain, np.zeros(200), q) for q in (queries, np.arange(200)))
    assert independent.points == clustered.points == 50
    assert clustered.upper - clustered.lower > 3 * (independent.upper - independent.lower)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 weeks of two models with the same true recall, 300 pairs of 100 queries of different difficulty."""
    below = significant_losses = 0
    for week in range(400):
        generator = np.random.default_rng(week)
        queries = np.repeat(np.arange(100), 3)
        difficulty = np.repeat(generator.beta(2, 2, 100), 3)
        challenger, rival = (generator.random(300) < difficulty for _ in range(2))
        found = compare(challenger.astype(float), rival.astype(float), queries)
        below += found.lower > 0
        significant_losses += bool(significant({"all": found.p_loss}))
    expected = 400 * (1 - CONFIDENCE)
    assert below <= 2.2 * expected and significant_losses <= 2.2 * expected


def test_the_least_loss_is_shown_in_four_of_five_weeks() -> None:
    def week(number: int, loss: float) -> tuple[float, bool]:
        generator = np.random.default_rng(number)
        queries = np.repeat(np.arange(400), 3)
        rival = generator.random(1200) < 0.5
        redrawn = np.where(generator.random(1200) < 0.25, generator.random(1200) < 0.5, rival)
        challenger = redrawn & (generator.random(1200) >= 2 * loss / 100)  # half of the pairs are hits
        found = compare(challenger.astype(float), rival.astype(float), queries)
        return found.least_loss, bool(significant({"all": found.p_loss}))

    least = np.mean([week(number, 0)[0] for number in range(20)])
    shown = np.mean([week(number, float(least))[1] for number in range(200)])
    assert 0.7 <= shown <= 0.92


def test_holm() -> None:
    """Three hypotheses at 2.5 %: thresholds 0.00833, 0.0125, 0.025; the first one that misses its own ends it."""
    assert significant({"a": 0.008, "b": 0.012, "c": 0.02}) == {"a", "b", "c"}
    assert significant({"a": 0.008, "b": 0.013, "c": 0.013}) == {"a"}
    assert significant({"a": 0.009, "b": 0.009, "c": 0.009}) == set()
    assert significant({}) == set()
