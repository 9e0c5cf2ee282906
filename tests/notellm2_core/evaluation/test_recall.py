"""Exact Recall@k by counting equals a reference that sorts, with ties."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.embeddings.table import Embeddings
from notellm2_core.evaluation.pairs import Pairs
from notellm2_core.evaluation.recall import Ranks, cosine_rows, count_ranks, recall_at, target_ranks


def table(vectors: np.ndarray, prefix: str = "n") -> Embeddings:
    vectors = np.asarray(vectors, dtype=np.float32)
    return Embeddings(tuple(f"{prefix}{i}" for i in range(len(vectors))), vectors)


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    vectors = rng.normal(size=(n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_worked_example() -> None:
    """Query q scores the pool q, a, b, c, d as 1, .9, .5, .5, .1; the pool without the query is a, b, c, d.

    Target a: no note is higher, no tie. Target c: a is higher, b ties, so its rank is 2 or 3 with probability 1/2 each:
    expected R@1 = 0, R@2 = 1/2, R@3 = 1. Target d: three notes are higher.
    R@2 over the three pairs: expected (1 + .5 + 0) / 3, at worst 1/3, at best 2/3.
    """
    scores = np.array([[1, 0.9, 0.5, 0.5, 0.1]], dtype=np.float32)
    ranks = count_ranks(lambda _: scores, ["q", "a", "b", "c", "d"], Pairs(("q", "q", "q"), ("a", "c", "d")))
    assert ranks.higher.tolist() == [0, 1, 3]
    assert ranks.ties.tolist() == [0, 1, 0]
    assert ranks.candidates.tolist() == [4, 4, 4]
    assert (ranks.queries.tolist(), ranks.relevance.tolist()) == ([0, 0, 0], [1, 1, 1])
    two = recall_at(ranks, [2])[0]
    assert (two.expected, two.pessimistic, two.optimistic) == pytest.approx((50, 100 / 3, 200 / 3))
    assert recall_at(ranks, [4])[0].expected == 100


def test_the_query_is_no_candidate_even_if_it_ties_with_the_target() -> None:
    """The target is a copy of the query, so both score 1. Without the query nothing ties, and the target is first."""
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    ranks = target_ranks(table(vectors), table(vectors), Pairs(("n0",), ("n1",)))
    assert (ranks.higher.tolist(), ranks.ties.tolist(), ranks.candidates.tolist()) == ([0], [0], [2])


def test_a_query_outside_the_pool_leaves_the_whole_pool() -> None:
    vectors = np.eye(3, dtype=np.float32)
    ranks = target_ranks(table(vectors, "q"), table(vectors), Pairs(("q0",), ("n1",)))
    assert (ranks.higher.tolist(), ranks.ties.tolist(), ranks.candidates.tolist()) == ([1], [1], [3])


@given(st.data())
def test_expected_recall_is_the_mean_over_all_tie_orders(data: st.DataObject) -> None:
    """The reference sorts (stably) every permutation of the candidates and averages if the target is in the top k."""
    n = data.draw(st.integers(2, 5))
    scores = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=np.float32)
    target, k = data.draw(st.integers(1, n - 1)), data.draw(st.integers(1, n))
    ids = [f"n{i}" for i in range(n)]
    recall = recall_at(count_ranks(lambda q: scores[None], ids, Pairs(("n0",), (ids[target],))), [k])[0]
    hits = []
    for order in itertools.permutations(range(1, n)):  # without the query, note 0
        by_score = np.array(order)[np.argsort(-scores[list(order)], kind="stable")]
        hits.append(target in by_score[:k])
    assert recall.expected == pytest.approx(100 * np.mean(hits))
    assert recall.pessimistic == 100 * min(hits)
    assert recall.optimistic == 100 * max(hits)


@given(st.integers(0, 10_000), st.integers(3, 40), st.sampled_from([1, 2, 3, 7, None]))
def test_equals_argsort_for_every_chunk(seed: int, n: int, chunk: int | None) -> None:
    """Duplicated rows make ties. The slow reference computes each pair's scores alone, in fp64 rounded to fp32."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng, n, 8)[rng.integers(0, n, n)]
    pairs = list(dict.fromkeys((int(a), int(b)) for a, b in rng.integers(0, n, (12, 2)) if a != b))
    embeddings = table(vectors)
    named = Pairs(tuple(f"n{a}" for a, _ in pairs), tuple(f"n{b}" for _, b in pairs))
    ranks = target_ranks(embeddings, embeddings, named)
    counted = count_ranks(cosine_rows(embeddings, embeddings), embeddings.note_ids, named, chunk)
    for field in ("higher", "ties", "candidates", "queries", "relevance"):
        np.testing.assert_array_equal(getattr(ranks, field), getattr(counted, field))
    for p, (a, b) in enumerate(pairs):
        others = [i for i in range(n) if i != a]
        scores = np.array([np.float32(vectors[a].astype(float) @ vectors[i].astype(float)) for i in others])
        own = scores[others.index(b)]
        ordered = scores[np.argsort(-scores, kind="stable")]
        assert ranks.higher[p] == np.searchsorted(-ordered, -own, side="left")
        assert ranks.ties[p] == (scores == own).sum() - 1


def test_copies_of_a_vector_tie_at_any_place_in_a_large_block() -> None:
    """A matrix product in fp32 may round equal columns differently; our scores must not."""
    vectors = unit(np.random.default_rng(0), 1003, 64)
    vectors[[5, 500, 1002]] = vectors[1]
    embeddings = table(vectors)
    pairs = Pairs(tuple(f"n{q}" for q in range(100, 140)), ("n500",) * 40)
    assert set(target_ranks(embeddings, embeddings, pairs).ties.tolist()) == {3}


def test_selecting_pairs_and_no_pairs() -> None:
    ranks = Ranks(np.array([0, 5]), np.array([0, 0]), np.array([9, 9]), np.array([0, 1]), np.ones(2))
    assert recall_at(ranks.select(np.array([True, False])), [1])[0].expected == 100
    nothing = recall_at(ranks.select(np.array([False, False])), [1, 10])
    assert [(r.num_pairs, r.expected, r.pessimistic) for r in nothing] == [(0, None, None)] * 2


def test_errors_name_the_count() -> None:
    embeddings = table(np.eye(3))
    with pytest.raises(ValueError, match=r"^2 of 3 pairs have a note without embedding \(the first is 'x'\)"):
        target_ranks(embeddings, embeddings, Pairs(("n0", "x", "n1"), ("n1", "n0", "y")))
    with pytest.raises(ValueError, match="targets of 1 pairs are not in the pool"):
        count_ranks(lambda q: np.zeros((1, 1)), ["a"], Pairs(("q",), ("b",)))
    with pytest.raises(ValueError, match=r"1 pairs relate a note to itself \(the first is 'n0'\), and no query is"):
        target_ranks(embeddings, embeddings, Pairs(("n0",), ("n0",)))
    with pytest.raises(ValueError, match="not all finite"):
        count_ranks(lambda q: np.full((1, 2), np.nan), ["a", "b"], Pairs(("q",), ("b",)))
    with pytest.raises(ValueError, match=r"1 notes come twice in the pool \(the first is 'a'\)"):
        count_ranks(lambda q: np.zeros((1, 2)), ["a", "a"], Pairs(("q",), ("a",)))
    with pytest.raises(ValueError, match="2 pairs are repetitions"):
        count_ranks(lambda q: np.zeros((1, 2)), ["a", "b"], Pairs(("a",) * 3, ("b",) * 3))
    with pytest.raises(ValueError, match="evaluation.ks"):
        recall_at(Ranks(np.zeros(1), np.zeros(1), np.ones(1), np.zeros(1), np.ones(1)), [0])
