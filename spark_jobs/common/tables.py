"""Read, write and count Parquet tables. Two runs over the same rows write the same files."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core.runtime.files import is_hidden, replaced_folder

_UNREADABLE = (
    "FAILED_READ_FILE",
    "CANNOT_READ_FILE_FOOTER",
    "UNABLE_TO_INFER_SCHEMA",
    "is not a Parquet file",
)
_DAMAGED_FILE = re.compile(r"reading file file:/*(/\S+?)\.?\s+SQLSTATE")


class BadInput(ValueError):
    """Input that the user can correct, met inside a task. `readable` turns it into a ValueError with its sentence."""


_BAD_INPUT = re.compile(rf"{BadInput.__name__}: (.+)")


def write_table(df: DataFrame, out: Path, sort: Sequence[str], num_files: int = 1) -> None:
    """Write `df` to the new folder `out` as at most `num_files` Parquet files, each sorted by `sort`.

    The hash of `sort[0]` decides a row's file, so every run writes the same rows, in the same order, into the same
    files.
    """
    # By number: after a join on a column, Spark may skip a repartition by that column and coalesce partitions freely.
    file = F.pmod(F.hash(sort[0]), F.lit(num_files))
    files = df.repartition(1) if num_files == 1 else df.repartitionById(num_files, file)
    files.sortWithinPartitions(*sort).write.parquet(str(out))
    _settle(out)


def write_partitions(df: DataFrame, out: Path, partition: str, sort: Sequence[str]) -> None:
    """Write `df` to `out/<value of partition>/`, sorted within each file; `out` may exist.

    A value of ordinary size gets one file; Spark spreads a large one over several tasks.
    """
    files = df.hint("rebalance", partition).sortWithinPartitions(partition, *sort)
    files.write.mode("append").partitionBy(partition).parquet(str(out))
    for folder in out.glob(f"{partition}=*"):
        _settle(folder.rename(out / folder.name.partition("=")[2]))


def _settle(folder: Path) -> None:
    """Give Spark's files plain names, in their order, and remove its hidden checksums and markers."""
    for file in folder.iterdir():
        if is_hidden(file.name):
            file.unlink()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"part-{i:05d}.parquet")


def literal(path: Path) -> str:
    """The path escaped for Spark's readers, which take [ and * for patterns."""
    return re.sub(r"([\\*?{}\[\]])", r"\\\1", str(path))


def num_files(spark: SparkSession) -> int:
    """The number of files, and of tasks, of a table that may be large: spark.shuffle_partitions."""
    return int(spark.conf.get("spark.sql.shuffle.partitions") or 1)


def read_table(spark: SparkSession, *paths: Path) -> DataFrame:
    """The rows of the Parquet folders `paths`. Raises ValueError naming the first that does not exist."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; run the step that writes it.")
    with readable(", ".join(map(str, paths))):
        return spark.read.parquet(*map(literal, paths))


def visible_files(path: Path) -> list[Path]:
    """The files that Spark reads of a table: `path` itself, or all files in the folder that are not hidden."""
    if not path.is_dir():
        return [path]
    paths: list[Path] = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        paths += [Path(folder) / name for name in files if not is_hidden(name)]
    return sorted(paths)


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Inside, Spark's failure to read a damaged file or an unsupported type is a ValueError that names the file.

    A task's BadInput becomes a ValueError with its sentence.
    """
    try:
        yield
    except (PySparkException, Py4JJavaError) as e:
        if bad_input := _BAD_INPUT.search(str(e)):
            raise ValueError(bad_input[1]) from e
        if any(sign in str(e) for sign in _UNREADABLE):
            path = unquote(file[1]) if (file := _DAMAGED_FILE.search(str(e))) else path
            raise ValueError(f"{path} is damaged, or not of the format its name says.") from e
        raise


@contextmanager
def replacing(out: Path, source: Path, columns: Sequence[str]) -> Iterator[Path]:
    """A path next to `out` for a new folder, which replaces `out` if the block ends without an error.

    Only a previous result is ever overwritten. Raises ValueError where `out` holds anything except the files of a table
    with `columns`, and where `out` overlaps `source`, the input of the result.
    """
    out = out.resolve()  # a link stays, and its target is replaced
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder.")
    if source.resolve().is_relative_to(out):
        raise ValueError(f"--out {out} holds the input {source}; name another folder.")
    if out.is_relative_to(source.resolve()):
        raise ValueError(f"--out {out} lies in the input {source}; name another folder.")
    foreign_files = [f.name for f in out.iterdir() if not _is_result(f, columns)] if out.exists() else []
    if foreign_files:
        raise ValueError(
            f"--out {out} holds {sorted(foreign_files)[0]}, which is no result of this command; name another folder."
        )
    with replaced_folder(out) as draft:
        draft.rmdir()  # Spark makes the folder itself
        yield draft


def _is_result(file: Path, columns: Sequence[str]) -> bool:
    if not re.fullmatch(r"part-\d{5,}\.parquet", file.name) or not file.is_file():
        return False
    try:
        return pq.read_schema(file).names == list(columns)
    except (OSError, pa.ArrowException):
        return False


def counts_by(df: DataFrame, column: str) -> dict[str, int]:
    """Rows per value of `column`, most frequent first; null counts as ""."""
    rows = df.groupBy(F.coalesce(F.col(column), F.lit("")).alias("key")).count().collect()
    return {r["key"]: r["count"] for r in sorted(rows, key=lambda r: (-r["count"], r["key"]))}


def top_counts(df: DataFrame, column: str, num: int = 20) -> dict[str, int]:
    """`counts_by` for a column with any number of values: the `num` most frequent, and the rest as "(others)"."""
    key = F.coalesce(F.col(column), F.lit("")).alias("key")
    rows = df.groupBy(key).count().orderBy(F.desc("count"), "key").limit(num + 1).collect()
    top = {r["key"]: r["count"] for r in rows[:num]}
    return top if len(rows) <= num else {**top, "(others)": df.count() - sum(top.values())}


def aggregates(df: DataFrame, **expressions: Column) -> dict[str, Any]:
    """The value of each aggregate expression over all rows, by name."""
    return df.agg(*(e.alias(name) for name, e in expressions.items())).collect()[0].asDict()


def pair_counts(pairs: DataFrame) -> dict[str, int]:
    """The number of pairs, of distinct queries, and of distinct notes (queries or targets)."""
    ends = pairs.select(F.explode(F.array("query_id", "target_id")).alias("note_id"))
    counted = aggregates(pairs, pairs=F.count("*"), queries=F.count_distinct("query_id"))
    return {**counted, "notes": ends.distinct().count()}
