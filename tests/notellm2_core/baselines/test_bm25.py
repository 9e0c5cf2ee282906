"""BM25 rows against a slow reference, the formula itself; popularity and random rows."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.baselines.bm25 import BM25, K1, B, words
from notellm2_core.baselines.popularity import popularity_rows, random_rows
from notellm2_core.notes.note import Note


def slow_bm25(query: list[str], documents: list[list[str]]) -> list[float]:
    """Lucene's BM25: sum over query words of ln(1 + (N - df + .5) / (df + .5)) tf / (tf + k1 (1 - b + b l / mean))."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df, tf = sum(word in d for d in documents), document.count(word)
            if tf:
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + K1 * (1 - B + B * len(document) / mean))
        scores.append(score)
    return scores


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=6), min_size=2, max_size=6))
def test_rows_equal_the_formula(texts: list[list[str]]) -> None:
    notes = {f"n{i}": Note(f"n{i}", " ".join(t[:2]), tuple(t[2:3]), " ".join(t[3:])) for i, t in enumerate(texts)}
    pool = list(notes)[1:]  # the first is a query from outside the pool
    rows = BM25(notes, pool).rows(list(notes))
    expected = [slow_bm25(query, texts[1:]) if any(texts[1:]) else [0.0] * len(pool) for query in texts]
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_words() -> None:
    """Words are lower case and without punctuation, compatibility forms are folded, a Chinese character is a word."""
    assert words("Toy Story (1995), it's_fun!") == ["toy", "story", "1995", "it", "s", "fun"]
    assert words("我爱Python编程。すし") == ["我", "爱", "python", "编", "程", "す", "し"]
    assert words("ＡＢＣ １２ café") == ["abc", "12", "café"]
    assert words(" …!") == []


def test_popularity_is_the_same_for_every_query() -> None:
    rows = popularity_rows({"a": 3, "c": 9}, ["a", "b", "c"])(["q", "r"])
    assert rows.tolist() == [[3, 0, 9], [3, 0, 9]]


def test_random_depends_on_seed_and_query_only() -> None:
    pool = [f"n{i}" for i in range(20)]
    both, alone = random_rows(pool, 1)(["q", "r"]), random_rows(pool, 1)(["r"])
    np.testing.assert_array_equal(both[1], alone[0])
    assert not np.array_equal(both[0], both[1])
    assert not np.array_equal(random_rows(pool, 2)(["r"]), alone)
