import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import date
from fractions import Fraction
from itertools import count
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from notellm2_core import schema
from notellm2_core.config.data import ScoringSettings
from notellm2_core.config.source import EventSettings
from spark_jobs import cooccurrence as job
from spark_jobs.common.tables import write_table
from spark_jobs.cooccurrence import cooccurrence, score, target_clicks
from spark_jobs.interactions import interactions, reduced
from tests.spark_jobs.conftest import EVENTS, WEIGHED_EVENTS, Frame, at, rows_of
from tests.spark_jobs.test_source import write_csv

NAMES = EventSettings(view_events=["view"], click_events=["click"], ignored_events=None)
Log = list[tuple[str, str, int, str]]
Scores = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def scores_of(spark: SparkSession, tmp_path: Path) -> Scores:
    """A function that runs `cooccurrence` on events or interactions and returns the rows that it writes."""
    numbers = count()

    def compute(rows: DataFrame, end: date | None = None, **settings: Any) -> list[tuple[Any, ...]]:
        out = tmp_path / f"scores{next(numbers)}"
        rows = interactions(rows, NAMES) if "event" in rows.columns else rows
        counts = cooccurrence(rows, out, ScoringSettings(**settings), end)
        assert {f.name[:5] for f in out.iterdir()} <= {"part-"}  # nothing hidden is left
        rows = [tuple(r.values()) for file in sorted(out.iterdir()) for r in pq.read_table(file).to_pylist()]
        assert counts["pairs"] == len(rows) and counts["queries"] == len({r[0] for r in rows})
        return rows

    return compute


def brute_force(
    log: Log,
    simultaneous: bool,
    weights: Mapping[str, Fraction] = MappingProxyType({"click": Fraction(1)}),
    most: float = inf,
    weight_at: Callable[[int], Fraction] = lambda time: Fraction(1),
) -> dict[tuple[str, str], tuple[Fraction, int]]:
    """Eq. 2, literally: for every ordered pair of notes, the users who saw A and later clicked B.

    `weights`: of the events that are clicks. `most`: seconds between the two. `weight_at`: the weight of a click by its
    time. Of several clicks of a user that follow a view, the one that weighs most counts.
    """
    clicked = defaultdict(set)
    for user, note, _, event in log:
        if event in weights:
            clicked[user].add(note)
    users: dict[tuple[str, str], dict[str, Fraction]] = defaultdict(dict)
    for user, a, seen_at, _ in log:
        for other, b, clicked_at, name in log:
            followed = seen_at <= clicked_at if simultaneous else seen_at < clicked_at
            if user == other and a != b and name in weights and followed and clicked_at - seen_at <= most:
                weight = weights[name] * weight_at(clicked_at)
                users[a, b][user] = max(weight, users[a, b].get(user, Fraction(0)))
    return {
        pair: (sum((w / len(clicked[u]) for u, w in us.items()), Fraction()), len(us)) for pair, us in users.items()
    }


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


@settings(max_examples=4, suppress_health_check=list(HealthCheck), derandomize=True)
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


def test_worked_example_with_times_and_weights(frame: Frame, scores_of: Scores) -> None:
    """One user of 2024-01-01; the numbers are minutes. N = 3 (B, C, D).

    view A 0, like B 10, view A 20, buy C 30, view C 40, like D 55, like B 70, buy B 100

    Pairs with A, by the clicks that follow its views at 0 and 20: B by the likes at 10 and 70 and the purchase at 100,
    C by the purchase at 30, D by the like at 55.
    At most 15 minutes: A->B (0, 10) and A->C (20, 30). After B, seen first at 10: nothing. C, seen at 30 and 40: C->D
    (40, 55). D, seen at 55: D->B (55, 70). The first view of C and the last click on B would lose C->D and D->B.
    A purchase counts 4: A->B 4/3 (the purchase at 100), A->C 4/3, A->D 1/3, ... Within 15 minutes, A->B is by a like.
    A half-life of 1/24 days: at the end of the day, 24:00, a click at minute m counts 2 ** (m / 60 - 24).
    """
    log = [("A", 0, "view"), ("B", 10, "like"), ("A", 20, "view"), ("C", 30, "buy"), ("C", 40, "view"),
           ("D", 55, "like"), ("B", 70, "like"), ("B", 100, "buy")]  # fmt: skip
    events = frame(EVENTS, [("u", note, at(60 * minute), name) for note, minute, name in log])
    names = {"view_events": ["view"], "click_events": ["like", "buy"], "event_weights": {"buy": 4}}
    rows = interactions(events, EventSettings(**names))
    within = {("A", "B"): 1, ("A", "C"): 4, ("C", "D"): 1, ("D", "B"): 1}
    assert {(q, t): s for q, t, s, _ in scores_of(rows, max_minutes=15)} == pytest.approx(
        {pair: weight / 3 for pair, weight in within.items()}, rel=1e-15
    )
    everything = {(a, b): 4 if b in "BC" else 1 for a, b in ("AB", "AC", "AD", "BC", "BD", "CB", "CD", "DB")}
    assert {(q, t): s for q, t, s, _ in scores_of(reduced(rows, False))} == pytest.approx(
        {pair: weight / 3 for pair, weight in everything.items()}, rel=1e-15
    )
    rows = interactions(events, EventSettings(**names | {"event_weights": None}))
    last = {"B": 100, "C": 30, "D": 55}
    aged = scores_of(reduced(rows, False), end=date(2024, 1, 2), half_life_days=1 / 24)
    assert {(q, t): s for q, t, s, _ in aged} == pytest.approx(
        {(a, b): 2 ** (last[b] / 60 - 24) / 3 for a, b in everything}, rel=1e-15
    )


def test_worked_example_with_weights_of_rows(frame: Frame, scores_of: Scores) -> None:
    """Two users; the numbers are minutes, with the weight of the row behind: say, minutes that a video was watched.

    u1  view A 0, click B 10 (8), click B 20 (3), view C 15 (9), click D 30 (0)     N = 1: D, watched for 0, is viewed
    u2  view A 0, click B 10 (0.5), click C 20 (2)                                  N = 2

    A->B from u1 by the click at 10: 8, from u2: 0.5 / 2. C->B from u1: the click at 20, 3. A->C from u2: 2 / 2, B->C
    from u2: 2 / 2. Nothing leads to D. With `event_weights`, all of it is doubled.
    """
    log = [("u1", "A", 0, "view", None), ("u1", "B", 10, "click", 8.0), ("u1", "B", 20, "click", 3.0),
           ("u1", "C", 15, "view", 9.0), ("u1", "D", 30, "click", 0.0), ("u2", "A", 0, "view", 1.0),
           ("u2", "B", 10, "click", 0.5), ("u2", "C", 20, "click", 2.0)]  # fmt: skip
    events = frame(WEIGHED_EVENTS, [(u, n, at(60 * minute), e, w) for u, n, minute, e, w in log])
    expected = [("A", "B", 8.25, 2), ("A", "C", 1.0, 1), ("B", "C", 1.0, 1), ("C", "B", 3.0, 1)]
    assert sorted(scores_of(reduced(interactions(events, NAMES), False))) == expected
    twice = interactions(events, NAMES.model_copy(update={"event_weights": {"click": 2.0}}))
    assert sorted(scores_of(reduced(twice, False))) == [(q, t, 2 * s, n) for q, t, s, n in expected]


times_and_weights = st.fixed_dictionaries(
    {
        "max_minutes": st.none() | st.integers(1, 3),
        "half_life_days": st.none() | st.just(1 / 12),
        "event_weights": st.none() | st.fixed_dictionaries({"click": st.integers(1, 3), "buy": st.integers(1, 9)}),
        "has_column": st.booleans(),
        "simultaneous": st.booleans(),
    }
)
minute = st.tuples(
    st.sampled_from(["u1", "u2", "u3"]),
    st.sampled_from(["A", "B", "C", "D"]),
    st.integers(0, 9),
    st.sampled_from([f"{name} {weight}" for name in ("view", "click", "buy") for weight in (0, 1, 2.5, 6)]),
)


@settings(max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True)
@given(logs=st.lists(st.lists(minute, max_size=16), min_size=25, max_size=25), options=times_and_weights)
def test_times_and_weights_equal_the_definition(
    frame: Frame, scores_of: Scores, logs: list[Log], options: dict[str, Any]
) -> None:
    """Many small logs, of ten minutes in two partitions that are reduced by themselves, against all of their events.

    An event of the logs is a name and the weight of its row.
    """
    event_weights, half_life = options.pop("event_weights"), options["half_life_days"]
    columns = WEIGHED_EVENTS if options.pop("has_column") else EVENTS
    weights = {
        f"{name} {weight}": Fraction(by_name * (weight if columns is WEIGHED_EVENTS else 1))
        for name, by_name in (event_weights or {"click": 1, "buy": 1}).items()
        for weight in (0, 1, 2.5, 6)
    }
    weights = {name: weight for name, weight in weights.items() if weight}
    expected = {
        (f"{i}{a}", f"{i}{b}"): value
        for i, log in enumerate(logs)
        for (a, b), value in brute_force(
            log,
            options["simultaneous"],
            weights,
            options["max_minutes"] or inf,
            lambda minute: Fraction(1) if half_life is None else Fraction(2 ** ((minute - 1440) / 120)),
        ).items()
    }
    names = EventSettings(view_events=("view",), click_events=("click", "buy"), event_weights=event_weights)
    rows = [
        (f"{i}{u}", f"{i}{n}", at(60 * t), e.split()[0], *([float(e.split()[1])] if columns is WEIGHED_EVENTS else []))
        for i, log in enumerate(logs)
        for u, n, t, e in log
    ]
    events = frame(columns, rows).withColumn("partition", F.col("timestamp") < F.lit(at(300)))
    limit = options["max_minutes"]
    scores = scores_of(
        reduced(interactions(events, names), every_time=limit is not None).drop("partition"),
        end=date(2024, 1, 2),
        **options,
    )
    assert {(q, t): n for q, t, _, n in scores} == {pair: users for pair, (_, users) in expected.items()}
    for query, target, score_, _ in scores:
        assert score_ == pytest.approx(float(expected[query, target][0]), rel=1e-12)


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
    ends = dict.fromkeys(("train", "test"), date(2024, 1, 2))
    counts = score(spark, tmp_path / "same", tmp_path / "out", ScoringSettings(), ends)
    assert len(calls) == 1 and counts["test"] == counts["train"]
    assert counts["train"]["pairs"] == 1 and counts["train"]["score"]["max"] == 1.0
    for table in ("train", "test"):
        assert pq.read_table(tmp_path / "out" / table).to_pylist()[0]["target_id"] == "B"
        assert pq.read_table(tmp_path / "out" / f"{table}_clicks").to_pylist() == [{"note_id": "B", "num_users": 1}]
    with pytest.raises(
        ValueError, match="test window: no user clicked one note after viewing another; set pairs.simult"
    ):
        score(spark, tmp_path / "other", tmp_path / "out2", ScoringSettings(), ends)


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

    timed = ("--max-minutes", "0.05", "--half-life-days", "1", "--end", "1970-01-02", "--event-weights", "buy=4")
    quick = write_csv(tmp_path / "quick.csv", ["u,A,1,seen", "u,B,4,buy", "u,C,8,buy", "v,A,0,seen", "v,B,9,buy"])
    run(monkeypatch, "--events", quick, "--out", tmp_path / "timed", *names, *timed)  # in 3 seconds: A->B of u, N = 2
    [pair] = pq.read_table(tmp_path / "timed").to_pylist()
    aged = 2 ** (4 / 86400 - 1)
    assert pair == {"query_id": "A", "target_id": "B", "score": pytest.approx(4 / 2 * aged, rel=1e-14), "num_users": 1}
    capsys.readouterr()

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

    fails(
        "at most 0.01 minutes after viewing",
        "--events",
        quick,
        "--out",
        tmp_path / "none",
        *names,
        "--max-minutes",
        ".01",
    )
    fails("counts back from --end", "--events", quick, "--out", tmp_path / "none", *names, "--half-life-days", "7")
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
