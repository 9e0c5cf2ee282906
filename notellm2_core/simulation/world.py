"""A world of many weeks, delivered to a source week by week.

It has the notes and the logs of the demo world, without pictures: an image is bytes that name its style, which only
the stand-ins (`simulation.stand_ins`) read. What a note is about, its theme, is in `truth.parquet` beside the source.

    FOLDER/source/notes.parquet               all notes published until the last delivered week
    FOLDER/source/events/2025-02-02.parquet   the events of a week, by its first day
    FOLDER/truth.parquet                      note_id, theme (-1: its text tells nothing)
"""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.demo.logs import DAY, simulate
from notellm2_core.demo.texts import poor_titles, write_note
from notellm2_core.demo.words import THEMES
from notellm2_core.demo.world import FIRST_DAY, lay_out, note_id
from notellm2_core.runtime.files import written_whole

WEEK = 7 * DAY  # seconds
NOTES_A_WEEK, NUM_USERS = 870, 2500  # some 2,300 test pairs a week, as in the demo
NUM_ROBOTS, ROBOT_EVENTS = 5, 1000  # users that view notes at random, and their events a week
TRUTH, SOURCE, EVENTS = "truth.parquet", "source", "events"
Text = tuple[str, list[str], str]  # title, topics, content
_EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("note_id", pa.string()),
        pa.field("event", pa.string()),
        pa.field("timestamp", pa.timestamp("s", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class Log:
    """Events as arrays [E]."""

    user: np.ndarray
    note: np.ndarray
    event: np.ndarray  # its name
    second: np.ndarray  # since the first midnight of the world

    @property
    def is_click(self) -> np.ndarray:
        return np.asarray(self.event == "click")

    def __len__(self) -> int:
        return len(self.user)

    def where(self, chosen: np.ndarray) -> "Log":
        """The chosen events, by a mask or by their numbers."""
        return Log(self.user[chosen], self.note[chosen], self.event[chosen], self.second[chosen])

    def plus(self, other: "Log") -> "Log":
        """The events of both."""
        pairs = ((self.user, other.user), (self.note, other.note), (self.event, other.event),
                 (self.second, other.second))  # fmt: skip
        return Log(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class Catalogue:
    """The notes that a delivery brings, as columns of equal length."""

    note: np.ndarray  # their numbers
    texts: tuple[Text, ...]
    images: tuple[bytes | None, ...]

    def where(self, chosen: np.ndarray) -> "Catalogue":
        """The notes of these positions."""
        return Catalogue(self.note[chosen], tuple(self.texts[i] for i in chosen), tuple(self.images[i] for i in chosen))


class World:
    """All weeks, before any of them is delivered."""

    def __init__(self, num_weeks: int, seed: int = 0) -> None:
        num_notes, num_days = NOTES_A_WEEK * num_weeks, 7 * num_weeks
        self.layout = lay_out(np.random.default_rng([seed, 0]), num_notes, num_days)
        shown = simulate(
            np.random.default_rng([seed, 1]), self.layout.topic, self.layout.published, NUM_USERS, num_days
        )
        views = Log(shown.user, shown.note, np.full(len(shown.user), "view"), shown.second)
        clicked = shown.clicked_after > 0
        clicks = Log(shown.user[clicked], shown.note[clicked], np.full(int(clicked.sum()), "click"),
                     (shown.second + shown.clicked_after)[clicked])  # fmt: skip
        log = views.plus(clicks)
        for week in range(num_weeks):
            log = log.plus(self.robots(week, NUM_ROBOTS, np.random.default_rng([seed, 2, week])))
        self._log = log.where(np.argsort(log.second, kind="stable"))
        self.texts = self._texts(seed)
        self.num_weeks = num_weeks

    def _texts(self, seed: int) -> tuple[Text, ...]:
        layout, themes = self.layout, list(THEMES)
        poor = iter(poor_titles(np.random.default_rng([seed, 4]), int(layout.text_poor.sum())))
        texts: list[Text] = []
        for i, theme in enumerate(layout.theme_of_topic[layout.topic]):
            if layout.text_poor[i]:
                texts.append((_accented(next(poor)), [], ""))
                continue
            title, topics, content = write_note(np.random.default_rng([seed, 5, i]), themes[theme])
            texts.append((_accented(title), [_accented(topic) for topic in topics], _accented(content)))
        return tuple(texts)

    def robots(self, week: int, num: int, rng: np.random.Generator) -> Log:
        """The views of `num` robots in a week, of the notes that are in the feed."""
        notes = np.flatnonzero(self.layout.published <= 7 * week)
        size = num * ROBOT_EVENTS
        user = NUM_USERS + np.repeat(np.arange(num), ROBOT_EVENTS)
        second = week * WEEK + rng.integers(0, WEEK, size)
        # At the hours of people: robots that never sleep would be seen by their hours alone.
        hour = rng.normal(20, 3, size) % 24
        second = second - second % DAY + (hour * 3600).astype(np.int64)
        return Log(user, rng.choice(notes, size), np.full(size, "view"), second)

    def log(self, week: int) -> Log:
        """The events of a week."""
        low, high = np.searchsorted(self._log.second, [week * WEEK, (week + 1) * WEEK])
        return self._log.where(np.arange(low, high))

    def catalogue(self, week: int) -> Catalogue:
        """The notes that are published by the end of a week."""
        notes = np.flatnonzero(self.layout.published < 7 * (week + 1))
        styles = self.layout.style_of_topic[self.layout.topic]
        images = tuple(
            f"style {styles[i]} of {note_id(int(i))}".encode() if self.layout.image[i] == "ok" else None for i in notes
        )
        return Catalogue(notes, tuple(self.texts[i] for i in notes), images)

    def write_truth(self, folder: Path) -> None:
        """Write what the texts of all notes are about."""
        themes = np.where(self.layout.text_poor, -1, self.layout.theme_of_topic[self.layout.topic])
        ids = [note_id(i) for i in range(len(themes))]
        pq.write_table(pa.table({"note_id": ids, "theme": themes}), folder / TRUTH)


def first_day(week: int) -> date:
    """The Sunday that a week begins with."""
    first: date = FIRST_DAY.astype("datetime64[D]").item()
    return first + timedelta(weeks=week)


def deliver(folder: Path, week: int, catalogue: Catalogue, log: Log) -> None:
    """Write the events of a week, and the notes that there are by then, into the source in `folder`.

    An earlier delivery of the same week is replaced.
    """
    source = folder / SOURCE
    (source / EVENTS).mkdir(parents=True, exist_ok=True)
    titles, topics, contents = zip(*catalogue.texts, strict=True)
    notes = {
        "note_id": [note_id(int(i)) for i in catalogue.note],
        "title": list(titles),
        "topics": pa.array(list(topics), pa.list_(pa.string())),
        "content": list(contents),
        "image": pa.array(list(catalogue.images), pa.binary()),
    }
    _write(source / "notes.parquet", pa.table(notes))
    columns = [
        pa.array([f"u{n:05d}" for n in log.user]),
        pa.array([note_id(int(n)) for n in log.note]),
        pa.array(log.event.tolist()),
        pa.array(FIRST_DAY.astype("datetime64[s]") + log.second.astype("timedelta64[s]")).cast(_EVENTS.types[3]),
    ]
    _write(source / EVENTS / f"{first_day(week)}.parquet", pa.Table.from_arrays(columns, schema=_EVENTS))


def _write(path: Path, table: pa.Table) -> None:
    with written_whole(path) as draft:
        pq.write_table(table, draft)


def _accented(text: str) -> str:
    """A text with letters beyond ASCII, as most languages have: only these show a wrong decoding."""
    return text.replace("e", "é")
