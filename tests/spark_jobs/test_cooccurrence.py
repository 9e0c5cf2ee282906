import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from notellm2_core import schema
from notellm2_core.config.data import EventSettings, ScoringSettings
from spark_jobs import cooccurrence as job
from spark_jobs.common.tables import write_table
from spark_jobs.cooccurrence import cooccurrence, score, target_clicks
from spark_jobs.interactions import interactions
from tests.spark_jobs.conftest import EVENTS, Frame, at, rows_of
from tests.spark_jobs.test_source import write_csv

NAMES = EventSettings(view_events=["view"], click_events=["click"], ignored_events=None)
Log = list[tuple[str, str, int, str]]
Scores = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def scores_of(spark: SparkSession, tmp_path: Path) -> Scores:
    """A function that runs `cooccurrence` and returns the rows that it writes."""
    numbers = count()

    def compute(events: DataFrame, **settings: Any) -> list[tuple[Any, ...]]:
        out = tmp_path / f"scores{next(numbers)}"
        counts = cooccurrence(interactions(events, NAMES), out, ScoringSettings(**settings))
        assert {f.name[:5] for f in out.iterdir()} <= {"part-"}  # nothing hidden is left
        rows = [tuple(r.values()) for file in sorted(out.iterdir()) for r in pq.read_table(file).to_pylist()]
        assert counts["pairs"] == len(rows) and counts["queries"] == len({r[0] for r in rows})
        return rows

    return compute


def brute_force(log: Log, simultaneous: bool) -> dict[tuple[str, str], tuple[Fraction, int]]:
    """Eq. 2, literally: for every ordered pair of notes, the users who saw A and later clicked B."""
    clicked = defaultdict(set)
    for user, note, _, event in log:
        if event == "click":
            clicked[user].add(note)
    users = defaultdict(set)
    for user, a, seen_at, _ in log:
        for other, b, clicked_at, name in log:
            followed = seen_at <= clicked_at if simultaneous else seen_at < clicked_at
            if user == other and a != b and name == "click" and followed:
                users[a, b].add(user)
    return {pair: (sum(Fraction(1, len(clicked[u])) for u in us), len(us)) for pair, us in users.items()}


def test_worked_example(frame: Frame, scores_of: Scores) -> None:
    """Three users; the numbers are seconds:

    u1  view A 1, click B 2, click C 3, view B 9        N = 2 (B, C)
    u2  click B 5, view A 5, click C 5                  N = 2 (B, C), all at one time
    u3  view A 1, click B 2, click B 4, view C 3        N = 1 (B)

    Strict: A->B from u1 (1 < 2) and u3 (1 < 4): 1/2 + 1/1 = 3/2. A->C from u1: 1/2. B->C from u1 (the click on B at 2
    is a view too): 1/2. C->B from u3, as its last click on B is at 4, after the view of C at 3: 1. u1's C->B is not:
    its last click on B is at 2. u2 adds nothing.
    Simultaneous: u2 adds 1/2 to A->B, A->C, B->C and C->B.
    """
    log = [
        ("u1", "A", 1, "view"), ("u1", "B", 2, "click"), ("u1", "C", 3, "click"), ("u1", "B", 9, "view"),
        ("u2", "B", 5, "click"), ("u2", "A", 5, "view"), ("u2", "C", 5, "click"),
        ("u3", "A", 1, "view"), ("u3", "B", 2, "click"), ("u3", "B", 4, "click"), ("u3", "C", 3, "view"),
    ]  # fmt: skip
    events = frame(EVENTS, [(u, n, at(t), e) for u, n, t, e in log])
    strict = [("A", "B", 1.5, 2), ("A", "C", 0.5, 1), ("B", "C", 0.5, 1), ("C", "B", 1.0, 1)]
    together = [("A", "B", 2.0, 3), ("A", "C", 1.0, 2), ("B", "C", 1.0, 2), ("C", "B", 1.5, 2)]
    assert sorted(scores_of(events)) == strict
    assert sorted(scores_of(events, simultaneous=True)) == together
    assert sorted(scores_of(events, max_user_notes=1)) == [("C", "B", 1.0, 1)]
    assert rows_of(target_clicks(interactions(events, NAMES)), "note_id", "num_users") == [("B", 3), ("C", 2)]


event = st.tuples(
    st.sampled_from(["u1", "u2", "u3"]),
    st.sampled_from(["A", "B", "C", "D"]),
    st.integers(0, 4),
    st.sampled_from(["view", "click"]),
)


def test_equals_the_sql_of_the_module_docstring(
    spark: SparkSession, frame: Frame, scores_of: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference that a reader sees at the top of the job, run by Spark SQL on 400 events of eight users."""
    rng = random.Random(0)
    rows = [(f"u{rng.randrange(8)}", f"n{rng.randrange(12)}", at(rng.randrange(50)), rng.choice(["view", "click"]))
            for _ in range(400)]  # fmt: skip
    events = frame(EVENTS, rows)
    events.createOrReplaceTempView("events")
    assert job.__doc__ is not None
    sql = job.__doc__[job.__doc__.index("WITH seen") : job.__doc__.index("Spark shuffles")]
    expected = {(r.query_id, r.target_id): (r.score, r.num_users) for r in spark.sql(sql).collect()}
    spark.catalog.dropTempView("events")
    scores = {(q, t): (s, n) for q, t, s, n in scores_of(events)}
    assert scores.keys() == expected.keys() and len(scores) > 100
    for pair, (score_, num_users) in expected.items():
        assert scores[pair] == (pytest.approx(score_, rel=1e-12), num_users)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(logs=st.lists(st.lists(event, max_size=14), min_size=25, max_size=25), simultaneous=st.booleans())
def test_equals_the_definition(frame: Frame, scores_of: Scores, logs: list[Log], simultaneous: bool) -> None:
    """Many small logs are scored at once. A prefix separates their users and notes, and U and N_u never mix users."""
    rows: Log = [(f"{i}{u}", f"{i}{n}", t, e) for i, log in enumerate(logs) for u, n, t, e in log]
    expected = {
        (f"{i}{a}", f"{i}{b}"): value
        for i, log in enumerate(logs)
        for (a, b), value in brute_force(log, simultaneous).items()
    }
    events = frame(EVENTS, [(u, n, at(t), e) for u, n, t, e in rows])
    scores = {(q, t): (s, n) for q, t, s, n in scores_of(events, simultaneous=simultaneous)}
    assert scores.keys() == expected.keys()
    for pair, (value, users) in expected.items():
        assert scores[pair][1] == users
        assert scores[pair][0] == pytest.approx(float(value), rel=1e-12)


def test_sums_are_exact_and_do_not_depend_on_order(frame: Frame, scores_of: Scores) -> None:
    """Users with N_u = 1 .. 40 who all saw A and then clicked B: the score is the harmonic number H_40."""
    rows = [(f"u{n}", "A", at(0), "view") for n in range(1, 41)]
    rows += [(f"u{n}", "B" if i == 0 else f"x{n}-{i}", at(1), "click") for n in range(1, 41) for i in range(n)]
    one, two = (scores_of(frame(EVENTS, r).repartition(p)) for r, p in ((rows, 1), (rows[::-1], 7)))
    assert one == two  # bit by bit, in the same order
    [harmonic] = [s for q, t, s, _ in one if (q, t) == ("A", "B")]
    assert harmonic == pytest.approx(float(sum(Fraction(1, n) for n in range(1, 41))), rel=1e-15)


def test_score_computes_equal_windows_once(
    spark: SparkSession, frame: Frame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = frame(EVENTS, [("u", "A", at(0), "view"), ("u", "B", at(1), "click")])
    for window in ("train", "test"):
        write_table(interactions(events, NAMES), tmp_path / "same" / window, ["user_id"])
        clicks_in_train = events.filter(f"event != 'click' OR '{window}' = 'train'")
        write_table(interactions(clicks_in_train, NAMES), tmp_path / "other" / window, ["user_id"])
    calls = []
    monkeypatch.setattr(job, "cooccurrence", lambda *a: calls.append(a) or cooccurrence(*a))
    counts = score(spark, tmp_path / "same", tmp_path / "out", ScoringSettings())
    assert len(calls) == 1 and counts["test"] == counts["train"]
    assert counts["train"]["pairs"] == 1 and counts["train"]["score"]["max"] == 1.0
    for table in ("train", "test"):
        assert pq.read_table(tmp_path / "out" / table).to_pylist()[0]["target_id"] == "B"
        assert pq.read_table(tmp_path / "out" / f"{table}_clicks").to_pylist() == [{"note_id": "B", "num_users": 1}]
    with pytest.raises(
        ValueError, match="test window: no user clicked one note after viewing another; set pairs.simult"
    ):
        score(spark, tmp_path / "other", tmp_path / "out2", ScoringSettings())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cooccurrence", *map(str, arguments)])
    job.main()


def test_command(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "spark_session", lambda name: spark)
    log = write_csv(tmp_path / "events.csv.gz", ["u,A,1,seen", "u,B,2,buy", "u,C,86400,buy", "u,D,x,buy", "u,E,3,like"])
    names = ("--view-events", "seen", "--click-events", "buy")
    run(monkeypatch, "--events", log, "--out", tmp_path / "out", *names, "--end", "1970-01-02")
    table = pq.read_table(tmp_path / "out")
    assert table.to_pylist() == [{"query_id": "A", "target_id": "B", "score": 1.0, "num_users": 1}]
    assert [(f.name, f.type) for f in table.schema] == [(f.name, f.type) for f in schema.SCORES]
    counts = json.loads(capsys.readouterr().out)
    assert counts["pairs"] == 1 and counts["dropped"] == {"bad_timestamp": 1} and counts["events"]["like"] == 1

    def fails(message: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, *arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1

    again = tmp_path / "events2.csv"
    write_csv(again, ["u,A,1,click", "u,B,2,click", "v,A,3,click", "v,B,1,click", "v,C,9,view"])
    run(monkeypatch, "--events", again, "--out", tmp_path / "swing", "--score", "swing", "--max-user-notes", "all")
    swing = [tuple(row.values()) for row in pq.read_table(tmp_path / "swing").to_pylist()]
    assert sorted(swing) == [("A", "B", pytest.approx(1 / 6), 2), ("B", "A", pytest.approx(1 / 6), 2)]  # 1/2 / (1 + 2)
    assert json.loads(capsys.readouterr().out)["max_loss"] is None

    folder = tmp_path / "parquet"  # two files of other types, and then one that is damaged
    folder.mkdir()
    for name, ids, times in (("a", ["1", "1"], ["1970-01-01", "1970-01-02"]), ("b", [1, 2], [172800, 0])):
        columns = {"user_id": ids, "note_id": ["A", "B"], "timestamp": times, "event": ["click"] * 2}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    run(monkeypatch, "--events", folder, "--out", tmp_path / "mixed")
    assert [tuple(row.values()) for row in pq.read_table(tmp_path / "mixed").to_pylist()] == [
        ("A", "B", 0.5, 1), ("B", "A", 0.5, 1)
    ]  # fmt: skip
    capsys.readouterr()
    (folder / "b.parquet").write_text("PAR1")
    fails("b.parquet is damaged", "--events", folder, "--out", tmp_path / "none")

    fails("no clicks; set --click-events", "--events", log, "--out", tmp_path / "none")
    fails(
        "is not before --end",
        "--events",
        log,
        "--out",
        tmp_path / "none",
        "--start",
        "2025-01-02",
        "--end",
        "2025-01-01",
    )
    fails("does not exist", "--events", tmp_path / "nowhere", "--out", tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    fails("thesis.tex, which is no result of this command", "--events", log, "--out", tmp_path / "mine", *names)
    assert not (tmp_path / "none").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
