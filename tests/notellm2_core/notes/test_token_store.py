"""Tokens on disk are the tokenizer's, read without it; another tokenizer's or damaged ones are refused."""

from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core import schema
from notellm2_core.config.data import TextSettings
from notellm2_core.model.llm import tiny_tokenizer
from notellm2_core.model.tokenise import main
from notellm2_core.notes import token_store
from notellm2_core.notes.note import Note
from notellm2_core.notes.note_tokenizer import NoteTokenizer
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.notes.token_store import TokenTable, read_tokens, write_tokens
from notellm2_core.schema import TOKENS_FILE

KINDS = ("multimodal", "image", "text")
texts = st.text(max_size=30)


@cache
def processor(prompt: str = "micl", **text: int) -> MLRMProcessor:
    return MLRMProcessor(tiny_tokenizer(), TextSettings(**text), prompt, 3, 2, 5)  # type: ignore[arg-type]


def tokenizer(**text: int) -> NoteTokenizer:
    return processor(**text).note_tokenizer


def notes_of(fields: list[tuple[str, list[str], str]]) -> list[Note]:
    return [Note(f"n{i}", title, tuple(topics), content) for i, (title, topics, content) in enumerate(fields)]


@settings(max_examples=40)
@given(fields=st.lists(st.tuples(texts, st.lists(texts, max_size=3), texts), min_size=1, max_size=9))
def test_stored_tokens_are_those_of_each_note(
    fields: list[tuple[str, list[str], str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file, written in batches of 4, gives each note's tokens and their number for every prompt and kind of input."""
    folder, notes = tmp_path_factory.mktemp("tokens"), notes_of(fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "_BATCH_NOTES", 4)
        write_tokens(folder, tokenizer(), notes)
    for prompt in ("micl", "basic", "text"):
        reader = processor(prompt)
        table = read_tokens(folder, reader.note_tokenizer)
        assert list(table) == [note.note_id for note in notes]
        for note in notes:
            for kind in KINDS:
                expected = reader.encode(note, kind)
                stored = reader.lay_out(table[note.note_id], kind)
                assert stored.token_ids.tolist() == expected.token_ids.tolist()
                assert (stored.image_start, stored.visual_index) == (expected.image_start, expected.visual_index)
                assert reader.num_tokens(table[note.note_id], kind) == len(expected)


def test_only_the_named_notes(tmp_path: Path) -> None:
    write_tokens(tmp_path, tokenizer(), notes_of([("a", [], ""), ("b", [], ""), ("c", [], "")]))
    assert list(read_tokens(tmp_path, tokenizer(), ["n2", "n0"])) == ["n0", "n2"]
    assert len(read_tokens(tmp_path, tokenizer(), [])) == 0
    with pytest.raises(ValueError, match="1 notes are not in .*, among them 'n9'"):
        read_tokens(tmp_path, tokenizer(), ["n1", "n9"])


def test_tokens_of_another_tokenizer_or_other_settings_are_refused(tmp_path: Path) -> None:
    """Settings that change no token (the prompt, the bounds of short and long) may differ."""
    write_tokens(tmp_path, tokenizer(), notes_of([("a", [], "")]))
    TokenTable(tmp_path / TOKENS_FILE, processor("basic", short_tokens=7).note_tokenizer)
    larger = tiny_tokenizer()
    larger.add_tokens(["zebra"])
    for other in (tokenizer(title_words=3), NoteTokenizer(larger, TextSettings())):
        with pytest.raises(ValueError, match="made with another tokenizer or other text settings"):
            TokenTable(tmp_path / TOKENS_FILE, other)


def test_a_saved_processor_has_the_same_tokens_id(tmp_path: Path) -> None:
    processor().save_pretrained(tmp_path / "model")
    saved = MLRMProcessor.from_pretrained(tmp_path / "model")
    assert saved.note_tokenizer.tokens_id == tokenizer().tokens_id


def test_unreadable_tokens(tmp_path: Path) -> None:
    (tmp_path / TOKENS_FILE).write_bytes(b"ARROW1 and no more")
    with pytest.raises(
        ValueError, match=r"tokens.arrow cannot be read .*; python -m notellm2_core.model.tokenise makes it"
    ):
        read_tokens(tmp_path, tokenizer())
    write_tokens(tmp_path, tokenizer(), [Note("n", "a", (), ""), Note("n", "b", (), "")])
    with pytest.raises(ValueError, match="has a note twice"):
        read_tokens(tmp_path, tokenizer())
    with pytest.raises(ValueError, match="holds no Parquet file; give the folder of the notes dataset"):
        read_tokens(tmp_path / "nowhere", tokenizer())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two notes, the second without text: the tiny tokenizer makes 12 tokens of 12 letters. No prompt is counted."""
    rows = [
        {"note_id": f"n{i}", "title": title, "topics": [], "content": "", "image_path": None, "image": None}
        for i, title in enumerate(["zzzzzzzzzzzz", ""])
    ]
    (tmp_path / "notes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.NOTES), tmp_path / "notes" / "notes.parquet")
    (tmp_path / "config.yaml").write_text("{name: t, model: {llm: {name: tiny}, vision: {library: tiny, name: tiny}}}")
    arguments = ["--config", str(tmp_path / "config.yaml"), "--notes", str(tmp_path / "notes")]
    main([*arguments, "--out", str(tmp_path / "out")])
    counts = (tmp_path / "out" / "counts.json").read_text()
    assert '"tokens": 12,' in counts and '"tokens_per_note_max": 12' in counts
    assert '"notes": 2' in counts and '"notes_without_text": 1' in counts
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "config.yaml"), "--notes", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "error: " in capsys.readouterr().err
