"""Note ids in a table of which every row has one: embeddings, pairs, pools."""

from pathlib import Path

import pyarrow as pa

from notellm2_core.tables.columns import Kind, plain_column, read_column


def read_ids(source: Path, name: str, column: pa.ChunkedArray) -> pa.Array:
    """The ids of the column `name` of `source` as text.

    Raises ValueError for a type that carries no ids, and where a row has none.
    """
    try:
        ids = read_column(plain_column(column.combine_chunks()), Kind.ID)
    except ValueError as e:
        raise ValueError(f"{source}, column {name} {e}.") from e
    if ids.null_count:
        raise ValueError(f"{source}, column {name} has no id in {ids.null_count} of {len(ids)} rows.")
    return ids
