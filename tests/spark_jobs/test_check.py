"""`notellm2 check` counts what the Spark jobs count, on a source that has every fault."""

import json
from datetime import date
from pathlib import Path
from random import Random
from typing import Any

from pyspark.sql import SparkSession

from notellm2_core.check.check import DataSettings, check_source
from notellm2_core.config.source import EventReadingSettings
from notellm2_core.tables.log import ingestion_metrics
from spark_jobs.clean import prepare_notes
from spark_jobs.ingest import ingest
from tests.spark_jobs.test_interactions import joined

NOTES = [
    "n0,A title,a|b,Some <b>text</b>,",
    "n1,,,,images/1.jpg",
    "n2,First,,,",
    " n2 ,Last,,,",
    "n3, , | ,\t,",
    "n4,one field too many,,,,,",
    "\\N,no id,,,",
    "n5,,,,images/5.jpg",
    "n6,empty in the end,,,",
    "n6,,,,",
]
MALFORMED, BAD_TIME, ABSURD_TIME = "one field", "u1,n0,yesterday,view", "u1,n0,2150-01-01,view"
FAULTS = [
    MALFORMED, BAD_TIME, BAD_TIME, ABSURD_TIME, "u1,n0,0,view", "u1,n0,1969-05-05,skip",
    ",n0,2024-01-03,view", "NULL, ,2024-01-03,view", "u1,nan,2024-01-10,click", "u1,n0,2024-01-03,",
    ",n0,2024-01-03,skip", "u1,n0,2024-01-03,fav", "u1,n0,2024-01-11,fav",
    "u1,n9,2024-01-04,view", "u2,n9,2024-01-11,click",
    "u1,n0,2023-12-31T23:59:59.999999,view", "u1,n0,2024-01-15,click",
]  # fmt: skip


def _write(source: Path, random: Random) -> None:
    """Two files: CSV with every fault, and JSON Lines with other rows, some repeated. Clicks have weights."""
    source.mkdir()
    (source / "notes.csv").write_text("\n".join(["note_id,title,topics,content,image_path", *NOTES]) + "\n")

    def row() -> list[Any]:
        time = f"2024-01-{random.randint(1, 16):02} 0{random.randint(0, 3)}:00:00"
        return [f"u{random.randint(0, 9)}", f"n{random.choice([0, 1, 2, 2, 3, 7])}", time,
                random.choice(["view", "view", "click", "skip", "other"]),
                random.choice(["1", "1", "0", "-1"])]  # fmt: skip

    rows = [row() for _ in range(400)]
    robot = [["robot", "n0", f"2024-01-09 00:00:{second:02}", "view", "1"] for second in range(40)]
    twice = [["twice", "n0", "2024-01-02", "view", "1"]] * 31  # one event, but 31 rows on a day
    (source / "events").mkdir()
    faults = [line if line == MALFORMED else f"{line},1" for line in FAULTS]
    lines = [
        "user_id,note_id,timestamp,event,strength",
        *faults,
        "u1,n0,2024-01-12,click,",
        *(",".join(row) for row in rows[:200] + twice),
    ]
    (source / "events" / "a.csv").write_text("\n".join(lines) + "\n")
    names = ("user_id", "note_id", "timestamp", "event", "strength")
    objects = [json.dumps(dict(zip(names, row, strict=True))) for row in rows[190:] + robot]
    (source / "events" / "b.jsonl").write_text("\n".join([*objects, "no object"]) + "\n")


def test_check_counts_what_the_jobs_count(spark: SparkSession, tmp_path: Path) -> None:
    source = tmp_path / "source"
    _write(source, Random(0))
    events = {"view_events": ["view"], "click_events": ["click"], "ignored_events": ["skip"], "max_events_per_day": 30}
    window = {"end": date(2024, 1, 15), "train_days": 7, "test_days": 7}
    columns = {"columns": {"weight": "strength"}}
    report = check_source(source, DataSettings.model_validate({"source": events | columns, "window": window}))

    notes = prepare_notes(spark, source, tmp_path / "notes")
    assert notes.pop("with_image") == report["images"]["named"] == 2
    assert {name: report["notes"][name] for name in notes} == notes
    assert notes["dropped"] == {"duplicate_note_id": 2, "empty_note": 2, "malformed_row": 1, "null_note_id": 1}

    reading = EventReadingSettings.model_validate(columns)
    log = ingestion_metrics(source, [ingest(spark, source, tmp_path / "raw", "week", reading=reading)])
    worst = {"file": "events/a.csv", "share": 6 / (len(FAULTS) + 232)}  # the graph ingests each file by itself
    assert report["log"] == log | {"most_undated": worst} and log["undated"] == 7
    counts = joined(
        spark, tmp_path / "raw", log, tmp_path / "joined", note_ids=["n0", "n1", "n2", "n5"], **events
    )  # fmt: skip
    for name in ("train", "test"):
        del counts[name]["first_day"], counts[name]["last_day"]
    assert report["interactions"] == counts
    assert {*counts["dropped"]} == {
        "malformed_row", "bad_timestamp", "absurd_timestamp", "null_user", "null_note", "unknown_event",
        "duplicate_event", "robot", "unknown_note", "bad_weight",
    }  # fmt: skip
    assert counts["robots"] == 2 and counts["dropped"]["robot"] == 41
