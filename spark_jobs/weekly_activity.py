"""The activity of each week of the windows: events, clicks, hours, concentration, and repetition.

A log that is damaged (delivered twice, shifted, flooded by robots) can hold valid rows only. It differs from its own
past, which these figures show.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import reduce
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_jobs.common.tables import read_table

BUSY = 10  # a user with more than so many times the events of the mean user is busy
_MICROSECONDS_OF_WEEK = 7 * 24 * 3600 * 1_000_000


def weekly_activity(
    spark: SparkSession, tables: Sequence[Path], start: date, end: date, num_weeks: int
) -> list[dict[str, Any]]:
    """The last `num_weeks` whole weeks of INTERACTIONS `tables` in [start, end), the oldest first.

    Weeks are counted back from `end`; one without events is left out. The partitions of the log have to be these weeks:
    a user and note has a row per partition. Each has

    - first_day, events, clicks, users
    - clicked, viewed_before: users and notes of a click, and those among them with an earlier view
    - hours: the share of the events in each hour of the day, UTC [24], by the first event of a user and note
    - top_note: the share of its events that fall on the busiest note
    - busy_users: the share of its events that come from users with more than BUSY times the mean user's
    - repeated: of its clicked users and notes, the largest share that was clicked in one of the weeks before; None for
      the oldest week
    """
    num_weeks = min(num_weeks, (end - start).days // 7)
    after = int(datetime.combine(end, time(), UTC).timestamp()) * 1_000_000
    age = F.floor((F.lit(after) - 1 - F.unix_micros("first_view")) / _MICROSECONDS_OF_WEEK).cast("int")
    columns = ("user_id", "note_id", "first_view", "last_click", "events", "clicks")
    rows = reduce(DataFrame.union, (read_table(spark, table).select(*columns) for table in tables))
    rows = rows.withColumn("age", age).filter(F.col("age").between(0, num_weeks - 1))
    by_pair = (
        rows.groupBy("age", "user_id", "note_id")
        .agg(
            F.min("first_view").alias("first_view"),
            F.max("last_click").alias("last_click"),
            F.sum("events").alias("events"),
            F.sum("clicks").alias("clicks"),
        )
        .persist()
    )
    figures = {r["age"]: r.asDict() for r in _sums(by_pair).collect()}
    for table in (_top_note(by_pair), _busy_users(by_pair)):
        for row in table.collect():
            figures[row["age"]].update(row.asDict())
    hours = {(r["age"], r["hour"]): r["events"] for r in _hours(by_pair).collect()}
    repeated = {r["age"]: r["repeated"] for r in _repeated(by_pair).collect()}
    by_pair.unpersist()
    weeks: list[dict[str, Any]] = []
    for age in sorted(figures, reverse=True):
        week = figures[age]
        num_events = week["events"]
        weeks.append(
            {
                "first_day": str(end - timedelta(days=7 * (week.pop("age") + 1))),
                **week,
                "hours": [hours.get((age, hour), 0) / num_events for hour in range(24)],
                "repeated": repeated.get(age, 0) / week["clicked"] if weeks and week["clicked"] else None,
            }
        )
    return weeks


def _sums(by_pair: DataFrame) -> DataFrame:
    return by_pair.groupBy("age").agg(
        F.sum("events").alias("events"),
        F.sum("clicks").alias("clicks"),
        F.count_distinct("user_id").alias("users"),
        F.count("last_click").alias("clicked"),
        F.count_if(F.col("first_view") < F.col("last_click")).alias("viewed_before"),
    )


def _hours(by_pair: DataFrame) -> DataFrame:
    hour = (F.floor(F.unix_micros("first_view") / (3600 * 1_000_000)) % 24).cast("int")  # UTC in any time zone
    return by_pair.groupBy("age", hour.alias("hour")).agg(F.sum("events").alias("events"))


def _top_note(by_pair: DataFrame) -> DataFrame:
    by_note = by_pair.groupBy("age", "note_id").agg(F.sum("events").alias("events"))
    return by_note.groupBy("age").agg((F.max("events") / F.sum("events")).alias("top_note"))


def _busy_users(by_pair: DataFrame) -> DataFrame:
    by_user = by_pair.groupBy("age", "user_id").agg(F.sum("events").alias("events"))
    usual = by_user.groupBy("age").agg(F.mean("events").alias("usual"))
    busy = F.sum(F.when(F.col("events") > BUSY * F.col("usual"), F.col("events")).otherwise(0)) / F.sum("events")
    return by_user.join(usual, "age").groupBy("age").agg(busy.alias("busy_users"))


def _repeated(by_pair: DataFrame) -> DataFrame:
    """For each week but the oldest, the largest number of its clicked users and notes that an earlier week had."""
    clicked = by_pair.filter(F.isnotnull("last_click")).select("age", "user_id", "note_id")
    earlier = clicked.withColumnRenamed("age", "earlier")
    common = clicked.join(earlier, ["user_id", "note_id"]).filter("earlier > age").groupBy("age", "earlier").count()
    return common.groupBy("age").agg(F.max("count").alias("repeated"))
