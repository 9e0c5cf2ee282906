import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core import schema
from notellm2_core.config.data import HoldOutSettings
from spark_jobs.common.tables import write_table
from spark_jobs.split import assign_split, leakage, note_split, split, split_pairs
from tests.spark_jobs.conftest import EVENTS, NOTES, SCORES, SIDES, Frame, at, rows_of

PAIRS = SCORES + ", rank int"


def notes_of(frame: Frame, names: list[str], same: dict[str, str] | None = None) -> DataFrame:
    """Notes with texts of their own, or the text that `same` says."""
    return frame(NOTES, [(n, (same or {}).get(n, n), [], "", None, None) for n in names])


def seen(frame: Frame, names: list[str]) -> DataFrame:
    return frame(EVENTS, [("u", n, at(0), "view") for n in names])


def place(name: str, salt: str) -> float:
    """`hash_position`, with Python's own hash."""
    return int(hashlib.sha256(f"{salt} {name}".encode()).hexdigest()[:13], 16) / 2**52


def sides_of(df: DataFrame) -> dict[str, str]:
    return dict(rows_of(df, "note_id", "side"))


def test_by_time_a_near_duplicate_of_a_train_note_is_in_neither(frame: Frame) -> None:
    """old, both: training days. both, new, twin: test days. twin has old's text, so it is dropped. idle: no events."""
    notes = notes_of(frame, ["old", "both", "new", "twin", "idle"], {"old": "Same  TEXT", "twin": " same text"})
    days = seen(frame, ["old", "both"]), seen(frame, ["both", "new", "twin"])
    assert sides_of(note_split(notes, *days, HoldOutSettings(by="time"))) == {
        "old": "train",
        "both": "train",
        "new": "pool",
    }


def test_by_hash_whole_groups_take_sides(frame: Frame) -> None:
    names = [f"n{i:03d}" for i in range(200)]
    twins = {n: f"text {i // 2}" for i, n in enumerate(names[:60])}  # pairs of near-duplicates
    notes, events = notes_of(frame, names, twins), seen(frame, names)
    by_hash = HoldOutSettings(by="hash", pool_share=0.3)
    sides = note_split(notes, events, events, by_hash).persist()
    group = {n: names[i // 2 * 2] if i < 60 else n for i, n in enumerate(names)}
    assert dict(rows_of(sides, "note_id", "group_id")) == group
    expected = {n: "pool" if place(group[n], "side") < 0.3 else "train" for n in names}
    assert sides_of(sides) == expected
    assert 0.2 < sum(s == "pool" for s in expected.values()) / 200 < 0.4
    # The pool's lowest hashes are kept, the train side stays; notes without events in their side's days are left out.
    five = HoldOutSettings(by="hash", pool_share=0.3, max_pool_notes=5)
    cut = sides_of(note_split(notes, events, events, five))
    pool = sorted((n for n, s in expected.items() if s == "pool"), key=lambda n: place(n, "pool"))
    assert sorted(n for n, s in cut.items() if s == "pool") == sorted(pool[:5])
    assert sum(s == "train" for s in cut.values()) == sum(s == "train" for s in expected.values())
    halves = sides_of(note_split(notes, seen(frame, names[:100]), seen(frame, names[100:]), by_hash))
    assert halves == {n: s for n, s in expected.items() if (s == "train") == (n < "n100")}
    cold = note_split(notes, seen(frame, names[:150]), seen(frame, names[100:]), by_hash)
    assert dict(rows_of(cold, "note_id", "in_train_days")) == {
        n: n < "n150" for n, s in expected.items() if (n < "n150" and s == "train") or (n >= "n100" and s == "pool")
    }


def test_assign_sides_counts_and_names_the_setting(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    write_table(notes_of(frame, ["a", "b", "c", "d"], {"a": "x", "b": "x", "c": "x"}), tmp_path / "notes", ["note_id"])
    write_table(seen(frame, ["a", "b"]), tmp_path / "events" / "train", ["user_id"])
    write_table(seen(frame, ["c", "d"]), tmp_path / "events" / "test", ["user_id"])
    by_time = HoldOutSettings(by="time")
    counts = assign_split(spark, tmp_path / "notes", tmp_path / "events", tmp_path / "sides", by_time)
    assert counts == {
        "notes": 4, "notes_in_train_days": 2, "notes_in_test_days": 2, "train": 2, "pool": 1,
        "near_duplicate_groups": 1, "largest_near_duplicate_group": 2, "unassigned": 1,
    }  # fmt: skip
    table = pq.read_table(tmp_path / "sides")
    assert [(f.name, f.type) for f in table.schema] == [(f.name, f.type) for f in schema.NOTE_SPLIT]
    # All four have the same image, so all belong to the train side.
    columns = "note_id string, image_id string, perceptual_hash string, status string"
    images = frame(columns, [(n, "i", None, "ok") for n in "abcd"])
    write_table(images, tmp_path / "images", ["note_id"])
    with pytest.raises(ValueError, match=r"no note is left for the pool side: 2 of the 2 notes .* same image"):
        assign_split(spark, tmp_path / "notes", tmp_path / "events", tmp_path / "s2", by_time, tmp_path / "images")
    write_table(seen(frame, ["a", "d"]), tmp_path / "known" / "train", ["user_id"])
    write_table(seen(frame, ["d"]), tmp_path / "known" / "test", ["user_id"])
    with pytest.raises(ValueError, match=r"no note is left for the pool side of 2 notes.*split.by = time.*test_days"):
        assign_split(spark, tmp_path / "notes", tmp_path / "known", tmp_path / "s3", by_time)


def pairs_and_sides(frame: Frame, edges: list[tuple[int, int]]) -> tuple[DataFrame, DataFrame]:
    names = sorted({f"n{i}" for edge in edges for i in edge})
    pairs = frame(PAIRS, [(f"n{a}", f"n{b}", 1.0 / (1 + abs(a - b)), 1, 1) for a, b in edges])
    return pairs, frame(SIDES, [(n, "train", n) for n in names])


def test_small_components_are_cut_without_loss(frame: Frame) -> None:
    """60 islands of 3 notes and 4 pairs each: a tenth of the 240 pairs is 6 islands, and nothing straddles."""
    islands = [(3 * i + a, 3 * i + b) for i in range(60) for a, b in ((0, 1), (1, 0), (1, 2), (2, 1))]
    train, validation = split_pairs(*pairs_and_sides(frame, islands), validation_share=0.1)
    assert (train.count(), validation.count()) == (216, 24)


def test_one_large_component_is_cut_in_clusters(frame: Frame) -> None:
    """20 circles of 15 notes, each note tied to the next two and every fifth to another circle: all hang together. No
    note is on both sides, the share is nearly met, and less is lost than the 43 % of a cut by single notes."""
    inside = [(15 * c + i, 15 * c + (i + step) % 15) for c in range(20) for i in range(15) for step in (1, 2)]
    between = [(i, (i * 7 + 31) % 300) for i in range(0, 300, 5)]
    ring = inside + between
    train, validation = (t.collect() for t in split_pairs(*pairs_and_sides(frame, ring), validation_share=0.1))
    notes = [{n for p in table for n in (p.query_id, p.target_id)} for table in (train, validation)]
    assert not notes[0] & notes[1]
    assert 0.05 < len(validation) / len(ring) < 0.15
    assert len(train) + len(validation) > 0.65 * len(ring)


def test_no_validation_wanted(frame: Frame) -> None:
    train, validation = split_pairs(*pairs_and_sides(frame, [(1, 2)]), validation_share=0)
    assert (train.count(), validation.count()) == (1, 0)


@pytest.fixture
def related(frame: Frame, tmp_path: Path) -> Path:
    """A random graph of 120 train notes, where n0 and n1 are near-duplicates, and 3 test pairs in a pool of 10."""
    rng = random.Random(0)
    edges = sorted({(a, (a + rng.randint(1, 5)) % 120) for a in range(120) for _ in range(2)})
    pairs, sides = pairs_and_sides(frame, edges)
    pool = frame(SIDES, [(f"p{i}", "pool", f"p{i}") for i in range(10)])
    twins = sides.replace({"n1": "n0"}, subset=["group_id"])
    write_table(pairs, tmp_path / "pairs" / "train", ["query_id"])
    write_table(
        frame(PAIRS, [("p1", f"p{i}", 1.0, 1, i) for i in (2, 3, 4)]), tmp_path / "pairs" / "test", ["query_id"]
    )
    all_sides = twins.union(pool).withColumn("in_train_days", F.col("note_id") != "p1")
    write_table(all_sides, tmp_path / "sides", ["note_id"])
    return tmp_path


def test_split_writes_disjoint_tables_the_same_on_every_run(spark: SparkSession, related: Path) -> None:
    runs = [split(spark, related / "pairs", related / "sides", related / out, 0.1) for out in ("a", "b")]
    assert runs[0] == runs[1]
    for file in (related / "a").rglob("*.parquet"):
        assert file.read_bytes() == (related / "b" / file.relative_to(related / "a")).read_bytes()
    counts = runs[0]
    assert set(counts["leakage"].values()) == {0} and len(counts["leakage"]) == 8
    assert counts["pool"] == 10 and counts["test"]["pairs"] == 3 and counts["test"]["notes"] == 4
    total = pq.read_table(related / "pairs" / "train").num_rows
    assert counts["train"]["pairs"] + counts["validation"]["pairs"] + counts["dropped_straddling"] == total
    assert 0 < counts["validation"]["pairs"] < 0.2 * total
    schema_of = pq.read_table(related / "a" / "validation").schema
    assert [(f.name, f.type) for f in schema_of] == [(f.name, f.type) for f in schema.RELATED_PAIRS]
    pool = pq.read_table(related / "a" / "pool")
    assert [(f.name, f.type) for f in pool.schema] == [(f.name, f.type) for f in schema.POOL]
    assert [row["note_id"] for row in pool.to_pylist() if not row["in_train_days"]] == ["p1"]


def test_too_few_pairs_to_split(spark: SparkSession, frame: Frame, tmp_path: Path) -> None:
    pairs, sides = pairs_and_sides(frame, [(1, 2)])
    for window in ("train", "test"):
        write_table(pairs, tmp_path / "pairs" / window, ["query_id"])
    write_table(sides, tmp_path / "sides", ["note_id"])
    with pytest.raises(ValueError, match="split.validation_share = 0.4 cuts 1 pairs into"):
        split(spark, tmp_path / "pairs", tmp_path / "sides", tmp_path / "out", 0.4)


def test_leakage_finds_each_kind(frame: Frame) -> None:
    def pairs(*edges: str) -> DataFrame:
        return frame(PAIRS, [(e[0], e[1], 1.0, 1, 1) for e in edges])

    def leaks(sides: list[Any], **tables: DataFrame) -> dict[str, int]:
        clean = {"train": pairs("ab"), "validation": pairs("cd"), "test": pairs("xy")}
        found = leakage(**{**clean, **tables}, sides=frame(SIDES, sides))
        return {name: count for name, count in found.items() if count}

    sides = [(n, "train", n) for n in "abcd"] + [(n, "pool", n) for n in "xy"]
    assert leaks(sides) == {}
    twins = [(n, s, "a" if n in "acx" else g) for n, s, g in sides]
    assert leaks(twins) == {
        "near_duplicate_groups_on_both_sides": 1,
        "validation_groups_in_train_pairs": 1,
        "test_groups_in_train_pairs": 1,
    }
    assert leaks([*sides, ("x", "train", "x")])["notes_on_both_sides"] == 1
    assert leaks(sides, validation=pairs("cb"))["validation_notes_in_train_pairs"] == 1
    outside = leaks(sides, test=pairs("xa"))
    assert outside["test_notes_outside_pool"] == 1 and outside["test_notes_in_train_pairs"] == 1
    assert leaks(sides, train=pairs("ax"))["train_notes_outside_train_side"] == 1
