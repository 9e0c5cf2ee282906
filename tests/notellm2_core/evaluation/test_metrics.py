"""The metrics with ties equal the mean over all orders of the ties; without ties they equal trec_eval and ranx."""

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.evaluation.metrics import _reciprocal_of_first, each_pair, ranking_metrics
from notellm2_core.evaluation.pairs import Pairs
from notellm2_core.evaluation.recall import Ranks, count_ranks, recall_at

Scores = Mapping[str, Mapping[str, float]]  # query -> candidate -> score
Qrels = Mapping[str, Mapping[str, float]]  # query -> target -> relevance


def ranks_of(scores: Scores, qrels: Qrels) -> Ranks:
    pool = list(next(iter(scores.values())))
    pairs = [(query, target, grade) for query, targets in qrels.items() for target, grade in targets.items()]
    query_ids, target_ids, relevance = zip(*pairs, strict=True)
    return count_ranks(
        lambda queries: np.array([[scores[q][n] for n in pool] for q in queries]),
        pool,
        Pairs(query_ids, target_ids, relevance),
    )


def of_one_order(order: Sequence[str], relevance: Mapping[str, float], k: int) -> dict[str, float]:
    """The definitions of trec_eval, literally, for one query."""
    hits = [rank for rank, note in enumerate(order, start=1) if note in relevance]
    top = [rank for rank in hits if rank <= k]
    dcg = sum(relevance[order[rank - 1]] / math.log2(rank + 1) for rank in top)
    best = sum(g / math.log2(rank + 1) for rank, g in enumerate(sorted(relevance.values(), reverse=True)[:k], start=1))
    return {
        "mrr": 1 / hits[0],
        f"recall@{k}": len(top) / len(relevance),
        f"hit_rate@{k}": float(bool(top)),
        f"mrr@{k}": 1 / top[0] if top else 0.0,
        f"ndcg@{k}": dcg / best,
        f"map@{k}": sum(sum(other <= rank for other in hits) / rank for rank in top) / len(relevance),
    }


def over_all_orders(scores: Mapping[str, float], relevance: Mapping[str, float], k: int) -> dict[str, float]:
    """The mean of `of_one_order` over all orders of notes with equal scores."""
    groups = [[n for n, s in scores.items() if s == score] for score in sorted(set(scores.values()), reverse=True)]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    values = [of_one_order([*itertools.chain(*order)], relevance, k) for order in orders]
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}


def test_worked_example() -> None:
    """The query scores a, b, c, d, e as 9, 5, 5, 5, 1. Its targets: b and c, of relevance 1 and 2. h = 1, n = 3, m = 2.

    The ranks of b and c are two of 2, 3, 4: (2, 3), (2, 4) or (3, 4), each with probability 1/3.
    MRR: the first is at 2, 2 or 3: (1/2 + 1/2 + 1/3) / 3 = 4/9.
    Within rank 2: one target in two of three cases, so hit rate@2 = 2/3 and Recall@2 = 1/3.
    MRR@2 = 2/3 * 1/2 = 1/3, and MAP@2 = half of it: the precision at rank 2 is 1/2, and there are 2 targets.
    MAP@5: the mean of (1/2 + 2/3) / 2, (1/2 + 2/4) / 2 and (1/3 + 2/4) / 2 = (7/12 + 6/12 + 5/12) / 3 = 1/2.
    nDCG@2: rank 2 has b, c, or no target with probability 1/3 each: DCG = (1 + 2) / 3 / log2(3); the best order has
    2 + 1 / log2(3).
    """
    scores = {"q": dict(zip("abcde", [9, 5, 5, 5, 1], strict=True))}
    metrics = ranking_metrics(ranks_of(scores, {"q": {"b": 1, "c": 2}}), [2, 5])
    assert metrics["mrr"] == metrics["mrr@5"] == pytest.approx(400 / 9)
    assert (metrics["hit_rate@2"], metrics["recall@2"]) == (pytest.approx(200 / 3), pytest.approx(100 / 3))
    assert (metrics["mrr@2"], metrics["map@2"]) == (pytest.approx(100 / 3), pytest.approx(100 / 6))
    assert metrics["map@5"] == pytest.approx(50)
    assert metrics["ndcg@2"] == pytest.approx(100 / math.log2(3) / (2 + 1 / math.log2(3)))
    assert metrics["recall@5"] == metrics["hit_rate@5"] == 100


def test_the_mean_is_over_queries_or_over_pairs() -> None:
    """Query p finds its one target at rank 1; query q finds its three at ranks 2, 3 and 4.

    Per query: MRR = (1 + 1/2) / 2, Recall@2 = (1 + 1/3) / 2. Per pair: (1 + 1/2 + 1/3 + 1/4) / 4, and 2 of 4.
    """
    scores = {q: dict(zip("abcd", [4, 3, 2, 1], strict=True)) for q in "pq"}
    ranks = ranks_of(scores, {"q": {"b": 1, "c": 1, "d": 1}, "p": {"a": 1}})
    per_query, per_pair = ranking_metrics(ranks, [2]), ranking_metrics(each_pair(ranks), [2])
    assert (per_query["mrr"], per_query["recall@2"]) == (pytest.approx(75), pytest.approx(200 / 3))
    assert (per_pair["mrr"], per_pair["recall@2"]) == (pytest.approx(100 * 25 / 48), pytest.approx(50))


NOTES = 6


@given(st.data())
def test_equals_the_mean_over_all_orders_of_the_ties(data: st.DataObject) -> None:
    """Two queries over at most six notes with at most three scores: up to 720 orders each."""
    pool = [f"n{i}" for i in range(data.draw(st.integers(1, NOTES)))]
    k = data.draw(st.integers(1, NOTES + 1))
    scores = {q: {n: data.draw(st.integers(0, 2)) for n in pool} for q in "pq"}
    targets = st.dictionaries(st.sampled_from(pool), st.sampled_from([1, 2, 0.5]), min_size=1)
    qrels = {q: data.draw(targets) for q in "pq"}
    ranks = ranks_of(scores, qrels)
    expected = [over_all_orders(scores[q], qrels[q], k) for q in "pq"]
    means = {name: pytest.approx(100 * np.mean([e[name] for e in expected]), abs=1e-9) for name in expected[0]}
    assert ranking_metrics(ranks, [k]) == means
    pairs = [over_all_orders(scores[q], {target: grade}, k) for q in "pq" for target, grade in qrels[q].items()]
    means = {name: pytest.approx(100 * np.mean([e[name] for e in pairs]), abs=1e-9) for name in pairs[0]}
    assert ranking_metrics(each_pair(ranks), [k]) == means


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_equals_a_sort_without_ties(seed: int, num_notes: int) -> None:
    rng = np.random.default_rng(seed)
    pool = [f"n{i}" for i in range(num_notes)]
    scores = {f"q{q}": dict(zip(pool, rng.permutation(num_notes), strict=True)) for q in range(4)}
    qrels: dict[str, dict[str, float]] = {
        q: {pool[t]: float(rng.integers(1, 4)) for t in rng.integers(0, num_notes, rng.integers(1, 6))} for q in scores
    }
    for k in (1, 3, 10, 100):
        orders = {q: sorted(pool, key=scores[q].__getitem__, reverse=True) for q in scores}
        values = [of_one_order(orders[q], qrels[q], k) for q in scores]
        means = {name: pytest.approx(100 * np.mean([v[name] for v in values]), abs=1e-9) for name in values[0]}
        assert ranking_metrics(ranks_of(scores, qrels), [k]) == means


@given(st.integers(0, 50), st.integers(1, 60), st.data())
def test_the_first_of_many_tied_targets(higher: int, size: int, data: st.DataObject) -> None:
    """In exact fractions: the first of m targets is at place i of n in C(n - i, m - 1) of C(n, m) choices of places."""
    targets, within = data.draw(st.integers(1, size)), data.draw(st.integers(1, size))
    exact = sum(
        Fraction(math.comb(size - i, targets - 1), math.comb(size, targets)) / (higher + i)
        for i in range(1, within + 1)
    )
    assert _reciprocal_of_first(higher, size, targets, within) == pytest.approx(float(exact), rel=1e-12)


def test_equals_trec_eval_and_ranx() -> None:
    """Scores without ties, graded relevance. The numbers are those of ranx 0.3.21; trec_eval prints the same.

    trec_eval 9 through pytrec-eval-terrier 0.5.11: recip_rank, recall, success, map_cut, ndcg_cut; it has no mrr@k.
    """
    scores = {f"q{q}": {f"n{n}": (n * 17 + q * 7) ** 2 % 1009 for n in range(40)} for q in range(5)}
    qrels = {f"q{q}": {f"n{(q * 11 + j * j * 3) % 40}": 1 + (q + j) % 3 for j in range(q + 2)} for q in range(5)}
    assert ranking_metrics(ranks_of(scores, qrels), [1, 5, 10, 30]) == {
        name: pytest.approx(value, abs=1e-7)
        for name, value in {
            "mrr": 25.587662338,
            "recall@1": 6.666666667, "hit_rate@1": 20, "mrr@1": 20, "ndcg@1": 6.666666667, "map@1": 6.666666667,
            "recall@5": 6.666666667, "hit_rate@5": 20, "mrr@5": 20, "ndcg@5": 4.200039915, "map@5": 6.666666667,
            "recall@10": 10.666666667, "hit_rate@10": 40, "mrr@10": 22, "ndcg@10": 5.151006640, "map@10": 7.066666667,
            "recall@30": 66.333333333, "hit_rate@30": 100, "mrr@30": 25.587662338, "ndcg@30": 25.596303079,
            "map@30": 11.821867445,
        }.items()
    }  # fmt: skip


@given(st.integers(0, 10_000))
def test_per_pair_recall_is_the_papers(seed: int) -> None:
    """To the bit; and of one target, hit rate@k is Recall@k, and MAP@k is MRR@k."""
    rng = np.random.default_rng(seed)
    scores = {q: {f"n{n}": int(rng.integers(0, 4)) for n in range(12)} for q in "pqr"}
    qrels = {q: {f"n{n}": float(rng.integers(1, 3)) for n in rng.permutation(12)[:4]} for q in scores}
    ranks = ranks_of(scores, qrels)
    metrics = ranking_metrics(each_pair(ranks), [1, 3])
    for recall in recall_at(ranks, [1, 3]):
        assert metrics[f"recall@{recall.k}"] == recall.expected
        assert metrics[f"hit_rate@{recall.k}"] == pytest.approx(recall.expected)
        assert metrics[f"map@{recall.k}"] == pytest.approx(metrics[f"mrr@{recall.k}"])


def test_no_pairs_and_no_k() -> None:
    ranks = ranks_of({"q": {"a": 1, "b": 0}}, {"q": {"a": 1}})
    assert set(ranking_metrics(ranks.select(np.array([False])), [1]).values()) == {None}
    assert [*ranking_metrics(ranks.select(np.array([False])), [1, 2])] == [*ranking_metrics(ranks, [1, 2])]
    with pytest.raises(ValueError, match="evaluation.ks"):
        ranking_metrics(ranks, [0])
