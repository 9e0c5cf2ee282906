"""Recall as the build measures it, against brute force; and the parameters that it chooses."""

from pathlib import Path

import numpy as np
import pytest

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval import build
from notellm2_core.retrieval.build import make_index, save_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.parameters import format_parameters, parse_parameters, searcher
from notellm2_core.retrieval.tuning import Sample, Samples, ann_recall, measure, tune
from tests.notellm2_core.retrieval.test_index import factory, random_embeddings, recall, unit


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    return random_embeddings(600)


def at_points(index: Index, table: Embeddings) -> np.ndarray:
    """The vectors at the points of an index of the table."""
    return table.vectors[index.points.first_rows]


def test_recall_is_the_share_of_the_exact_neighbours(embeddings: Embeddings) -> None:
    """One probe of 16 finds the neighbours in the query's cell; brute force counts as many, for both kinds."""
    index = make_index(embeddings, factory("IVF16,Flat"))
    held_out = random_embeddings(400, seed=1).vectors
    sample = Sample.draw(index, at_points(index, embeddings), 5, 600, held_out)
    few = parse_parameters("nprobe=1", index.faiss_index)
    found, _ = index.search_rows(sample.queries, 6, params="nprobe=1")
    hits = np.zeros(1000)
    for q, (query, own) in enumerate(zip(sample.queries, sample.own, strict=True)):
        exact = embeddings.vectors @ query
        exact[own] = exact[own] if own < 0 else -2
        nearest = np.argsort(-exact)[:5]
        hits[q] = len({*nearest} & {*[r for r in found[q] if r != own][:5]})
    of_notes, of_held_out = sample.recalls(5, few)
    np.testing.assert_allclose(of_notes, hits[:600] / 5)
    np.testing.assert_allclose(of_held_out, hits[600:] / 5)
    assert sample.recall(5, few) == pytest.approx(min(hits[:600].mean(), hits[600:].mean()) / 5)
    assert 20 < 100 * sample.recall(5, few) < 60
    assert min(recalls.min() for recalls in sample.recalls(5, None)) == 1

    assert sorted(sample.own[:600]) == list(range(600)) and (sample.own[600:] == -1).all()
    np.testing.assert_array_equal(sample.queries[:600], embeddings.vectors[sample.own[:600]])
    np.testing.assert_array_equal(np.sort(sample.queries[600:], axis=0), np.sort(held_out, axis=0))


def test_held_out_queries_are_drawn_from_all(embeddings: Embeddings) -> None:
    """A table in the order of time: few queries, for a large k, are not those of its beginning."""
    index = make_index(embeddings, factory("Flat"))
    held_out = np.eye(250, 16, dtype=np.float32)
    held_out[:, 0] = np.arange(250)
    drawn = Sample.draw(index, at_points(index, embeddings), 10_000, 10, held_out).queries[10:, 0]
    assert len({*drawn}) == 10 and drawn.min() < 60 and drawn.max() > 190


@pytest.mark.parametrize("count", [319, 320, 3000])
def test_what_is_held_out(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One vector in ten, from all over the table, up to 250; where the parameters depend on it."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Recorded(Samples):
        def __init__(self, index: Index, vectors: np.ndarray, held_out: np.ndarray) -> None:
            super().__init__(index, vectors, held_out)
            seen.append((vectors, held_out))

    monkeypatch.setattr(build, "Samples", Recorded)
    table = random_embeddings(count)
    index = make_index(table, factory("HNSW8", search_k=count))
    ((kept, held_out),) = seen
    num = {319: 0, 320: 32, 3000: 250}[count]
    assert held_out.shape == (num, 16) and index.faiss_index.ntotal == count
    assert {*map(bytes, kept)} | {*map(bytes, held_out)} == {*map(bytes, table.vectors)}
    rows = sorted(index.points.first_rows[count - num :])
    np.testing.assert_array_equal(np.sort(held_out, axis=0), np.sort(table.vectors[rows], axis=0))
    assert not num or (rows[0] < 0.1 * count and rows[-1] > 0.9 * count)


def test_all_notes_but_one_are_asked_for(tmp_path: Path) -> None:
    """Also where some are held out: of the others, all count."""
    table = random_embeddings(400)
    metadata = save_index(table, tmp_path / "index", factory("HNSW8", search_k=399))
    assert metadata["recall"] == {"1": 100, "10": metadata["recall"]["10"], "100": 100, "399": 100}


@pytest.mark.parametrize("name", ["HNSW8", "IVF64,Flat", "NSG16"])
def test_vectors_that_the_index_does_not_have_are_found(name: str) -> None:
    """6 dimensions in 32, where a new vector's neighbours are harder to find than a note's: both reach the target."""
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(8000, 6)) @ rng.normal(size=(6, 32)) + 0.1 * rng.normal(size=(8000, 32)))
    table = Embeddings(tuple(map(str, range(6000))), vectors[:6000])
    index = make_index(table, factory(name))
    for queries, own in ((vectors[6000:], np.full(2000, -1)), (table.vectors[:2000], np.arange(2000))):
        exact = np.sort(np.where(np.arange(6000) == own[:, None], -2, queries @ table.vectors.T), axis=1)[:, -10]
        rows, _ = index.search_rows(queries, 10, own)
        found = np.einsum("qd,qkd->qk", queries, table.vectors[rows])
        assert (found >= exact[:, None] - 1e-6).mean() >= 0.95


@pytest.mark.parametrize("name", ["Flat", "HNSW8", "IVF16,Flat", "NSG16", "IDMap,HNSW8", "PCA8,NSG16,RFlat"])
def test_what_was_held_out_is_in_the_index(name: str) -> None:
    """Every note finds itself, and the index has each of the distinct vectors once."""
    vectors = random_embeddings(600).vectors.copy()
    vectors[500:] = vectors[:100]
    index = make_index(Embeddings(tuple(map(str, range(600))), vectors), factory(name))
    assert index.faiss_index.ntotal == 500
    for params in ("exhaustive", None):
        rows, scores = index.search_rows(vectors, 2, params=params)
        np.testing.assert_array_equal(rows[:100], np.stack([np.arange(100), np.arange(500, 600)], axis=1))
        np.testing.assert_array_equal(rows[100:500, 0], np.arange(100, 500))
        np.testing.assert_allclose(scores[:, 0], 1, atol=1e-6)


@pytest.mark.parametrize("k", [1, 10, 500])
def test_equal_vectors_are_counted_as_notes(k: int) -> None:
    """300 of 600 notes are equal: k = 10 of them are found by 9 of their own, and brute force agrees for all."""
    vectors = random_embeddings(600).vectors.copy()
    vectors[300:] = vectors[300]
    table = Embeddings(tuple(map(str, range(600))), vectors)
    assert ann_recall(make_index(table, factory("Flat")), vectors, k) == 100
    index = make_index(table, factory("IVF8,Flat"))
    assert measure(index, Samples(index, vectors[index.points.first_rows]), [k])["recall"][str(k)] >= 95


def test_the_cheapest_parameters_that_reach_the_target() -> None:
    """More is asked for with k and with the target, and half as many clusters would miss it."""
    table = random_embeddings(2000, 32)
    index = make_index(table, factory("IVF32,Flat"))
    searches = {target: tune(Samples(index, at_points(index, table)), 60, target) for target in (0.5, 0.95)}
    probes = {(t, s.k): (s.parameters or {})["nprobe"] for t, tuned in searches.items() for s in tuned}
    assert probes[0.5, 10] < probes[0.95, 10] <= probes[0.95, 60] <= 32 and probes[0.5, 10] <= probes[0.5, 60]
    sample = Sample.draw(index, at_points(index, table), 10, 500)
    assert (
        sample.recall(10, {"nprobe": probes[0.95, 10]}) >= 0.95 > sample.recall(10, {"nprobe": probes[0.95, 10] // 2})
    )


def test_the_parameters_reach_the_target_by_themselves() -> None:
    """256 clusters of two vectors: one finds too few, and a comparison with all would hide it."""
    table, queries = random_embeddings(500), np.arange(500)
    index = make_index(table, factory("IVF256,Flat"))
    (search,) = index.tuned
    assert search.parameters is not None and search.parameters["nprobe"] > 5
    _, points = searcher(index.faiss_index, search.parameters)(table.vectors, 11)
    assert (points >= 0).mean() > 0.95
    rows, _ = index.search_rows(table.vectors, 10, queries, "nprobe=1")
    assert (rows >= 0).all() and recall(rows, table.vectors, queries, queries, 10) == 100  # of all that lack one


def test_a_compressed_index_says_what_it_reaches() -> None:
    """4 bits for 8 numbers: no parameters reach 95 %, so those are kept that lose 1 % at most."""
    table = random_embeddings(2000, 32)
    index = make_index(table, factory("IVF16,PQ4x4"))
    (search,) = index.tuned
    sample = Sample.draw(index, at_points(index, table), 10, 2000)
    assert sample.recall(10, None) > sample.recall(10, search.parameters) >= 0.98 * sample.recall(10, None)
    assert search.recall == pytest.approx(100 * sample.recall(10, search.parameters), abs=2) and search.recall < 60


def test_candidates_that_are_ranked_again_do_not_shrink_with_k() -> None:
    """k_factor_rf counts candidates per neighbour: 20 x 10 candidates for 10 neighbours are 200 x 1 for one."""
    table = random_embeddings(4000, 32)
    index = make_index(table, factory("RQ2x4,RFlat"))
    one, ten, hundred = (index.parameters(k) for k in (1, 10, 100))
    assert one is not None and ten is not None and hundred is not None
    assert one["k_factor_rf"] == 10 * ten["k_factor_rf"] > 100
    assert ten["k_factor_rf"] > 2 * hundred["k_factor_rf"]  # tuned: a hundred take fewer each
    assert min(measure(index, Samples(index, at_points(index, table)), [1, 100])["recall"].values()) >= 95


def test_few_and_single_notes() -> None:
    for count in (1, 2, 3):
        table = random_embeddings(count)
        assert make_index(table, IndexSettings()).tuned == ()
    with pytest.raises(ValueError, match="at least two notes, got 1"):
        ann_recall(make_index(random_embeddings(1), factory("Flat")), random_embeddings(1).vectors, 10)
    few = random_embeddings(3)
    assert ann_recall(make_index(few, factory("Flat")), few.vectors, 10) == 100  # k is cut to the two others
    with pytest.raises(ValueError, match=r"recall@3 needs more than 3 notes"):
        index = make_index(few, factory("Flat"))
        measure(index, Samples(index, at_points(index, few)), [3])


def test_parameters_as_text() -> None:
    table = Embeddings(tuple(map(str, range(400))), unit(np.random.default_rng(0).normal(size=(400, 8))))
    index = make_index(table, factory("IVF4_HNSW4,Flat")).faiss_index
    parameters = {"nprobe": 3, "quantizer_efSearch": 20}
    assert parse_parameters(format_parameters(parameters), index) == parameters
    assert parse_parameters(format_parameters(None), index) is None and format_parameters(None) == "exhaustive"
    assert parse_parameters(format_parameters({}), index) == {}
    for wrong in ("nprobe=0", "nprobe=x", "nprobe", "efSearch=3"):
        with pytest.raises(ValueError, match=f"'{wrong}' is no search parameter of this index: it has nprobe=NUMBER"):
            parse_parameters(wrong, index)
