"""The data card against numbers counted by hand."""

import json
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from notellm2_core.config.data import PairSettings
from notellm2_core.evaluation.data_card import CardInputs, write_data_card
from notellm2_core.lake.window import Days, ResolvedWindow

NOTES = [
    {"note_id": "a", "title": "one two", "topics": ["x y", "z"], "content": "a b c d"},
    {"note_id": "b", "title": "three", "topics": [], "content": ""},
    {"note_id": "c", "title": "你好", "topics": ["q"], "content": "e"},
    {"note_id": "d", "title": "", "topics": ["r s t"], "content": "f g"},
    {"note_id": "unused", "title": "u " * 9, "topics": ["u"] * 9, "content": "u " * 9},
]
MANIFESTS = {
    "raw_events": {"first_day": "2024-01-01", "covered_until": "2024-01-21", "rows": 1234},
    "notes": {"dropped": {"empty_note": 2}},
    "interactions": {
        "dropped": {"robot": 3},
        **{s: {"events": 40, "views": 30, "clicks": 10, "users": 5, "notes": 4} for s in ("train", "test")},
    },
    "cooccurrence": {
        s: {
            "pairs": 9,
            "capped_users": 1,
            "capped_notes": 0,
            "max_loss": 0.25,
            "histogram": {"edges": [0.25, 0.5, 1.0], "pairs": [4, 5]},
        }
        for s in ("train", "test")
    },
    "related_pairs": {
        s: {"pairs_on_side": 8, "pairs_with_min_users": 7, "pairs_within_bounds": 6, "pairs": 3}
        for s in ("train", "test")
    },
}


def write(folder: Path, rows: list[dict[str, object]], schema: pa.Schema | None = None) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "part-00000.parquet")


def test_data_card(tmp_path: Path) -> None:
    """The training pairs are a -> b and c -> a, the validation pair is b -> d: their notes are a, b, c, d.

    The test pair is c -> d, in a pool of c and d.

    Words per title: (2 + 1 + 2 + 0) / 4 (a Chinese character is a word), topics per note (2 + 0 + 1 + 1) / 4, words per
    topic (2 + 1 + 1 + 3) / 4, words per content (4 + 0 + 1 + 2) / 4. The means of c and d: 2 / 2, 2 / 2, 4 / 2, 3 / 2.
    """
    write(tmp_path / "notes", NOTES)
    pairs = {"train": ["ab", "ca"], "validation": ["bd"], "test": ["cd"]}
    for name, edges in pairs.items():
        write(
            tmp_path / "pairs" / name, [{"query_id": q, "target_id": t, "score": 0.6, "num_users": 1} for q, t in edges]
        )
    write(tmp_path / "pairs" / "pool", [{"note_id": "c"}, {"note_id": "d"}])
    for name in ("train", "test"):
        clicks = [{"note_id": note, "num_users": users} for note, users in {"a": 1, "b": 7, "c": 2}.items()]
        write(tmp_path / "clicks" / f"{name}_clicks", clicks)
    (tmp_path / "out").mkdir()
    window = ResolvedWindow(Days(date(2024, 1, 1), date(2024, 1, 15)), Days(date(2024, 1, 15), date(2024, 1, 22)))
    folders = (tmp_path / name for name in ("notes", "pairs", "clicks"))
    table, advice = write_data_card(CardInputs(*folders, MANIFESTS, window), tmp_path / "out", "auto", PairSettings())
    assert table == {
        "train": {
            "notes": 4,
            "pairs": 3,
            "title_words": 1.25,
            "topics": 1.0,
            "topic_words": 1.75,
            "content_words": 1.75,
        },
        "test": {"notes": 2, "pairs": 1, "title_words": 1.0, "topics": 1.0, "topic_words": 2.0, "content_words": 1.5},
    }
    written = json.loads((tmp_path / "out" / "data_card.json").read_text())
    assert (written["table"], written["advice"]) == (table, advice) and len(advice) == 3
    assert written["window"] == {"train": ["2024-01-01", "2024-01-15"], "test": ["2024-01-15", "2024-01-22"]}
    card = (tmp_path / "out" / "data_card.md").read_text()
    for line in ("| # notes | 4 | 2 |", "| avg. # words per topic | 1.75 | 2.00 |", "| notes | empty_note | 2 |",
                 "| interactions | robot | 3 |", "| a score has lost at most | 0.25 | 0.25 |",
                 "| users per clicked note, train | 3 | 3.33 | 2 | 7 | 70.0 % |", "## What to change",
                 *(f"- {sentence}" for sentence in advice)):  # fmt: skip
        assert line in card
    assert Image.open(tmp_path / "out" / "data_card.png").width == 1200
