"""A source that is not ours: what is understood of it, and whether following the advice leads to a run."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from notellm2_core.check.check import DataSettings, check_source
from notellm2_core.check.report import text_of, yaml_lines
from notellm2_core.cli import main

START = datetime(2024, 3, 3, tzinfo=UTC)  # a Sunday


def write_csv(file: Path, header: str, rows: list[list[Any]], delimiter: str = ",") -> None:
    file.write_text("\n".join([header, *(delimiter.join(map(str, row)) for row in rows)]) + "\n")


def write_source(folder: Path, num_rows: int = 600, days: int = 21, event: str | None = None) -> None:
    """40 notes without images, and a log of 20 users: every other row is a view, the others are clicks."""
    folder.mkdir()
    notes = [[i, f"Title {i}", "a|b", "Text", ""] for i in range(40)]
    write_csv(folder / "notes.csv", "note_id,title,topics,content,image_path", notes)
    random = Random(0)
    rows = [
        [random.randrange(20), random.randrange(40), START + timedelta(minutes=random.randrange(days * 1440)),
         event or ["view", "click"][i % 2]]
        for i in range(num_rows)
    ]  # fmt: skip
    write_csv(folder / "events.csv", "user_id,note_id,timestamp,event", rows)


def checked(folder: Path, **settings: Any) -> dict[str, Any]:
    """In most of these sources, every note has events in the training days."""
    return check_source(folder, DataSettings.model_validate({"split": {"by": "hash"}} | settings))


def changes(report: dict[str, Any]) -> dict[str, Any]:
    return {change["setting"]: change["value"] for change in report["changes"]}


def merged(settings: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the sections of `changed`, as a user who pastes the lines would have them."""
    both = dict(settings)
    for name, value in changed.items():
        both[name] = (
            merged(both[name], value) if isinstance(value, dict) and isinstance(both.get(name), dict) else value
        )
    return both


def follow(source: Path, rounds: int) -> dict[str, Any]:
    """The report after `rounds` of pasting the proposed YAML into the configuration."""
    settings: dict[str, Any] = {}
    for _ in range(rounds):
        report = checked(source, **settings)
        settings = merged(settings, yaml.safe_load("\n".join(yaml_lines(report["changes"]))) or {})
    return checked(source, **settings)


def test_a_good_source_is_understood(tmp_path: Path) -> None:
    write_source(tmp_path / "s")
    report = checked(tmp_path / "s")
    assert not report["stops"] and not report["changes"] and not report["remarks"]
    assert report["notes"] == {
        "rows": 40, "html_rows": 0, "notes": 40, "with_text": 40, "dropped": {},
        "filled": {"title": 40, "topics": 40, "content": 40},
    }  # fmt: skip
    events = report["tables"]["events"][0]
    assert [c["type"] for c in events["columns"]] == ["text"] * 4 and events["formats"] == ["CSV"]
    first = (tmp_path / "s" / "events.csv").read_text().splitlines()[1].removesuffix("+00:00,view")
    assert ",".join(str(v) for v in list(events["first_rows"][0].values())[:3]) == first.replace("+00:00", "")
    assert report["windows"] == {"train": ("2024-03-03", "2024-03-17"), "test": ("2024-03-17", "2024-03-24")}
    assert sum(report["interactions"][name]["events"] for name in ("train", "test")) == 600


def _films(source: Path) -> None:
    source.mkdir()
    write_csv(source / "movies.csv", "movieId,title,genres", [[i, f"Film {i}", "Drama|War"] for i in range(40)])
    random = Random(1)
    rows = [[random.randrange(20), random.randrange(40), random.choice([1, 2, 3, 4, 4.5, 5]),
             int(START.timestamp()) + random.randrange(40 * 86_400)] for _ in range(900)]  # fmt: skip
    write_csv(source / "ratings.csv", "userId,movieId,rating,timestamp", rows)


def _shop(source: Path) -> None:
    source.mkdir()
    write_csv(source / "notes.csv", "item;name;tags", [[i, f"Thing {i}", "a|b"] for i in range(40)], ";")
    random = Random(2)
    rows = [[random.randrange(20), random.randrange(40),
             (START + timedelta(days=random.randrange(9))).strftime("%d/%m/%Y"), random.choice(["pv", "pv", "buy"])]
            for _ in range(900)]  # fmt: skip
    write_csv(source / "events.csv", "visitor_id,item,date,action", rows)


def _purchases(source: Path) -> None:
    """Images without their folder and suffix, one kind of event, days, and a log that ended long ago."""
    write_source(source, days=5, event="purchase")
    (source / "images").mkdir()
    columns = {"note_id": range(40), "title": ["A"] * 40, "topics": [["x"]] * 40, "content": [""] * 40}
    (source / "notes.csv").unlink()
    pq.write_table(pa.table({**columns, "image_path": [f"p{i}" for i in range(40)]}), source / "notes.parquet")
    for i in range(40):
        Image.new("RGB", (8, 8)).save(source / "images" / f"p{i}.png")
    log = (source / "events.csv").read_text()
    (source / "events.csv").write_text("\n".join(",".join([*row.split(",")[:2], row.split(",")[2][:10], "purchase"])
                                                if i else row for i, row in enumerate(log.splitlines())))  # fmt: skip


@pytest.mark.parametrize(
    ("write", "rounds", "expected"),
    [
        (_films, 2, {"source.events.files": "ratings.csv", "source.notes.columns.note_id": "movieId",
                     "source.columns.user_id": "userId"}),
        (_shop, 3, {"source.notes.delimiter": ";", "source.columns.user_id": "visitor_id",
                    "source.columns.timestamp": "date", "source.events.columns.note_id": "item"}),
        (_purchases, 2, {"source.click_events": ["purchase"], "pairs.simultaneous": True,
                         "source.columns.image_path": "images/{image_path}.png"}),
    ],
)  # fmt: skip
def test_the_advice_leads_to_a_run(
    write: Callable[[Path], None], rounds: int, expected: dict[str, Any], tmp_path: Path
) -> None:
    """A newcomer who pastes what is proposed has, after a few rounds, a source that a run reads without stopping."""
    write(tmp_path / "s")
    first = checked(tmp_path / "s")
    assert first["stops"] and {name: changes(first).get(name) for name in expected} == expected
    last = follow(tmp_path / "s", rounds)
    assert last["stops"] == [] and last["interactions"]["test"]["clicks"] > 0


def test_ids_of_two_forms_and_robots(tmp_path: Path) -> None:
    """The log writes 007 where the notes have 7; the busiest users are called robots."""
    write_source(tmp_path / "s")
    rows = [row.split(",") for row in (tmp_path / "s" / "events.csv").read_text().splitlines()]
    for row in rows[1:]:
        row[1] = f"{int(row[1]):03}"
    write_csv(tmp_path / "s" / "events.csv", ",".join(rows[0]), rows[1:])
    most = max(Counter((row[0], row[2][:10]) for row in rows[1:]).values())
    report = checked(tmp_path / "s", source={"max_events_per_day": most - 1})
    assert changes(report) == {"source.max_events_per_day": most}
    assert "'000', '001', '002' in the events, '0', '1', '10' in the notes" in report["remarks"][0]
    assert "without leading zeros they are the same ('001' and '1')" in report["remarks"][0]
    assert report["stops"][0].startswith("no usable events in the train window")
    assert report["stops"][0].endswith("a note_id of the log is '000', one of the notes '0'.")


def test_names_in_no_list_and_a_window_elsewhere(tmp_path: Path) -> None:
    write_source(tmp_path / "s")
    text = (tmp_path / "s" / "events.csv").read_text().splitlines()
    (tmp_path / "s" / "events.csv").write_text("\n".join([*text[:-1], text[-1].replace("click", "mute"), "u"]))
    report = checked(tmp_path / "s", window={"end": "2023-01-01"}, source={"ignored_events": ["hide"]})
    assert changes(report)["source.ignored_events"] == ["hide", "mute"]
    assert str(changes(report)["window.end"]) == "2024-03-24" and "window.train_days" not in changes(report)
    assert "not into the window" in report["stops"][0] and report["interactions"] is None
    assert any("1 rows" in remark and "'u'" in remark for remark in report["remarks"])


def test_an_error_in_one_table_does_not_hide_the_other(tmp_path: Path) -> None:
    write_source(tmp_path / "s")
    (tmp_path / "s" / "notes.csv").unlink()
    columns = {"note_id": [1.0], "title": ["A"], "topics": ["x"], "content": ["C"]}
    pq.write_table(pa.table(columns), tmp_path / "s" / "notes.parquet")
    report = checked(tmp_path / "s")
    assert len(report["stops"]) == 1 and "the column note_id has type double" in report["stops"][0]
    assert report["tables"]["notes"][0]["columns"][0] == {"column": "note_id", "from": "note_id", "type": "double"}
    assert report["interactions"]["train"]["events"] > 0  # no note is unknown


def test_images_of_all_kinds(tmp_path: Path) -> None:
    """Of 40 images, 10 exist; of these one is no image. A table with bytes is looked at by a sample of its rows."""
    write_source(tmp_path / "s")
    columns = {"note_id": range(40), "title": ["A"] * 40, "topics": ["x"] * 40, "content": [""] * 40}
    paths = [f"images/{i}.png" for i in range(39)] + ["../outside.png"]
    (tmp_path / "s" / "notes.csv").unlink()
    pq.write_table(pa.table({**columns, "image_path": paths}), tmp_path / "s" / "notes.parquet")
    (tmp_path / "s" / "images").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "s" / "images" / f"{i}.png")
    data = (tmp_path / "s" / "images" / "0.png").read_bytes()
    (tmp_path / "s" / "images" / "3.png").write_bytes(b"no image")
    report = checked(tmp_path / "s")
    assert report["images"]["found"] == {"not_found": 29, "ok": 10, "escapes": 1}
    assert report["images"]["statuses"] == {"ok": 9, "broken": 1}
    assert report["images"]["examples"] == {
        "not_found": [f"images/{i}.png" for i in (10, 11, 12)], "escapes": ["../outside.png"],
        "broken": ["images/3.png"],
    }  # fmt: skip
    assert report["stops"] == ["77.5 % of the named images cannot be used; checks.max_dropped_share is 0.2."]
    images = [data] * 20 + [None] * 10 + [b"no image"] * 10
    pq.write_table(pa.table({**columns, "image": images}), tmp_path / "s" / "notes.parquet")
    report = checked(tmp_path / "s")
    assert report["images"]["statuses"] == {"ok": 20, "broken": 10} and report["images"]["named"] is None
    assert report["stops"] == ["33.3 % of the named images cannot be used; checks.max_dropped_share is 0.2."]


def test_names_with_line_breaks_stay_on_a_line(tmp_path: Path) -> None:
    write_source(tmp_path / "s", event='"a\nb"')
    report = checked(tmp_path / "s")
    lines = yaml_lines(report["changes"])
    assert yaml.safe_load("\n".join(lines))["source"]["click_events"] == ["a\nb"]
    assert "    a b     600  100.0 %  in no list: quarantine" in text_of(report, DataSettings().source).splitlines()


def test_a_limit_is_raised_only_if_nothing_else_helps(tmp_path: Path) -> None:
    """12 of 52 notes have no id: 23.1 %. With 60 of 100 without one, no limit is proposed."""
    write_source(tmp_path / "s")
    notes = (tmp_path / "s" / "notes.csv").read_text()
    (tmp_path / "s" / "notes.csv").write_text(notes + ",A,,,\n" * 12)
    report = checked(tmp_path / "s")
    assert report["stops"] == ["23.1 % of the notes would be dropped; checks.max_dropped_share is 0.2."]
    assert changes(report) == {"checks.max_dropped_share": 0.24}
    assert not checked(tmp_path / "s", checks={"max_dropped_share": 0.24})["stops"]
    (tmp_path / "s" / "notes.csv").write_text(notes + ",A,,,\n" * 60)
    assert checked(tmp_path / "s")["stops"] and not changes(checked(tmp_path / "s"))


@pytest.mark.parametrize(("num_new", "stops", "advised"), [(0, True, True), (49, False, True), (50, False, False)])
def test_notes_that_can_be_held_out_by_time(num_new: int, stops: bool, advised: bool, tmp_path: Path) -> None:
    """New notes have an event in the test days alone. One of them is unknown, and one was viewed before."""
    write_source(tmp_path / "s")
    with (tmp_path / "s" / "notes.csv").open("a") as notes, (tmp_path / "s" / "events.csv").open("a") as events:
        for i in range(num_new + 1):
            notes.write(f"new{i},Title,a,Text,\n")
        for i in range(num_new):
            events.write(f"u,new{i},2024-03-18T10:00:00Z,view\n")
        events.write(f"u,nowhere,2024-03-18,view\nu,new{num_new},2024-03-16,view\nu,new{num_new},2024-03-18,view\n")
    report = checked(tmp_path / "s", split={"by": "time"})
    assert bool(report["stops"]) == stops
    if stops:
        assert report["stops"][0].startswith(
            "No note of the test days is new: each also has events in the training days"
        )
    expected = {"split.by": "hash", "window.train_days": 21, "window.test_days": None} if advised else {}
    assert changes(report) == expected
    after = checked(tmp_path / "s", split={"by": "hash"}, window={"train_days": 21, "test_days": None})
    assert not after["stops"] and not after["changes"]


def test_a_column_of_images_without_bytes_stops(tmp_path: Path) -> None:
    write_source(tmp_path / "s")
    (tmp_path / "s" / "notes.csv").write_text("note_id,title,topics,content,image\n1,A,x,C,abc\n")
    report = checked(tmp_path / "s")
    assert report["stops"][0].endswith("notes.csv: the column image has type string, not bytes.")
    assert report["notes"]["notes"] == 1 and "1 usable notes" in text_of(report, DataSettings().source)


@pytest.mark.slow
def test_neither_torch_nor_spark_is_imported() -> None:
    code = "import sys, notellm2_core.check.check; print({'torch', 'pyspark'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0: a run would go through; 1: it would stop; 2: the command cannot be carried out."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["check", *arguments])
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, printed.out, printed.err

    write_source(tmp_path / "good")
    config = tmp_path / "my.yaml"
    model = "name: my\nmodel: {llm: {name: a}, vision: {name: b}}\nsplit: {by: hash}\n"
    config.write_text(model)
    code, out, err = run(str(tmp_path / "good"), "--config", str(config))
    assert code == 0 and not err and out == text_of(checked(tmp_path / "good"), DataSettings().source) + "\n"
    assert max(map(len, out.splitlines())) <= 112 and len(out.splitlines()) < 50
    config.write_text(f"{model}source: {{path: {tmp_path}/good, click_events: []}}")
    code, out, _ = run("--config", str(config), "--json")
    report = json.loads(out)
    assert code == 1 and "no clicks in the train window" in report["stops"][0]
    config.write_text("name: my\nwindows: {}\n")
    assert run(str(tmp_path / "good"), "--config", str(config))[::2] == (
        2, f"error: {config}: model: Field required; windows: no such setting\n",
    )  # fmt: skip
    assert run()[0] == run(str(tmp_path / "elsewhere"))[0] == 2
