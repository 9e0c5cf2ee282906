"""The gate of the recall: what passes, what is refused, and what these pairs cannot tell."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from notellm2_core.config.promotion import GateSettings
from notellm2_core.release.verdict import Gate, Measured, Verdict, recall_gate

SETTINGS = GateSettings()


def _week(num_pairs: int, loss: float, seed: int = 0, share: float = 0.25, short_loss: float = 0.0) -> Measured:
    """Three pairs a query; the champion finds half of the targets, a quarter of them by luck."""
    generator = np.random.default_rng(seed)
    champion = generator.random(num_pairs) < 0.5
    challenger = np.where(generator.random(num_pairs) < 0.25, generator.random(num_pairs) < 0.5, champion)
    short = generator.random(num_pairs) < share
    lost = np.where(short & (short_loss > 0), short_loss, loss) / 50
    challenger &= generator.random(num_pairs) >= lost
    queries = np.arange(num_pairs) // 3
    return Measured(challenger.astype(float), champion.astype(float), queries, {"short_query": short})


def _gate(measured: Measured, max_loss: float = 5.0) -> Gate:
    return recall_gate("champion", measured, max_loss, SETTINGS, ["short_query"])


def test_an_equal_model_passes_and_one_that_lost_is_refused() -> None:
    passed, refused = _gate(_week(2340, 0)), _gate(_week(2340, 10))
    assert passed.outcome == "passed" and "would have shown" in passed.why
    assert refused.outcome == "refused" and refused.why.startswith("The release is worse than the champion: R@10 ")
    assert refused.figures["all"]["num_pairs"] == 2340 and refused.figures["max_loss"] == 5


@pytest.mark.parametrize(("num_pairs", "num_queries"), [(299, 299), (600, 99)])
def test_too_few_pairs_or_queries_decide_nothing(num_pairs: int, num_queries: int) -> None:
    hits = np.zeros(num_pairs)
    measured = Measured(hits, hits + 1, np.arange(num_pairs) % num_queries, {})
    gate = recall_gate("champion", measured, 5, SETTINGS)
    assert gate.outcome == "undecided" and f"{num_pairs} pairs of {num_queries} queries are too few" in gate.why


def test_a_small_week_cannot_show_that_little_was_lost() -> None:
    """With 330 pairs the interval is wider than what may be lost: a good model is not refused, and not promoted."""
    outcomes = [_gate(_week(330, 0, seed)).outcome for seed in range(40)]
    assert outcomes.count("undecided") >= 5 and outcomes.count("refused") <= 2


def test_a_slice_that_lost_refuses_a_release_that_is_good_on_the_whole() -> None:
    gate = _gate(_week(2340, 0, short_loss=9))
    assert gate.outcome == "refused" and "on short_query" in gate.why


def test_a_slice_with_too_few_pairs_is_not_judged() -> None:
    gate = _gate(_week(2340, 0, share=0.05, short_loss=30))
    assert gate.outcome == "passed" and "short_query" not in gate.figures


@pytest.mark.slow
def test_error_rates() -> None:
    """Of 200 equal models at most 5 % are refused, and of 200 that lost 5 points at least 90 %, at 2,340 pairs."""
    equal = [_gate(_week(2340, 0, seed)).outcome for seed in range(200)]
    worse = [_gate(_week(2340, 5, seed)).outcome for seed in range(200)]
    assert equal.count("refused") <= 10 and equal.count("passed") >= 190
    assert worse.count("refused") >= 180
    beside_an_anchor = [
        recall_gate("anchor", _week(2340, 0, seed), 2.0, SETTINGS, has_to_show=False).outcome for seed in range(200)
    ]
    assert beside_an_anchor.count("passed") >= 190


def _week_of_shared_targets(seed: int, with_targets: bool) -> Measured:
    """Equal models. The pairs of a target, of which a few have many, are found together, or not."""
    generator, num_pairs, num_targets = np.random.default_rng(seed), 2340, 300
    popularity = np.arange(1, num_targets + 1) ** -0.5
    targets = generator.choice(num_targets, num_pairs, p=popularity / popularity.sum())
    champion, challenger = (generator.random(num_targets)[targets] < 0.5 for _ in range(2))
    queries = np.arange(num_pairs) // 3
    return Measured(challenger.astype(float), champion.astype(float), queries, {}, targets if with_targets else None)


def test_what_happens_to_a_target_happens_to_all_its_pairs() -> None:
    """By queries alone, four in ten equal models would be refused."""

    def refused(with_targets: bool) -> int:
        weeks = (_week_of_shared_targets(seed, with_targets) for seed in range(60))
        return [recall_gate("champion", week, 0, SETTINGS).outcome for week in weeks].count("refused")

    assert refused(with_targets=True) <= 5 and refused(with_targets=False) >= 12


def test_without_shared_targets_they_change_nothing() -> None:
    week = _week(600, 2)
    with_own = replace(week, targets=np.arange(600))
    for name, value in asdict(week.difference("all")).items():
        assert getattr(with_own.difference("all"), name) == pytest.approx(value)


def test_a_slow_boil_is_stopped_by_the_anchor() -> None:
    """Each week loses 0.4 points more, which passes beside the week before. Of 40 such series, the anchor stops nine in
    ten before 2.5 points are lost.
    """
    week_by_week = [_gate(_week(2340, 0.4, seed)).outcome for seed in range(40)]
    assert week_by_week.count("passed") >= 36
    lost = []
    for series in range(40):
        weeks = ((week, _week(2340, 0.4 * week, 100 * series + week)) for week in range(1, 13))
        gates = ((week, recall_gate("anchor", measured, 2.0, SETTINGS, has_to_show=False)) for week, measured in weeks)
        lost.append(0.4 * next((week for week, gate in gates if gate.outcome == "refused"), 99))
    assert sum(points <= 2.5 for points in lost) >= 36, lost


def test_a_verdict_is_its_worst_gate() -> None:
    good, bad, unclear = Gate("a", "passed", "Good."), Gate("b", "refused", "Bad."), Gate("c", "undecided", "Unclear.")
    assert (Verdict((good,)).outcome, Verdict((good,)).why) == ("passed", "All 1 gates passed.")
    assert (Verdict((good, unclear)).outcome, Verdict((good, unclear)).why) == ("undecided", "Unclear.")
    assert (Verdict((unclear, good, bad)).outcome, Verdict((unclear, good, bad)).why) == ("refused", "Bad.")
