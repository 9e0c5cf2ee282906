"""Splits without leakage: train notes and the candidate pool, training and validation pairs, and the leakage report."""

from functools import reduce
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from notellm2_core.config.data import HoldOutSettings
from notellm2_core.schema import NOTE_SPLIT, POOL, POOL_TABLE, RELATED_PAIRS, TEST, TRAIN
from spark_jobs.common.graph import checkpointed, clusters, components, hash_position, near_duplicates
from spark_jobs.common.tables import aggregates, counts_by, pair_counts, read_table, write_table


def assign_split(
    spark: SparkSession,
    notes: Path,
    events: Path,
    out: Path,
    settings: HoldOutSettings,
    images: Path | None = None,
) -> dict[str, Any]:
    """Notes and `events/{train,test}` -> `out/*.parquet` (NOTE_SPLIT).

    `images`: NOTE_IMAGES, which find near-duplicate images by content. Returns notes, notes_in_train_days,
    notes_in_test_days, train, pool, near_duplicate_groups (with two or more notes on a side),
    largest_near_duplicate_group (its notes; a large one hints at a placeholder image or text) and unassigned (notes in
    the windows that are on neither side). Raises ValueError for an empty side.
    """
    all_notes, train, test = (read_table(spark, p) for p in (notes, events / TRAIN, events / TEST))
    note_images = read_table(spark, images) if images is not None else None
    write_table(note_split(all_notes, train, test, settings, note_images), out, ["note_id"])
    sides = read_table(spark, out)
    counts = {"train": 0, "pool": 0, **counts_by(sides, "side")}
    in_train, in_test = (t.select("note_id").distinct() for t in (train, test))
    num_seen = in_train.union(in_test).distinct().count()
    sizes = aggregates(
        sides.groupBy("group_id").count(),
        near_duplicate_groups=F.count_if(F.col("count") > 1),
        largest_near_duplicate_group=F.max("count"),
    )
    for side, setting in (("train", "window.train_days"), ("pool", "window.test_days")):
        largest, placed = sizes["largest_near_duplicate_group"] or 0, counts["train"] + counts["pool"]
        if not counts[side] and 2 * largest > placed:
            raise ValueError(
                f"no note is left for the {side} side: {largest} of the {placed} notes on the other one have the same "
                "image or the same text, and near-duplicates stay on one side; leave placeholder images out of "
                "notes.parquet."
            )
        if not counts[side]:
            raise ValueError(
                f"no note is left for the {side} side of {num_seen} notes in the windows (split.by = {settings.by}); "
                f"set split.by, split.pool_share = {settings.pool_share} or {setting}."
            )
    return {
        "notes": all_notes.count(),
        "notes_in_train_days": in_train.count(),
        "notes_in_test_days": in_test.count(),
        **counts,
        **sizes,
        "unassigned": num_seen - counts["train"] - counts["pool"],
    }


def note_split(
    notes: DataFrame,
    train_events: DataFrame,
    test_events: DataFrame,
    settings: HoldOutSettings,
    images: DataFrame | None = None,
) -> DataFrame:
    """NOTES, INTERACTIONS, INTERACTIONS -> NOTE_SPLIT. Near-duplicates are never on different sides.

    time: notes with events in the training days form the train side, notes with events only in the test days the pool.
    A pool note with a near-duplicate on the train side is dropped from both.
    hash: the hash of a near-duplicate group decides its side, the pool for about `pool_share` of the groups. Train
    notes need events in the training days, pool notes in the test days.
    The pool is cut to the `max_pool_notes` notes with the lowest hash.
    """
    in_train = train_events.select("note_id").distinct().withColumn("in_train_days", F.lit(True))
    in_test = test_events.select("note_id").distinct().withColumn("in_test", F.lit(True))
    grouped = near_duplicates(notes, images)
    seen = grouped.join(in_train, "note_id", "left").join(in_test, "note_id", "left").na.fill(False)
    if settings.by == "time":
        touched = seen.groupBy("group_id").agg(F.bool_or("in_train_days").alias("touches_train"))
        seen = seen.join(touched, "group_id")
        is_train, is_pool = F.col("in_train_days"), F.col("in_test") & ~F.col("touches_train")
    else:
        in_pool = hash_position(F.col("group_id"), "side ") < settings.pool_share
        is_train, is_pool = F.col("in_train_days") & ~in_pool, F.col("in_test") & in_pool
    side = F.when(is_train, "train").when(is_pool, "pool")
    sides = seen.withColumn("side", side).filter("side IS NOT NULL").select(NOTE_SPLIT.names)
    if settings.max_pool_notes is None:
        return sides
    by_hash = hash_position(F.col("note_id"), "pool "), F.col("note_id")
    pool = sides.filter("side = 'pool'").orderBy(*by_hash).limit(settings.max_pool_notes)
    return sides.filter("side = 'train'").union(pool)


def split_pairs(pairs: DataFrame, sides: DataFrame, validation_share: float) -> tuple[DataFrame, DataFrame]:
    """RELATED_PAIRS of the train side -> (train, validation), without a note or a near-duplicate in both.

    Notes are assigned in units. A note's unit is the largest of these with at most `validation_share` of the pairs: its
    connected component in the pair graph, its cluster of strongest neighbours, its near-duplicate group. Units are
    ordered by hash; the first ones, until the share is met most nearly, are for validation. Pairs that straddle are in
    neither table: none if the components are small, two or three times the share if the graph is connected (four times
    with single notes as units).
    """
    if validation_share == 0:
        return pairs, pairs.limit(0)
    placed = checkpointed(_place(pairs, sides, validation_share))
    # A pair is in validation if both its ends are: the later end is the smallest border that includes it.
    later, earlier = F.greatest("query_position", "target_position"), F.least("query_position", "target_position")
    upto = F.sum("count").over(Window.orderBy("border")) / F.sum("count").over(Window.partitionBy())
    borders = placed.groupBy(later.alias("border")).count().withColumn("miss", F.abs(upto - validation_share))
    border = borders.orderBy("miss", "border").select("border").limit(1)
    placed = placed.crossJoin(F.broadcast(border))
    train = placed.filter(earlier > F.col("border")).select(RELATED_PAIRS.names)
    return train, placed.filter(later <= F.col("border")).select(RELATED_PAIRS.names)


def _place(pairs: DataFrame, sides: DataFrame, validation_share: float) -> DataFrame:
    """`pairs` with query_position and target_position, the hash positions of their notes' units."""
    groups = sides.select("note_id", "group_id")
    ends = pairs.join(groups.toDF("query_id", "query"), "query_id").join(
        groups.toDF("target_id", "target"), "target_id"
    )
    ends = checkpointed(ends)
    edges = ends.select(F.col("query").alias("a"), F.col("target").alias("b"), "score")
    units = components(edges).join(clusters(edges.filter("a != b")), "node", "left")
    largest = validation_share * edges.count()
    for level in ("cluster", "component"):
        inside = (
            edges.join(units.select(F.col("node").alias("a"), F.col(level).alias("unit")), "a")
            .join(units.select(F.col("node").alias("b"), F.col(level).alias("other")), "b")
            .filter("unit = other")
        )
        small = inside.groupBy("unit").count().filter(F.col("count") <= largest).select(F.col("unit").alias(level))
        units = units.join(small.withColumn(f"small_{level}", F.lit(True)), level, "left")
    unit = F.when(F.col("small_component"), F.col("component")).when(F.col("small_cluster"), F.col("cluster"))
    placed = units.select("node", hash_position(F.coalesce(unit, "node"), "validation ").alias("position"))
    return ends.join(placed.toDF("query", "query_position"), "query").join(
        placed.toDF("target", "target_position"), "target"
    )


def leakage(train: DataFrame, validation: DataFrame, test: DataFrame, sides: DataFrame) -> dict[str, int]:
    """RELATED_PAIRS three times, NOTE_SPLIT -> counts, by name, that must all be zero."""
    tables = {"train": train, "validation": validation, "test": test}
    ends = [
        pairs.select(F.explode(F.array("query_id", "target_id")).alias("note_id"), F.lit(place).alias("place"))
        for place, pairs in tables.items()
    ]
    sided = sides.select("note_id", F.concat(F.lit("side "), "side").alias("place"))
    flags = {
        name: F.bool_or(F.col("place") == place)
        for name, place in (
            *((name, name) for name in tables),
            ("train_side", "side train"),
            ("pool_side", "side pool"),
        )
    }
    by_note = reduce(DataFrame.union, ends, sided).groupBy("note_id").agg(*(f.alias(n) for n, f in flags.items()))
    groups = sides.select("note_id", "group_id").distinct()
    by_group = by_note.join(groups, "note_id").groupBy("group_id").agg(*(F.bool_or(n).alias(n) for n in flags))

    fitted = F.col("train") | F.col("validation")
    note_counts = aggregates(
        by_note,
        notes_on_both_sides=F.count_if(F.col("train_side") & F.col("pool_side")),
        train_notes_outside_train_side=F.count_if(fitted & ~F.col("train_side")),
        validation_notes_in_train_pairs=F.count_if(F.col("validation") & F.col("train")),
        test_notes_outside_pool=F.count_if(F.col("test") & ~F.col("pool_side")),
        test_notes_in_train_pairs=F.count_if(F.col("test") & fitted),
    )
    group_counts = aggregates(
        by_group,
        near_duplicate_groups_on_both_sides=F.count_if(F.col("train_side") & F.col("pool_side")),
        validation_groups_in_train_pairs=F.count_if(F.col("validation") & F.col("train")),
        test_groups_in_train_pairs=F.count_if(F.col("test") & fitted),
    )
    return {**note_counts, **group_counts}


def split(spark: SparkSession, pairs: Path, sides: Path, out: Path, validation_share: float) -> dict[str, Any]:
    """`pairs/{train,test}` -> `out/train`, `out/validation`, `out/test` (RELATED_PAIRS) and `out/pool` (POOL).

    Returns the pairs, queries and notes of each table of pairs, dropped_straddling, pool, and `leakage` (all zero).
    Raises ValueError where training or validation has no pairs.
    """
    note_side, all_train = read_table(spark, sides), read_table(spark, pairs / TRAIN)
    train, validation = split_pairs(all_train, note_side, validation_share)
    tables = {"train": train, "validation": validation, "test": read_table(spark, pairs / TEST)}
    counts: dict[str, Any] = {}
    for name, table in tables.items():
        write_table(table, out / name, ["query_id", "rank", "target_id"])
        tables[name] = read_table(spark, out / name)
        counts[name] = pair_counts(tables[name])
    num_pairs = all_train.count()
    if not counts["train"]["pairs"] or (validation_share and not counts["validation"]["pairs"]):
        raise ValueError(
            f"split.validation_share = {validation_share} cuts {num_pairs} pairs into {counts['train']['pairs']} for "
            f"training and {counts['validation']['pairs']} for validation; change it, or lower pairs.low."
        )
    pool = note_side.filter("side = 'pool'").select(POOL.names)
    write_table(pool, out / POOL_TABLE, ["note_id"])
    straddling = num_pairs - counts["train"]["pairs"] - counts["validation"]["pairs"]
    leaks = leakage(**tables, sides=note_side)
    return {**counts, "dropped_straddling": straddling, "pool": pool.count(), "leakage": leaks}
