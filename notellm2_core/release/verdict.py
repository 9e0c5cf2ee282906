"""The verdict on a release: gates, each a figure with its limit, and what follows from them together.

A gate passes, refuses, or cannot tell. One refusal refuses the release. Without one, a gate that has to show something
and cannot leaves the verdict undecided, and the champion stays. Everything here is computed from figures and ranks; no
event of an orchestrator is read back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from notellm2_core.config.promotion import GateSettings
from notellm2_core.release.comparison import Difference, compare, significant

Outcome = Literal["passed", "refused", "undecided"]
ALL = "all"
VERDICT_FILE, VERDICT_TABLE, VERDICT_PLOT = "verdict.json", "verdict.md", "verdict.png"
# The nearest notes of some test queries by the champion and by the new model; without a champion, neither.
NEIGHBOURS_BEFORE, NEIGHBOURS_AFTER = "neighbours_before.jpg", "neighbours_after.jpg"
VERDICT_FILES = (VERDICT_FILE, VERDICT_TABLE, VERDICT_PLOT, NEIGHBOURS_BEFORE, NEIGHBOURS_AFTER)
GATES = {  # what each gate asks
    "recall_of_champion": "The recall is not worse than that of the release that is live, on all pairs and each slice.",
    "recall_of_anchor": "The recall is not worse than that of the champion of some weeks ago.",
    "recall_of_chance": "The recall of a first release is better than chance.",
    "image_recall": "With the image alone, recall is at least half its usual multiple of chance (visual neglect).",
    "has_learned": "Training lowered the loss below that of chance, or raised the validation recall.",
    "not_collapsed": "The vectors of random notes are not all alike.",
    "index_recall": "The index finds the share of the exact nearest notes that index.target_recall asks for.",
    "no_leakage": "No note and no pair is in both training and test.",
    "canary": "Model and index, loaded as a service loads them, answer golden queries.",
}


@dataclass(frozen=True)
class Gate:
    """One question to a release. `figures`: what the answer rests on, the limit among them."""

    name: str
    outcome: Outcome
    why: str  # a sentence for people
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """All gates of a release."""

    gates: tuple[Gate, ...]

    @property
    def outcome(self) -> Outcome:
        outcomes = {gate.outcome for gate in self.gates}
        return "refused" if "refused" in outcomes else "undecided" if "undecided" in outcomes else "passed"

    @property
    def why(self) -> str:
        """The sentences of the gates that decided it."""
        deciding = [gate.why for gate in self.gates if gate.outcome == self.outcome]
        return " ".join(deciding) if self.outcome != "passed" else f"All {len(self.gates)} gates passed."

    def to_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "why": self.why, "gates": [asdict(gate) for gate in self.gates]}


@dataclass(frozen=True)
class Measured:
    """The hits of challenger and rival on the pairs that both may be measured on. Arrays are [P]."""

    challenger: np.ndarray
    rival: np.ndarray
    queries: np.ndarray
    slices: Mapping[str, np.ndarray]  # name -> mask; without "all"
    targets: np.ndarray | None = None  # None: each pair has one of its own

    def difference(self, name: str) -> Difference:
        mask = np.ones(len(self.queries), bool) if name == ALL else self.slices[name]
        targets = None if self.targets is None else self.targets[mask]
        return compare(self.challenger[mask], self.rival[mask], self.queries[mask], name, targets=targets)

    def has_enough(self, name: str, settings: GateSettings) -> bool:
        mask = np.ones(len(self.queries), bool) if name == ALL else self.slices[name]
        num_queries = len(np.unique(self.queries[mask]))
        return bool(mask.sum() >= settings.min_pairs and num_queries >= settings.min_queries)


def recall_gate(
    rival: str,
    measured: Measured,
    max_loss: float,
    settings: GateSettings,
    slices: Sequence[str] = (),
    k: int = 10,
    has_to_show: bool = True,
) -> Gate:
    """The challenger has lost less than `max_loss` points of Recall@k to `rival`, on all pairs and on each slice.

    A loss that is significant, with a lower bound of the difference below -max_loss, refuses the release. has_to_show:
    without a significant loss, too, the lower bound has to be at least -max_loss (a non-inferiority test), or the gate
    is undecided: these pairs cannot tell. Slices only refuse, by losses that are significant among all slices (Holm);
    one with fewer than `min_pairs` pairs or `min_queries` queries is not judged.
    """
    if not measured.has_enough(ALL, settings):
        num_queries = len(np.unique(measured.queries))
        return Gate(
            f"recall_of_{rival}", "undecided" if has_to_show else "passed",
            f"{len(measured.queries)} pairs of {num_queries} queries are too few to compare with the {rival}; "
            f"promotion.min_pairs is {settings.min_pairs}, promotion.min_queries {settings.min_queries}.",
            {"pairs": len(measured.queries), "queries": num_queries},
        )  # fmt: skip
    whole = measured.difference(ALL)
    parts = [measured.difference(name) for name in slices if measured.has_enough(name, settings)]
    lost = {part.slice: part.p_loss for part in parts}
    losers = [part for part in parts if part.slice in significant(lost) and part.lower < -max_loss]
    figures = {"max_loss": max_loss, ALL: asdict(whole)} | {part.slice: asdict(part) for part in parts}
    shown = f"R@{k} {whole.challenger:.1f}, {rival} {whole.rival:.1f}: {whole.points:+.1f} points"
    bounds = f"({whole.lower:+.1f} to {whole.upper:+.1f}; a loss of {whole.least_loss:.1f} would have shown)"
    name = f"recall_of_{rival}"
    if whole.lower < -max_loss and significant({ALL: whole.p_loss}):
        return Gate(name, "refused", f"The release is worse than the {rival}: {shown} {bounds}.", figures)
    if losers:
        worst = min(losers, key=lambda part: part.points)
        reason = f"The release is worse than the {rival} on {worst.slice}: {worst.points:+.1f} points"
        return Gate(name, "refused", f"{reason} ({worst.num_pairs} pairs).", figures)
    if has_to_show and whole.lower < -max_loss:
        reason = f"These pairs cannot show that less than {max_loss:g} points are lost to the {rival}"
        return Gate(name, "undecided", f"{reason}: {shown} {bounds}.", figures)
    return Gate(name, "passed", f"{shown} {bounds}.", figures)
