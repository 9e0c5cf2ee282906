"""The demo world's users on a running service: the weeks after the log, as a platform lives them.

Every day, the notes of the day are written (`POST /notes`). A user who comes is asked for with the own history
(`POST /recall`); the newest notes among the hits, which the user has not seen yet, are the feed, of two releases in
turns. The user looks at it and clicks by taste, then finds other notes elsewhere, as in the log. All of it is sent as
events (`POST /events`), with the simulated times.

How good the feed is, is measured by clicks that do not depend on it: those that users make elsewhere, by their tastes
alone. A click is foreseen if a feed of its week has shown the note before.

U: users.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import date
from typing import Any

import numpy as np

from notellm2_core.demo.client import ServiceClient
from notellm2_core.demo.journal import Journal
from notellm2_core.demo.logs import DAY
from notellm2_core.demo.weeks import DAYS, LaterWeeks, Look, NewNote, Visit, Week, unix_time


@dataclass(frozen=True)
class FeedSettings:
    """How the platform makes a feed."""

    size: int  # most notes of a feed
    history: int  # most notes of a history, the newest
    k: int  # hits that it asks for
    shelf_days: int  # older notes are not shown


@dataclass
class WeekCounts:
    """What happened in a week."""

    number: int
    first_day: date
    num_users: InitVar[int]
    new_notes: int
    elsewhere: np.ndarray = field(init=False)  # [U] clicks of each user outside of the feed
    foreseen: np.ndarray = field(init=False)  # [U] those of them whose note a feed of the week had shown before
    again: np.ndarray = field(init=False)  # [U] those of them that the user had made in the feed already
    in_feed: np.ndarray = field(init=False)  # [U] clicks in the feed
    late_notes: int = 0  # kept, but not found at once
    requests: int = 0
    shown: int = 0
    fresh_shown: int = 0  # notes of this week
    errors: int = 0
    releases: dict[str, None] = field(default_factory=dict)  # those that answered, in order

    def __post_init__(self, num_users: int) -> None:
        self.elsewhere, self.foreseen, self.again, self.in_feed = np.zeros((4, num_users), dtype=np.int64)

    def add_elsewhere(self, user: int, look: Look, was_shown: bool, is_again: bool) -> None:
        """A note that was found outside of the feed. was_shown: in a feed of the week; is_again: and clicked there."""
        if look.clicked_after:
            self.elsewhere[user] += 1
            self.foreseen[user] += was_shown
            self.again[user] += is_again

    @property
    def foreseen_share(self) -> float:
        """Of the clicks elsewhere."""
        return _share(self.foreseen.sum(), self.elsewhere.sum())

    @property
    def foreseen_of_all(self) -> float:
        """Of all clicks, each once; those in the feed are foreseen by themselves."""
        others = self.elsewhere - self.again
        return _share((self.in_feed + self.foreseen - self.again).sum(), (self.in_feed + others).sum())


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


class Simulation:
    """The weeks, one after the other."""

    def __init__(self, world: LaterWeeks, client: ServiceClient, journal: Journal, feed: FeedSettings) -> None:
        self._world, self._client, self._journal, self._settings = world, client, journal, feed
        self._seen: dict[int, set[str]] = {}
        self._clicked: dict[int, dict[str, int]] = {}  # of a user: note -> second of the click
        for user, looks in world.seen_in_log().items():
            self._seen[user] = {note for _, note, _ in looks}
            self._clicked[user] = {note: second for second, note, clicked in looks if clicked}

    def run(self, num_weeks: int, after_week: Callable[[Week], None] | None = None) -> Iterator[WeekCounts]:
        """Weeks 1, 2, ...; those that the journal holds are only counted. after_week: called once after each."""
        for number in range(1, num_weeks + 1):
            week = self._world.week(number)
            yield self._week(week)
            if after_week is not None and not self._journal.get("after", number):
                after_week(week)
                self._journal.add(True, "after", number)

    def _week(self, week: Week) -> WeekCounts:
        counts = WeekCounts(week.number, week.date, len(self._world.crowd.activity), len(week.notes))
        shown: dict[int, set[str]] = {}  # of each user, in the feeds of this week
        for day in range(week.first_day, week.first_day + DAYS):
            counts.late_notes += self._publish(day, [note for note in week.notes if note.day == day])
            events: list[dict[str, Any]] = []
            for visit in week.visits:
                if visit.second // DAY == day:
                    events += self._visit(week, visit, shown.setdefault(visit.user, set()), counts)
            self._journal.sync()
            if not self._journal.get("events", day):
                if self._client.send(events):
                    self._journal.add(len(events), "events", day)
                else:
                    counts.errors += 1
        return counts

    def _publish(self, day: int, notes: list[NewNote]) -> int:
        """Write the notes of a day. Returns how many are not found yet."""
        found = self._journal.get("notes", day)
        if found is None:
            found = self._journal.add(sum(self._client.write(note) for note in notes), "notes", day)
        return len(notes) - int(found)

    def _visit(self, week: Week, visit: Visit, shown: set[str], counts: WeekCounts) -> list[dict[str, Any]]:
        """One session: its events. `shown`: what the user's feeds of this week have had; this one's is added."""
        clicked, seen = self._clicked.setdefault(visit.user, {}), self._seen.setdefault(visit.user, set())
        answer = self._answer(week, visit, clicked, seen)
        release_of = dict(answer.get("feed", ()))  # note -> release, in the order of the feed
        counts.requests += bool(answer)
        counts.errors += "error" in answer
        counts.releases |= dict.fromkeys(release_of.values())
        counts.shown += len(release_of)
        counts.fresh_shown += sum(self._is_fresh(week, note) for note in release_of)
        shown |= release_of.keys()
        events: list[dict[str, Any]] = []
        for look in self._world.look_at_feed(week.number, visit, [*release_of]):
            counts.in_feed[visit.user] += look.clicked_after > 0
            events += self._events(visit, look, answer=answer["answer"], release=release_of[look.note_id])
        for look in visit.elsewhere:
            is_again = look.note_id in clicked  # the user has read it in the feed already
            counts.add_elsewhere(visit.user, look, look.note_id in shown, is_again)
            if not is_again:
                events += self._events(visit, look)
        for number, event in enumerate(events):
            event["event_id"] = f"{self._journal.run}-{week.number}-{visit.number}-{number}"
        return events

    def _is_fresh(self, week: Week, note_id: str) -> bool:
        return self._world.published(note_id) >= week.first_day

    def _events(self, visit: Visit, look: Look, **shown_by: str) -> list[dict[str, Any]]:
        """The view, and the click if there is one; they become part of what is known of the user."""
        about = {"user_id": self._world.user_id(visit.user), "note_id": look.note_id, **shown_by}
        events = [{**about, "event": "view", "timestamp": unix_time(look.second)}]
        self._seen[visit.user].add(look.note_id)
        if look.clicked_after:
            second = look.second + look.clicked_after
            events.append({**about, "event": "click", "timestamp": unix_time(second)})
            self._clicked[visit.user][look.note_id] = second
        return events

    def _answer(self, week: Week, visit: Visit, clicked: Mapping[str, int], seen: set[str]) -> dict[str, Any]:
        """What the user is shown: the answer's id, and the feed, [note, release] each. {}: a user without a history."""
        if not clicked:
            return {}
        found: dict[str, Any] | None = self._journal.get("visit", week.number, visit.number)
        if found is not None:
            return found
        newest = sorted(clicked, key=lambda note: (-clicked[note], note))[: self._settings.history]
        first_day = visit.second // DAY - self._settings.shelf_days
        unwanted = sorted(note for note in seen if self._world.published(note) > first_day and note not in newest)
        answer = self._client.recall(self._world.user_id(visit.user), newest, self._settings.k, unwanted)
        if answer is None:
            return dict(self._journal.add({"error": True}, "visit", week.number, visit.number))
        feed = [
            [hit["note_id"], hit.get("release") or answer["release"]]
            for hit in answer["hits"]
            if self._world.has(hit["note_id"])
            and self._world.published(hit["note_id"]) > first_day
            and hit["note_id"] not in seen
        ]
        record = {"answer": answer["answer"], "feed": in_turns(feed)[: self._settings.size]}
        return dict(self._journal.add(record, "visit", week.number, visit.number))


def in_turns(hits: Sequence[list[str]]) -> list[list[str]]:
    """Hits of one or two releases, [note, release] each: one of each release in turns, each in its order; then those
    of which only one has more.

    Releases that have drafted an answer in turns no longer do so in what is left of it: the one with more fresh notes
    would be shown more often, and win more clicks by that alone.
    """
    num_before: Counter[str] = Counter()
    turns = []
    for _, release in hits:
        turns.append(num_before[release])
        num_before[release] += 1
    return [hits[place] for place in sorted(range(len(hits)), key=lambda place: turns[place])]
