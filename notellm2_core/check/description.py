"""What was understood of a table: its files, its columns and where they come from, and its first rows as read."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from notellm2_core.tables.columns import Kind
from notellm2_core.tables.formats import column_types, format_name, is_parquet
from notellm2_core.tables.table import Table

_NUM_ROWS = 3
_BATCHES = 3  # that are looked at for the first rows: conditions may leave none in the first
_TYPED_FILES = 100  # whose types are listed


def describe_table(source: Path, table: Table) -> dict[str, Any]:
    """files, bytes, path, formats, columns [{column, from, type}] and other_columns, the names that are not read."""
    types: dict[str, dict[str, None]] = {}
    for file in table.files[:_TYPED_FILES]:
        if is_parquet(file):
            for name, kind in column_types(file):
                types.setdefault(name, {})[str(kind)] = None
        else:
            for name in table.names_in(file):
                types.setdefault(name, {})["text" if "JSON" not in format_name(file, table.layout) else "JSON"] = None
    columns = [_column(table, origin, types) for origin in table.origins]
    used = {name for origin in table.origins for name in origin.kinds} | {*table.extract, *table.where}
    return {
        "path": str(table.path.relative_to(source)) if table.path != source else ", ".join(_names(table.files, source)),
        "files": len(table.files),
        "bytes": sum(file.stat().st_size for file in table.files),
        "formats": list(dict.fromkeys(format_name(file, table.layout) for file in table.files)),
        "columns": columns,
        "where": dict(table.where),
        "other_columns": [name for name in types if name not in used],
    }


def _column(table: Table, origin: Any, types: dict[str, dict[str, None]]) -> dict[str, str]:
    name = origin.column.name
    if name in table.groups:
        return {"column": name, "from": " + ".join(table.extract), "type": "text, by source.events.extract"}
    kinds = dict.fromkeys(kind for column in origin.kinds for kind in types.get(column, ()))
    where_from = str(origin) if not origin.kinds or kinds else "none"
    return {"column": name, "from": where_from, "type": ", ".join(kinds)}


def _names(files: Iterable[Path], source: Path) -> list[str]:
    names = [str(file.relative_to(source)) for file in files]
    return [*names[:3], *(["..."] if len(names) > 3 else [])]


def first_rows(table: Table) -> list[dict[str, str | None]]:
    """The first rows in their canonical types, as text. Bytes are left out.

    Raises ValueError naming the file and the column that cannot be read.
    """
    names = [column.name for column in table.columns if column.kind is not Kind.BYTES]
    for split in table.splits()[:1]:
        for batch in islice(table.read(split, names), _BATCHES):
            if len(batch):
                rows = batch.select(names).slice(0, _NUM_ROWS).to_pylist()
                return [{name: _written(value) for name, value in row.items()} for row in rows]
    return []


def _written(value: Any) -> str | None:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return None if value is None else str(value).removesuffix("+00:00")
