"""The subcommands of `notellm2`, as a shell would call them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core import schema
from notellm2_core.cli import main


def _embeddings(folder: Path) -> Path:
    """Three unit vectors in the plane: a and b 10 degrees apart, c opposite to a."""
    angles = np.deg2rad([0, 10, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    columns = [pa.array(["a", "b", "c"]), pa.FixedSizeListArray.from_arrays(vectors.ravel(), 2)]
    folder.mkdir()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema.embeddings(2)), folder / "part-00000.parquet")
    return folder


def test_demo_writes_a_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["demo", "--out", str(tmp_path / "world"), "--notes", "60", "--users", "30", "--days", "14", "--seed", "3"])
    counts = json.loads(capsys.readouterr().out)
    assert counts["num_notes"] == 60 == pq.read_metadata(tmp_path / "world" / "notes.parquet").num_rows


def test_describe_counts_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "--config", "pipelines/configs/tiny.yaml"])
    printed = json.loads(capsys.readouterr().out)
    parts = {k: v for k, v in printed["parameters"].items() if k not in ("total", "trainable")}
    assert sum(parts.values()) == printed["parameters"]["total"] > 0
    assert printed["method"] == "notellm2" and printed["shapes"]["embedding"] == 16


def test_index_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cos 10 degrees = 0.984808; of the pairs a -> b (rank 1) and a -> c (rank 2), half are found at 1."""
    embeddings, index = _embeddings(tmp_path / "embeddings"), tmp_path / "index"
    main(["index", "build", "--embeddings", str(embeddings), "--out", str(index), "--factory", "Flat"])
    assert json.loads(capsys.readouterr().out)["num_notes"] == 3
    main(["index", "search", "--index", str(index), "--note-id", "a", "--k", "2"])
    hits = json.loads(capsys.readouterr().out)
    assert [f["note_id"] for f in hits] == ["b", "c"]  # without the note itself
    assert hits[0]["score"] == pytest.approx(0.984808, abs=1e-6)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = {"query_id": ["a", "a"], "target_id": ["b", "c"], "score": [1.0, 1.0], "num_users": [1, 1], "rank": [1, 2]}
    pq.write_table(pa.table(rows, schema=schema.RELATED_PAIRS), pairs / "part.parquet")
    main(["evaluate", "--embeddings", str(embeddings), "--pairs", str(pairs), "--ks", "1,2"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["recall"] == {"1": 50.0, "2": 100.0} and not printed.err


def test_evaluate_reads_qrels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """a -> c has rank 2; b -> a has rank 1 and comes twice; a -> b is irrelevant. So MRR is (1/2 + 1) / 2."""
    (tmp_path / "qrels.txt").write_text("a 0 c 2\na 0 b 0\nb 0 a 1\nb 0 a 1\n")
    embeddings = str(_embeddings(tmp_path / "embeddings"))
    main(["evaluate", "--embeddings", embeddings, "--pairs", str(tmp_path / "qrels.txt"), "--ks", "1"])
    printed = capsys.readouterr()
    metrics = json.loads(printed.out)
    assert metrics["per_query"]["mrr"] == 75
    assert (metrics["num_pairs"], metrics["duplicate_pairs"], metrics["irrelevant_pairs"]) == (2, 1, 1)
    assert printed.err == (
        f"warning: {tmp_path / 'qrels.txt'} holds rows that are not counted: 1 duplicate pairs, 1 irrelevant pairs\n"
    )


def test_user_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["describe", "--config", str(tmp_path / "none.yaml")])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith("error: cannot read") and printed.count("\n") == 1
