"""The user's tables in Spark: each task reads a file, or a row group of one, through the description of its columns.

`notellm2_core.tables` reads them, so that Spark and the commands without Spark read the same values.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from notellm2_core.config.source import EVENT_CONTRACT, NOTE_CONTRACT, EventReadingSettings, NoteReadingSettings
from notellm2_core.tables.formats import Split
from notellm2_core.tables.source import open_events, open_notes
from notellm2_core.tables.table import HTML, MALFORMED, ROW, Table
from spark_jobs.common.tables import BadInput

_POSITION = "position"
_FILE_ROWS = 1 << 40  # more than a file has


def event_files(source: Path, reading: EventReadingSettings = EVENT_CONTRACT) -> list[str]:
    """The files of the log, relative to `source`. Raises ValueError where there is none, or a column is missing."""
    files = [str(file.relative_to(source)) for table in open_events(source, reading) for file in table.files]
    return list(dict.fromkeys(files))


def read_source_events(
    spark: SparkSession,
    source: Path,
    files: Sequence[str] | None = None,
    reading: EventReadingSettings = EVENT_CONTRACT,
) -> DataFrame:
    """The events of `source`, a source folder or a table of events, with malformed, row and html.

    The columns are user_id, note_id, timestamp and event. `html`: HTML was cleaned from a text of the row.
    `row` is the unchanged row in JSON: the columns of the contract, or the line of a text file that is no row. Such a
    row is malformed, and so is one with bytes that are not UTF-8; its other columns are null. `files`: those of its
    `event_files` to read; None: all. `weight` is a column where `reading` names one. Raises ValueError naming the file,
    and the column that is missing or has the wrong type.
    """
    wanted = None if files is None else {source / file for file in files}
    tables = open_events(source, reading)
    return _read(spark, [(t, [f for f in t.files if wanted is None or f in wanted]) for t in tables])


def read_source_notes(spark: SparkSession, source: Path, reading: NoteReadingSettings = NOTE_CONTRACT) -> DataFrame:
    """The notes of `source`: the columns of the contract, malformed, row and html (as of events), and `position`.

    `position` orders the rows as in the files. Raises ValueError naming the file, and the column that is missing or has
    the wrong type.
    """
    table = open_notes(source, reading)
    return _read(spark, [(table, table.files)])


def _read(spark: SparkSession, tables: Sequence[tuple[Table, Sequence[Path]]]) -> DataFrame:
    splits = [(table, split) for table, files in tables for split in table.splits(files)]
    schema = pa.schema([(column.name, column.canonical) for column in tables[0][0].columns])
    for name, kind in (("malformed", pa.bool_()), ("row", pa.string()), ("html", pa.bool_()), (_POSITION, pa.int64())):
        schema = schema.append(pa.field(name, kind))
    tasks = spark.range(0, len(splits), 1, max(1, len(splits)))
    return tasks.mapInArrow(partial(_rows_of, splits), from_arrow_schema(schema))


def _rows_of(splits: Sequence[tuple[Table, Split]], tasks: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for number in (number for task in tasks for number in task.column(0).to_pylist()):
        table, split = splits[number]
        first = number * _FILE_ROWS
        try:
            for batch in table.read(split):
                position = pa.array(range(first, first + len(batch)), pa.int64())
                first += len(batch)
                columns = {column.name: batch.column(column.name) for column in table.columns}
                marks = {"malformed": MALFORMED, "row": ROW, "html": HTML}
                columns |= {name: batch.column(mark) for name, mark in marks.items()} | {_POSITION: position}
                yield pa.RecordBatch.from_pydict(columns)
        except ValueError as e:
            raise BadInput(str(e)) from e
