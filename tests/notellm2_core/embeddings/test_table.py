"""Embeddings of a user: every type that carries them, and one sentence for everything else."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.embeddings.unit_vectors import require_unit_vectors

VECTORS = [[0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]]


def write(file: Path, ids: Any, vectors: Any) -> Path:
    pq.write_table(pa.table({"note_id": ids, "embedding": vectors, "extra": [None] * len(ids)}), file)
    return file


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 2), pa.list_(pa.float64()), pa.large_list(pa.float32()),
                                  pa.list_(pa.float64(), 2), pa.list_(pa.float32())])  # fmt: skip
@pytest.mark.parametrize("ids", [pa.array([7, 8, 9]), pa.array([7, 8, 9], pa.uint64()), pa.array(["7", "8", "9"]),
                                 pa.array(["7", "8", "9"]).dictionary_encode()])  # fmt: skip
def test_types_of_ids_and_vectors(tmp_path: Path, kind: pa.DataType, ids: pa.Array) -> None:
    table = read_embeddings(write(tmp_path / "e.parquet", ids, pa.array(VECTORS, kind)))
    assert table.note_ids == ("7", "8", "9") and table.vectors.dtype == np.float32
    np.testing.assert_array_equal(table.vectors, np.array(VECTORS, np.float32))


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (pa.array([1.0, 2.0, 3.0]), VECTORS, r"e.parquet, column note_id has type double, not text or whole"),
        (pa.array(["a", None, "c"]), VECTORS, r"e.parquet, column note_id has no id in 1 of 3 rows"),
        (["a", "b", "c"], ["x", "y", "z"], r"e.parquet is not an embedding table: embedding has type string"),
        (["a", "b", "c"], [[1], [1], [1]], r"embedding has type list<\w+: int64>, not lists of floats"),
        (["a", "b", "c"], [[0.6, 0.8], None, [1.0, 0.0]], r"e.parquet: note 'b' has no embedding \(null\)"),
        (["a", "b", "c"], pa.array([[0.6, 0.8], None, [1.0, 0.0]], pa.list_(pa.float32(), 2)),
         r"e.parquet has lists of a fixed size, some of them null"),
        (["a", "b", "c"], [[0.6, 0.8], [1.0], [1.0, 0.0]], r"embedding of note 'b' has width 1, that of 'a' has 2"),
        (["a", "b", "c"], [[0.6, 0.8], [0.0, 0.0], [3.0, 0.0]],
         r"e.parquet: 2 of 3 embeddings are not unit vectors \(that of note 'b' has length 0\); cosines need unit"),
        (["a", "b", "c"], [[0.6, 0.8], [0.6, None], [1.0, 0.0]], r"\(that of note 'b' holds NaN or infinity\)"),
        (["a", "b", "c"], [[0.6, 0.8], [0.6, 0.8], [np.inf, 0.0]], r"\(that of note 'c' holds NaN or infinity\)"),
        (["a", "b", "a"], VECTORS, r"e.parquet: 1 notes occur twice"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, ids: Any, vectors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_embeddings(write(tmp_path / "e.parquet", ids, vectors))


def test_a_part_without_rows_has_no_width(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.array([], pa.string()), pa.array([], pa.list_(pa.float32())))
    write(tmp_path / "b.parquet", ["a"], pa.array([[0.6, 0.8]]))
    assert read_embeddings(tmp_path).vectors.shape == (1, 2)
    assert read_embeddings(tmp_path, {"nobody"}).vectors.shape == (0, 2)
    (tmp_path / "b.parquet").unlink()
    assert read_embeddings(tmp_path).note_ids == ()


def test_lengths_within_the_rounding_of_16_bits() -> None:
    vectors = np.random.default_rng(0).normal(size=(1000, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    require_unit_vectors(vectors.astype(np.float16))
    with pytest.raises(ValueError, match=r"1000 of 1000 embeddings .* \(that of row 0 has length 1.002\)"):
        require_unit_vectors(vectors * 1.002)
    with pytest.raises(ValueError, match="that of note 'x' has length 2"):
        Embeddings(("x",), np.array([[2.0, 0.0]]))
