"""What a column of a user's table may hold, and how it is read.

A column has a logical type, a Kind. Several Arrow types carry a kind; `read_column` turns each of them into one
canonical type, or refuses it with a sentence. All readers of a user's tables go through it, so that the graph and the
commands read the same values. Nothing that could lose a digit is read: no floats as ids, no 32-bit floats as times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from notellm2_core.tables.forms import USUAL_FORMS, WHITE_SPACE, Forms
from notellm2_core.tables.html_text import clean_html, has_html
from notellm2_core.tables.times import NUMBER, read_times, read_written_times
from notellm2_core.tables.topics import topics_of_text, trimmed_topics

NO_ID = ("", r"\N", "NULL", "null", "None", "nan", "NaN", "<NA>", "NaT")  # what writers put where there is no id


FETCH = "no run fetches images. Fetch them beforehand, for example with img2dataset, and name the files in image_path"


class Kind(StrEnum):
    """A logical type; the value is what error messages call it."""

    ID = "text or whole numbers"  # -> string, trimmed; null: no id
    NAME = "text, numbers or booleans"  # -> string, trimmed; null: no name
    TEXT = "text"  # -> string
    TEXTS = "text or a list of texts"  # -> list<string>, each trimmed and not empty; null: no list
    PIECES = "a text or a list of texts"  # -> list<string>, as TEXTS, but one text is one piece
    TIME = "text, numbers or timestamps"  # -> timestamp[us, UTC]; null: unreadable
    NUMBER = "numbers"  # -> double; null: no number
    PATH = "text, the paths of files"  # -> string, trimmed; null: none
    BYTES = "bytes"  # -> binary


@dataclass(frozen=True)
class Column:
    """A column of a user's table.

    `in_every_part`: every part of the table has to have it. Otherwise its values are null in the parts that lack it.
    `required`: at least one part has to have it. `may_be_list`: a row may hold several values, each a row of its own.
    """

    name: str
    kind: Kind
    required: bool = True
    in_every_part: bool = False
    may_be_list: bool = False

    @property
    def canonical(self) -> pa.DataType:
        """The type of its values once they are read."""
        return CANONICAL[self.kind]


def read_column(column: pa.Array, kind: Kind, forms: Forms = USUAL_FORMS) -> pa.Array:
    """The values of `column`, a `plain_column`, in the canonical type of `kind`.

    Raises ValueError, without a name, where its type carries no such values.
    """
    if pt.is_null(column.type):
        return pa.nulls(len(column), CANONICAL[kind])
    if (read := _READERS[kind](column, forms)) is None:
        raise ValueError(f"has type {column.type}, not {kind.value}")
    return read


def read_text(column: pa.Array) -> pa.Array:
    """The values of `column`, a `plain_column`, as text for people to read."""
    if pt.is_nested(column.type) or pt.is_binary(column.type):
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    return pc.cast(column, pa.string())


def plain_column(column: pa.Array) -> pa.Array:
    """`column` without the encodings that say nothing about its values: dictionaries, views, large offsets, ..."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain_column(column.storage)
    if pt.is_dictionary(kind):
        return plain_column(column.dictionary_decode())
    if pt.is_run_end_encoded(kind):
        return plain_column(pc.run_end_decode(column))
    if pt.is_large_string(kind) or pt.is_string_view(kind):
        return pc.cast(column, pa.string())
    if pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind):
        return pc.cast(column, pa.binary())
    if _is_list_view(kind):
        return pa.array(column.to_pylist(), pa.list_(kind.value_type))
    if pt.is_large_list(kind) or pt.is_fixed_size_list(kind):
        return pc.cast(column, pa.list_(kind.value_type))
    return column


def valid_utf8(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """A plain column of text, or of lists of text, with U+FFFD for bytes that are not UTF-8, and where those are.

    Both [n]; None: nowhere.
    """
    is_list = pt.is_list(column.type) and pt.is_string(column.type.value_type)
    if not is_list and not pt.is_string(column.type):
        return column, None
    try:
        column.validate(full=True)
        return column, None
    except pa.ArrowInvalid:
        values = column.cast(pa.list_(pa.binary()) if is_list else pa.binary()).to_pylist()
    texts = [_decoded(value) for value in values]
    broken = [_encoded(text) != value for text, value in zip(texts, values, strict=True)]
    return pa.array(texts, column.type), pa.array(broken)


def _decoded(value: Any) -> Any:
    return [_decoded(v) for v in value] if isinstance(value, list) else value and value.decode(errors="replace")


def _encoded(text: Any) -> Any:
    return [_encoded(t) for t in text] if isinstance(text, list) else text and text.encode()


def _is_list_view(kind: pa.DataType) -> bool:
    return pt.is_list_view(kind) or pt.is_large_list_view(kind)


def _read_id(column: pa.Array, forms: Forms) -> pa.Array | None:
    kind = column.type
    if (pt.is_decimal(kind) and kind.scale == 0) or pt.is_integer(kind):
        return pc.cast(column, pa.string())
    if not pt.is_string(kind):
        return None
    trimmed = pc.utf8_trim(column, WHITE_SPACE)
    return pc.if_else(pc.is_in(trimmed, pa.array(NO_ID)), pa.scalar(None, pa.string()), trimmed)


def _read_name(column: pa.Array, forms: Forms) -> pa.Array | None:
    """Floats as Python writes them, and booleans as true and false: no id, but the name of an event."""
    if pt.is_float64(column.type):
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    if pt.is_boolean(column.type):
        return pc.cast(column, pa.string())
    return _read_id(column, forms)


def _read_text(column: pa.Array, forms: Forms) -> pa.Array | None:
    if not pt.is_string(column.type):
        return None
    if not forms.clean_html or not pc.any(pc.match_substring_regex(column, "[<&]")).as_py():
        return column
    return pa.array([text and clean_html(text) for text in column.to_pylist()], pa.string())


def _read_texts(column: pa.Array, forms: Forms) -> pa.Array | None:
    if pt.is_string(column.type):
        texts = [topics_of_text(text, forms) for text in column.to_pylist()]
        return pa.array(texts, CANONICAL[Kind.TEXTS])
    return _read_list(column, forms)


def _read_pieces(column: pa.Array, forms: Forms) -> pa.Array | None:
    if pt.is_list(column.type):
        return _read_list(column, forms)
    if (texts := _read_id(column, forms)) is None:
        return None
    pieces = [None if text is None else trimmed_topics([text], forms.clean_html) for text in texts.to_pylist()]
    return pa.array(pieces, CANONICAL[Kind.PIECES])


def _read_list(column: pa.Array, forms: Forms) -> pa.Array | None:
    if not pt.is_list(column.type):
        return None
    items = plain_column(pa.array([], column.type.value_type))
    if not pt.is_null(items.type) and _read_id(items, forms) is None:
        return None
    texts = [None if row is None else trimmed_topics(row, forms.clean_html) for row in column.to_pylist()]
    return pa.array(texts, CANONICAL[Kind.TEXTS])


def rows_with_html(column: pa.Array) -> pa.Array:
    """Whether each of the values of a plain column is, or contains, a text with HTML."""
    if pt.is_list(column.type):
        rows = column.to_pylist()
        return pa.array(
            [any(isinstance(text, str) and has_html(text) for text in row or ()) for row in rows], pa.bool_()
        )
    if not pt.is_string(column.type) or not pc.any(pc.match_substring_regex(column, "[<&]")).as_py():
        return pa.repeat(False, len(column))
    return pa.array([text is not None and has_html(text) for text in column.to_pylist()], pa.bool_())


def _read_time(column: pa.Array, forms: Forms) -> pa.Array | None:
    if forms.timestamp_format is not None and (pt.is_string(column.type) or pt.is_integer(column.type)):
        return read_written_times(pc.cast(column, pa.string()), forms.timestamp_format, forms.time_zone)
    return read_times(column, forms.time_zone)


def _read_number(column: pa.Array, forms: Forms) -> pa.Array | None:
    if pt.is_boolean(column.type):
        return pc.cast(pc.cast(column, pa.int8()), pa.float64())
    if pt.is_string(column.type):
        text = pc.utf8_trim(column, WHITE_SPACE)
        is_number = pc.fill_null(pc.match_substring_regex(text, NUMBER), False)
        return pc.cast(pc.if_else(is_number, text, pa.scalar(None, pa.string())), pa.float64())
    if pt.is_integer(column.type) or pt.is_floating(column.type) or pt.is_decimal(column.type):
        return pc.cast(column, pa.float64(), safe=False)
    return None


def _read_path(column: pa.Array, forms: Forms) -> pa.Array | None:
    if (paths := _read_id(column, forms)) is None:
        return None
    addresses = paths.filter(pc.fill_null(pc.match_substring_regex(paths, "^[a-z][a-z0-9]+://"), False))
    if len(addresses):
        raise ValueError(f"holds addresses ({addresses[0]}): {FETCH}")
    return paths


def _read_bytes(column: pa.Array, forms: Forms) -> pa.Array | None:
    """Bytes, or the struct{bytes, path} of Hugging Face's datasets."""
    if pt.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        return _read_bytes(plain_column(pc.struct_field(column, "bytes")), forms)
    return column if pt.is_binary(column.type) else None


CANONICAL: dict[Kind, pa.DataType] = {
    Kind.ID: pa.string(),
    Kind.NAME: pa.string(),
    Kind.TEXT: pa.string(),
    Kind.TEXTS: pa.list_(pa.string()),
    Kind.PIECES: pa.list_(pa.string()),
    Kind.TIME: pa.timestamp("us", "UTC"),
    Kind.NUMBER: pa.float64(),
    Kind.PATH: pa.string(),
    Kind.BYTES: pa.binary(),
}
_READERS: dict[Kind, Callable[[pa.Array, Forms], Any]] = {
    Kind.ID: _read_id,
    Kind.NAME: _read_name,
    Kind.TEXT: _read_text,
    Kind.TEXTS: _read_texts,
    Kind.PIECES: _read_pieces,
    Kind.TIME: _read_time,
    Kind.NUMBER: _read_number,
    Kind.PATH: _read_path,
    Kind.BYTES: _read_bytes,
}
