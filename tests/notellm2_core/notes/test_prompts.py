import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm2_core.config.data import TextSettings
from notellm2_core.notes.note import Note
from notellm2_core.notes.prompts import PROMPTS, Field, Mark, escape, field_text, truncate_words


def rendered(prompt: str) -> str:
    """The prompt as the paper prints it, with each field's name in its place."""
    pieces = PROMPTS[prompt]  # type: ignore[index]
    return "".join(p.name if isinstance(p, Field) else p.token if isinstance(p, Mark) else p for p in pieces)


def test_prompts_are_the_papers() -> None:
    """The prompts are those of sections 2.2 and 3, with the values in quotes ("json format")."""
    assert rendered("basic") == (
        "Note content: {'image': <IMG>, 'title': 'title', 'topic': 'topic', 'content': 'content'}. "
        'Compress this note into one word:"'
    )
    assert rendered("micl") == (
        "Note content: {'image': <IMG>}, Compress this note into one word: \"<IMG_EMB>\". "
        "Note content: {'title': 'title', 'topic': 'topic', 'content': 'content'}. Compress this note into one word: \""
    )
    assert rendered("text") == (
        "Note content: {'title': 'title', 'topic': 'topic', 'content': 'content'}. Compress this note into one word:\""
    )


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("one two  three", "auto", "one two"),
        ("  one\ntwo three", "space", "one\ntwo"),
        ("今天天气", "auto", "今天"),  # a Han character is a word ...
        ("今天天气 很好 吧", "space", "今天天气 很好"),
        ("かな漢字", "auto", "かな"),
        ("go去上海", "auto", "go去"),  # ... also next to a Latin word
        ("안녕 세계 또", "auto", "안녕 세계"),  # Korean has spaces between words
        ("a bc", "character", "a b"),
        ("مرحبا بالعالم الجميل", "auto", "مرحبا بالعالم"),
        ("", "auto", ""),
        (" \n ", "auto", ""),
    ],
)
def test_first_two_words(text: str, unit: str, expected: str) -> None:
    assert truncate_words(text, 2, unit) == expected  # type: ignore[arg-type]


@given(st.text(max_size=60), st.integers(1, 10))
def test_a_truncated_text_is_a_piece_of_the_text_and_is_not_cut_again(text: str, limit: int) -> None:
    once = truncate_words(text, limit)
    assert once in text
    assert truncate_words(once, limit) == once
    assert len(once.split()) <= limit


def test_escape_keeps_one_line_and_closes_no_quote() -> None:
    r"""Backslashes are doubled first, so that \n written by the user differs from a line break."""
    assert escape('it\'s "x"\n\\n\r\n\u2028') == 'it\\\'s \\"x\\"\\n\\\\n\\n\\n'
    assert escape("a\ud800b") == "a?b"


@given(st.text())
def test_escaped_text_has_no_bare_quote(text: str) -> None:
    bare = escape(text).replace("\\\\", "").replace("\\'", "").replace('\\"', "")
    assert "'" not in bare and '"' not in bare and len(escape(text).splitlines()) <= 1


def test_topics_are_truncated_together() -> None:
    note = Note("n", "t", ("blue sky", "red sea", "sun"), "c")
    assert field_text(note, "topic", TextSettings(topic_words=3)) == "blue sky, red"


def test_a_word_of_a_million_letters_is_cut() -> None:
    """20 words may take 80 tokens, and at most 32 characters per token are read: 2,560 characters."""
    start = time.perf_counter()
    assert len(field_text(Note("n", "x" * 1_000_000, (), ""), "title", TextSettings())) == 2560
    assert time.perf_counter() - start < 0.5


def test_white_space_before_a_text_hides_nothing() -> None:
    assert field_text(Note("n", "", (), " " * 20_000 + "late"), "content", TextSettings()) == "late"
