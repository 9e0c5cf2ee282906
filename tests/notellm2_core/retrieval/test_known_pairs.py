"""Known positives and near-duplicates: the notes that are no negatives of each other."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.retrieval.known_pairs import read_known_pairs


def _write(path: Path, columns: dict[str, list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train: c -> a, a -> d; validation: y -> b. b is a near-duplicate of d; b and y are held out."""
    _write(tmp_path / "pairs" / "train" / "0.parquet", {"query_id": ["c"], "target_id": ["a"]})
    _write(tmp_path / "pairs" / "train" / "1.parquet", {"query_id": ["a"], "target_id": ["d"]})
    _write(tmp_path / "pairs" / "validation" / "0.parquet", {"query_id": ["y"], "target_id": ["b"]})
    groups = {"note_id": list("dcbayz"), "group_id": ["g", "c", "g", "a", "y", "c"]}
    _write(tmp_path / "split" / "0.parquet", groups)
    return tmp_path


def test_pairs_in_both_directions_and_groups(root: Path) -> None:
    """The notes are a, c, d of training, then b, y. The pairs are c a, a d, y b. b and d are near-duplicates, so y is
    related to d, and a to b. A note is its own near-duplicate.
    """
    candidates = np.tile(np.arange(5), (5, 1))
    alone = read_known_pairs(root / "pairs")
    assert (alone.note_ids.to_pylist(), alone.num_train) == (["a", "c", "d", "b", "y"], 3)
    positive = np.array([[0, 1, 1, 0, 0],
                         [1, 0, 0, 0, 0],
                         [1, 0, 0, 0, 0],
                         [0, 0, 0, 0, 1],
                         [0, 0, 0, 1, 0]], dtype=bool)  # fmt: skip
    assert (alone.is_positive(np.arange(5), candidates) == positive).all()
    assert (alone.is_near(np.arange(5), candidates) == (positive | np.eye(5, dtype=bool))).all()  # each its own group
    grouped = read_known_pairs(root / "pairs", root / "split")
    assert (grouped.is_positive(np.arange(5), candidates) == positive).all()
    near = np.array([[1, 1, 1, 1, 0],
                     [1, 1, 0, 0, 0],
                     [1, 0, 1, 1, 1],
                     [1, 0, 1, 1, 1],
                     [0, 0, 1, 1, 1]], dtype=bool)  # fmt: skip
    assert (grouped.is_near(np.arange(5), candidates) == near).all()


def test_validation_pairs_are_optional(root: Path) -> None:
    (root / "pairs" / "validation" / "0.parquet").unlink()
    assert read_known_pairs(root / "pairs").note_ids.to_pylist() == ["a", "c", "d"]


def test_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"empty/train holds no training pairs"):
        read_known_pairs(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty holds no note split"):
        read_known_pairs(root / "pairs", tmp_path / "empty")
    _write(root / "split" / "0.parquet", {"note_id": ["a", "c", "y"], "group_id": ["a", "c", "y"]})
    with pytest.raises(ValueError, match=r"2 notes of the pairs are not in .*split \(the first is 'd'\)"):
        read_known_pairs(root / "pairs", root / "split")
    _write(root / "pairs" / "train" / "0.parquet", {"note_id": ["a"]})
    (root / "pairs" / "train" / "1.parquet").unlink()
    with pytest.raises(ValueError, match=r"train lacks the columns \['query_id', 'target_id'\], it has \['note_id'\]"):
        read_known_pairs(root / "pairs")
    _write(root / "pairs" / "train" / "0.parquet", {"query_id": [], "target_id": []})
    with pytest.raises(ValueError, match="holds no training pairs"):
        read_known_pairs(root / "pairs")
