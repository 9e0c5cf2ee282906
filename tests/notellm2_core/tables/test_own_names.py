"""The settings of the source: names, layouts and forms that differ from the contract's."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from notellm2_core.config.source import EventColumn, EventReadingSettings, NoteColumn, NoteReadingSettings
from notellm2_core.tables.source import EVENT_COLUMNS, NOTE_COLUMNS, WEIGHT, open_events, open_notes, used_by
from notellm2_core.tables.table import MALFORMED, ROW, Table, meets

NOTES = "item,name,brand,text,tags\n007,Kite,Acme,It flies.,a;b\n08,,,,\n"


def rows(*tables: Table) -> list[dict[str, Any]]:
    return [
        row for table in tables for split in table.splits() for batch in table.read(split) for row in batch.to_pylist()
    ]


def events(path: Path, **settings: Any) -> list[tuple[Any, ...]]:
    """(user_id, note_id, Unix seconds, event) of the rows that are not malformed."""
    return [
        (r["user_id"], r["note_id"], r["timestamp"] and r["timestamp"].timestamp(), r["event"])
        for r in rows(*open_events(path, EventReadingSettings(**settings)))
        if not r[MALFORMED]
    ]


def notes(path: Path, **settings: Any) -> list[tuple[Any, ...]]:
    return [
        (r["note_id"], r["title"], r["topics"], r["content"], r["image_path"])
        for r in rows(open_notes(path, NoteReadingSettings(**settings)))
    ]


def test_the_names_of_the_settings_are_those_of_the_contract() -> None:
    assert get_args(NoteColumn) == tuple(column.name for column in NOTE_COLUMNS)
    assert get_args(EventColumn) == tuple(column.name for column in (*EVENT_COLUMNS, WEIGHT))


def test_columns_are_mapped_joined_and_put_into_a_pattern(tmp_path: Path) -> None:
    """007 keeps its zeros in the name of its image. A note without values has none."""
    (tmp_path / "notes.csv").write_text(NOTES)
    columns = {"note_id": "item", "title": "name", "content": ["brand", "text"], "topics": "tags",
               "image_path": "img/{item:.2}/{item}.jpg"}  # fmt: skip
    assert notes(tmp_path, columns=columns, topic_delimiter=";") == [
        ("007", "Kite", ["a", "b"], "Acme It flies.", "img/00/007.jpg"),
        ("08", None, None, None, "img/08/08.jpg"),
    ]
    columns |= {"content": None, "topics": ["brand", "tags"], "image_path": "img/{brand}.jpg"}
    assert notes(tmp_path, columns=columns) == [
        ("007", "Kite", ["Acme", "a;b"], None, "img/Acme.jpg"),
        ("08", None, [], None, None),
    ]


def test_lists_of_json_and_parquet_are_joined(tmp_path: Path) -> None:
    lines = [{"id": 1, "name": "a", "text": ["x", "y"], "tags": ["t"]}, {"id": 2, "name": "b", "text": [], "tags": "u"}]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"columns": {"note_id": "id", "title": "name", "content": ["name", "text"], "topics": ["tags", "text"]}}
    expected = [("1", "a", ["t", "x", "y"], "a x y", None), ("2", "b", ["u"], "b", None)]
    assert notes(tmp_path, **settings) == expected
    (tmp_path / "notes.jsonl").unlink()
    table = {"id": [1, 2], "name": ["a", "b"], "text": [["x", "y"], []], "tags": [["t"], ["u"]]}
    pq.write_table(pa.table(table), tmp_path / "notes.parquet")
    assert notes(tmp_path, **settings) == expected


def test_a_column_that_is_named_and_missing_is_an_error(tmp_path: Path) -> None:
    """Also one that may be missing under its own name: a slip of the pen would lose all images."""
    (tmp_path / "notes.csv").write_text("note_id,title,topics,content\n1,a,b,c\n")
    with pytest.raises(
        ValueError, match=r"lacks the column pic; .* source\.columns\.image_path names your column, null"
    ):
        notes(tmp_path, columns={"image_path": "pic"})
    with pytest.raises(ValueError, match=r"lacks the column pic; it has note_id, title, topics, content\."):
        notes(tmp_path, columns={"image_path": "{pic}.jpg"})
    with pytest.raises(ValueError, match=r"lacks the column text.*source\.columns\.content"):
        notes(tmp_path, columns={"content": ["content", "text"]})
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp\nu,n,1\n")
    with pytest.raises(ValueError, match=r"lacks the column event; .* source\.columns\.event names your column\."):
        events(tmp_path)


def test_files_without_a_header_and_with_other_delimiters(tmp_path: Path) -> None:
    """A layout makes a file of any name a CSV; a compressed one, too."""
    (tmp_path / "clicks.dat").write_text('u1;5;n1\nu2;6;"n;2"\n')
    events_settings = {"files": "clicks.dat", "header": ["user_id", "timestamp", "note_id"], "delimiter": ";",
                       "event": "click"}  # fmt: skip
    assert events(tmp_path, events=events_settings) == [("u1", "n1", 5.0, "click"), ("u2", "n;2", 6.0, "click")]
    (tmp_path / "spark").mkdir()
    (tmp_path / "spark" / "part-0.csv").write_text('note_id,title,topics,content\n1,"a ""b""","x","c \\"d\\", e"\n')
    (tmp_path / "spark" / "part-0.csv").write_text('note_id,title,topics,content\n1,a,"x","c \\"d\\", e"\n')
    assert notes(tmp_path, notes={"files": "spark", "escape": "\\"}) == [("1", "a", ["x"], 'c "d", e', None)]


def test_null_values_of_a_table(tmp_path: Path) -> None:
    """Whole fields alone, with and without quotes, beside those that are always null."""
    (tmp_path / "notes.csv").write_text('note_id,title,topics,content\n1,UNKNOWN,"-","UNKNOWN"\n-,UNKNOWN x,\\N,\n')
    assert notes(tmp_path, notes={"null_values": ["UNKNOWN", "-"]}) == [
        ("1", None, None, None, None), (None, "UNKNOWN x", None, None, None),
    ]  # fmt: skip
    assert notes(tmp_path)[0] == ("1", "UNKNOWN", ["-"], "UNKNOWN", None)


def test_several_tables_of_events(tmp_path: Path) -> None:
    """Clicks and purchases in files of their own; one file may be two tables. The second's own names win."""
    (tmp_path / "clicks.csv").write_text("session,t,item,bought\ns1,5,a,b\n")
    (tmp_path / "buys-1.csv").write_text("session,t,article\ns2,6,c\n")
    (tmp_path / "buys-2.csv").write_text("session,t,article\ns3,7,d\n")
    settings = {
        "columns": {"user_id": "session", "timestamp": "t", "note_id": "item"},
        "events": [
            {"files": "clicks.csv", "event": "click"},
            {"files": "clicks.csv", "event": "buy", "columns": {"note_id": "bought"}},
            {"files": "buys-*.csv", "event": "buy", "columns": {"note_id": "article"}},
        ],
    }
    assert events(tmp_path, **settings) == [
        ("s1", "a", 5.0, "click"), ("s1", "b", 5.0, "buy"), ("s2", "c", 6.0, "buy"), ("s3", "d", 7.0, "buy")
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"holds no sales\.csv, which source\.events\.files names"):
        events(tmp_path, events={"files": "sales.csv"})


def test_a_row_may_hold_several_events(tmp_path: Path) -> None:
    """As lists of equal length. An empty list is no event, a null one an event without a note: it is counted later."""
    table = pa.table({
        "user_id": [1, 2, 3, 4, 5], "timestamp": [5, 6, 7, 8, 9], "event": ["view"] * 5,
        "note_id": pa.array([[10, 11], [], None, [12, None], [13]], pa.large_list(pa.int32())),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "events.parquet")
    expected = [("1", "10", 5.0, "view"), ("1", "11", 5.0, "view"), ("3", None, 7.0, "view"), ("4", "12", 8.0, "view"),
                ("4", None, 8.0, "view"), ("5", "13", 9.0, "view")]  # fmt: skip
    assert events(tmp_path) == expected
    (tmp_path / "events.parquet").rename(tmp_path / "x.parquet")
    lines = [{"user_id": "u", "note_id": [1, "b"], "timestamp": [5, 6.5], "event": ["view", "click"]},
             {"user_id": "u", "note_id": ["c", "d"], "timestamp": [7], "event": "view"},
             {"user_id": "u", "note_id": "e", "timestamp": 8, "event": "view"}]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert events(tmp_path) == [("u", "1", 5.0, "view"), ("u", "b", 6.5, "click"), ("u", "e", 8.0, "view")]
    [unequal] = [row for row in rows(*open_events(tmp_path)) if row[MALFORMED]]
    assert json.loads(unequal[ROW])["note_id"] == "['c', 'd']"


def test_a_regular_expression_takes_a_text_apart(tmp_path: Path) -> None:
    """As MIND writes impressions. A text without a match is malformed; a blank one is an event without a note."""
    (tmp_path / "behaviors.tsv").write_text("1\tU1\t5\tN0\tN1-0 N2-1\n2\tU2\t6\t\t\n3\tU3\t7\tN0\tnone\n")
    settings = {
        "columns": {"user_id": "user", "timestamp": "time"},
        "events": {
            "files": "behaviors.tsv",
            "header": ["id", "user", "time", "history", "impressions"],
            "extract": {"impressions": r"(?P<note_id>\S+)-(?P<event>[01])"},
        },
    }
    assert events(tmp_path, **settings) == [("U1", "N1", 5.0, "0"), ("U1", "N2", 5.0, "1"), ("U2", None, 6.0, None)]
    read = rows(*open_events(tmp_path, EventReadingSettings(**settings)))
    assert [json.loads(row[ROW]) for row in read if row[MALFORMED]] == [{"line": "none"}]


def test_times_in_a_format_and_a_zone(tmp_path: Path) -> None:
    """The zone counts for times that do not say theirs. 2024-03-31 02:30 does not exist in Berlin; 01:30 came twice
    on 2024-10-27 there, an hour apart: the first counts."""

    def seconds(*times: Any, **settings: Any) -> list[float | None]:
        pq.write_table(pa.table({"user_id": ["u"] * len(times), "note_id": ["n"] * len(times), "timestamp": times,
                                 "event": ["view"] * len(times)}), tmp_path / "events.parquet")  # fmt: skip
        return [event[2] for event in events(tmp_path, **settings)]

    def utc(*parts: int) -> float:
        return datetime(*parts, tzinfo=UTC).timestamp()  # type: ignore[misc, arg-type]

    us = {"timestamp_format": "%m/%d/%Y %I:%M:%S %p"}
    assert seconds("11/11/2019 9:05:58 PM", "2019-11-11", "13/11/2019 9:05:58 PM", **us) == [
        utc(2019, 11, 11, 21, 5, 58), None, None,
    ]  # fmt: skip
    assert seconds("11/11/2019 9:05:58 PM", **us, time_zone="America/New_York") == [utc(2019, 11, 12, 2, 5, 58)]
    assert seconds("5 +0200", "5 +0000", timestamp_format="%H %z", time_zone="Asia/Shanghai") == [
        utc(1900, 1, 1, 3), utc(1900, 1, 1, 5)
    ]  # fmt: skip
    assert seconds(19112019, timestamp_format="%d%m%Y") == [utc(2019, 11, 19)]
    zone = {"time_zone": "Europe/Berlin"}
    texts = [
        "2024-07-01 12:00",
        "2024-07-01T12:00:00Z",
        "2024-03-31 02:30:00",
        "2024-10-27 02:30:00",
        "20240701",
        "86400",
    ]
    assert seconds(*texts, **zone) == [utc(2024, 7, 1, 10), utc(2024, 7, 1, 12), utc(2024, 3, 31, 1),
                                       utc(2024, 10, 27, 0, 30), utc(2024, 6, 30, 22), 86400]  # fmt: skip
    assert seconds(20240701, 1719792000, **zone) == [utc(2024, 6, 30, 22), 1719792000]
    assert seconds(20240701.0, 1719792000.5, **zone) == [utc(2024, 6, 30, 22), 1719792000.5]
    noon = datetime(2024, 7, 1, 12)
    assert seconds(noon, **zone) == [utc(2024, 7, 1, 10)]
    assert seconds(noon.replace(tzinfo=UTC), **zone) == [utc(2024, 7, 1, 12)]
    assert seconds(noon.date(), **zone) == [utc(2024, 6, 30, 22)]


def test_numbers_and_booleans_name_events_and_never_notes(tmp_path: Path) -> None:
    table: dict[str, Any] = {"user_id": ["u", "u"], "note_id": ["n", "n"], "timestamp": [5, 6]}
    for values, names in (([4.5, 5.0], ["4.5", "5.0"]), ([True, None], ["true", None]), ([1, 0], ["1", "0"])):
        pq.write_table(pa.table({**table, "event": values}), tmp_path / "events.parquet")
        assert [event[3] for event in events(tmp_path)] == names
    pq.write_table(pa.table({**table, "note_id": [1.0, 2.0], "event": ["view"] * 2}), tmp_path / "events.parquet")
    with pytest.raises(ValueError, match="the column note_id has type double, not text or whole numbers"):
        events(tmp_path)


def test_weights_are_read_where_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,note_id,timestamp,event,weight\nu,n,1,view,2.5\nu,n,2,view,heavy\n")
    assert all("weight" not in row for row in rows(*open_events(tmp_path)))
    named = EventReadingSettings(columns={"weight": "weight"})
    assert [row["weight"] for row in rows(*open_events(tmp_path, named))] == [2.5, None]


def test_addresses_of_images_are_refused(tmp_path: Path) -> None:
    sentence = "no run fetches images. Fetch them beforehand, for example with img2dataset"
    (tmp_path / "notes.csv").write_text("note_id,title,topics,content,image_url\n1,a,b,c,https://x.org/1.jpg\n")
    with pytest.raises(ValueError, match=f"has the column image_url and neither image_path nor image: {sentence}"):
        notes(tmp_path)
    with pytest.raises(ValueError, match=rf"notes.csv: the column image_url holds addresses \(https.*\): {sentence}"):
        notes(tmp_path, columns={"image_path": "image_url"})
    assert notes(tmp_path, columns={"image_path": None}) == [("1", "a", ["b"], "c", None)]


def test_a_second_header_and_fields_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    header = "user_id,note_id,timestamp,event"
    path.write_text(f"{header}\nu,n,1,view\n{header}\nu,n,2,view\n")
    assert events(path) == [("u", "n", 1.0, "view"), ("u", "n", 2.0, "view")]
    assert sum(row[MALFORMED] for row in rows(*open_events(path))) == 1
    path.write_text(f"{header}\n" + "u,n,1,view,\n" * 3)
    with pytest.raises(ValueError, match=f"the header has 4 columns, and the first row has 5: {header} / u,n,1,view,"):
        events(path)
    path.write_text(f"{header},text\n" + 'u,n,1,view,"say \\"hi\\", you"\n' * 3)
    with pytest.raises(
        ValueError, match="first row has 6: .* Backslashes before quotes are read with the setting escape"
    ):
        events(path)
    path.write_text("u;n;1;view\nu;n;1;view\n")
    with pytest.raises(ValueError, match="lacks the column user_id; it has u;n;1;view"):
        events(path)


def test_which_files_notes_and_events_depend_on() -> None:
    """Images belong to the notes; what only events read does not."""
    default = NoteReadingSettings(), EventReadingSettings()
    assert used_by(*default, "notes/a.csv") == (True, False)
    assert used_by(*default, "images/1.jpg") == (True, False)
    assert used_by(*default, "events.csv.gz") == (False, True)
    named = (
        NoteReadingSettings(notes={"files": "log/items*.csv"}),
        EventReadingSettings(events=[{"files": "log"}, {"files": "x.csv"}]),
    )
    assert used_by(*named, "log/items1.csv") == (True, True)
    assert used_by(*named, "log/a/b.csv") == (False, True)
    assert used_by(*named, "x.csv") == (False, True)
    assert used_by(*named, "events.csv") == (True, False)


def test_conditions_choose_the_rows_of_a_table(tmp_path: Path) -> None:
    """A rating is a view, and a high one a click. A null, and what is no number, meets no condition."""
    (tmp_path / "ratings.csv").write_text(
        "user_id,note_id,timestamp,rating,kind\nu,a,1,4.5,x\nu,b,2,3,x\nu,c,3,,y\nu,d,4,good,y\nshort\n"
    )
    table = {"files": "ratings.csv"}
    settings = [{**table, "event": "rated"}, {**table, "event": "liked", "where": {"rating": ">= 4", "kind": "== x"}}]
    assert events(tmp_path, events=settings) == [
        ("u", "a", 1.0, "rated"), ("u", "b", 2.0, "rated"), ("u", "c", 3.0, "rated"), ("u", "d", 4.0, "rated"),
        ("u", "a", 1.0, "liked"),
    ]  # fmt: skip
    read = rows(*open_events(tmp_path, EventReadingSettings(events=settings)))
    assert sum(row[MALFORMED] for row in read) == 2  # a line that is no row counts in both tables
    assert [e[1] for e in events(tmp_path, events={**table, "event": "e", "where": {"kind": "!= x"}})] == ["c", "d"]
    with pytest.raises(ValueError, match=r"lacks the column stars; .*\. The setting where names it\."):
        events(tmp_path, events={**table, "event": "e", "where": {"stars": "> 1"}})
    for value, condition, holds in ((True, "== 1", True), (2, "< 2", False), ("2", "<= 2", True), ("a", "> A", True)):
        assert meets(pa.array([value]), condition).to_pylist() == [holds]
