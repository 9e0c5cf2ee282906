"""The behaviour logs: sessions of users with tastes who view and click notes in a feed of fresh notes."""

from dataclasses import dataclass

import numpy as np

from notellm2_core.runtime.progress import ProgressBar

DAY = 86_400  # seconds
MIN_TASTES, MAX_TASTES = 2, 4  # topics that a user likes
TOPICS_PER_TASTE = 15  # fewer tastes with few topics: topics that too many users share are indistinguishable
FRESHNESS_DAYS = 2.5  # a note's weight in the feed falls by e in this time
TASTE_SHARE = 0.85  # of the views are of a topic that the user likes; the others are of any topic
CLICK_ON_TASTE, CLICK_ON_ANYTHING = 0.6, 0.25  # one click in seven is noise: notes that fit a taste run out sooner
SESSIONS_PER_DAY = 1.0  # of the mean user
ACTIVITY_SPREAD = 0.7  # standard deviation of the users' log-activity: a few users read very much
VIEWS_PER_SESSION = 7.0


@dataclass(frozen=True)
class Impressions:
    """The notes shown to users, by time; no user sees a note twice. All `[E]`."""

    user: np.ndarray
    note: np.ndarray
    second: np.ndarray  # since the first midnight
    clicked_after: np.ndarray  # seconds from the view to the click; 0: not clicked


def simulate(
    rng: np.random.Generator, topic: np.ndarray, published: np.ndarray, num_users: int, num_days: int
) -> Impressions:
    """The impressions of `num_users` users in `num_days` days.

    `topic` [N]: each note's topic, 0..T-1. `published` [N]: the day from whose midnight on a note is in the feed, maybe
    negative.
    """
    num_notes, num_topics = len(topic), int(topic.max()) + 1
    by_topic = np.argsort(topic, kind="stable")  # a topic is a slice of this order
    edges = np.searchsorted(topic[by_topic], np.arange(num_topics + 1))
    appeal = rng.lognormal(0.0, 0.5, num_notes)

    activity = SESSIONS_PER_DAY * rng.lognormal(-(ACTIVITY_SPREAD**2) / 2, ACTIVITY_SPREAD, num_users)
    tastes = rng.random((num_users, num_topics), dtype=np.float32).argsort(axis=1)[:, :MAX_TASTES]
    num_tastes = np.minimum(rng.integers(MIN_TASTES, MAX_TASTES + 1, num_users), max(1, num_topics // TOPICS_PER_TASTE))

    days = []
    for day in ProgressBar(range(num_days), desc="demo logs", unit="day"):
        age = (day - published)[by_topic]
        weight = np.where(age >= 0, appeal[by_topic] * np.exp(-age / FRESHNESS_DAYS), 0.0)
        cumulative = np.concatenate([[0.0], np.cumsum(weight)])

        session_user = np.repeat(np.arange(num_users), rng.poisson(activity))
        length = 1 + rng.poisson(VIEWS_PER_SESSION - 1, len(session_user))
        session = np.repeat(np.arange(len(session_user)), length)  # [E] index of the session
        user = session_user[session]
        start = _session_starts(rng, len(session_user))[session]
        second = start + _running_sum(rng.integers(20, 60, len(user)), length)

        fits = rng.random(len(user)) < TASTE_SHARE
        liked = tastes[user, (rng.random(len(user)) * num_tastes[user]).astype(np.int64)]
        low = np.where(fits, cumulative[edges[liked]], 0.0)
        high = np.where(fits, cumulative[edges[liked + 1]], cumulative[-1])
        # Below `high` even after rounding, so that a future note, with weight zero, is never drawn.
        weight = np.minimum(low + rng.random(len(user)) * (high - low), np.nextafter(high, low))
        index = np.minimum(np.searchsorted(cumulative, weight, side="right") - 1, num_notes - 1)
        note = by_topic[index]

        chance = np.where(fits, CLICK_ON_TASTE, CLICK_ON_ANYTHING)
        clicked_after = np.where(rng.random(len(user)) < chance, rng.integers(2, 20, len(user)), 0)
        # Drop draws from topics without a published note, and impressions that end after the log.
        is_shown = (high > low) & (day * DAY + second + clicked_after < num_days * DAY)
        days.append(np.stack([user, note, day * DAY + second, clicked_after])[:, is_shown])

    impressions = np.concatenate(days, axis=1)  # [4, E]
    impressions = impressions[:, np.lexsort((impressions[1], impressions[0], impressions[2]))]
    _, first = np.unique(impressions[0] * num_notes + impressions[1], return_index=True)
    return Impressions(*impressions[:, np.sort(first)])


def _session_starts(rng: np.random.Generator, num: int) -> np.ndarray:
    """Starts of sessions in seconds of the day `[num]`: some in the morning, most in the evening."""
    evening = rng.random(num) < 0.65
    hour = np.where(evening, rng.normal(20.0, 2.2, num), rng.normal(9.5, 2.5, num))
    return np.asarray(hour % 24 * 3600, dtype=np.int64)


def _running_sum(gaps: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Cumulative sum of `gaps` [E] that restarts in each group of `lengths` [S] (sum of lengths = E)."""
    total = np.cumsum(gaps)
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], total[ends[:-1] - 1]]) if len(lengths) else total[:0]
    return total - np.repeat(before, lengths)
