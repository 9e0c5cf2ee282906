"""The baselines of the report, in the order of its table. A new baseline begins with a row here."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """A baseline that `evaluation.baselines` may name."""

    label: str  # in tables and plots
    encoder: str | None = None  # the sentence encoder whose embeddings it needs


BASELINES: dict[str, Baseline] = {
    "random": Baseline("random"),
    "popularity": Baseline("popularity"),
    "bm25": Baseline("BM25"),
    "minilm": Baseline("MiniLM", encoder="minilm"),
    "bm25_minilm": Baseline("BM25 + MiniLM", encoder="minilm"),
    "zero_shot": Baseline("zero-shot"),
}


def require_baseline(name: str) -> str:
    """`name`, if it is a baseline. Raises ValueError listing the choices."""
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}")
    return name


def encoders(names: Iterable[str]) -> list[str]:
    """The sentence encoders that the baselines `names` need. Each has a row of its own in the report."""
    return [*dict.fromkeys(encoder for name in names if (encoder := BASELINES[name].encoder) is not None)]
