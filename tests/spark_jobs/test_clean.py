import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from notellm2_core import schema
from spark_jobs.clean import prepare_notes


def written_notes(spark: SparkSession, folder: Path, **columns: Any) -> tuple[dict[str, Any], list[Any], list[Any]]:
    pq.write_table(pa.table(columns), folder / "notes.parquet", row_group_size=2)
    counts = prepare_notes(spark, folder, folder / "out")
    return counts, *(pq.read_table(folder / "out" / name).to_pylist() for name in ("notes", "quarantine"))


def test_notes_are_validated_and_the_rest_is_quarantined(spark: SparkSession, tmp_path: Path) -> None:
    """The rows are: valid; replaced by a later row; null id; blank id; the last of its id; empty; with an image only;
    with a topic only.
    """
    counts, notes, quarantine = written_notes(
        spark, tmp_path,
        note_id=[" a ", "b", None, " ", "b", "empty", "photo", "topic"],
        title=["A", "old", "x", "x", "new", None, None, None],
        topics=["x| y ||z", "q", "q", "q", None, " | ", None, "only"],
        content=[None, "", "", "", "B", " \n", "", None],
        image_path=[" ", None, None, None, "b.png", "", "../../etc/passwd", None],
        image=[None, b"1", None, None, b"", b"", None, None],
        **{"stats.extra": range(8)},
    )  # fmt: skip
    assert counts["dropped"] == {"null_note_id": 2, "duplicate_note_id": 1, "empty_note": 1}
    assert {k: v for k, v in counts.items() if k != "dropped"} == {
        "rows": 8, "html_rows": 0, "notes": 4, "with_text": 3, "with_image": 2,
    }  # fmt: skip
    assert notes == [
        {"note_id": "a", "title": "A", "topics": ["x", "y", "z"], "content": "", "image_path": None, "image": None},
        {"note_id": "b", "title": "new", "topics": [], "content": "B", "image_path": "b.png", "image": None},
        {
            "note_id": "photo",
            "title": "",
            "topics": [],
            "content": "",
            "image_path": "../../etc/passwd",
            "image": None,
        },
        {"note_id": "topic", "title": "", "topics": ["only"], "content": "", "image_path": None, "image": None},
    ]
    [replaced] = [json.loads(q["row"]) for q in quarantine if q["reason"] == "duplicate_note_id"]
    assert replaced["title"] == "old"
    assert set(replaced) == {
        "note_id",
        "title",
        "topics",
        "content",
        "image_path",
    }  # the columns that are read, except the bytes
    files = {name: pq.read_schema(tmp_path / "out" / name / "part-00000.parquet") for name in ("notes", "quarantine")}
    assert [(f.name, f.type) for f in files["notes"]] == [(f.name, f.type) for f in schema.NOTES]
    assert files["quarantine"].names == schema.QUARANTINE.names


def test_notes_with_whole_number_ids_lists_and_null_columns(spark: SparkSession, tmp_path: Path) -> None:
    counts, notes, _ = written_notes(
        spark, tmp_path, note_id=[7, 8], title=pa.nulls(2), topics=[["a ", None, ""], []], content=["c", "d"]
    )  # fmt: skip
    assert counts["notes"] == 2 and counts["with_image"] == 0
    assert [(n["note_id"], n["title"], n["topics"]) for n in notes] == [("7", "", ["a"]), ("8", "", [])]
    with pytest.raises(ValueError, match=r"the notes of .* hold no usable one \(1 rows\)"):
        written_notes(spark, _new(tmp_path), note_id=[None], title=["t"], topics=["a"], content=["c"])


def _new(folder: Path) -> Path:
    (folder / "new").mkdir()
    return folder / "new"


def test_notes_that_were_posted_replace_and_delete_those_of_the_source(spark: SparkSession, tmp_path: Path) -> None:
    source = {"note_id": ["kept", "old", "gone", "old", None], "title": list("abcde"), "content": [""] * 5}
    pq.write_table(pa.table({**source, "topics": pa.nulls(5, pa.string())}), tmp_path / "notes.parquet")
    posted = {
        "note_id": ["old", "gone", "fresh", "never there"],
        "deleted": [False, True, False, True],
        "title": ["new", "", "f", ""],
        "topics": [["x", "y"], [], [], []],
        "content": ["", "", "c", ""],
        "image": [None, None, b"picture", None],
    }
    pq.write_table(pa.table(posted, schema=schema.POSTED), tmp_path / "posted.bin")
    counts = prepare_notes(spark, tmp_path, tmp_path / "out", posted=tmp_path / "posted.bin")
    assert {name: counts[name] for name in ("rows", "posted", "replaced", "deleted", "notes", "with_image")} == {
        "rows": 5, "posted": 2, "replaced": 2, "deleted": 1, "notes": 3, "with_image": 1,
    }  # fmt: skip
    assert counts["dropped"] == {"null_note_id": 1}
    notes = pq.read_table(tmp_path / "out" / "notes").to_pylist()
    assert [(n["note_id"], n["title"], n["topics"], n["image_path"], n["image"]) for n in notes] == [
        ("fresh", "f", [], None, b"picture"), ("kept", "a", [], None, None), ("old", "new", ["x", "y"], None, None),
    ]  # fmt: skip
