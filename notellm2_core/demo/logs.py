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


@dataclass(frozen=True)
class Crowd:
    """What the users are like. U: users."""

    activity: np.ndarray  # [U] sessions a day
    tastes: np.ndarray  # [U, MAX_TASTES] topics
    num_tastes: np.ndarray  # [U] how many of them the user likes

    def likes(self, user: int, topic: int) -> bool:
        return bool((self.tastes[user, : self.num_tastes[user]] == topic).any())


class Offer:
    """The notes that users may find. N: notes, T: topics."""

    def __init__(self, topic: np.ndarray, published: np.ndarray, appeal: np.ndarray) -> None:
        """topic [N]: 0..T-1. published [N]: the day from whose midnight on a note is in the feed, maybe negative."""
        self.by_topic = np.argsort(topic, kind="stable")  # a topic is a slice of this order
        self.edges = np.searchsorted(topic[self.by_topic], np.arange(int(topic.max()) + 2))  # [T + 1]
        self._published, self._appeal = published[self.by_topic], appeal[self.by_topic]

    def cumulative(self, day: int) -> np.ndarray:
        """[N + 1] the sum of the weights of a day, in the order `by_topic`; a note that is not published yet has 0."""
        age = day - self._published
        return np.concatenate([[0.0], np.cumsum(np.where(age >= 0, self._appeal * np.exp(-age / FRESHNESS_DAYS), 0.0))])


@dataclass(frozen=True)
class Views:
    """What users would see on a day, by session. E: views, S: sessions."""

    session: np.ndarray  # [E]
    note: np.ndarray  # [E]
    second: np.ndarray  # [E] since the first midnight
    clicked_after: np.ndarray  # [E] as in Impressions
    user: np.ndarray  # [S]
    start: np.ndarray  # [S] seconds since the first midnight


def simulate(
    rng: np.random.Generator, topic: np.ndarray, published: np.ndarray, num_users: int, num_days: int
) -> Impressions:
    """The impressions of `num_users` users in `num_days` days, of the notes of an `Offer`."""
    appeal = draw_appeal(rng, len(topic))
    crowd = draw_crowd(rng, num_users, int(topic.max()) + 1)
    return log_of(rng, Offer(topic, published, appeal), crowd, num_days)


def draw_appeal(rng: np.random.Generator, num_notes: int) -> np.ndarray:
    """How much notes of one topic and age are looked at, beside each other `[N]`."""
    return rng.lognormal(0.0, 0.5, num_notes)


def draw_crowd(rng: np.random.Generator, num_users: int, num_topics: int) -> Crowd:
    activity = SESSIONS_PER_DAY * rng.lognormal(-(ACTIVITY_SPREAD**2) / 2, ACTIVITY_SPREAD, num_users)
    tastes = rng.random((num_users, num_topics), dtype=np.float32).argsort(axis=1)[:, :MAX_TASTES]
    num_tastes = np.minimum(rng.integers(MIN_TASTES, MAX_TASTES + 1, num_users), max(1, num_topics // TOPICS_PER_TASTE))
    return Crowd(activity, tastes, num_tastes)


def log_of(rng: np.random.Generator, offer: Offer, crowd: Crowd, num_days: int) -> Impressions:
    """The impressions of `num_days` days."""
    days = []
    for day in ProgressBar(range(num_days), desc="demo logs", unit="day"):
        views = views_of_day(rng, offer, crowd, day)
        in_log = views.second + views.clicked_after < num_days * DAY  # not those that end after it
        columns = (views.user[views.session], views.note, views.second, views.clicked_after)
        days.append(np.stack(columns)[:, in_log])

    impressions = np.concatenate(days, axis=1)  # [4, E]
    impressions = impressions[:, np.lexsort((impressions[1], impressions[0], impressions[2]))]
    _, first = np.unique(impressions[0] * len(offer.by_topic) + impressions[1], return_index=True)
    return Impressions(*impressions[:, np.sort(first)])


def views_of_day(rng: np.random.Generator, offer: Offer, crowd: Crowd, day: int) -> Views:
    """The views of a day, with notes that a user has seen before."""
    cumulative = offer.cumulative(day)
    session_user = np.repeat(np.arange(len(crowd.activity)), rng.poisson(crowd.activity))
    length = 1 + rng.poisson(VIEWS_PER_SESSION - 1, len(session_user))
    session = np.repeat(np.arange(len(session_user)), length)  # [E] index of the session
    user = session_user[session]
    start = _session_starts(rng, len(session_user))
    second = start[session] + _running_sum(rng.integers(20, 60, len(user)), length)

    fits = rng.random(len(user)) < TASTE_SHARE
    liked = crowd.tastes[user, (rng.random(len(user)) * crowd.num_tastes[user]).astype(np.int64)]
    low = np.where(fits, cumulative[offer.edges[liked]], 0.0)
    high = np.where(fits, cumulative[offer.edges[liked + 1]], cumulative[-1])
    # Below `high` even after rounding, so that a future note, with weight zero, is never drawn.
    weight = np.minimum(low + rng.random(len(user)) * (high - low), np.nextafter(high, low))
    index = np.minimum(np.searchsorted(cumulative, weight, side="right") - 1, len(offer.by_topic) - 1)
    clicked_after = clicks(rng, fits)
    is_shown = high > low  # there is a published note of this topic
    return Views(
        session=session[is_shown],
        note=offer.by_topic[index][is_shown],
        second=day * DAY + second[is_shown],
        clicked_after=clicked_after[is_shown],
        user=session_user,
        start=day * DAY + start,
    )


def clicks(rng: np.random.Generator, fits: np.ndarray) -> np.ndarray:
    """Seconds from each view to its click, 0: none `[E]`. fits [E]: whether the user likes the note's topic."""
    chance = np.where(fits, CLICK_ON_TASTE, CLICK_ON_ANYTHING)
    return np.where(rng.random(len(fits)) < chance, rng.integers(2, 20, len(fits)), 0)


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
