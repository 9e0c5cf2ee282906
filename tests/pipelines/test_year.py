"""The simulated year: its plan, and its first week through the real daemon."""

import json
import os
from pathlib import Path

import pytest

from notellm2_core.simulation import world, year
from notellm2_core.simulation.year import ABSENT, AGAIN, BACKFILLS, LATE, NUM_WEEKS, ROLLED_BACK, WORSE
from pipelines.simulation import commands
from pipelines.simulation.rows import Row, disk_faults


def test_the_year_holds_what_a_loop_has_to_stand() -> None:
    assert (NUM_WEEKS, len(LATE), len(ABSENT), len(ROLLED_BACK)) == (52, 6, 2, 3)
    assert sum(len(weeks) for weeks in BACKFILLS.values()) == 4
    assert year.DURING_A_RUN in ROLLED_BACK
    special = [*LATE, *ABSENT, *ROLLED_BACK, *WORSE, *AGAIN]
    assert len(set(special)) == len(special) and max(special) < NUM_WEEKS
    for number, weeks in BACKFILLS.items():
        assert all(week < number - 1 for week in weeks)  # the sensor itself runs the last two
    assert {week for weeks in BACKFILLS.values() for week in weeks} >= ABSENT


def _rows(releases: list[int], lake_mb: list[float], history_mb: list[float]) -> list[Row]:
    weeks = zip(releases, lake_mb, history_mb, strict=True)
    return [
        Row("2025-02-02", "in time", "promoted", "", 60.0, "2025-02-02", num, lake, 30.0, history, seconds=1.0)
        for num, lake, history in weeks
    ]


def test_what_took_too_much_of_the_disk_is_said() -> None:
    good = [4] * 52, [30.0, *[250.0] * 51], [3.0, *[40.0] * 51]
    assert disk_faults(_rows(*good), keep=4) == []
    assert disk_faults(_rows([*[4] * 51, 8], *good[1:]), keep=4) == ["8 releases lay on the disk"]
    (lake,) = disk_faults(_rows(good[0], [*[30.0] * 51, 253.0], good[2]), keep=4)  # 1.2 * 7 * 30 = 252
    assert lake == "after 2025-02-02 the lake had 253 MB, and a release 30 MB"
    growing = [float(number) for number in range(52)]  # 25 MB in week 25, 51 MB in the last
    (history,) = disk_faults(_rows(*good[:2], growing), keep=4)
    assert history == "Dagster's database has grown from 25 MB in the second quarter to 51 MB"
    assert disk_faults(_rows([1], [30.0], [3.0]), keep=4) == []


@pytest.mark.slow
def test_a_week_through_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DAGSTER_HOME", "NOTELLM2_CONFIG", "SPARK_REMOTE", "JAVA_HOME", "SPARK_HOME", "SPARK_LOCAL_IP"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # which the simulation sets: back to what they were
        monkeypatch.delenv(name)
    monkeypatch.setattr(world, "NOTES_A_WEEK", 120)
    monkeypatch.setattr(world, "NUM_USERS", 300)
    code = commands.year(["--out", str(tmp_path / "year"), "--weeks", "1"])
    printed = capsys.readouterr().out
    assert code == 0, printed + (tmp_path / "year" / "daemon.log").read_text()[-6000:]
    (week,) = json.loads((tmp_path / "year" / "year.json").read_text())
    assert (week["logs"], week["decision"], week["live"]) == ("in time", "promoted", week["week"])
