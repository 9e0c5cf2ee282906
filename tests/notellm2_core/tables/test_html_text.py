"""HTML becomes text, what only looks like HTML stays, and the graph and the commands read the same."""

import html
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from notellm2_core.config.source import NoteReadingSettings
from notellm2_core.notes.note import Note, as_note
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.tables.html_text import clean_html, has_html
from notellm2_core.tables.source import open_notes
from notellm2_core.tables.table import HTML, ROW

PLAIN = [
    "", "  a  b\n\n c ", "a < b and c > d", "<3", "x<y", "x<y and z>w", "x<b and c>d", "i<j>k", "a <-> b", "->",
    "<<aha>>", "<user>@host", "I <love> it", "<https://a.b>", "<br", "<p class=", '<p class="a>b', "</ p>", "< p>",
    "<!-- a", "AT&T", "R&D; Q&A", "a && b;", "&nothing;", "&notit;", "?a=1&copy=2", "&#;", "&#x;", "&;",
    "你好，世界 <你好> 3<5 & 7>6",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_what_only_looks_like_html_stays(text):
    assert clean_html(text) == text and not has_html(text)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("one<br>two<BR/>three<br />four", "one\ntwo\nthree\nfour"),
        ("<ul>\n  <li>one\n  <li>two three</ul>", "one\ntwo three"),
        ("<div class='a' id=\"b\">one</div>two", "one\ntwo"),
        ("<table><tr><td nowrap>1</td><td>2</td></tr></table>", "1\n2"),
        ("<h1>Title</h1>text", "Title\ntext"),
        ("<b>bo</b>ld <i>and</i> <a href=http://a.b/?x=1&y=2 target=_blank>link</a>", "bold and link"),
        ('<img src="a.png" alt="x > y">z', "z"),
        ('<font size="2"color="red">text</font>', "text"),
        ("keeps  its\n\nwhite space <b>here</b>", "keeps  its\n\nwhite space here"),
        ("a<script type='x'>if (a<b) { '<p>' }</script>b<style>p > a {}</style>c", "abc"),
        ("<script>not closed", "not closed"),
        ("a<!-- a comment with <p> and\na line -->b", "ab"),
        ("<!DOCTYPE html><html><head><title>T</title></head><body>x</body></html>", "T\nx"),
        ("Tom &amp; Jerry&#39;s &quot;caf&eacute;&quot;&nbsp;&#x4f60;&#22909;", 'Tom & Jerry\'s "café" 你好'),
        ("&lt;b&gt; is &amp;lt;b&amp;gt;", "<b> is &lt;b&gt;"),  # once, as a browser does
        ("&#0;&#xD800;", "\ufffd\ufffd"),
        ("<p>你好，</p><p>世界<b>！</b></p>", "你好，\n世界！"),
        ("<p> </p><br>", ""),
    ],
)
def test_html_becomes_text(text, cleaned):
    assert clean_html(text) == cleaned and has_html(text)


@given(st.text(st.characters(exclude_characters="<&")) | st.text("ab<>/&;# =\"'!-3你", max_size=40))
def test_any_text_is_cleaned_without_error_and_encodable_text_stays_encodable(text):
    cleaned = clean_html(text)
    assert (cleaned == text) or has_html(text)
    if "<" not in text and "&" not in text:
        assert cleaned == text
    if all(not "\ud800" <= c <= "\udfff" for c in text):
        cleaned.encode()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp")), min_size=1)))
def test_escaped_paragraphs_come_back(texts):
    """Any texts, escaped as HTML wants it and put into paragraphs, are the lines of the cleaned text."""
    written = "".join(f"<p>{html.escape(text)}</p>\n" for text in texts)
    assert clean_html(written) == "\n".join(texts)


TAGS = ["<p>", "</p>", "<br/>", "<b>", "</b>", '<a href="x">', "</a>", "<!-- c -->", "<script>x<p></script>", "&amp;"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*TAGS, "word", " ", "\n", "<3", "x<y "])))
def test_pieces_of_html_as_a_slow_reference_cleans_them(pieces):
    """The reference works piece by piece: blocks are breaks, inline tags nothing, and the rest is text."""
    shown = {"<p>": "\0", "</p>": "\0", "<br/>": "\0", "&amp;": "&", **dict.fromkeys(TAGS[3:9], "")}
    if not {*pieces} & {*TAGS}:
        expected = "".join(pieces)
    else:
        lines = "".join(shown.get(piece, piece) for piece in pieces).split("\0")
        expected = "\n".join(line.strip() for line in lines if line.strip())
    assert clean_html("".join(pieces)) == expected


@pytest.mark.parametrize("part", ["<!--", "<script>", "<a b='", "<p a=''", "<br ", "</script ", "&#1", "<a b = "])
def test_the_time_is_linear(part):
    """Quadratic time would be minutes here."""
    assert clean_html(part * 50_000) or part == "<script>"


ROWS = [
    {
        "note_id": "1",
        "title": "Tom &amp; Jerry",
        "topics": "Home &amp; Garden;a<br>b",
        "content": "<p>one</p><p>two</p>",
    },
    {"note_id": "2", "title": "x<y", "topics": '["a &quot;b&quot;", "<b></b>", "c"]', "content": "R&D"},
    {"note_id": "3", "title": "<i> </i>", "topics": "<p></p>", "content": None},
    {"note_id": "&lt;4&gt;", "title": "ids stay", "topics": "", "content": ""},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "notes.parquet")
    return tmp_path


def read(source: Path, **settings) -> dict[str, Note]:
    table = read_note_table(source, reading=NoteReadingSettings(topic_delimiter=";", **settings))
    return {note_id: table.notes([note_id])[0].note for note_id in table.note_ids}


def test_notes_are_cleaned_by_default(source: Path) -> None:
    """An entity is no place to cut topics, and a quote in a list of topics ends none. The third note is empty."""
    assert read(source) == {
        "1": Note("1", "Tom & Jerry", ("Home & Garden", "a\nb"), "one\ntwo"),
        "2": Note("2", "x<y", ('a "b"', "c"), "R&D"),
        "&lt;4&gt;": Note("&lt;4&gt;", "ids stay", (), ""),
    }
    assert as_note(ROWS[0] | {"topics": ["Home &amp; Garden", "a<br>b"]}).note == read(source)["1"]


def test_without_the_setting_texts_stay(source: Path) -> None:
    notes = read(source, clean_html=False)
    assert notes["1"] == Note("1", "Tom &amp; Jerry", ("Home &amp", "Garden", "a<br>b"), "<p>one</p><p>two</p>")
    assert notes["3"].topics == ("<p></p>",)


def test_columns_that_are_joined_are_cleaned_one_by_one(source: Path) -> None:
    notes = read(source, columns={"title": ["title", "content"], "topics": ["topics"], "content": None})
    assert notes["1"].title == "Tom & Jerry one\ntwo" and notes["1"].topics == ("Home & Garden", "a\nb")
    assert notes["2"].title == "x<y R&D"


def test_rows_with_html_are_marked_and_shown_unchanged(source: Path) -> None:
    table = open_notes(source)
    rows = [row for split in table.splits() for batch in table.read(split) for row in batch.to_pylist()]
    assert [row[HTML] for row in rows] == [True, True, True, False]
    assert re.search("Tom &amp; Jerry", rows[0][ROW])
    lists = pa.table(
        {"note_id": ["1", "2"], "title": ["", ""], "topics": [["a", "b &amp; c"], None], "content": ["", ""]}
    )
    pq.write_table(lists, source / "notes.parquet")
    table = open_notes(source)
    assert [row[HTML] for b in table.read(table.splits()[0]) for row in b.to_pylist()] == [True, False]
    table = open_notes(source, NoteReadingSettings(clean_html=False))
    assert [row[HTML] for b in table.read(table.splits()[0]) for row in b.to_pylist()] == [False, False]
