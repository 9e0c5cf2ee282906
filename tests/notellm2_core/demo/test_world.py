"""The demo world: equal bytes for equal arguments, the source contract, and a signal split between text and image."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from notellm2_core.cli import main
from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.images import SIZE, STYLES, draw_image
from notellm2_core.demo.logs import DAY, simulate
from notellm2_core.demo.texts import poor_titles, write_note
from notellm2_core.demo.words import SENTENCES, THEMES, TITLES
from notellm2_core.demo.world import generate, lay_out
from notellm2_core.tables.source import EVENT_COLUMNS, NOTE_COLUMNS
from notellm2_core.vision.images import decode

TEST_WEEK = pd.Timestamp("2025-01-19", tz="UTC")


def small(out: Path, **changes: int) -> dict[str, int]:
    return generate(out, DemoSettings(num_notes=60, num_users=40, **changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    out = tmp_path_factory.mktemp("demo") / "world"
    return out, generate(out, DemoSettings(num_notes=600, num_users=1000))


def clean_events(folder: Path) -> pd.DataFrame:
    """The events with known notes and readable times, each once."""
    events = pd.read_csv(folder / "events.csv.gz")
    events["time"] = pd.to_datetime(events.timestamp, errors="coerce", utc=True)
    note_ids = pq.read_table(folder / "notes.parquet").column("note_id").to_pylist()
    return events[events.time.notna() & events.note_id.isin(note_ids)].drop_duplicates()


def related(events: pd.DataFrame, among: set[str]) -> pd.DataFrame:
    """Eq. 2 between the notes `among`, low = 0.01, top 3: columns q, t."""
    viewed = events.groupby(["user_id", "note_id"], as_index=False).time.min()
    clicked = events[events.event == "click"].groupby(["user_id", "note_id"], as_index=False).time.max()
    clicked["weight"] = 1 / clicked.groupby("user_id").note_id.transform("size")
    viewed, clicked = viewed[viewed.note_id.isin(among)], clicked[clicked.note_id.isin(among)]
    both = viewed.merge(clicked, on="user_id", suffixes=("_q", "_t"))
    both = both[(both.time_q < both.time_t) & (both.note_id_q != both.note_id_t)]
    scores = both.groupby(["note_id_q", "note_id_t"], as_index=False).weight.sum()
    scores = scores[scores.weight >= 0.01].set_axis(["q", "t", "score"], axis=1)
    return scores.sort_values(["q", "score", "t"], ascending=[True, False, True]).groupby("q").head(3)


def split_pairs(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Training pairs (two weeks), test pairs (the week after, among notes not seen before), the test pool."""
    events = clean_events(folder)
    train, test = events[events.time < TEST_WEEK], events[events.time >= TEST_WEEK]
    pool = sorted(set(test.note_id) - set(train.note_id))
    return related(train, set(train.note_id)), related(test, set(pool)), pool


def recall(pairs: pd.DataFrame, pool: list[str], keys: list[pd.Series], k: int) -> float:
    """Recall@k of an oracle that counts equal keys, expected over the order of ties; the query is no candidate."""
    codes = [pd.factorize(key[pool])[0] for key in keys]  # -1: no key
    score = sum((c[:, None] == c[None]) & (c[:, None] >= 0) for c in codes) + np.zeros((len(pool), len(pool)))
    np.fill_diagonal(score, -1)
    position = {note: i for i, note in enumerate(pool)}
    row = score[pairs.q.map(position)]  # [P, pool]
    own = row[np.arange(len(pairs)), pairs.t.map(position)][:, None]
    return float(np.clip((k - (row > own).sum(1)) / (row == own).sum(1), 0, 1).mean())


def hashes(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    counts = [small(tmp_path / name, seed=seed) for name, seed in (("a", 7), ("b", 7), ("c", 8))]
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert a == b and counts[0] == counts[1]
    assert all(a[name] != c[name] for name in a.keys() & c.keys())  # every file, each image too


def test_more_users_leave_notes_and_images_alone(tmp_path: Path) -> None:
    small(tmp_path / "a")
    generate(tmp_path / "b", DemoSettings(num_notes=60, num_users=41))
    a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert [name for name in a if a[name] != b[name]] == ["events.csv.gz"]


def test_source_contract(world: tuple[Path, dict[str, int]]) -> None:
    folder, counts = world
    notes = pq.read_table(folder / "notes.parquet")
    assert (
        notes.column_names == [column.name for column in NOTE_COLUMNS if column.name != "image"]
        and notes.num_rows == 600
    )
    assert len(set(notes["note_id"].to_pylist())) == 600
    assert all(notes["title"].to_pylist())
    events = pd.read_csv(folder / "events.csv.gz")
    assert list(events.columns) == [column.name for column in EVENT_COLUMNS] and len(events) == counts["num_events"]
    assert set(events.event) == {"view", "click"}
    oracle = pq.read_table(folder / "oracle.parquet")
    assert oracle.column_names == ["note_id", "text_key", "image_key"]
    assert oracle["note_id"].to_pylist() == notes["note_id"].to_pylist()


def test_missing_and_broken_images_are_as_counted(world: tuple[Path, dict[str, int]]) -> None:
    folder, counts = world
    notes = pq.read_table(folder / "notes.parquet").to_pylist()
    oracle = {row["note_id"]: row for row in pq.read_table(folder / "oracle.parquet").to_pylist()}
    status: Counter[str] = Counter()
    for note in notes:
        kind = "missing"
        if note["image_path"] is not None:
            kind, image = decode((folder / note["image_path"]).read_bytes(), SIZE * SIZE)
            assert image is None or image.size == (SIZE, SIZE)
        status[kind] += 1
        assert (oracle[note["note_id"]]["image_key"] is not None) == (kind == "ok")
    assert status == {"missing": 6, "broken": 1, "ok": 593}  # 1 % missing, one broken
    assert (counts["num_without_image"], counts["num_broken_images"]) == (6, 1)
    assert len(list((folder / "images").iterdir())) == 594


def test_text_poor_notes(world: tuple[Path, dict[str, int]]) -> None:
    """15 % of 600 = 90 notes have no topics and no content, and short titles that no two notes share."""
    folder, counts = world
    notes = pq.read_table(folder / "notes.parquet").to_pandas()
    oracle = pq.read_table(folder / "oracle.parquet").to_pandas()
    poor = oracle.text_key.isna()
    assert poor.sum() == counts["num_text_poor"] == 90
    assert (notes.content[poor] == "").all() and notes.topics[poor].map(len).eq(0).all()
    assert notes.title[poor].str.split().map(len).max() <= 9 and notes.title[poor].is_unique
    assert (notes.content[~poor] != "").all() and notes.topics[~poor].map(len).gt(0).all()
    assert oracle.image_key[poor].notna().all()  # each note has a usable text or image
    rich = notes[~poor]
    assert not (rich.title + rich.topics.map("|".join) + rich.content).duplicated().any()


def test_time_window(world: tuple[Path, dict[str, int]]) -> None:
    """The log has three whole weeks from a Sunday. About 30 % of the notes, of all topics, appear only in the last."""
    folder, _ = world
    events = clean_events(folder)
    assert events.time.min().date() == pd.Timestamp("2025-01-05").date()
    assert events.time.max() == pd.Timestamp("2025-01-25 23:59:59", tz="UTC")
    train_pairs, test_pairs, pool = split_pairs(folder)
    assert 0.25 <= len(pool) / 600 <= 1 / 3
    assert len(train_pairs) >= 3 * 0.95 * (600 - len(pool)) and len(test_pairs) >= 3 * 0.95 * len(pool)
    topic = topic_of(folder)
    assert set(topic[pool]) == set(topic[train_pairs.q]) == set(topic)


def topic_of(folder: Path) -> pd.Series:
    layout = lay_out(np.random.default_rng([0, 0]), 600, 21)
    return pd.Series(layout.topic, index=pq.read_table(folder / "notes.parquet")["note_id"].to_pylist())


def test_signal_is_half_in_the_text_half_in_the_image(world: tuple[Path, dict[str, int]]) -> None:
    """A text (or an image) is shared by two topics, so it alone finds about half of what both together find.

    k is the number of a topic's other notes in the pool (5 of 6). Both together find nearly all pairs within a topic.
    Where a note's text is poor, text finds no more than chance.
    """
    folder, _ = world
    _, pairs, pool = split_pairs(folder)
    oracle = pq.read_table(folder / "oracle.parquet").to_pandas().set_index("note_id")
    topic = topic_of(folder)
    same_topic = (topic[pairs.q].to_numpy() == topic[pairs.t].to_numpy()).mean()
    assert same_topic > 0.75
    chance, text, image, both = (
        recall(pairs, pool, [oracle[name] for name in names], k=5)
        for names in ([], ["text_key"], ["image_key"], ["text_key", "image_key"])
    )
    assert chance == pytest.approx(5 / (len(pool) - 1))
    assert both > 0.75 * same_topic
    assert 5 * chance < text < image < 0.7 * both  # fewer notes are without an image than without text
    poor = pairs[oracle.text_key[pairs.q].isna().to_numpy()]
    assert recall(poor, pool, [oracle.text_key], k=5) == pytest.approx(chance)
    assert recall(poor, pool, [oracle.image_key], k=5) > 5 * chance


def test_dirty_rows_are_few_and_counted(world: tuple[Path, dict[str, int]]) -> None:
    folder, counts = world
    events = pd.read_csv(folder / "events.csv.gz")
    unparsable = pd.to_datetime(events.timestamp, errors="coerce", utc=True).isna().sum()
    unknown = (events.note_id >= "n000600").sum()
    assert (unparsable, unknown) == (counts["num_bad_timestamps"], counts["num_unknown_note_events"])
    assert events.duplicated().sum() == counts["num_duplicate_events"]
    assert len(clean_events(folder)) > 0.99 * len(events)


def test_small_world_has_enough_pairs(tmp_path: Path) -> None:
    assert generate(tmp_path, DemoSettings(num_notes=160, num_users=80))["num_topics"] == 8
    train_pairs, test_pairs, _ = split_pairs(tmp_path)
    assert len(train_pairs) >= 50 and len(test_pairs) >= 20


@pytest.mark.parametrize("num_notes", [50, 160, 999, 2600, 10_000])
def test_each_theme_has_two_styles_and_each_style_two_themes(num_notes: int) -> None:
    layout = lay_out(np.random.default_rng(0), num_notes, 21)
    topics = list(zip(layout.theme_of_topic.tolist(), layout.style_of_topic.tolist(), strict=True))
    assert len(set(topics)) == len(topics) == min(80, max(4, 2 * (num_notes // 40)))
    assert (np.bincount(layout.theme_of_topic) == 2).all() and (np.bincount(layout.style_of_topic) == 2).all()
    sizes = np.bincount(layout.topic)
    assert sizes.max() - sizes.min() <= 1 and sizes.min() >= min(20, num_notes // 4)


def test_nobody_sees_a_note_twice_or_before_its_day() -> None:
    topic = np.arange(90) % 6
    published = np.repeat(np.arange(-15, 15), 3)
    events = simulate(np.random.default_rng(1), topic, published, num_users=300, num_days=14)
    assert (np.diff(events.second) >= 0).all()
    assert (events.second // DAY >= published[events.note]).all()
    assert len(set(zip(events.user.tolist(), events.note.tolist(), strict=True))) == len(events.user)
    assert (events.second + events.clicked_after).max() < 14 * DAY
    per_user = np.bincount(events.user, minlength=300)
    assert per_user.max() > 2 * np.median(per_user)  # a few users read very much


def test_words() -> None:
    """No two phrases of a theme share a word, and a theme has more phrases than the longest note has slots."""
    small_words = {"a", "an", "the", "my", "and", "in", "of", "on", "by", "s"}
    for name, phrases in THEMES.items():
        words = [w for p in phrases for w in set(p.replace("-", " ").split()) if w not in small_words]
        assert len(words) == len(set(words)), name
        most = max(t.count("{") for t in TITLES) + 1 + 3 * max(t.count("{") for t in SENTENCES)
        assert len(phrases) == 14 > most
    assert len(THEMES) == len(set(STYLES)) == 40


def test_texts() -> None:
    title, topics, content = write_note(np.random.default_rng(3), "tea")
    assert "{" not in title + content and 1 <= len(topics) <= 3
    assert any(phrase in (title + " " + content).lower() for phrase in THEMES["tea"])
    titles = poor_titles(np.random.default_rng(3), 4000)
    assert len(set(titles[:3000])) == 3000 and all(titles)


def test_styles_look_different() -> None:
    """The mean colour of an image follows its style: images of red styles are the reddest."""
    means = {
        colour: np.mean(
            [np.asarray(draw_image(np.random.default_rng(i), colour, "discs")) for i in range(8)], (0, 1, 2)
        )
        for colour in ("red", "green", "blue")
    }
    excess = {colour: mean - np.mean(list(means.values()), axis=0) for colour, mean in means.items()}
    assert [int(excess[colour].argmax()) for colour in ("red", "green", "blue")] == [0, 1, 2]


@pytest.mark.parametrize(("option", "number", "least"), [("notes", 49, 50), ("users", 3, 20), ("days", 7, 14)])
def test_too_small_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, number: int, least: int
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "world"), f"--{option}", str(number)])
    message = f"argument --{option}: {number}: Input should be greater than or equal to {least}"
    assert message in capsys.readouterr().err and not (tmp_path / "world").exists()


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    small(tmp_path)
    before = hashes(tmp_path)
    with pytest.raises(ValueError, match="already holds a source"):
        small(tmp_path, seed=1)
    assert hashes(tmp_path) == before
