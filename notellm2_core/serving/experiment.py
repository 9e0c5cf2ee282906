"""Two releases beside each other on real users: each user has one of them (A/B), or lists that both have drafted."""

import hashlib
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from notellm2_core.serving.live_index import Answer, Hit

Kind = Literal["ab", "interleave"]
NO_EXPERIMENT = "n"  # begins the ids of answers that are part of none
PREVIOUS = "previous"  # in place of a challenger: of each new release, the one before it


@dataclass(frozen=True)
class Experiment:
    """`share` of the users have the challenger (ab), or lists of both releases (interleave); the others have the
    champion. Who is among them depends on the user and the challenger alone.

    Raises ValueError for a share outside of 0 to 1.
    """

    kind: Kind
    challenger: str  # the id of its release
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"the share of an experiment is 0 to 1, not {self.share}")

    def includes(self, user_id: str) -> bool:
        """Whether the user is among the share."""
        digest = hashlib.sha256(f"{self.challenger} {user_id}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64 < self.share


def answer_prefix(kind: Kind, champion: str, challenger: str) -> str:
    """What the ids of an experiment's answers begin with: they tell what the events about them can be used for."""
    return kind[0] + hashlib.sha256(f"{champion} {challenger}".encode()).hexdigest()[:8]


def new_answer_id(prefix: str) -> str:
    """An id for an answer."""
    return prefix + secrets.token_hex(8)


def interleaved(champion: Answer, challenger: Answer, k: int, draw: random.Random) -> tuple[Answer, list[bool]]:
    """One answer of two to the same history (`team_draft`), and whether each hit is the challenger's."""
    hits, by_challenger = team_draft(champion.hits, challenger.hits, k, draw)
    answer = Answer(
        hits=tuple(hits),
        seq=min(champion.seq, challenger.seq),
        unknown=tuple(dict.fromkeys(champion.unknown + challenger.unknown)),
        is_partial=champion.is_partial or challenger.is_partial,
    )
    return answer, by_challenger


def team_draft(
    champion: Sequence[Hit], challenger: Sequence[Hit], k: int, draw: random.Random
) -> tuple[list[Hit], list[bool]]:
    """The k first hits of two lists, and whether each is the challenger's.

    Team-draft interleaving (Radlinski, Kurup and Joachims, 2008). In each round, both lists give their best hit that is
    not there yet; a coin decides which of them is first.
    """
    teams = ([*champion], [*challenger])
    drafted: list[Hit] = []
    by_challenger: list[bool] = []
    seen: set[str] = set()
    places = [0, 0]
    while len(drafted) < k:
        first = draw.random() < 0.5
        num_before = len(drafted)
        for team in (first, not first):
            hits = teams[team]
            while places[team] < len(hits) and hits[places[team]].note_id in seen:
                places[team] += 1
            if places[team] < len(hits) and len(drafted) < k:
                seen.add(hits[places[team]].note_id)
                drafted.append(hits[places[team]])
                by_challenger.append(team)
        if len(drafted) == num_before:
            break
    return drafted, by_challenger
