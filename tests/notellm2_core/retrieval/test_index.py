"""The FAISS index: saved, verified, searched; its recall against exact search."""

import json
from pathlib import Path

import numpy as np
import pytest

from notellm2_core.embeddings.shards import write_shard
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.index import Index, ann_recall, build_index, make_index


@pytest.fixture(scope="module")
def embeddings() -> Embeddings:
    vectors = np.random.default_rng(0).normal(size=(600, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings(tuple(f"note{i}" for i in range(600)), vectors.astype(np.float32))


@pytest.fixture
def folder(embeddings: Embeddings, tmp_path: Path) -> Path:
    write_shard(tmp_path / "e" / "part-00000.parquet", embeddings.note_ids, embeddings.vectors, {})
    return tmp_path / "e"


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF8,Flat", "PCA8,IVF4,SQ8"])
def test_a_saved_index_finds_the_notes(embeddings: Embeddings, folder: Path, tmp_path: Path, factory: str) -> None:
    metadata = build_index(folder, tmp_path / "index", factory)
    assert (metadata["num_notes"], metadata["dim"], metadata["factory"]) == (600, 16, factory)
    index = Index.load(tmp_path / "index")
    ids, scores = index.search(embeddings.vectors[:50], 3)
    assert ids.shape == scores.shape == (50, 3)
    if factory != "PCA8,IVF4,SQ8":  # lossy: a note need not be its own nearest
        assert ids[:, 0].tolist() == [f"note{i}" for i in range(50)]
        np.testing.assert_allclose(scores[:, 0], 1, rtol=1e-5)
    again, _ = make_index(embeddings, factory).search(embeddings.vectors[:50], 3)
    assert (again == ids).all()  # the same vectors give the same index
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e", "index"]  # no draft is left


def test_ann_recall_is_the_share_of_the_exact_neighbours(embeddings: Embeddings) -> None:
    """Flat finds all neighbours. IVF with one probe finds those in the query's cell; brute force counts as many."""
    assert ann_recall(make_index(embeddings, "Flat"), embeddings, 10) == 100
    index = make_index(embeddings, "IVF16,Flat")
    actual, _ = index.search(embeddings.vectors, 6)
    exact = embeddings.vectors @ embeddings.vectors.T
    np.fill_diagonal(exact, -2)
    hits = 0
    for q in range(600):
        nearest = {f"note{i}" for i in np.argsort(-exact[q])[:5]}
        hits += len(nearest & set([i for i in actual[q] if i != f"note{q}"][:5]))
    assert ann_recall(index, embeddings, 5) == pytest.approx(100 * hits / (600 * 5))
    assert 20 < ann_recall(index, embeddings, 5) < 100


def test_fewer_than_k_neighbours(embeddings: Embeddings) -> None:
    few = Embeddings(embeddings.note_ids[:3], embeddings.vectors[:3])
    ids, scores = make_index(few, "HNSW32").search(few.vectors[:1], 5)
    assert ids[0, 3:].tolist() == [None, None]
    assert np.isneginf(scores[0, 3:]).all()
    assert ann_recall(make_index(few, "Flat"), few, 10) == 100  # k is cut to the two others


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (
            "IVF4096,Flat",
            r"cannot be built from 600 vectors .*Number of training points \(600\).*Flat or HNSW32",
        ),
        ("PQ7", r"is no FAISS factory string for width 16: The dimension"),
        (
            "Nonsense",
            r"is no FAISS factory string for width 16: could not parse index string Nonsense",
        ),
    ],
)
def test_a_factory_that_cannot_be_built_is_named(embeddings: Embeddings, factory: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"index.factory = '{factory}' {reason}"):
        make_index(embeddings, factory)


def test_damage_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    with pytest.raises(ValueError, match="is no index"):
        Index.load(out)
    build_index(folder, out, "Flat")
    with pytest.raises(ValueError, match="do not fit an index of width 16"):
        Index.load(out).search(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="k = 0"):
        Index.load(out).search(np.zeros((1, 16)), 0)
    raw = (out / "index.faiss").read_bytes()
    (out / "index.faiss").write_bytes(raw[:-1] + b"\x55")
    with pytest.raises(ValueError, match="index.faiss does not match its checksum"):
        Index.load(out)
    (out / "index.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="index format 99"):
        Index.load(out)
    build_index(folder, out, "Flat")  # an index is replaced, damaged or not
    Index.load(out)


def test_nothing_foreign_is_overwritten(folder: Path, tmp_path: Path) -> None:
    """A folder with an index.json that is not ours, and a file, are refused."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").touch()
    (site / "thesis.tex").touch()
    for out in (site, site / "thesis.tex"):
        with pytest.raises(ValueError, match="holds files that are no index"):
            build_index(folder, out, "Flat")
    assert sorted(f.name for f in site.iterdir()) == ["index.json", "thesis.tex"]
