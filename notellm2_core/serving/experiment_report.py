"""What an experiment says: two releases by the events of their users, with intervals.

A note that an answer showed is one exposure, and clicked or not, however often its events were sent. Users are drawn
with replacement (bootstrap) for the intervals, because the exposures of one user depend on each other.

U: users, E: exposures.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.config.source import EventSettings
from notellm2_core.runtime.files import parquet_files
from notellm2_core.serving.events import SCHEMA

NUM_DRAWS, LEVEL = 2000, 0.95


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


def read_exposures(folder: Path, champion: str, challenger: str, events: EventSettings) -> Exposures:
    """The exposures in the files of `serving.events` that these two releases found.

    Raises ValueError where there are none of a release.
    """
    files = parquet_files(folder) if folder.is_dir() else []
    tables = [pq.read_table(file, columns=SCHEMA.names) for file in files if file.name.startswith("served-")]
    if not tables:
        raise ValueError(f"{folder} holds no events of a service (served-*.parquet)")
    table = pa.concat_tables(tables).filter(
        pc.field("release").isin([champion, challenger])
        & pc.field("event").isin([*events.view_events, *events.click_events])
    )
    clicks = pc.is_in(table["event"], pa.array(events.click_events, pa.string()))
    table = table.append_column("clicked", clicks)
    keys = ["user_id", "answer", "note_id", "release"]
    found = table.group_by(keys).aggregate([("clicked", "max")])
    by_challenger = pc.equal(found["release"], challenger).to_numpy()
    for release, has in {champion: (~by_challenger).any(), challenger: by_challenger.any()}.items():
        if not has:
            raise ValueError(f"{folder} holds no exposure of release {release}")
    answers = pc.binary_join_element_wise(found["user_id"], pc.fill_null(found["answer"], ""), "\n")
    return Exposures(
        users=_numbers(found["user_id"]),
        answers=_numbers(answers),
        notes=found["note_id"].to_numpy(),
        by_challenger=by_challenger,
        clicked=found["clicked_max"].to_numpy(),
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Each value's number among the distinct ones."""
    return np.unique(column.to_numpy(), return_inverse=True)[1]


@dataclass(frozen=True)
class Comparison:
    """One figure of both releases, and their difference (challenger - champion)."""

    name: str
    champion: Interval
    challenger: Interval
    difference: Interval


def compare(exposures: Exposures, known: Set[str], num_notes: int, seed: int = 0) -> list[Comparison]:
    """An A/B test: hit rate, cold-note exposure, novelty and coverage of both releases.

    known: the notes of the champion's release; those of other notes are cold exposures. num_notes: of them.
    Novelty is the mean of -log2(share of the note among all exposures), in bits. Coverage is the share of the notes
    that were shown, and grows with the number of exposures: it is only comparable where both have as many.
    """
    _, numbers, counts = np.unique(exposures.notes, return_inverse=True, return_counts=True)
    novelty = -np.log2(counts[numbers] / len(numbers))
    cold = np.array([note not in known for note in exposures.notes])
    values = {"hit rate": exposures.clicked, "cold-note exposure": cold, "novelty, bits": novelty}
    draws = _draws(exposures.num_users, seed)
    found = []
    for name, value in values.items():
        ratios = [
            _ratio(exposures, value.astype(float), side, draws)
            for side in (~exposures.by_challenger, exposures.by_challenger)
        ]
        found.append(_comparison(name, *ratios))
    covered = [
        _covered(exposures, numbers, side, draws) / num_notes
        for side in (~exposures.by_challenger, exposures.by_challenger)
    ]
    return [*found, _comparison("coverage", *covered)]


def preference(exposures: Exposures, seed: int = 0) -> tuple[Interval, int]:
    """Interleaving: the share of the answers that the challenger won, ties counted half, and how many answers had a
    click. An answer is won by the release with more clicks on its hits. 0.5: none is better.
    """
    num = int(exposures.answers.max(initial=-1)) + 1
    sign = np.where(exposures.by_challenger, 1.0, -1.0) * exposures.clicked
    lead = np.bincount(exposures.answers, sign, num)
    clicks = np.bincount(exposures.answers, exposures.clicked, num)
    user_of = np.zeros(num, dtype=np.int64)
    user_of[exposures.answers] = exposures.users
    decided = clicks > 0
    wins = np.where(lead > 0, 1.0, np.where(lead < 0, 0.0, 0.5))[decided]
    won = np.bincount(user_of[decided], wins, exposures.num_users)
    played = np.bincount(user_of[decided], minlength=exposures.num_users).astype(float)
    draws = _draws(exposures.num_users, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        sampled = np.concatenate([[won.sum() / played.sum()], (draws @ won) / (draws @ played)])
    return _interval(sampled), int(decided.sum())


def _draws(num_users: int, seed: int) -> np.ndarray:
    """How often each user is drawn: [draws, U]."""
    chance = np.full(num_users, 1 / num_users)
    return np.random.default_rng(seed).multinomial(num_users, chance, NUM_DRAWS).astype(np.float64)


def _ratio(exposures: Exposures, value: np.ndarray, side: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean of `value` over the exposures of one side: as it is, and of each draw [1 + draws]."""
    total = np.bincount(exposures.users[side], value[side], exposures.num_users)
    count = np.bincount(exposures.users[side], minlength=exposures.num_users).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        sampled = (draws @ total) / (draws @ count)
    return np.concatenate([[total.sum() / count.sum()], sampled])


def _covered(exposures: Exposures, numbers: np.ndarray, side: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The number of distinct notes that one side showed: as it is, and of each draw [1 + draws].

    A draw has fewer distinct users than there are, and so fewer notes: the bounds are moved by the mean loss.
    """
    pairs = np.unique(np.stack([exposures.users[side], numbers[side]]), axis=1)
    num = len(np.unique(pairs[1]))
    sampled = np.array([len(np.unique(pairs[1][draw[pairs[0]] > 0])) for draw in draws], dtype=float)
    return np.concatenate([[num], sampled + num - sampled.mean()])


def _comparison(name: str, champion: np.ndarray, challenger: np.ndarray) -> Comparison:
    return Comparison(name, _interval(champion), _interval(challenger), _interval(challenger - champion))


def _interval(sampled: np.ndarray) -> Interval:
    """Of an estimate, which comes first, and its draws."""
    low, high = np.nanquantile(sampled[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sampled[0]), float(low), float(high))


def to_markdown(comparisons: Sequence[Comparison], won: tuple[Interval, int] | None, exposures: Exposures) -> str:
    """A table for people. won: of interleaving."""
    num = int(exposures.by_challenger.sum())
    lines = [
        f"{exposures.num_users:,} users; {len(exposures.users) - num:,} exposures of the champion, {num:,} of the "
        "challenger.",
        "",
        "| | champion | challenger | difference |",
        "| --- | --- | --- | --- |",
        *(f"| {c.name} | {c.champion} | {c.challenger} | {c.difference} |" for c in comparisons),
    ]
    if won is not None:
        lines += [
            "",
            f"Interleaved: the challenger won {won[0]} of {won[1]:,} answers with a click (0.5: no difference).",
        ]
    return "\n".join(lines)
