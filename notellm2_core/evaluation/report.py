"""The recall report: JSON for programs, a Markdown table and a plot for people. No torch."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from notellm2_core.config.baselines import BASELINES
from notellm2_core.evaluation.recall import Ranks, Recall, recall_at

# The order of the table: baselines, trained methods, and last the oracle, which cannot be beaten.
FIRST = {name: baseline.label for name, baseline in BASELINES.items()}
LAST = {"oracle": "oracle"}
INPUTS = ("", "multimodal", "image", "text")
TABLE_SLICES = ("all", "short_query", "short_target")
DIGITS = 1  # of a percentage in the table


@dataclass(frozen=True)
class Row:
    """Recall@k of one method with one kind of input on one slice."""

    method: str
    inputs: str  # "multimodal" | "image" | "text" | "" (reads no note)
    slice: str
    recalls: tuple[Recall, ...]


@dataclass(frozen=True)
class Report:
    """All rows, and what puts them into context."""

    rows: tuple[Row, ...]
    ks: tuple[int, ...]
    num_pairs: Mapping[str, int]  # by slice
    pool_notes: int
    context: Mapping[str, Any] = field(default_factory=dict)  # e.g. chance, mean_cosine; keys of recall.json

    def recall(self, method: str, inputs: str = "multimodal", slice: str = "all", k: int | None = None) -> float | None:
        """The expected Recall@k in percent (default k: the smallest); None if the slice is empty.

        Raises ValueError if the report has no such row.
        """
        k = k or min(self.ks)
        for row in self.rows:
            if (row.method, row.inputs, row.slice) == (method, inputs, slice):
                for recall in row.recalls:
                    if recall.k == k:
                        return recall.expected
        raise ValueError(f"the report has no Recall@{k} of {method} with {inputs or 'no'} input on slice {slice!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The content of recall.json. Recalls are in percent; null if a slice has no pairs."""

        def by_k(row: Row, name: str) -> dict[str, float | None]:
            return {str(r.k): getattr(r, name) for r in row.recalls}

        return {
            "ks": list(self.ks),
            "num_pairs": dict(self.num_pairs),
            "pool_notes": self.pool_notes,
            "rows": [
                {
                    "method": row.method,
                    "input": row.inputs,
                    "slice": row.slice,
                    "num_pairs": self.num_pairs[row.slice],
                    "recall": by_k(row, "expected"),
                    "recall_pessimistic": by_k(row, "pessimistic"),
                    "recall_optimistic": by_k(row, "optimistic"),
                }
                for row in self.rows
            ],
            **self.context,
        }


def build_report(
    ranks: Mapping[tuple[str, str], Ranks],
    masks: Mapping[str, np.ndarray],
    ks: Sequence[int],
    pool_notes: int,
    context: Mapping[str, Any] | None = None,
) -> Report:
    """The report of `ranks`, by (method, inputs), on the slices of `masks`, by name [P]."""
    rows = tuple(
        Row(method, inputs, name, tuple(recall_at(ranks[method, inputs].select(mask), ks)))
        for method, inputs in sorted(ranks, key=_order(list(ranks)))
        for name, mask in masks.items()
    )
    return Report(rows, tuple(ks), {n: int(m.sum()) for n, m in masks.items()}, pool_notes, context or {})


def label(method: str) -> str:
    """A method's name in tables and plots."""
    return {**FIRST, **LAST}.get(method, f"{method}, fine-tuned")


def to_markdown(report: Report, slices: Sequence[str] = TABLE_SLICES) -> str:
    """The table for people: a row per method and input, Recall@k in percent by slice, the best in bold.

    Oracles are never bold. An empty slice has dashes.
    """
    cells = {
        (r.method, r.inputs, r.slice, c.k): None if c.expected is None else round(c.expected, DIGITS)
        for r in report.rows
        for c in r.recalls
    }
    lines = list(dict.fromkeys((r.method, r.inputs) for r in report.rows))
    columns = [(name, k) for name in slices for k in report.ks]
    best = {
        (name, k): max((cells[m, i, name, k] or 0 for m, i in lines if m not in LAST), default=0) for name, k in columns
    }

    def cell(method: str, inputs: str, name: str, k: int) -> str:
        value = cells[method, inputs, name, k]
        if value is None:
            return "–"
        text = f"{value:.{DIGITS}f}"
        return f"**{text}**" if method not in LAST and value > 0 and value == best[name, k] else text

    counts = ", ".join(f"{name.replace('_', ' ')} {report.num_pairs[name]:,}" for name in slices)
    head = ["method", "input", *(f"{name.replace('_', ' ')} R@{k}" for name, k in columns)]
    table = [head, ["---", "---", *["---:"] * len(columns)]]
    table += [[label(m), i or "–", *(cell(m, i, name, k) for name, k in columns)] for m, i in lines]
    title = f"Recall@k in percent over a pool of {report.pool_notes:,} notes. Test pairs: {counts}."
    return "\n".join([title, "", *("| " + " | ".join(row) + " |" for row in table), ""])


def to_plot(report: Report, slice: str = "all") -> bytes:
    """Bars of Recall@k of every row of one slice, one panel per k. PNG bytes."""
    from matplotlib.figure import Figure  # no pyplot: it keeps state and looks for a display; a Figure draws with Agg

    rows = [r for r in report.rows if r.slice == slice]
    figure = Figure(figsize=(3.2 * len(report.ks) + 2.2, 0.34 * len(rows) + 1.1), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(report.ks), sharey=True, squeeze=False)[0]
    names = [f"{label(r.method)} {r.inputs}".strip() for r in rows]
    colours = ["0.75" if r.method in LAST else "tab:gray" if r.method in FIRST else "tab:green" for r in rows]
    for n, (panel, k) in enumerate(zip(panels, report.ks, strict=True)):
        values = [r.recalls[n].expected or 0.0 for r in rows]
        bars = panel.barh(range(len(rows)), values, color=colours)
        panel.bar_label(bars, fmt=f"%.{DIGITS}f", padding=2, fontsize=8)
        panel.set_title(f"R@{k} (%)", fontsize=10)
        panel.set_xlim(0, max([*values, 1.0]) * 1.2)
        panel.set_yticks(range(len(rows)), names, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    if rows:
        panels[0].invert_yaxis()
    figure.suptitle(f"{slice.replace('_', ' ')}: {report.num_pairs[slice]:,} pairs", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _order(rows: list[tuple[str, str]]) -> Any:
    """The sort key of `rows`: FIRST in its order, other methods in the order of `rows`, LAST; then the inputs."""
    middle = list(dict.fromkeys(m for m, _ in rows if m not in FIRST and m not in LAST))
    methods = {m: n for n, m in enumerate([*FIRST, *middle, *LAST])}

    def key(row: tuple[str, str]) -> tuple[int, int]:
        return methods[row[0]], INPUTS.index(row[1]) if row[1] in INPUTS else len(INPUTS)

    return key
