"""The table of each note's neighbours: exact, or by the index at a recall of 0.99."""

from pathlib import Path

import numpy as np
import pytest

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.retrieval.build import make_index
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.neighbour_table import NeighbourTable, write_neighbours


def index_of(vectors: np.ndarray, factory: str = "Flat") -> Index:
    ids = tuple(f"n{i:05d}" for i in range(len(vectors)))
    return make_index(Embeddings(ids, vectors, Path("x")), IndexSettings(factory=factory))


def unit(num: int, dim: int = 6) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_rows_are_the_exact_neighbours_without_the_note_itself(tmp_path: Path) -> None:
    vectors = unit(300)
    vectors[7] = vectors[5]  # equal vectors are each other's nearest
    index = index_of(vectors)
    assert write_neighbours(index, vectors, tmp_path, width=10) == {"width": 10, "recall": 100.0}
    table = NeighbourTable.load(tmp_path, index)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    expected = -np.sort(-scores, axis=1)[:, :10]
    np.testing.assert_allclose(table.scores, expected, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores, table.rows.astype(int), axis=1), expected, atol=1e-6)
    assert table.rows[7, 0] == 5 and table.rows[5, 0] == 7


def test_beyond_a_number_of_notes_the_index_is_searched(tmp_path: Path) -> None:
    vectors = unit(3000)
    index = index_of(vectors, "HNSW16")
    made = write_neighbours(index, vectors, tmp_path, width=20, exact_notes=100)
    assert 99 <= made["recall"] <= 100
    table = NeighbourTable.load(tmp_path, index)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    kth = -np.sort(-scores, axis=1)[:, 19]
    assert (table.scores >= kth[:, None] - 1e-6).mean() >= 0.985


def test_fewer_notes_than_the_width(tmp_path: Path) -> None:
    vectors = unit(3)
    index = index_of(vectors)
    assert write_neighbours(index, vectors, tmp_path)["width"] == 2
    assert (NeighbourTable.load(tmp_path, index).rows >= 0).all()
    other = index_of(unit(4))
    with pytest.raises(ValueError, match="is not the table of an index of 4 notes of width 6"):
        NeighbourTable.load(tmp_path, other)


def test_a_single_note_has_no_neighbour(tmp_path: Path) -> None:
    index = index_of(unit(1))
    write_neighbours(index, unit(1), tmp_path)
    assert NeighbourTable.load(tmp_path, index).rows.tolist() == [[-1]]
