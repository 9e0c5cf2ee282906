"""Note ids in a table: text, or whole numbers, which are read as their digits."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt


def read_ids(source: Path, name: str, column: pa.ChunkedArray) -> pa.Array:
    """The ids of the column `name` of `source` as text, trimmed.

    Raises ValueError for another type, and where a row has no id. Floats are no ids: as a float, 100000000000000001 is
    1e17.
    """
    ids = column.combine_chunks()
    if pt.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    kind = ids.type
    is_text = pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)
    if not (is_text or pt.is_integer(kind) or (pt.is_decimal(kind) and kind.scale == 0)):
        raise ValueError(f"{source}, column {name} has type {kind}; ids are text or whole numbers.")
    texts = pc.utf8_trim(pc.cast(ids, pa.string()), " \t\r\n")
    if missing := texts.null_count + (pc.sum(pc.equal(texts, "")).as_py() or 0):
        raise ValueError(f"{source}, column {name} has no id in {missing} of {len(texts)} rows.")
    return texts
