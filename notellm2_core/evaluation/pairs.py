"""Related pairs as files hold them: the lake's Parquet, a user's Parquet, and qrels as TREC and BEIR write them.

Three forms, recognised by their content:

- Parquet: query_id and target_id, text or whole numbers. A row may list several targets. The column `relevance` or
  `label`, if there is one, grades them; `score` does not: in the lake, it is that of Eq. 2. BEIR's names are read too.
- TREC: lines `query iteration target relevance`, separated by blanks; the iteration means nothing.
- BEIR: tab-separated, with the header query-id, corpus-id, score.

A target with a relevance of 0 or less is not relevant and makes no pair. A repeated pair counts once, with its highest
relevance.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from notellm2_core.runtime.files import parquet_files, read_errors
from notellm2_core.schema import TEST
from notellm2_core.tables.ids import read_ids

BEIR = ("query-id", "corpus-id", "score")
# Columns of query and target, and those that may hold the relevance.
LAYOUTS = (("query_id", "target_id", ("relevance", "label")), (BEIR[0], BEIR[1], (BEIR[2],)))
FORMS = (
    "pairs are Parquet with the columns query_id and target_id, lines of TREC (query iteration target relevance), or "
    "tab-separated with BEIR's header (query-id corpus-id score)"
)
LEFT_OUT = ("duplicate_pairs", "irrelevant_pairs", "queries_without_target")
_ROWS = pa.schema([("query", pa.string()), ("target", pa.string()), ("relevance", pa.float64())])


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
    """Pairs of a file, of a folder of Parquet, of its sub-folder test/, or of its BEIR file test.tsv.

    Raises ValueError naming the file where it has no such form, a column or a type is wrong, or an id is missing.
    """
    files = _files(path)
    is_text = len(files) == 1 and not _is_parquet(files[0])
    parts = [_of_text(files[0])] if is_text else _of_parquet(files)
    rows = pa.concat_tables(table for table, _ in parts)
    queries = pa.chunked_array([queries for _, queries in parts], pa.string())
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
    if (path / f"{TEST}.tsv").is_file():
        return [path / f"{TEST}.tsv"]
    folder = path / TEST if (path / TEST).is_dir() else path
    if not (files := parquet_files(folder)):
        raise ValueError(f"{folder} holds no *.parquet and no {TEST}.tsv; name the file itself: {FORMS}.")
    return files


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as start:
        return start.read(4) == b"PAR1"


def _of_parquet(files: list[Path]) -> list[tuple[pa.Table, pa.Array]]:
    """Of each file the rows (_ROWS), and the ids of all queries, also of those whose list of targets is empty."""
    layouts = {file: _layout(file) for file in files}
    first = layouts[files[0]]
    if other := next((file for file in files if layouts[file] != first), None):
        raise ValueError(
            f"{files[0]} has the columns {', '.join(first)}, {other} has {', '.join(layouts[other])}: the parts of a "
            "table of pairs need the same ones."
        )
    return [_of_part(file, *first) for file in files]


def _of_part(file: Path, query: str, target: str, grade: str | None = None) -> tuple[pa.Table, pa.Array]:
    with read_errors(file):
        table = pq.read_table(file, columns=[name for name in (query, target, grade) if name])
    query_ids, targets = read_ids(file, query, table[query]), table[target]
    relevance = _relevance(file, grade, table[grade]) if grade else pa.array(np.ones(len(table)))
    of_target = query_ids
    if _is_list(targets.type):
        if targets.null_count:
            raise ValueError(f"{file}, column {target}: {targets.null_count} of {len(table)} rows are null.")
        row = pc.list_parent_indices(targets)  # of each target
        of_target, relevance, targets = query_ids.take(row), relevance.take(row), pc.list_flatten(targets)
    return pa.Table.from_arrays([of_target, read_ids(file, target, targets), relevance], schema=_ROWS), query_ids


def _layout(file: Path) -> tuple[str, ...]:
    """The columns of query and target, and of the relevance if there is one."""
    with read_errors(file):
        names = pq.read_schema(file).names
    for query, target, grades in LAYOUTS:
        if query in names and target in names:
            present = [grade for grade in grades if grade in names]
            if len(present) > 1:
                raise ValueError(f"{file} has the columns {' and '.join(present)}: which of them is the relevance?")
            return query, target, *present
    raise ValueError(f"{file} needs the columns query_id and target_id, it has {names}.")


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view,
                                             pt.is_large_list_view))  # fmt: skip


def _relevance(file: Path, name: str, column: pa.ChunkedArray) -> pa.Array:
    """The column as float64 [n]. A bool is 1 or 0."""
    kind = column.type
    if not (pt.is_boolean(kind) or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind)):
        raise ValueError(f"{file}, column {name} has type {kind}; a relevance is a number or a bool.")
    grades = column.combine_chunks()
    grades = pc.cast(pc.cast(grades, pa.int8()) if pt.is_boolean(kind) else grades, pa.float64())
    if not pc.all(pc.fill_null(pc.is_finite(grades), False)).as_py():
        raise ValueError(f"{file}, column {name}: a relevance is null or not finite.")
    return grades


def _of_text(file: Path) -> tuple[pa.Table, pa.Array]:
    """The rows (_ROWS) of a file of TREC or BEIR, and the ids of all queries."""
    rows: list[tuple[str, str, float]] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            is_beir = tuple(lines.readline().split()) == BEIR
            if not is_beir:
                lines.seek(0)
            fields = csv.reader(lines, delimiter="\t") if is_beir else map(str.split, lines)
            for number, row in enumerate(fields, start=2 if is_beir else 1):
                if row:
                    rows.append(_row(row, is_beir, f"{file}, line {number}"))
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is neither Parquet nor a text of pairs ({e}); {FORMS}.") from e
    table = pa.Table.from_pylist([dict(zip(_ROWS.names, row, strict=True)) for row in rows], schema=_ROWS)
    return table, table["query"].combine_chunks()


def _row(fields: list[str], is_beir: bool, place: str) -> tuple[str, str, float]:
    """Query, target and relevance. `place`: file and line, for error messages."""
    if len(fields) != (3 if is_beir else 4):
        raise ValueError(f"{place} has {len(fields)} fields; {FORMS}.")
    query, target, grade = (field.strip() for field in (fields if is_beir else (fields[0], *fields[2:])))
    try:
        relevance = float(grade)
    except ValueError:
        relevance = math.nan
    if not math.isfinite(relevance):
        raise ValueError(f"{place}: the relevance {grade!r} is not a number; {FORMS}.")
    if not query or not target:
        raise ValueError(f"{place} lacks an id.")
    return query, target, relevance
