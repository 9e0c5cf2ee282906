"""The prompts (sections 2.2 and 3), and how a note's fields are truncated (section 2.3) and escaped for them.

A prompt is a sequence of literal text, fields and marks. Fields are tokenised apart from the text around them, so that
nothing a user writes can become part of the template or a special token.
"""

import re
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from notellm2_core.config.data import WordSettings, WordUnit
from notellm2_core.config.methods import PromptName
from notellm2_core.notes.note import Note

IMAGE_TOKEN = "<IMG>"  # a placeholder: it is repeated L_c times, and the visual embeddings replace them
VISUAL_WORD_TOKEN = "<IMG_EMB>"  # the token after the visual compressed word

TOKENS_PER_WORD = 4  # a field of w words may take 4 w tokens: a "word" of 100,000 letters cannot fill the prompt
CHARACTERS_PER_TOKEN = 32  # characters beyond this many per token are not even read

FieldName = Literal["title", "topic", "content"]


@dataclass(frozen=True)
class Field:
    """A piece of a prompt: a field of the note."""

    name: FieldName


@dataclass(frozen=True)
class Mark:
    """A piece of a prompt: a special token."""

    token: str


def name_of(piece: str | Field | Mark) -> str:
    """The name of a piece of a prompt: a literal in quotes, a field's name or a special token."""
    return repr(piece) if isinstance(piece, str) else piece.name if isinstance(piece, Field) else piece.token


_IMAGE = Mark(IMAGE_TOKEN)
_TEXT_FIELDS = (
    "'title': '",
    Field("title"),
    "', 'topic': '",
    Field("topic"),
    "', 'content': '",
    Field("content"),
    "'}",
)

PROMPTS: dict[PromptName, tuple[str | Field | Mark, ...]] = {
    # Section 2.2, "Note Compression Prompt".
    "basic": ("Note content: {'image': ", _IMAGE, ", ", *_TEXT_FIELDS, '. Compress this note into one word:"'),
    # Section 3, "mICL Note Compression Prompt"; the comma after the first brace is the paper's.
    "micl": (
        "Note content: {'image': ", _IMAGE, '}, Compress this note into one word: "', Mark(VISUAL_WORD_TOKEN),
        '". Note content: {', *_TEXT_FIELDS, '. Compress this note into one word: "',
    ),
    # Section 4.1, "only late fusion ... without inputting image embeddings into LLMs": the basic prompt without them.
    "text": ("Note content: {", *_TEXT_FIELDS, '. Compress this note into one word:"'),
}  # fmt: skip

# Kana, Han (with extensions and compatibility forms), Bopomofo, and the full-width punctuation between them. Korean
# is written with spaces and is not among them.
_CJK = (
    "\u3001-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uffef"
    "\U00020000-\U0003ffff"
)
_WORDS = {
    "auto": re.compile(rf"[{_CJK}]|[^\s{_CJK}]+"),
    "space": re.compile(r"\S+"),
    "character": re.compile(r"\S"),
}
_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def count_words(text: str, unit: WordUnit = "auto") -> int:
    """Number of words in `text`, as `truncate_words` counts them."""
    return sum(1 for _ in _WORDS[unit].finditer(text))


def truncate_words(text: str, num_words: int, unit: WordUnit = "auto") -> str:
    """The first `num_words` words of `text`, unchanged, without the white space around them.

    unit = auto: a Chinese or Japanese character is a word, other text is split at white space.
    """
    words = list(islice(_WORDS[unit].finditer(text), num_words))
    return text[words[0].start() : words[-1].end()] if words else ""


def escape(text: str) -> str:
    r"""`text` for the inside of the prompt's single quotes: \ ' " and line breaks get a backslash.

    Lone surrogates, which no tokenizer accepts, become question marks.
    """
    text = text.encode("utf-8", "replace").decode()
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
    return _LINE_BREAK.sub(lambda _: "\\n", text)


def field_limit(name: FieldName, settings: WordSettings) -> int:
    """Number of words of the field that are read."""
    return {"title": settings.title_words, "topic": settings.topic_words, "content": settings.content_words}[name]


def max_field_tokens(name: FieldName, settings: WordSettings) -> int:
    """Upper limit of tokens per field; only pathological texts reach it."""
    return TOKENS_PER_WORD * field_limit(name, settings)


def field_text(note: Note, name: FieldName, settings: WordSettings) -> str:
    """A field as the prompt contains it: truncated and escaped. Topics are joined with ", " and truncated together."""
    raw = {"title": note.title, "topic": ", ".join(note.topics), "content": note.content}[name]
    raw = raw.lstrip()[: CHARACTERS_PER_TOKEN * max_field_tokens(name, settings)]
    return escape(truncate_words(raw, field_limit(name, settings), settings.word_unit))
