"""Related pairs as files hold them: tables of any format of `tables.formats`, and qrels as TREC and BEIR write them.

Three forms, recognised by their content:

- A table with the columns query_id and target_id, text or whole numbers. A row may list several targets. The column
  `relevance` or `label`, if there is one, grades them; `score` does not: in the lake, it is that of Eq. 2.
- BEIR: a table with the columns query-id, corpus-id, score. As text, it is separated by tabs under any name.
- TREC: lines `query iteration target relevance` without a header, separated by blanks; the iteration means nothing.

A target with a relevance of 0 or less is not relevant and makes no pair. A repeated pair counts once, with its highest
relevance.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core.runtime.files import is_hidden
from notellm2_core.schema import TEST, TRAIN, VALIDATION
from notellm2_core.tables.columns import Column, Kind
from notellm2_core.tables.csv_rows import RFC_4180, CsvLayout
from notellm2_core.tables.formats import FORMATS, column_names, is_table_file, open_text
from notellm2_core.tables.origins import Stored
from notellm2_core.tables.source import is_table
from notellm2_core.tables.table import MALFORMED, ROW, Table, check_table

BEIR = ("query-id", "corpus-id", "score")
# Columns of query and target, and those that may hold the relevance.
LAYOUTS = (("query_id", "target_id", ("relevance", "label")), (BEIR[0], BEIR[1], (BEIR[2],)))
FORMS = (
    "pairs are a table with the columns query_id and target_id or those of BEIR (query-id, corpus-id, score), as "
    f"{FORMATS}; or lines of TREC (query iteration target relevance)"
)
LEFT_OUT = ("duplicate_pairs", "irrelevant_pairs", "queries_without_target")
_ROWS = pa.schema([("query", pa.string()), ("target", pa.string()), ("relevance", pa.float64())])
_OTHER_SPLITS = (TRAIN, VALIDATION, "valid", "dev")


@dataclass(frozen=True)
class Pairs:
    """Related pairs (query -> target), in the order of every per-pair array [P]."""

    query_ids: tuple[str, ...]
    target_ids: tuple[str, ...]
    relevance: tuple[float, ...] | None = None  # of each target, above 0; only nDCG uses it. None: 1 for all

    def __len__(self) -> int:
        return len(self.query_ids)


@dataclass(frozen=True)
class PairTable:
    """The pairs of a file or folder, and the number of rows and queries that make none."""

    pairs: Pairs  # sorted by (query, target)
    left_out: Mapping[str, int]  # by the names LEFT_OUT


def read_pairs(path: Path) -> PairTable:
    """Pairs of a file, of a folder of files, or of the file or sub-folder `test` of a folder, such as BEIR's test.tsv.

    Raises ValueError naming the file where it has no such form, a column or a type is wrong, or an id is missing.
    """
    files = _files(path)
    is_trec = len(files) == 1 and _is_trec(files[0])
    rows, queries = _of_trec(files[0]) if is_trec else _of_tables(path, files)
    positive = rows.filter(pc.greater(rows["relevance"], 0))
    keys = ["query", "target"]
    pairs = positive.group_by(keys).aggregate([("relevance", "max")]).sort_by([(key, "ascending") for key in keys])
    query_ids, target_ids, relevance = (tuple(column.to_pylist()) for column in pairs.columns)
    num_queries = len({*query_ids})
    left_out = (
        len(positive) - len(pairs), len(rows) - len(positive), pc.count_distinct(queries).as_py() - num_queries,
    )  # fmt: skip
    return PairTable(
        Pairs(query_ids, target_ids, relevance if {*relevance} - {1} else None),
        dict(zip(LEFT_OUT, left_out, strict=True)),
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"{path} does not exist; {FORMS}.")
    if path.is_file():
        return [path]
    tests = sorted(entry for entry in path.iterdir() if is_table(entry.name, TEST))
    if len(tests) > 1:
        raise ValueError(f"{path} holds both {tests[0].name} and {tests[1].name}: name the one that counts.")
    if tests and tests[0].is_file():
        return tests
    folder = tests[0] if tests else path
    files = sorted(file for file in folder.iterdir() if file.is_file() and not is_hidden(file.name))
    if not files:
        raise ValueError(f"{folder} holds no pairs; {FORMS}.")
    if other := next((file for file in files if re.split("[-_.]", file.name)[0] in _OTHER_SPLITS), None):
        raise ValueError(f"{folder} holds {other.name} and no {TEST}: name the file whose pairs count.")
    return files


def _is_trec(file: Path) -> bool:
    """Whether a text file has lines of TREC: its first one names no columns."""
    layout = _csv_layout(file)
    if layout != RFC_4180:
        return False
    if not is_table_file(file):
        return True
    names = column_names(file, file)
    line = _first_line(file)
    return not _present(names) and len(line.split()) == 4 and not line.startswith("{")


def _csv_layout(file: Path) -> CsvLayout:
    """BEIR's tabs need no name that says so."""
    return CsvLayout(delimiter="\t") if tuple(_first_line(file).split()) == BEIR else RFC_4180


def _first_line(file: Path) -> str:
    """The first line; empty for a file that cannot be read, which its reader reports."""
    try:
        with open_text(file) as stream:
            return io.BufferedReader(stream).readline(1 << 16).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def _of_tables(path: Path, files: Sequence[Path]) -> tuple[pa.Table, pa.Array]:
    """The rows (_ROWS) of the files, and the ids of all queries, also of those whose list of targets is empty."""
    names = {file: _columns(file) for file in files}
    first = names[files[0]]
    if other := next((file for file in files if names[file] != first), None):
        raise ValueError(
            f"{files[0]} has the columns {', '.join(first)}, {other} has {', '.join(names[other])}: the parts of a "
            "table of pairs need the same ones."
        )
    kinds = (Kind.ID, Kind.ID, Kind.NUMBER)
    columns = [Column(name, kind, may_be_list=name == first[1]) for name, kind in zip(first, kinds, strict=False)]
    origins = tuple(Stored(column, column.name) for column in columns)
    table = check_table(Table(path, origins, tuple(files), _csv_layout(files[0])))
    parts = [_of_part(table, file) for file in table.files]
    return pa.concat_tables(rows for rows, _ in parts), pa.chunked_array([ids for _, ids in parts], pa.string())


def _columns(file: Path) -> tuple[str, ...]:
    """The columns of query and target, and of the relevance if there is one."""
    names = column_names(file, file, _csv_layout(file))
    if not (present := _present(names)):
        raise ValueError(
            f"{file} needs the columns query_id and target_id, it has {', '.join(names) or 'none'}; {FORMS}."
        )
    if len(present) > 3:
        raise ValueError(f"{file} has the columns {' and '.join(present[2:])}: which of them is the relevance?")
    return present


def _present(names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that hold query, target and relevance; none if they do not hold pairs."""
    for query, target, grades in LAYOUTS:
        if query in names and target in names:
            return query, target, *(grade for grade in grades if grade in names)
    return ()


def _of_part(table: Table, file: Path) -> tuple[pa.Table, pa.Array]:
    query, target, *grade = (column.name for column in table.columns)
    rows, queries = _read(table, file, [query, target, *grade]), _read(table, file, [query])[query]
    for name in (query, target):
        if missing := rows[name].null_count:
            raise ValueError(f"{file}, column {name} has no id in {missing} of {len(rows)} rows.")
    relevance = rows[grade[0]] if grade else pa.chunked_array([np.ones(len(rows))])
    if not pc.all(pc.fill_null(pc.is_finite(relevance), False), min_count=0).as_py():
        raise ValueError(f"{file}, column {grade[0]}: a relevance is no finite number.")
    return pa.Table.from_arrays([rows[query], rows[target], relevance], schema=_ROWS), queries.combine_chunks()


def _read(table: Table, file: Path, names: list[str]) -> pa.Table:
    """The columns `names` of a file. Raises ValueError for a line that is no row."""
    batches = [batch for split in table.splits([file]) for batch in table.read(split, names)]
    if any(pc.any(batch.column(MALFORMED)).as_py() for batch in batches):
        rows = (row for split in table.splits([file]) for row in table.read(split))
        line = next(line for row in rows for line in row.filter(row.column(MALFORMED)).column(ROW).to_pylist())
        raise ValueError(f"{file} has a line that is no row: {line[:200]}; {FORMS}.")
    schema = pa.schema([(column.name, column.canonical) for column in table.columns if column.name in names])
    return pa.Table.from_batches([batch.select(schema.names) for batch in batches], schema)


def _of_trec(file: Path) -> tuple[pa.Table, pa.Array]:
    """The rows (_ROWS) of a file of TREC, and the ids of all queries."""
    rows: list[tuple[str, str, float]] = []
    try:
        with open_text(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if fields := line.split():
                    rows.append(_row(fields, f"{file}, line {number}"))
    except (UnicodeDecodeError, OSError, EOFError) as e:
        raise ValueError(f"{file} is neither a table nor a text of pairs ({e}); {FORMS}.") from e
    table = pa.Table.from_pylist([dict(zip(_ROWS.names, row, strict=True)) for row in rows], schema=_ROWS)
    return table, table["query"].combine_chunks()


def _row(fields: list[str], place: str) -> tuple[str, str, float]:
    """Query, target and relevance of a line of TREC. `place`: file and line, for error messages."""
    if len(fields) != 4:
        raise ValueError(f"{place} has {len(fields)} fields; {FORMS}.")
    query, _, target, grade = fields
    try:
        relevance = float(grade)
    except ValueError:
        relevance = math.nan
    if not math.isfinite(relevance):
        raise ValueError(f"{place}: the relevance {grade!r} is not a number; {FORMS}.")
    return query, target, relevance
