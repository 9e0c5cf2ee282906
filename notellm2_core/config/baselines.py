"""The baselines of the report, in the order of its table. A new baseline begins with a row here."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """A baseline that `evaluation.baselines` may name."""

    label: str  # in tables and plots
    encoder: bool = False  # a sentence encoder, whose weights have the baseline's name


BASELINES: dict[str, Baseline] = {
    "random": Baseline("random"),
    "popularity": Baseline("popularity"),
    "bm25": Baseline("BM25"),
    "minilm": Baseline("MiniLM", encoder=True),
    "zero_shot": Baseline("zero-shot"),
}


def require_baseline(name: str) -> str:
    """`name`, if it is a baseline. Raises ValueError listing the choices."""
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    return name


def encoders(names: Iterable[str]) -> list[str]:
    """Those baselines of `names` that are sentence encoders."""
    return [name for name in names if BASELINES[name].encoder]
