"""What can be wrong with the logs of a week, and what only looks like it: twelve poisons and three friends.

Each changes one delivery. The table says beforehand what refuses it: a gate of the data, or another check of an asset,
before any training; the asset that cannot be made; or a gate of the release, where the data alone do not show it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from notellm2_core.demo.logs import DAY
from notellm2_core.simulation.world import WEEK, Catalogue, Log, World

Delivered = tuple[Catalogue, Log]
NO_GATE = ""  # of a friend


@dataclass(frozen=True)
class Change:
    """A change of the delivery of a week."""

    what: str
    gate: str  # that refuses it; NO_GATE: none does
    apply: Callable[[World, int, np.random.Generator], Delivered]


def clean(world: World, week: int) -> Delivered:
    """A week as it was."""
    return world.catalogue(week), world.log(week)


def _empty_images(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    images = tuple(b"" if rng.random() < 0.6 else image for image in notes.images)
    return replace(notes, images=images), log


def _swapped_images(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return replace(notes, images=tuple(notes.images[i] for i in rng.permutation(len(notes.images)))), log


def _shuffled_clicks(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    note = log.note.copy()
    note[log.is_click] = rng.permutation(note[log.is_click])
    return notes, replace(log, note=note)


def _week_before_again(world: World, week: int, rng: np.random.Generator) -> Delivered:
    before = world.log(week - 1)
    return world.catalogue(week), replace(before, second=before.second + WEEK)


def _half_a_week(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return notes, log.where(log.second < week * WEEK + WEEK // 2)


def _eight_hours_late(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return notes, replace(log, second=log.second + 8 * 3600)


def _ten_times_the_robots(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return notes, log.plus(world.robots(week, 50, rng))


def _half_the_notes(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return notes.where(np.flatnonzero(rng.random(len(notes.note)) < 0.5)), log


def _mojibake(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)

    def wrong(text: str) -> str:
        return text.encode().decode("latin-1")

    texts = tuple((wrong(title), [wrong(t) for t in topics], wrong(content)) for title, topics, content in notes.texts)
    return replace(notes, texts=texts), log


def _flooded_note(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    flood = log.where(np.flatnonzero(~log.is_click & (rng.random(len(log)) < 0.4)))
    return notes, log.plus(replace(flood, note=np.full(len(flood), flood.note[0])))


def _renamed_event(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    return notes, replace(log, event=np.where(log.is_click, "tap", log.event))


def _test_clicks_in_training(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    copied = log.where(np.flatnonzero(log.is_click & (rng.random(len(log)) < 0.4)))
    return notes, log.plus(replace(copied, second=copied.second - WEEK))


def _holiday(world: World, week: int, rng: np.random.Generator) -> Delivered:
    notes, log = clean(world, week)
    day_of_user = (log.user * 1009 + log.second // DAY).astype(np.int64)  # people stay away for whole days
    _, number = np.unique(day_of_user, return_inverse=True)
    return notes, log.where(rng.random(number.max() + 1)[number] < 0.6)


def _larger_catalogue(world: World, week: int, rng: np.random.Generator) -> Delivered:
    """Notes that are published in later weeks are there already, and nobody reads them."""
    notes, log = clean(world, week)
    more = world.catalogue(world.num_weeks - 1)
    return more.where(np.arange(min(len(more.note), round(1.3 * len(notes.note))))), log


def _new_topic(world: World, week: int, rng: np.random.Generator) -> Delivered:
    """A tenth of the notes are about something else, in other words."""
    notes, log = clean(world, week)
    words = np.array(["zyklotron", "quarkfeld", "magnetspule", "teilchenstrahl", "vakuumkammer", "detektor", "mÿon"])
    texts = [
        (" ".join(rng.choice(words, 4)), [str(rng.choice(words))], " ".join(rng.choice(words, 30)))
        if rng.random() < 0.1 else text
        for text in notes.texts
    ]  # fmt: skip
    return replace(notes, texts=tuple(texts)), log


CHANGES: Mapping[str, Change] = {
    "empty_images": Change("six in ten images are empty files", "image_share", _empty_images),
    "swapped_images": Change("each image is that of another note", "image_recall", _swapped_images),
    "shuffled_clicks": Change("the clicks name other notes", "views_before_clicks", _shuffled_clicks),
    "week_before_again": Change("the week before, with its times moved", "repeated", _week_before_again),
    "half_a_week": Change("the second half is missing", "raw_events", _half_a_week),
    "eight_hours_late": Change("all times are off by eight hours", "hours", _eight_hours_late),
    "robots": Change("ten times the robots, each under the limit", "busy_users", _ten_times_the_robots),
    "half_the_notes": Change("half of the notes are missing", "dropped_share", _half_the_notes),
    "mojibake": Change("the texts are decoded wrongly", "characters", _mojibake),
    "flooded_note": Change("one note is in a quarter of the events", "top_note", _flooded_note),
    "renamed_event": Change("the clicks have another name", "interactions", _renamed_event),
    "test_clicks_in_training": Change("test clicks are also in the training days", "repeated",
                                      _test_clicks_in_training),
    "holiday": Change("40 % less of everything", NO_GATE, _holiday),
    "larger_catalogue": Change("30 % more notes", NO_GATE, _larger_catalogue),
    "new_topic": Change("a tenth of the notes are about a new topic", NO_GATE, _new_topic),
}  # fmt: skip
