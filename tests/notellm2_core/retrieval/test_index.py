"""The FAISS index: saved, verified and searched, with k neighbours at the recall that the build measured."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.shards import EmbeddingKey, plan_shards, write_shard, write_shards
from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.retrieval.build import build_index, make_index
from notellm2_core.retrieval.index import Index


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def random_embeddings(num_notes: int, dim: int = 16, seed: int = 0) -> Embeddings:
    vectors = unit(np.random.default_rng(seed).normal(size=(num_notes, dim)))
    return Embeddings(tuple(f"note{i}" for i in range(num_notes)), vectors)


def factory(name: str, **others: float) -> IndexSettings:
    return IndexSettings(factory=name, **others)


def recall(found: np.ndarray, vectors: np.ndarray, queries: np.ndarray, own: np.ndarray, k: int) -> float:
    """Percent of the exact k nearest notes among `found` rows [Q, k], by brute force; ties with the k-th count."""
    scores = vectors[queries].astype(np.float64) @ vectors.T.astype(np.float64)
    scores[np.arange(len(queries)), own] = -np.inf
    kth = np.sort(scores, axis=1)[:, -k]
    return 100 * float((np.take_along_axis(scores, found, axis=1) >= kth[:, None] - 1e-6).mean())


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    return random_embeddings(600)


@pytest.fixture
def folder(embeddings: Embeddings, tmp_path: Path) -> Path:
    write_shard(tmp_path / "e" / "part-00000.parquet", embeddings.note_ids, embeddings.vectors, {})
    return tmp_path / "e"


@pytest.mark.parametrize("name", ["Flat", "HNSW32", "IVF8,Flat", "PCA8,IVF4,SQ8", "IDMap,HNSW16", "IVF8,SQ4,RFlat"])
def test_a_saved_index_finds_the_notes(embeddings: Embeddings, folder: Path, tmp_path: Path, name: str) -> None:
    metadata = build_index(folder, tmp_path / "index", factory(name))
    assert (metadata["num_notes"], metadata["dim"], metadata["factory"]) == (600, 16, name)
    index = Index.load(tmp_path / "index")
    ids, scores = index.search(embeddings.vectors[:50], 3)
    assert ids.shape == scores.shape == (50, 3)
    if name != "PCA8,IVF4,SQ8":  # lossy: a note need not be its own nearest
        assert ids[:, 0].tolist() == [f"note{i}" for i in range(50)]
        np.testing.assert_allclose(scores[:, 0], 1, rtol=1e-5)
    made = make_index(embeddings, factory(name))
    again, _ = made.search(embeddings.vectors[:50], 3)
    assert (again == ids).all()  # the same vectors give the same index
    assert made.tuned == index.tuned and [search.k for search in index.tuned] == [10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "index"]  # no draft is left


@pytest.mark.parametrize(
    ("name", "num_notes", "k"), [("HNSW32", 5000, 1000), ("HNSW32", 5000, 100), ("IVF8,Flat", 200, 50)]
)
def test_k_neighbours_at_the_target_recall(name: str, num_notes: int, k: int) -> None:
    """Random vectors of width 64, the hardest case: FAISS's defaults find 641 of 1,000, 74 % of 100, and 27 of 50."""
    table = random_embeddings(num_notes, 64)
    index = make_index(table, factory(name))
    queries = np.arange(100)
    rows, scores = index.search_rows(table.vectors[queries], k, own=queries)
    assert rows.shape == (100, k) and (rows >= 0).all()
    assert all(len(set(row)) == k and query not in row for query, row in zip(queries, rows, strict=True))
    assert (np.diff(scores, axis=1) <= 0).all()
    assert recall(rows, table.vectors, queries, queries, k) >= 95


@pytest.mark.parametrize(("share", "group"), [(0.05, 2), (0.2, 1000), (0.4, 2), (0.6, 1000)])
def test_equal_vectors_cost_no_recall(share: float, group: int) -> None:
    """FAISS alone, with 40 % equal vectors: recall@10 of the other notes falls from 97.6 to 63.3."""
    table = random_embeddings(3000, 64, seed=1)
    vectors = table.vectors.copy()
    equal = int(share * 3000)
    vectors[:equal] = vectors[np.arange(equal) // group]
    index = make_index(Embeddings(table.note_ids, vectors), factory("HNSW32"))
    assert index.faiss_index.ntotal == len(np.unique(vectors, axis=0))
    others = np.arange(equal, equal + 300)
    rows, _ = index.search_rows(vectors[others], 10, own=others)
    assert recall(rows, vectors, others, others, 10) >= 95
    some = np.arange(0, equal, 7)  # the others of its group come first, in the order of the table
    rows, scores = index.search_rows(vectors[some], 10, own=some)
    for query, row, score in zip(some, rows, scores, strict=True):
        equals = [r for r in range(query // group * group, min(query // group * group + group, equal)) if r != query]
        assert row[: len(equals)].tolist() == equals[:10]
        np.testing.assert_allclose(score[: len(equals)], 1, rtol=1e-5)


DIRECTIONS = np.concatenate([np.eye(4), -np.eye(4), np.array(list(product([0.5, -0.5], repeat=4)))])


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=60),
    st.sampled_from(["Flat", "HNSW8", "IVF1,Flat"]),
    st.integers(1, 70),
    st.booleans(),
)
def test_equals_brute_force(directions: list[int], name: str, k: int, leaves_out: bool) -> None:
    """Notes in 24 directions, whose inner products are multiples of 1/2: many are equal, and others tie exactly.

    Equal scores are in the order of the table, except that the last ones may be any of those that tie with them.
    """
    vectors = DIRECTIONS[directions].astype(np.float32)
    ids = tuple(f"n{i:02}" for i in range(len(vectors)))
    index = make_index(Embeddings(ids, vectors), factory(name))
    actual, scores = index.search(vectors, k, leave_out=ids if leaves_out else None)
    for query in range(len(vectors)):
        exact = vectors @ vectors[query]
        order = [r for r in np.lexsort((range(len(ids)), -exact)) if not (leaves_out and r == query)][:k]
        found = [ids.index(i) for i in actual[query] if i is not None]
        assert len(set(found)) == len(found) == len(order) and not (leaves_out and query in found)
        assert found == sorted(found, key=lambda row: (-exact[row], row))
        assert [r for r in found if exact[r] > exact[order[-1:]]] == [r for r in order if exact[r] > exact[order[-1:]]]
        np.testing.assert_array_equal(scores[query, : len(found)], exact[order])
        assert np.isneginf(scores[query, len(found) :]).all()


def test_parameters_of_a_search(embeddings: Embeddings) -> None:
    """One cluster of 16 finds only the notes in it; all clusters are an exact search."""
    index = make_index(embeddings, factory("IVF16,Flat"))
    queries = np.arange(600)
    few, _ = index.search_rows(embeddings.vectors, 5, queries, "nprobe=1")
    whole, _ = index.search_rows(embeddings.vectors, 5, queries, "exhaustive")
    all_clusters, _ = index.search_rows(embeddings.vectors, 5, queries, "nprobe=16")
    assert recall(whole, embeddings.vectors, queries, queries, 5) == 100
    assert recall(few, embeddings.vectors, queries, queries, 5) < 95
    np.testing.assert_array_equal(whole, all_clusters)
    with pytest.raises(
        ValueError, match=r"'efSearch=8' is no search parameter of this index: it has nprobe=NUMBER, or"
    ):
        index.search(embeddings.vectors, 5, "efSearch=8")


def test_fewer_than_k_neighbours(embeddings: Embeddings) -> None:
    few = Embeddings(embeddings.note_ids[:3], embeddings.vectors[:3])
    ids, scores = make_index(few, factory("HNSW32")).search(few.vectors[:1], 5)
    assert ids[0, 3:].tolist() == [None, None]
    assert np.isneginf(scores[0, 3:]).all()


def test_no_notes_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"note_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float32(), 2))}),
        tmp_path / "empty.parquet",
    )
    with pytest.raises(ValueError, match=r"empty.parquet: there are no notes to build an index of"):
        build_index(tmp_path / "empty.parquet", tmp_path / "index", factory("HNSW32"))
    assert not (tmp_path / "index").exists()


def test_queries_are_checked(embeddings: Embeddings) -> None:
    index = make_index(embeddings, factory("Flat"))
    for wrong in (np.nan, np.inf, 0.0, 2.0):
        queries = embeddings.vectors[:3].copy()
        queries[1] *= wrong
        with pytest.raises(ValueError, match=r"queries: 1 of 3 embeddings are not unit vectors \(that of note 'b' "):
            index.search(queries, 1, leave_out=["a", "b", "c"])
        with pytest.raises(ValueError, match=r"that of row 1 "):
            index.search(queries, 1)


def test_queries_of_another_model_are_refused(embeddings: Embeddings, tmp_path: Path) -> None:
    """Shards say which model made them; the index keeps it. A model that is unknown on one side is accepted."""

    def export(name: str, weights_id: str | None) -> Embeddings:
        key = EmbeddingKey("all", list, weights_id)
        write_shards(
            plan_shards(tmp_path / name, embeddings.note_ids, key, 400), lambda ids: random_embeddings(len(ids)).vectors
        )
        return read_embeddings(tmp_path / name)

    ours, other, unknown = export("ours", "model-1"), export("other", "model-2"), export("unknown", None)
    assert (ours.weights_id, other.weights_id, unknown.weights_id) == ("model-1", "model-2", None)
    assert build_index(tmp_path / "ours", tmp_path / "index", factory("Flat"))["weights_id"] == "model-1"
    index = Index.load(tmp_path / "index")
    for queries in (ours, unknown):
        assert index.neighbours(queries, 1)[0].shape == (600, 1)
    with pytest.raises(ValueError, match=r"other holds vectors of model model-2, .*index those of model model-1"):
        index.neighbours(other, 1)
    (tmp_path / "other" / "part-00000.parquet").rename(tmp_path / "ours" / "part-00009.parquet")
    with pytest.raises(ValueError, match=r"part-00009.parquet holds vectors of model model-2"):
        read_embeddings(tmp_path / "ours")


def test_damage_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    with pytest.raises(ValueError, match="is no index"):
        Index.load(out)
    build_index(folder, out, factory("Flat"))
    with pytest.raises(ValueError, match="do not fit an index of width 16"):
        Index.load(out).search(np.array([[1.0, 0, 0]]), 1)
    with pytest.raises(ValueError, match="k = 0"):
        Index.load(out).search(np.eye(16)[:1], 0)
    raw = (out / "index.faiss").read_bytes()
    (out / "index.faiss").write_bytes(raw[:-1] + b"\x55")
    with pytest.raises(ValueError, match="index.faiss does not match its checksum"):
        Index.load(out)
    (out / "index.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ValueError, match="index format 1, this code reads 2: build the index again"):
        Index.load(out)
    build_index(folder, out, factory("Flat"))  # an index is replaced, damaged or not
    Index.load(out)


def test_nothing_foreign_is_overwritten(folder: Path, tmp_path: Path) -> None:
    """A folder with an index.json that is not ours, and a file, are refused."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").touch()
    (site / "thesis.tex").touch()
    for out in (site, site / "thesis.tex"):
        with pytest.raises(ValueError, match="holds files that are no index"):
            build_index(folder, out, factory("Flat"))
    assert sorted(f.name for f in site.iterdir()) == ["index.json", "thesis.tex"]
