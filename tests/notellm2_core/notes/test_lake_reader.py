from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.notes.note import Note
from notellm2_core.schema import NOTES


def write(folder: Path, name: str, ids: list[str]) -> None:
    rows = [
        {"note_id": i, "title": f"t{i}", "topics": ["a", "b"], "content": "", "image_path": None, "image": b"x"}
        for i in ids
    ]
    pq.write_table(pa.Table.from_pylist(rows, NOTES), folder / name)


def test_reads_all_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "part-1.parquet", ["c"])
    write(tmp_path, "part-0.parquet", ["b", "a"])
    notes = read_notes(tmp_path)
    assert list(notes) == ["b", "a", "c"]
    assert notes["a"] == Note("a", "ta", ("a", "b"), "")


def test_reads_only_the_requested_notes(tmp_path: Path) -> None:
    write(tmp_path, "part-0.parquet", ["b", "a", "c"])
    assert list(read_notes(tmp_path, {"c", "b"})) == ["b", "c"]
    assert read_notes(tmp_path, []) == {}


def test_errors_name_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Parquet"):
        read_notes(tmp_path)
    write(tmp_path, "part-0.parquet", ["a"])
    with pytest.raises(ValueError, match=r"1 notes are not in .*'zz'"):
        read_notes(tmp_path, ["a", "zz"])
    write(tmp_path, "part-1.parquet", ["a"])
    with pytest.raises(ValueError, match="'a' occurs twice"):
        read_notes(tmp_path)
    pq.write_table(pa.table({"note_id": ["x"]}), tmp_path / "part-0.parquet")
    with pytest.raises(ValueError, match="no column 'title'"):
        read_notes(tmp_path)
