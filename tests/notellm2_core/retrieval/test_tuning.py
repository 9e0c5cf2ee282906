"""Recall as the build measures it, against brute force; and the parameters that it chooses."""

import numpy as np
import pytest

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.parameters import format_parameters, parse_parameters, searcher
from notellm2_core.retrieval.tuning import Sample, Samples, ann_recall, measure, tune
from tests.notellm2_core.retrieval.test_index import factory, random_embeddings, recall, unit


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    return random_embeddings(600)


def test_recall_is_the_share_of_the_exact_neighbours(embeddings: Embeddings) -> None:
    """One probe of 16 finds the neighbours in the query's cell; brute force counts as many, for both kinds of queries.

    The held-out queries are as far from their note as its nearest neighbour is.
    """
    index = make_index(embeddings, factory("IVF16,Flat"))
    sample = Sample.draw(index, embeddings.vectors, 5, 600)
    few = parse_parameters("nprobe=1", index.faiss_index)
    found, _ = index.search_rows(sample.queries, 6, params="nprobe=1")
    hits = np.zeros(1200)
    for q, (query, own) in enumerate(zip(sample.queries, sample.own, strict=True)):
        exact = embeddings.vectors @ query
        exact[own] = exact[own] if own < 0 else -2
        nearest = np.argsort(-exact)[:5]
        hits[q] = len({*nearest} & {*[r for r in found[q] if r != own][:5]})
    np.testing.assert_allclose(sample.recalls(5, few), hits.reshape(2, 600) / 5)
    assert 20 < 100 * sample.recall(5, few) < 60
    assert sample.recalls(5, None).min() == 1

    assert sorted(sample.own[:600]) == list(range(600)) and (sample.own[600:] == -1).all()
    np.testing.assert_array_equal(sample.queries[:600], embeddings.vectors[sample.own[:600]])
    distances = np.linalg.norm(embeddings.vectors[:, None] - embeddings.vectors[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    moved = np.linalg.norm(sample.queries[600:] - sample.queries[:600], axis=1)
    ratio = moved / distances.min(axis=1)[sample.own[:600]]
    assert np.quantile(ratio, 0.01) > 0.5 and ratio.max() < 1.2  # shorter only because the sum is normalised


@pytest.mark.parametrize("k", [1, 10, 500])
def test_equal_vectors_are_counted_as_notes(k: int) -> None:
    """300 of 600 notes are equal: k = 10 of them are found by 9 of their own, and brute force agrees for all."""
    vectors = random_embeddings(600).vectors.copy()
    vectors[300:] = vectors[300]
    table = Embeddings(tuple(map(str, range(600))), vectors)
    assert ann_recall(make_index(table, factory("Flat")), vectors, k) == 100
    index = make_index(table, factory("IVF8,Flat"))
    assert measure(index, Samples(index, vectors), [k])["recall"][str(k)] >= 95


def test_the_cheapest_parameters_that_reach_the_target() -> None:
    """More is asked for with k and with the target, and half as many clusters would miss it."""
    table = random_embeddings(2000, 32)
    index = make_index(table, factory("IVF32,Flat"))
    searches = {target: tune(Samples(index, table.vectors), 60, target) for target in (0.5, 0.95)}
    probes = {(t, s.k): (s.parameters or {})["nprobe"] for t, tuned in searches.items() for s in tuned}
    assert probes[0.5, 10] < probes[0.95, 10] <= probes[0.95, 60] <= 32 and probes[0.5, 10] <= probes[0.5, 60]
    sample = Sample.draw(index, table.vectors, 10, 500)
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
    whole = Sample.draw(index, table.vectors, 10, 250).recall(10, None)
    assert search.recall < 60 and search.recall >= 99 * whole
    recall = measure(index, Samples(index, table.vectors), [10])["recall"]["10"]
    assert recall == pytest.approx(search.recall, abs=0.01)


def test_candidates_that_are_ranked_again_do_not_shrink_with_k() -> None:
    """k_factor_rf counts candidates per neighbour: 20 x 10 candidates for 10 neighbours are 200 x 1 for one."""
    table = random_embeddings(4000, 32)
    index = make_index(table, factory("RQ2x4,RFlat"))
    one, ten, hundred = (index.parameters(k) for k in (1, 10, 100))
    assert one is not None and ten is not None and hundred is not None
    assert one["k_factor_rf"] == 10 * ten["k_factor_rf"] > 100
    assert ten["k_factor_rf"] > 2 * hundred["k_factor_rf"]  # tuned: a hundred take fewer each
    assert min(measure(index, Samples(index, table.vectors), [1, 100])["recall"].values()) >= 95


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
        measure(index, Samples(index, few.vectors), [3])


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
