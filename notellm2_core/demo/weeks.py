"""The weeks after the demo world's log: what is published, and what its users look for.

The topics, the users and their tastes are those of `generate` with the same settings. Notes are published at the rate
of the log, and are made like its notes. What users look for outside of a feed is drawn as the log is: from their tastes
and from how new a note is. It does not depend on what a feed shows them.

U: users.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.images import STYLES, draw_image
from notellm2_core.demo.logs import TASTE_SHARE, Offer, Views, clicks, draw_appeal, draw_crowd, log_of, views_of_day
from notellm2_core.demo.texts import poor_titles, write_note
from notellm2_core.demo.words import THEMES
from notellm2_core.demo.world import BACKLOG_SHARE, FIRST_DAY, NO_IMAGE_SHARE, TEXT_POOR_SHARE, lay_out, note_id
from notellm2_core.runtime.files import written_whole
from notellm2_core.schema import NOTES

DAYS = 7  # of a week
_SECOND_0 = int(FIRST_DAY.astype("datetime64[s]").astype(np.int64))  # of the world's first midnight, in Unix time
# Streams of random numbers beside those of `world`: the notes of a week, their texts, pictures and appeal; what users
# look for; and what they click on in a feed.
_NOTES, _TEXTS, _IMAGES, _SEARCHES, _CLICKS = 6, 7, 8, 9, 10


@dataclass(frozen=True)
class NewNote:
    """A note as it is published. image: a JPEG; None: it has none."""

    note_id: str
    title: str
    topics: tuple[str, ...]
    content: str
    image: bytes | None
    day: int  # from whose midnight on it is there


@dataclass(frozen=True)
class Look:
    """A note that a user comes upon outside of the feed."""

    note_id: str
    second: int  # since the first midnight
    clicked_after: int  # seconds; 0: not clicked


@dataclass(frozen=True)
class Visit:
    """A session of a user: a look at the feed, and what the user finds elsewhere afterwards."""

    number: int  # in its week, in the order of their starts
    user: int
    second: int  # since the first midnight
    elsewhere: tuple[Look, ...]


@dataclass(frozen=True)
class Week:
    """number: 1, 2, ... after the log."""

    number: int
    first_day: int  # days since the world's first
    notes: tuple[NewNote, ...]  # by day
    visits: tuple[Visit, ...]  # by time

    @property
    def date(self) -> date:
        """Its first day."""
        first: datetime = FIRST_DAY.astype(datetime)
        return (first + timedelta(days=self.first_day)).date()


class LaterWeeks:
    """The world's weeks after its log, one after the other: `week` is called for 1, 2, ..."""

    def __init__(self, settings: DemoSettings) -> None:
        self._seed, num_notes = settings.seed, settings.num_notes
        layout = lay_out(np.random.default_rng([self._seed, 0]), num_notes, settings.num_days)
        stream = np.random.default_rng([self._seed, 1])  # the same numbers as in `generate`
        self._topic, self._published, self._appeal = layout.topic, layout.published, draw_appeal(stream, num_notes)
        self._theme_of_topic, self._style_of_topic = layout.theme_of_topic, layout.style_of_topic
        self.crowd = draw_crowd(stream, settings.num_users, len(layout.theme_of_topic))
        log = log_of(stream, Offer(self._topic, self._published, self._appeal), self.crowd, settings.num_days)
        self.note_ids = [note_id(n) for n in range(num_notes)]
        self._rows = {name: row for row, name in enumerate(self.note_ids)}
        self._seen = set(zip(log.user.tolist(), log.note.tolist(), strict=True))
        self.log = log
        self._num_poor = int(layout.text_poor.sum())
        self._first_day = -(-settings.num_days // DAYS) * DAYS
        self.notes_a_week = round((1 - BACKLOG_SHARE) * num_notes * DAYS / settings.num_days)
        self._done = 0

    def user_id(self, user: int) -> str:
        """The user's id, as in the log."""
        return f"u{user:05d}"

    def has(self, note_id: str) -> bool:
        """Whether it is a note of this world, up to the last week that was asked for."""
        return note_id in self._rows

    def published(self, note_id: str) -> int:
        """The day from whose midnight on a note is there."""
        return int(self._published[self._rows[note_id]])

    def seen_in_log(self) -> dict[int, list[tuple[int, str, bool]]]:
        """Of each user, by time: second, note, and whether it was clicked."""
        seen: dict[int, list[tuple[int, str, bool]]] = {}
        log = self.log
        columns = (log.user, log.note, log.second + log.clicked_after, log.clicked_after > 0)
        for user, note, second, clicked in zip(*(column.tolist() for column in columns), strict=True):
            seen.setdefault(user, []).append((second, self.note_ids[note], clicked))
        return seen

    def week(self, number: int) -> Week:
        """The next week. Its notes belong to the world from then on."""
        assert number == self._done + 1, "weeks come one after the other"
        self._done = number
        first_day = self._first_day + DAYS * (number - 1)
        notes = self._publish(number, first_day)
        rng = np.random.default_rng([self._seed, _SEARCHES, number])
        offer = Offer(self._topic, self._published, self._appeal)
        visits = [
            visit
            for day in range(first_day, first_day + DAYS)
            for visit in self._visits(views_of_day(rng, offer, self.crowd, day))
        ]
        ordered = sorted(visits, key=lambda visit: (visit[1], visit[0]))
        return Week(number, first_day, notes, tuple(Visit(n, *visit) for n, visit in enumerate(ordered)))

    def _publish(self, number: int, first_day: int) -> tuple[NewNote, ...]:
        rng, size = np.random.default_rng([self._seed, _NOTES, number]), self.notes_a_week
        topic = rng.permutation(np.arange(size) % len(self._theme_of_topic))
        day = first_day + np.sort(rng.integers(0, DAYS, size))
        is_poor = rng.random(size) < TEXT_POOR_SHARE
        has_image = is_poor | (rng.random(size) >= NO_IMAGE_SHARE)  # every note carries signal
        titles = poor_titles(np.random.default_rng([self._seed, 4]), self._num_poor + int(is_poor.sum()))
        poor, themes = iter(titles[self._num_poor :]), list(THEMES)
        notes = []
        for n in range(size):
            words = np.random.default_rng([self._seed, _TEXTS, number, n])
            theme = themes[self._theme_of_topic[topic[n]]]
            title, topics, content = (next(poor), [], "") if is_poor[n] else write_note(words, theme)
            pencil = np.random.default_rng([self._seed, _IMAGES, number, n])
            image = _jpeg(pencil, *STYLES[self._style_of_topic[topic[n]]]) if has_image[n] else None
            notes.append(NewNote(f"w{number:03d}-{n:05d}", title, tuple(topics), content, image, int(day[n])))
        self._rows |= {note.note_id: len(self.note_ids) + n for n, note in enumerate(notes)}
        self.note_ids += [note.note_id for note in notes]
        self._topic, self._published = np.append(self._topic, topic), np.append(self._published, day)
        self._appeal = np.append(self._appeal, draw_appeal(rng, size))
        self._num_poor = len(titles)
        return tuple(notes)

    def _visits(self, views: Views) -> list[tuple[int, int, tuple[Look, ...]]]:
        """User, start and views elsewhere of each session; a note that a user has seen elsewhere is not seen again."""
        found: list[list[Look]] = [[] for _ in views.user]
        users = views.user.tolist()
        columns = (views.second, views.session, views.note, views.clicked_after)
        for second, session, note, clicked_after in sorted(zip(*(c.tolist() for c in columns), strict=True)):
            if (users[session], note) not in self._seen:
                self._seen.add((users[session], note))
                found[session].append(Look(self.note_ids[note], second, clicked_after))
        return list(zip(users, views.start.tolist(), map(tuple, found), strict=True))

    def look_at_feed(self, week: int, visit: Visit, feed: Sequence[str]) -> list[Look]:
        """What the user looks at of a feed, from top to bottom, and clicks on.

        The user looks at all notes that fit the tastes, and at as large a share of the others as in the log.
        """
        rng = np.random.default_rng([self._seed, _CLICKS, week, visit.number])
        topics = self._topic[[self._rows[note] for note in feed]]
        fits = np.array([self.crowd.likes(visit.user, topic) for topic in topics], dtype=bool)
        is_seen = fits | (rng.random(len(feed)) >= TASTE_SHARE)
        seconds = visit.second + np.cumsum(rng.integers(3, 10, len(feed)))
        columns = (seconds.tolist(), clicks(rng, fits).tolist(), is_seen.tolist())
        return [Look(note, second, after) for note, second, after, seen in zip(feed, *columns, strict=True) if seen]


def write_notes(notes: Sequence[NewNote], path: Path) -> None:
    """A file of the source's table of notes."""
    rows = [
        {"note_id": n.note_id, "title": n.title, "topics": n.topics, "content": n.content, "image": n.image}
        for n in notes
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as draft:
        pq.write_table(pa.Table.from_pylist(rows, schema=NOTES), draft)


def unix_time(second: int) -> int:
    """Of a second since the world's first midnight."""
    return _SECOND_0 + second


def _jpeg(rng: np.random.Generator, colour: str, shape: str) -> bytes:
    file = io.BytesIO()
    draw_image(rng, colour, shape).save(file, "JPEG", quality=80)
    return file.getvalue()
