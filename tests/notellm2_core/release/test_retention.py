"""What a sweep of the lake removes, and what it never does."""

import mmap
from datetime import date, timedelta
from pathlib import Path

import pytest

from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger, Subject
from notellm2_core.release.retention import lake_bytes, sweep_lake
from notellm2_core.release.served import mark_served

NOW = timedelta(0)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Five weeks: each has a log, a checkpoint of 10 kB made from it, and a release of both."""
    lake = Lake(tmp_path)
    ledger = Ledger(tmp_path, "demo")
    for n in range(5):
        _week(lake, f"{n}")
        ledger.decide("promoted", Subject(f"r{n}", f"c{n}", str(date(2025, 1, 5) + timedelta(weeks=n))), "It passed.")
    return lake


def _week(lake: Lake, n: str) -> None:
    _publish(lake, "ingestion", f"i{n}", {}, {"part.parquet.txt": n})
    with lake.publish("raw_events", f"e{n}", {}, {}) as draft:
        for earlier in range(int(n) + 1):
            source = lake.open("ingestion", f"i{earlier}")
            draft.link(f"2025/i{earlier}-part.txt", source, "part.parquet.txt")
    checksum = lake.open("ingestion", f"i{n}").manifest.files["part.parquet.txt"]["sha256"]
    _publish(lake, "log_partition", f"p{n}", {}, {"x.txt": n}, files=[checksum])
    _publish(lake, "checkpoint", f"c{n}", {"raw_events": f"e{n}"}, {"weights": n * 10_000})
    _publish(lake, "release", f"r{n}", {"checkpoint": f"c{n}"}, {"verdict": n})


def _publish(
    lake: Lake, name: str, key: str, inputs: dict[str, str], contents: dict[str, str], **settings: object
) -> None:
    with lake.publish(name, key, inputs, settings) as draft:
        for file, content in contents.items():
            (draft.path / file).write_text(content)


def _left(lake: Lake, name: str) -> list[str]:
    return sorted(path.name for path in (lake.root / name).iterdir())


def test_only_what_a_kept_release_needs_stays(lake: Lake) -> None:
    before = lake_bytes(lake)
    swept = sweep_lake(lake, "demo", keep_releases=1, anchor_weeks=2, grace=NOW)
    assert _left(lake, "release") == ["r2", "r3", "r4"]  # anchor, previous, champion
    assert _left(lake, "checkpoint") == ["c2", "c3", "c4"] and _left(lake, "raw_events") == ["e2", "e3", "e4"]
    assert _left(lake, "ingestion") == [f"i{n}" for n in range(5)]  # the log of the last week holds them all
    assert _left(lake, "log_partition") == [f"p{n}" for n in range(5)]
    assert swept.num_datasets == 6 and swept.lake_bytes == lake_bytes(lake) < before
    assert swept.removed_bytes == before - swept.lake_bytes
    assert sweep_lake(lake, "demo", 1, 2, NOW).num_datasets == 0


def test_the_present_run_young_datasets_and_other_configurations_stay(lake: Lake) -> None:
    assert sweep_lake(lake, "demo", 1, 2, timedelta(days=1)).num_datasets == 0
    Ledger(lake.root, "another").decide("refused", Subject("r0", "c0", "2025-01-05"), "It lost.")
    sweep_lake(lake, "demo", 1, 2, NOW, present=[("checkpoint", "c1")])
    assert _left(lake, "release") == ["r0", "r2", "r3", "r4"] and "c1" in _left(lake, "checkpoint")


def test_what_a_service_has_in_memory_stays(lake: Lake) -> None:
    mark_served(lake, "r1")
    mark_served(lake, "gone")
    sweep_lake(lake, "demo", 1, 2, NOW)
    assert _left(lake, "release") == ["r1", "r2", "r3", "r4"] and _left(lake, "serving") == ["r1"]


def test_a_log_that_no_kept_release_read_takes_its_copies_along(lake: Lake) -> None:
    _publish(lake, "ingestion", "old", {}, {"part.txt": "gone from the source"})
    _publish(lake, "log_partition", "old", {}, {"x.txt": "x"}, files=["another checksum"])
    sweep_lake(lake, "demo", 1, 2, NOW)
    assert "old" not in [*_left(lake, "ingestion"), *_left(lake, "log_partition")]


def test_unfinished_work_of_what_nothing_needs_goes(lake: Lake) -> None:
    for key in ("c4", "given up"):
        folder = lake.root / ".work" / "checkpoint" / key / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "step-5").write_text("x")
    assert sweep_lake(lake, "demo", 1, 2, NOW).num_work_folders == 1
    assert _left(lake, ".work/checkpoint") == ["c4"]


def test_what_a_service_made_of_a_release_goes_with_it(lake: Lake) -> None:
    for n in (0, 4):
        (lake.root / "serving" / f"r{n}").mkdir(parents=True)
        (lake.root / "serving" / f"r{n}" / "rows.npy").write_text("rows")
    sweep_lake(lake, "demo", 1, 1, NOW)
    assert "r0" not in _left(lake, "release") and _left(lake, "serving") == ["r4"]


def test_a_file_that_is_open_stays_readable(lake: Lake) -> None:
    with (lake.path("checkpoint", "c0") / "weights").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        sweep_lake(lake, "demo", 1, 2, NOW)
        assert not lake.path("checkpoint", "c0").exists() and mapped[:3] == b"000"
        mapped.close()


def test_what_was_posted_stays_as_long_as_notes_that_were_made_of_it(lake: Lake) -> None:
    for mark, made in (("m0", "n0"), ("m1", "n1")):
        _publish(lake, "posted_notes", mark, {}, {"posted.txt": mark})
        _publish(lake, "notes", made, {}, {"notes.txt": made}, posted=mark)
    sweep_lake(lake, "demo", keep_releases=1, anchor_weeks=2, grace=NOW, present=[("notes", "n1")])
    assert _left(lake, "notes") == ["n1"] and _left(lake, "posted_notes") == ["m1"]
