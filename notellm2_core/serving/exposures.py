"""Two releases by what they showed to users: figures of both with intervals.

A note that an answer showed is one exposure, and clicked or not. Users are drawn with replacement (bootstrap) for the
intervals, because the exposures of one user depend on each other; both releases are measured on the same draws.

U: users, E: exposures.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np

NUM_DRAWS, LEVEL = 2000, 0.95
_COVERAGE_DRAWS = 200  # each looks at all exposures
_BLOCK = 20_000_000  # numbers of a block of draws


@dataclass(frozen=True)
class Interval:
    """An estimate, with the bounds that hold it in 95 % of the experiments."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Exposures:
    """The exposures of two releases, one row each."""

    users: np.ndarray  # [E] int: which user
    answers: np.ndarray  # [E] int: which answer
    notes: np.ndarray  # [E] object: note ids
    by_challenger: np.ndarray  # [E] bool
    clicked: np.ndarray  # [E] bool

    @property
    def num_users(self) -> int:
        return int(self.users.max(initial=-1)) + 1


@dataclass(frozen=True)
class Comparison:
    """One figure of both releases, and their difference (challenger - champion)."""

    name: str
    champion: Interval
    challenger: Interval
    difference: Interval


def compare(exposures: Exposures, known: Set[str], seed: int = 0) -> list[Comparison]:
    """Hit rate, and the figures of `compare_shown`."""
    clicked, sides = exposures.clicked.astype(float), (~exposures.by_challenger, exposures.by_challenger)
    hit_rate = _comparison("hit rate", *(_mean(exposures, clicked, side, seed) for side in sides))
    return [hit_rate, *compare_shown(exposures, known, seed)]


def compare_shown(exposures: Exposures, known: Set[str], seed: int = 0) -> list[Comparison]:
    """Cold-note exposure, novelty and coverage of both releases: what does not depend on clicks.

    known: the notes of the champion's release; others are cold. Novelty is the mean of -log2(p) in bits, with the mean
    of both releases' shares of a note as p, so that it does not depend on how many users have which. Coverage is the
    share of the known notes that were shown. It grows with the number of exposures: compare it only where both releases
    have about as many.
    """
    sides = (~exposures.by_challenger, exposures.by_challenger)
    ids, numbers = np.unique(exposures.notes, return_inverse=True)
    shares = [np.bincount(numbers[side], minlength=len(ids)) / side.sum() for side in sides]
    cold = np.array([note not in known for note in ids])[numbers]
    novelty = -np.log2((shares[0] + shares[1]) / 2)[numbers]
    found = [
        _comparison(name, *(_mean(exposures, value, side, seed) for side in sides))
        for name, value in {"cold-note exposure": cold.astype(float), "novelty, bits": novelty}.items()
    ]
    covered = (_covered(exposures, numbers, side & ~cold, seed) / max(1, len(known)) for side in sides)
    return [*found, _comparison("coverage", *covered)]


def compare_means(
    name: str, users: np.ndarray, champion: np.ndarray, challenger: np.ndarray, seed: int = 0
) -> Comparison:
    """The means of both releases' values on the same cases, of which these are the users, from 0 on. [C] each."""
    num_users = int(users.max(initial=-1)) + 1
    return _comparison(name, *(_ratio(users, value, num_users, seed) for value in (champion, challenger)))


def preference(exposures: Exposures, seed: int = 0) -> tuple[Interval, int]:
    """Interleaving: the share of the answers with a click that the challenger won, ties counted half, and how many
    answers had a click. An answer is won by the release with more clicks on its hits. 0.5 means that neither is better.

    Raises ValueError where no answer had a click.
    """
    num = int(exposures.answers.max(initial=-1)) + 1
    lead = np.bincount(exposures.answers, np.where(exposures.by_challenger, 1.0, -1.0) * exposures.clicked, num)
    decided = np.bincount(exposures.answers, exposures.clicked, num) > 0
    if not decided.any():
        raise ValueError("no answer had a click: nothing can be said about who is preferred")
    user_of = np.zeros(num, dtype=np.int64)
    user_of[exposures.answers] = exposures.users
    wins = (np.sign(lead[decided]) + 1) / 2
    return _interval(_ratio(user_of[decided], wins, exposures.num_users, seed)), int(decided.sum())


def shown_share(exposures: Exposures, seed: int = 0) -> Interval:
    """The challenger's share of the exposures: a half where interleaved lists are shown unchanged."""
    return _interval(_ratio(exposures.users, exposures.by_challenger.astype(float), exposures.num_users, seed))


def _draws(num_users: int, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is drawn: blocks [draws, U] that fit into memory."""
    rng, size = np.random.default_rng(seed), max(1, _BLOCK // num_users)
    for start in range(0, num_draws, size):
        yield rng.multinomial(num_users, np.full(num_users, 1 / num_users), min(size, num_draws - start))


def _mean(exposures: Exposures, value: np.ndarray, side: np.ndarray, seed: int) -> np.ndarray:
    """The mean of `value` [E] over the exposures of one side: as it is, and of each draw [1 + draws]."""
    return _ratio(exposures.users[side], value[side], exposures.num_users, seed)


def _ratio(users: np.ndarray, value: np.ndarray, num_users: int, seed: int) -> np.ndarray:
    """The mean of `value`, of whose rows these are the users: as it is, and of each draw of users [1 + draws]."""
    total, count = np.bincount(users, value, num_users), np.bincount(users, minlength=num_users).astype(float)
    with np.errstate(invalid="ignore"):  # a draw may have nobody who saw anything
        sampled = [(draws @ total) / (draws @ count) for draws in _draws(num_users, NUM_DRAWS, seed)]
    return np.concatenate([[total.sum() / count.sum()], *sampled])


def _covered(exposures: Exposures, numbers: np.ndarray, side: np.ndarray, seed: int) -> np.ndarray:
    """The number of distinct notes that one side showed: as it is, and of each draw [1 + draws].

    A draw has fewer distinct users than there are, and so fewer notes: the bounds are moved by the mean loss.
    """
    users, notes = np.unique(np.stack([exposures.users[side], numbers[side]]), axis=1)
    sampled = [
        len(np.unique(notes[draw[users] > 0]))
        for draws in _draws(exposures.num_users, _COVERAGE_DRAWS, seed)
        for draw in draws
    ]
    num = len(np.unique(notes))
    return np.concatenate([[num], np.array(sampled, dtype=float) + num - np.mean(sampled)])


def _comparison(name: str, champion: np.ndarray, challenger: np.ndarray) -> Comparison:
    return Comparison(name, _interval(champion), _interval(challenger), _interval(challenger - champion))


def _interval(sampled: np.ndarray) -> Interval:
    """Of an estimate, which comes first, and its draws."""
    low, high = np.nanquantile(sampled[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sampled[0]), float(low), float(high))


def to_rows(comparisons: Sequence[Comparison]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        "| | champion | challenger | difference |",
        "| --- | --- | --- | --- |",
        *(f"| {c.name} | {c.champion} | {c.challenger} | {c.difference} |" for c in comparisons),
    ]
