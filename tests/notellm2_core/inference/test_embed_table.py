"""`notellm2 embed` makes the vectors of `Embedder`, resumes, and replaces nothing except its own result."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModel, AutoProcessor

from notellm2_core.cli import main
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference import embed_table as embed
from notellm2_core.inference.embedder import Embedder
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.vision.encoder import VisionEncoder
from tests.support.drafts import dead_process, draft_of
from tests.support.released import Release, write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return write_release(tmp_path_factory.mktemp("release"))


def run(release: Release, notes: Path, out: Path, *more: str) -> None:
    main(["embed", "--model", str(release.model), "--notes", str(notes), "--out", str(out), *more])


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and message.startswith("error: ")
    return message


def test_the_same_bits_as_the_embedder(release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(release, release.source, tmp_path / "out")
    table = read_embeddings(tmp_path / "out")
    assert list(table.note_ids) == [r["note_id"] for r in release.rows]
    model, processor = AutoModel.from_pretrained(release.model), AutoProcessor.from_pretrained(release.model)
    encoder = VisionEncoder.from_pretrained(release.model / "vision")
    np.testing.assert_array_equal(table.vectors, Embedder(model, processor, encoder).embed(release.notes))
    printed = capsys.readouterr()
    counts = json.loads(printed.out)
    assert "warning: of 13 images, 1 broken (no image, or a damaged one); --images names their folder" in printed.err
    assert (counts["notes"], counts["reused"], counts["dropped"]) == (20, 0, {})
    assert {k: n for k, n in counts["images"].items() if n} == {"ok": 12, "missing": 7, "broken": 1}
    for inputs, dim in (("text", 4), ("image", None)):
        more = ["--inputs", inputs, "--batch-notes", "3", *(["--dim", str(dim)] if dim else [])]
        run(release, release.source, tmp_path / "out", *more)
        expected = Embedder.from_pretrained(release.model).embed(release.notes, inputs, 3, dim)
        np.testing.assert_array_equal(read_embeddings(tmp_path / "out").vectors, expected)


def test_the_lakes_form_bytes_and_single_files(release: Release, tmp_path: Path) -> None:
    """Image bytes in the table (in three row groups), '|'-separated topics and integer ids give the same vectors.

    The last of two rows with id 3 counts. A row without id, and one without text and image, are dropped.
    """
    whole = Embedder.from_pretrained(release.model).embed(release.notes)
    rows = [
        {"note_id": n, "title": r["title"], "topics": " |".join(r["topics"]) or None, "content": r["content"] or None,
         "image": (release.source / r["image_path"]).read_bytes() if r["image_path"] else None}
        for n, r in enumerate(release.rows)
    ]  # fmt: skip
    odd = [{"note_id": 3, "title": "old", "topics": "", "content": "", "image": None},
           {"note_id": None, "title": "x", "topics": "", "content": "", "image": None},
           {"note_id": 99, "title": "", "topics": "|", "content": "", "image": None}]  # fmt: skip
    (tmp_path / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(odd + rows), tmp_path / "notes" / "a.parquet", row_group_size=8)
    counts = embed.embed_notes(release.model, read_note_table(tmp_path / "notes"), tmp_path / "out")
    assert counts["dropped"] == {"null_note_id": 1, "duplicate_note_id": 1, "empty_note": 1}
    table = read_embeddings(tmp_path / "out")
    np.testing.assert_allclose(table.vectors[table.rows([str(n) for n in range(20)])], whole, atol=2e-6)
    file = release.root / "notes" / "notes.parquet"  # the lake's: its images are in the source folder
    counts = embed.embed_notes(release.model, read_note_table(file, release.source), tmp_path / "two")
    np.testing.assert_allclose(read_embeddings(tmp_path / "two").vectors, whole, atol=2e-6)


def test_an_image_alone_makes_a_note(release: Release, tmp_path: Path) -> None:
    image = (release.source / "8.png").read_bytes()
    row = {"note_id": "p", "title": None, "topics": None, "content": None, "image": image}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "n.parquet")
    counts = embed.embed_notes(release.model, read_note_table(tmp_path / "n.parquet"), tmp_path / "out")
    assert (counts["notes"], counts["images"]["ok"]) == (1, 1)


def test_a_stopped_command_resumes(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is stopped in the third of four shards of 6 notes: two are reused, and OUT appears only when all four
    are complete. Files that a killed run has left next to its shards are no obstacle.
    """
    out = tmp_path / "out"
    monkeypatch.setattr(embed, "ExportSettings", lambda: type("E", (), {"shard_notes": 6}))
    own, calls = Embedder.embed, []

    def stopped(self: Embedder, *a: Any, **k: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, *a, **k)

    monkeypatch.setattr(Embedder, "embed", stopped)
    with pytest.raises(KeyboardInterrupt):
        embed.embed_notes(release.model, read_note_table(release.source), out)
    assert not out.exists()
    draft_of(tmp_path / ".out.partial" / "part-00002.parquet", dead_process()).write_bytes(b"half a shard")
    (tmp_path / ".out.partial" / ".former").mkdir()
    assert embed.embed_notes(release.model, read_note_table(release.source), out)["reused"] == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and len(list(out.iterdir())) == 4
    assert embed.embed_notes(release.model, read_note_table(release.source), out)["reused"] == 20
    assert len(calls) == 5

    (release.source / "19.png").write_bytes((release.source / "19.png").read_bytes() + b" ")
    assert embed.embed_notes(release.model, read_note_table(release.source), out)["reused"] == 19  # one image changed

    monkeypatch.setattr(embed, "optional_formats", lambda: ["a format of another package"])
    assert (
        embed.embed_notes(release.model, read_note_table(release.source), out)["reused"] == 0
    )  # more images may be read


def test_only_its_own_result_is_replaced(release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, another folder, an input of the command and another writer's embeddings are refused as OUT."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "lake").mkdir()
    pq.write_table(pa.table({"note_id": ["a"], "embedding": [[1.0]]}), tmp_path / "lake" / "part-00000.parquet")
    assert "is a file" in error(capsys, release, release.source, tmp_path / "file")
    assert "holds mine.txt, which this command did not write" in error(
        capsys, release, release.source, tmp_path / "full"
    )
    assert "holds part-00000.parquet" in error(capsys, release, release.source, tmp_path / "lake")
    assert "an input of this command" in error(capsys, release, release.source, release.source)
    assert "an input of this command" in error(capsys, release, release.source, release.root)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and (release.model / "config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "lake"]


def test_user_errors_are_one_line(release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    assert "holds no notes" in error(capsys, release, tmp_path, out)
    pq.write_table(pa.table({"note_id": ["a"]}), tmp_path / "n.parquet")
    assert "lacks the column title" in error(capsys, release, tmp_path / "n.parquet", out)
    assert "dim = 99" in error(capsys, release, release.source, out, "--dim", "99")
    assert "batch_notes = 0" in error(capsys, release, release.source, out, "--batch-notes", "0")
    with pytest.raises(ValueError, match="inputs = 'img'; choose one of multimodal, image, text"):
        embed.embed_notes(release.model, read_note_table(release.source), out, "img")  # type: ignore[arg-type]
    assert not list(out.parent.iterdir())  # and no half-made folder
