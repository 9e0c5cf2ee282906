"""A platform whose model learns: simulated users, the service, and a weekly training on what they click.

After each week, the newest model is trained a little further, on all clicks since the log's last week, and promoted;
the service takes it from the ledger. Before the week SAME, the same model is promoted twice. The release of the week
WORSE is the first one again, as if the job had read an old log.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from frozen_features import (
    DIM,
    FrozenFeatures,
    new_projector,
    related_pairs,
    train_projector,
    vectors_of,
    write_decoder,
)
from serving_site import Site, free_port, write_release

from notellm2_core.config.source import DemoSettings
from notellm2_core.demo.client import ServiceClient
from notellm2_core.demo.commands import to_row
from notellm2_core.demo.journal import Journal
from notellm2_core.demo.logs import DAY
from notellm2_core.demo.simulate import FeedSettings, Simulation, WeekCounts
from notellm2_core.demo.weeks import LaterWeeks, Week, unix_time
from notellm2_core.demo.world import generate
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.notes.note import Note, NoteWithImage
from notellm2_core.release.promotion import promote
from notellm2_core.release.release import open_release
from notellm2_core.serving.base import open_release_base
from notellm2_core.serving.events import write_event_files
from notellm2_core.serving.held_out import HeldOut
from notellm2_core.serving.live_index import LiveIndex
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.replay import Contest, Replay, compare_hits

SAME, WORSE = 6, 8
FEED = FeedSettings(size=12, history=30, k=200, shelf_days=14)


class Click(NamedTuple):
    """Sorted by user and time."""

    user_id: str
    second: int  # Unix time
    note_id: str


class Loop:
    """A platform, its service, and its weekly training. `champions`: of each week, the release and the one before."""

    def __init__(self, folder: Path, settings: DemoSettings, learns: bool) -> None:
        """learns: train after each week; if not, the first release stays."""
        self.folder, self._learns, self.site = folder, learns, Site(folder)
        decoder = {"name": str(write_decoder(folder / "decoder"))}
        config = self.site.configure(folder / "events", llm=decoder, projection_dim=DIM)
        generate(folder / "world", settings)
        self.world = LaterWeeks(settings)
        self._lake, self._ledger = Lake(config.lake), Ledger(config.lake, config.name)
        rows = pq.read_table(folder / "world" / "notes.parquet").to_pylist()
        self.notes = [_with_image(folder / "world", row) for row in rows]
        self._model = FrozenFeatures(config, folder, self.notes)
        self._features, self._num_log_notes = self._model.of(self.notes), len(self.notes)
        last_week = DAY * (settings.num_days - 7)
        self._log = [
            Click(self.world.user_id(user), unix_time(second), note)
            for user, looks in self.world.seen_in_log().items()
            for second, note, clicked in looks
            if clicked and second >= last_week
        ]
        untrained = new_projector(self._features)
        self._first = train_projector(untrained, self._features, self._pairs(self._log), seed=0)
        self._newest = self._first  # a later training starts from it
        self._projectors: dict[str, torch.nn.Linear] = {}
        self.champions = [(self._release("r0", self._first), "")]
        self.counts: list[WeekCounts] = []

    def run(self, num_weeks: int) -> None:
        """Raises RuntimeError where an answer is an error."""
        port = free_port()
        options = ("--experiment", "interleave", "--challenger", "previous") if self._learns else ()
        url = f"http://127.0.0.1:{port}"
        with (
            self.site.serving(port, self.folder / "serve.log", *options),
            closing(ServiceClient(url)) as client,
            closing(Journal(self.folder / "journal.jsonl", {})) as journal,
        ):
            simulation = Simulation(self.world, client, journal, FEED)
            for counts in simulation.run(num_weeks, lambda week: self._after(week, num_weeks, url)):
                self.counts.append(counts)
                print(to_row(counts), flush=True)
            if client.faults or any(counts.errors for counts in self.counts):
                raise RuntimeError(f"the service has answered with errors: {dict(client.faults)}")

    def _after(self, week: Week, num_weeks: int, url: str) -> None:
        """The weekly run: events become files, a model is trained on them, its release is promoted and served."""
        with closing(NoteLog.open(self.site.log)) as log:
            write_event_files(log, self.folder / "events")
        new = [NoteWithImage(Note(n.note_id, n.title, n.topics, n.content), n.image) for n in week.notes]
        if not self._learns:
            return
        self.notes += new
        self._features = torch.cat([self._features, self._model.of(new)])
        if week.number == num_weeks:
            return
        pairs = self._pairs([*self._log, *self.clicks()])
        self._newest = train_projector(self._newest, self._features, pairs, week.number)
        names = [f"r{week.number}", f"r{week.number}again"]
        for name in names if week.number + 1 == SAME else names[:1]:
            before = self._ledger.state().champion
            release = self._release(name, self._first if week.number + 1 == WORSE else self._newest)
            wait_until_served(url, release)
        self.champions.append((release, str(before)))

    def _pairs(self, clicks: Sequence[Click]) -> np.ndarray:
        """Rows of related notes."""
        rows = {note.note.note_id: row for row, note in enumerate(self.notes)}
        of_user: dict[str, list[int]] = {}
        for click in sorted(clicks):
            of_user.setdefault(click.user_id, []).append(rows[click.note_id])
        return related_pairs(of_user)

    def _release(self, name: str, projector: torch.nn.Linear) -> str:
        """Publish a release of all notes so far, and make it the champion. Returns its id."""
        release_id, notes = name.ljust(8, "0"), self.notes
        vectors, ids = vectors_of(projector, self._features), tuple(note.note.note_id for note in notes)
        probe = slice(None, None, max(1, len(notes) // 8))
        if (self._model.embed(projector, notes[probe]) * vectors[probe]).sum(1).min() < 0.9999:
            raise RuntimeError("the whole model gives other vectors than its projector on the stored features")
        embeddings = Embeddings(ids, vectors, weights_id=f"of {release_id}")
        write_release(self._lake, release_id, embeddings, lambda out: self._model.save(projector, out))
        rows = {note_id: row for row, note_id in enumerate(ids)}
        with closing(NoteLog.open(self.site.log)) as log:  # so that the service does not embed them again
            entries = log.tail(0, len(ids))
            log.put_vectors(f"of {release_id}", {entry.seq: vectors[rows[entry.note.note_id]] for entry in entries})
        promote(self._lake, self._ledger, release_id)
        self._projectors[release_id] = projector
        return release_id

    def clicks(self) -> list[Click]:
        """Those that the service has been told of."""
        table = pa.concat_tables(pq.read_table(file) for file in (self.folder / "events").iterdir())
        table = table.filter(pc.field("event") == "click")
        columns = (table[name].to_pylist() for name in ("user_id", "timestamp", "note_id"))
        return [Click(user, int(time.timestamp()), note) for user, time, note in zip(*columns, strict=True)]

    def replay(self, number: int, k: int) -> Replay:
        """The clicks of a week, asked of the release before (as the champion) and of that of the week."""
        start = datetime.combine(self.counts[number - 1].first_day, datetime.min.time(), UTC).timestamp()
        before: dict[str, tuple[str, ...]] = {}
        asked: list[tuple[str, str, tuple[str, ...]]] = []
        for user, second, note in sorted([*self._log, *self.clicks()]):
            if start <= second < start + 7 * DAY:
                asked.append((user, note, before.get(user, ())))
            before[user] = (note, *before.get(user, ()))[: FEED.history]
        users, notes, histories = zip(*asked, strict=True)
        clicks = HeldOut(np.unique(users, return_inverse=True)[1], notes, histories)
        new, previous = self.champions[number - 1]
        bases = [open_release_base(self._lake, open_release(self._lake, release)) for release in (previous, new)]
        indexes = [LiveIndex(base.index, base.table) for base in bases]
        num_notes = self._num_log_notes + number * self.world.notes_a_week  # up to the end of that week
        ids = [note.note.note_id for note in self.notes[:num_notes]]
        for index, release in zip(indexes, (previous, new), strict=True):
            vectors = dict(zip(ids, vectors_of(self._projectors[release], self._features[:num_notes]), strict=True))
            index.apply({i: vector for i, vector in vectors.items() if i not in index.index.rows}, 1)
        contest = Contest(indexes[0], indexes[1], frozenset(ids), frozenset(indexes[0].index.rows))
        return compare_hits(contest, clicks, k)


def _with_image(folder: Path, row: Mapping[str, Any]) -> NoteWithImage:
    image = None if row["image_path"] is None else (folder / row["image_path"]).read_bytes()
    return NoteWithImage(Note(row["note_id"], row["title"], tuple(row["topics"]), row["content"]), image)


def wait_until_served(url: str, release: str, seconds: float = 600.0) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while httpx.get(f"{url}/readyz", timeout=60).json()["release"] != release:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the service has not taken the release {release}")
        time.sleep(0.2)
