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
    interactions: Path,
    out: Path,
    settings: HoldOutSettings,
    images: Path | None = None,
) -> dict[str, Any]:
    """NOTES and `interactions/{train,test}` (INTERACTIONS) -> `out/*.parquet` (NOTE_SPLIT).

    `images`: NOTE_IMAGES, to find near-duplicate images by their content.

    Returns notes, notes_in_train_days, notes_in_test_days, train, pool, near_duplicate_groups (with two or more notes
    in a split), largest_near_duplicate_group (its number of notes; a large group hints at a placeholder image or text)
    and unassigned (notes in the windows that are in neither split). Raises ValueError for an empty split.
    """
    all_notes, train, test = (read_table(spark, p) for p in (notes, interactions / TRAIN, interactions / TEST))
    note_images = read_table(spark, images) if images is not None else None
    write_table(note_split(all_notes, train, test, settings, note_images), out, ["note_id"])
    splits = read_table(spark, out)
    counts = {"train": 0, "pool": 0, **counts_by(splits, "side")}
    in_train, in_test = (t.select("note_id").distinct() for t in (train, test))
    num_in_windows = in_train.union(in_test).distinct().count()
    sizes = aggregates(
        splits.groupBy("group_id").count(),
        near_duplicate_groups=F.count_if(F.col("count") > 1),
        largest_near_duplicate_group=F.max("count"),
    )
    largest, num_assigned = sizes["largest_near_duplicate_group"] or 0, counts["train"] + counts["pool"]
    for split, setting in (("train", "window.train_days"), ("pool", "window.test_days")):
        if not counts[split] and 2 * largest > num_assigned:
            raise ValueError(
                f"no note is left for the {split} split: {largest} of the {num_assigned} notes in the other one have "
                "the same image or the same text, and near-duplicates stay in one split. A placeholder image makes "
                "notes near-duplicates; source.columns.image_path: null reads notes without images."
            )
        if not counts[split]:
            raise ValueError(
                f"no note is left for the {split} split of {num_in_windows} notes in the windows (split.by = "
                f"{settings.by}); set split.by, split.pool_share = {settings.pool_share} or {setting}."
            )
    return {
        "notes": all_notes.count(),
        "notes_in_train_days": in_train.count(),
        "notes_in_test_days": in_test.count(),
        **counts,
        **sizes,
        "unassigned": num_in_windows - num_assigned,
    }


def note_split(
    notes: DataFrame,
    train_interactions: DataFrame,
    test_interactions: DataFrame,
    settings: HoldOutSettings,
    images: DataFrame | None = None,
) -> DataFrame:
    """NOTES, INTERACTIONS, INTERACTIONS -> NOTE_SPLIT. Near-duplicates are never in different splits.

    `by` = time: notes with interactions in the training days are the train split. Notes with interactions in the test
    days alone are the pool, except near-duplicates of train notes: these are in neither.
    `by` = hash: the hash of a near-duplicate group decides its split, the pool for about `pool_share` of the groups.
    Train notes need interactions in the training days, pool notes in the test days.

    `max_pool_notes` limits the pool to that many notes, those with the lowest hash.
    """
    in_train = train_interactions.select("note_id").distinct().withColumn("in_train_days", F.lit(True))
    in_test = test_interactions.select("note_id").distinct().withColumn("in_test_days", F.lit(True))
    groups = near_duplicates(notes, images)
    note_days = groups.join(in_train, "note_id", "left").join(in_test, "note_id", "left").na.fill(False)
    if settings.by == "time":
        group_days = note_days.groupBy("group_id").agg(F.bool_or("in_train_days").alias("group_in_train_days"))
        note_days = note_days.join(group_days, "group_id")
        is_train, is_pool = F.col("in_train_days"), F.col("in_test_days") & ~F.col("group_in_train_days")
    else:
        in_pool = hash_position(F.col("group_id"), "side ") < settings.pool_share  # the salt is part of the split
        is_train, is_pool = F.col("in_train_days") & ~in_pool, F.col("in_test_days") & in_pool
    split = F.when(is_train, "train").when(is_pool, "pool")
    splits = note_days.withColumn("side", split).filter("side IS NOT NULL").select(NOTE_SPLIT.names)
    if settings.max_pool_notes is None:
        return splits
    by_hash = hash_position(F.col("note_id"), "pool "), F.col("note_id")
    pool = splits.filter("side = 'pool'").orderBy(*by_hash).limit(settings.max_pool_notes)
    return splits.filter("side = 'train'").union(pool)


def split_pairs(pairs: DataFrame, splits: DataFrame, validation_share: float) -> tuple[DataFrame, DataFrame]:
    """RELATED_PAIRS of the train split -> (train, validation). No note is in both, and no near-duplicate of one.

    Notes are assigned in units. A note's unit is the first of these with at most `validation_share` of the pairs: its
    connected component in the pair graph, its cluster of strongest neighbours, else its near-duplicate group.

    Units are ordered by hash. The first units are for validation; they end where the validation pairs are closest to
    `validation_share`.

    Pairs between a validation unit and a training unit are dropped. With small components none are. With a connected
    graph they are two or three times the share (four times, if single notes were the units).

    `splits`: NOTE_SPLIT.
    """
    if validation_share == 0:
        return pairs, pairs.limit(0)
    pairs = checkpointed(_with_positions(pairs, splits, validation_share))
    # A pair is in validation if both its notes are: the later position is the smallest border that includes it.
    later, earlier = F.greatest("query_position", "target_position"), F.least("query_position", "target_position")
    upto = F.sum("count").over(Window.orderBy("border")) / F.sum("count").over(Window.partitionBy())
    borders = pairs.groupBy(later.alias("border")).count().withColumn("miss", F.abs(upto - validation_share))
    border = borders.orderBy("miss", "border").select("border").limit(1)
    pairs = pairs.crossJoin(F.broadcast(border))
    train = pairs.filter(earlier > F.col("border")).select(RELATED_PAIRS.names)
    return train, pairs.filter(later <= F.col("border")).select(RELATED_PAIRS.names)


def _with_positions(pairs: DataFrame, splits: DataFrame, validation_share: float) -> DataFrame:
    """`pairs` with query_position and target_position, the hash positions of their notes' units."""
    groups = splits.select("note_id", "group_id")
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
    positions = units.select("node", hash_position(F.coalesce(unit, "node"), "validation ").alias("position"))
    return ends.join(positions.toDF("query", "query_position"), "query").join(
        positions.toDF("target", "target_position"), "target"
    )


def leakage(train: DataFrame, validation: DataFrame, test: DataFrame, splits: DataFrame) -> dict[str, int]:
    """RELATED_PAIRS of the three tables and NOTE_SPLIT -> counts of leaks by name; all must be zero."""
    tables = {"train": train, "validation": validation, "test": test}
    pair_notes = [
        pairs.select(F.explode(F.array("query_id", "target_id")).alias("note_id"), F.lit(name).alias("table"))
        for name, pairs in tables.items()
    ]
    split_notes = splits.select("note_id", F.concat(F.lit("split "), "side").alias("table"))
    flags = {
        name: F.bool_or(F.col("table") == table)
        for name, table in (
            *((name, name) for name in tables),
            ("train_split", "split train"),
            ("pool_split", "split pool"),
        )
    }
    all_notes = reduce(DataFrame.union, pair_notes, split_notes)
    by_note = all_notes.groupBy("note_id").agg(*(f.alias(n) for n, f in flags.items()))
    groups = splits.select("note_id", "group_id").distinct()
    by_group = by_note.join(groups, "note_id").groupBy("group_id").agg(*(F.bool_or(n).alias(n) for n in flags))

    fitted = F.col("train") | F.col("validation")
    note_counts = aggregates(
        by_note,
        notes_on_both_sides=F.count_if(F.col("train_split") & F.col("pool_split")),
        train_notes_outside_train_side=F.count_if(fitted & ~F.col("train_split")),
        validation_notes_in_train_pairs=F.count_if(F.col("validation") & F.col("train")),
        test_notes_outside_pool=F.count_if(F.col("test") & ~F.col("pool_split")),
        test_notes_in_train_pairs=F.count_if(F.col("test") & fitted),
    )
    group_counts = aggregates(
        by_group,
        near_duplicate_groups_on_both_sides=F.count_if(F.col("train_split") & F.col("pool_split")),
        validation_groups_in_train_pairs=F.count_if(F.col("validation") & F.col("train")),
        test_groups_in_train_pairs=F.count_if(F.col("test") & fitted),
    )
    return {**note_counts, **group_counts}


def split(spark: SparkSession, pairs: Path, note_split: Path, out: Path, validation_share: float) -> dict[str, Any]:
    """`pairs/{train,test}` -> `out/train`, `out/validation`, `out/test` (RELATED_PAIRS) and `out/pool` (POOL).

    Returns the numbers of pairs, queries and notes of each table of pairs, dropped_straddling (pairs between training
    and validation notes), pool (its notes), and `leakage` (all zero). Raises ValueError where training or validation
    has no pairs.
    """
    splits, all_train = read_table(spark, note_split), read_table(spark, pairs / TRAIN)
    train, validation = split_pairs(all_train, splits, validation_share)
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
    pool = splits.filter("side = 'pool'").select(POOL.names)
    write_table(pool, out / POOL_TABLE, ["note_id"])
    straddling = num_pairs - counts["train"]["pairs"] - counts["validation"]["pairs"]
    leaks = leakage(**tables, splits=splits)
    return {**counts, "dropped_straddling": straddling, "pool": pool.count(), "leakage": leaks}
