"""The recall report: JSON for programs, a Markdown table and a plot for people. No torch."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from notellm2_core.config.baselines import BASELINES
from notellm2_core.evaluation.metrics import each_pair, ranking_metrics
from notellm2_core.evaluation.recall import Ranks, Recall, recall_at

# The order of the table: baselines, trained methods, and last the oracle, which cannot be beaten.
FIRST = {name: baseline.label for name, baseline in BASELINES.items()}
LAST = {"oracle": "oracle"}
INPUTS = ("", "multimodal", "image", "text")
TABLE_SLICES = ("all", "short_query", "short_target")
DIGITS = 1  # of a percentage in the table


@dataclass(frozen=True)
class Row:
    """The metrics of one method with one kind of input on one slice, whose pairs are the relevant ones."""

    method: str
    inputs: str  # "multimodal" | "image" | "text" | "" (reads no note)
    slice: str
    recalls: tuple[Recall, ...]
    num_queries: int
    per_pair: Mapping[str, float | None]  # `ranking_metrics`, each pair a query of its own
    per_query: Mapping[str, float | None]


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
        """The content of recall.json. Metrics are in percent; null if a slice has no pairs."""

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
                    "num_queries": row.num_queries,
                    "per_pair": dict(row.per_pair),
                    "per_query": dict(row.per_query),
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
        _row(method, inputs, name, ranks[method, inputs].select(mask), ks)
        for method, inputs in sorted(ranks, key=_order(list(ranks)))
        for name, mask in masks.items()
    )
    return Report(rows, tuple(ks), {n: int(m.sum()) for n, m in masks.items()}, pool_notes, context or {})


def _row(method: str, inputs: str, slice: str, ranks: Ranks, ks: Sequence[int]) -> Row:
    return Row(
        method,
        inputs,
        slice,
        recalls=tuple(recall_at(ranks, ks)),
        num_queries=len(np.unique(ranks.queries)),
        per_pair=ranking_metrics(each_pair(ranks), ks),
        per_query=ranking_metrics(ranks, ks),
    )


def label(method: str) -> str:
    """A method's name in tables and plots."""
    return {**FIRST, **LAST}.get(method, f"{method}, fine-tuned")


def to_markdown(report: Report, slices: Sequence[str] = TABLE_SLICES) -> str:
    """The tables for people, in percent: Recall@k by slice (the paper's), and the other metrics on all pairs."""
    counts = ", ".join(f"{_words(name)} {report.num_pairs[name]:,}" for name in slices)
    recalls = {
        f"{_words(name)} R@{k}": {(r.method, r.inputs): r.recalls[n].expected for r in report.rows if r.slice == name}
        for name in slices
        for n, k in enumerate(report.ks)
    }
    rows, k = [r for r in report.rows if r.slice == "all"], min(report.ks)
    names = {"mrr": "MRR", f"ndcg@{k}": f"nDCG@{k}", f"map@{k}": f"MAP@{k}", f"hit_rate@{k}": f"hit rate@{k}",
             f"recall@{k}": f"R@{k}"}  # fmt: skip
    others = {title: {(r.method, r.inputs): r.per_query[name] for r in rows} for name, title in names.items()}
    others |= {
        f"{names[name]} per pair": {(r.method, r.inputs): r.per_pair[name] for r in rows}
        for name in ("mrr", f"ndcg@{k}")
    }
    num_queries = rows[0].num_queries if rows else 0
    lines = [
        f"Recall@k in percent over a pool of {report.pool_notes:,} notes. Test pairs: {counts}.",
        "",
        *_table(recalls),
        "",
        f"All pairs, in percent: means over the {num_queries:,} queries, each with all of its targets; the last two "
        "columns are means over the pairs.",
        "",
        *_table(others),
        "",
    ]
    return "\n".join(lines)


def _table(columns: Mapping[str, Mapping[tuple[str, str], float | None]]) -> list[str]:
    """Lines of Markdown with a row per (method, input). `columns`: the values by heading."""
    rows = next(iter(columns.values()))
    table = [["method", "input", *columns], ["---", "---", *["---:"] * len(columns)]]
    cells = zip(*map(_cells, columns.values()), strict=True)
    table += [[label(method), inputs or "–", *row] for (method, inputs), row in zip(rows, cells, strict=True)]
    return ["| " + " | ".join(row) + " |" for row in table]


def _cells(column: Mapping[tuple[str, str], float | None]) -> list[str]:
    """A column of a table. The best value is bold, except an oracle's; None is a dash."""
    values = {row: None if value is None else round(value, DIGITS) for row, value in column.items()}
    best = max((value or 0 for (method, _), value in values.items() if method not in LAST), default=0)

    def cell(method: str, value: float | None) -> str:
        if value is None:
            return "–"
        text = f"{value:.{DIGITS}f}"
        return f"**{text}**" if method not in LAST and value == best > 0 else text

    return [cell(method, value) for (method, _), value in values.items()]


def _words(name: str) -> str:
    return name.replace("_", " ")


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
    figure.suptitle(f"{_words(slice)}: {report.num_pairs[slice]:,} pairs", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def headline(rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """The five figures that matter most, in percent, from the rows of `Report.to_dict` of all pairs.

    Recall at the smallest and the largest k of the trained model, `method`; at the smallest, with the image and with
    the text alone, and the best recall of a baseline, with its name.
    """
    ks = sorted((int(k) for k in rows[0]["recall"]), key=int) if rows else []
    recall = {(row["method"], row["input"]): {int(k): r for k, r in row["recall"].items()} for row in rows}
    ours = {inputs: recall.get((method, inputs), {}) for inputs in INPUTS}
    if not ks or ours["multimodal"].get(ks[0]) is None:
        return {}
    k = ks[0]
    found = {f"recall_at_{n}": ours["multimodal"][n] for n in dict.fromkeys((k, ks[-1]))}
    found |= {f"{inputs}_recall_at_{k}": r for inputs in ("image", "text") if (r := ours[inputs].get(k)) is not None}
    baselines = {name: r[k] for name, r in recall.items() if name[0] in FIRST}
    names: dict[str, str] = {}
    if baselines:
        best = max(baselines, key=lambda name: baselines[name])
        found[f"best_baseline_recall_at_{k}"] = baselines[best]
        names = {"best_baseline": " ".join(best).strip()}
    return {key: round(recall, DIGITS) for key, recall in found.items()} | names


def run_metrics(report: Report) -> dict[str, Any]:
    """What MLflow and the asset's page show: Recall@k by method, input, slice and k, in percent.

    Under "per_query" are MRR and, at the smallest k, nDCG of all pairs, by method and input. Cold slices that are empty
    or equal to all pairs are left out.
    """
    whole = report.num_pairs["all"]
    redundant = {name for name, num in report.num_pairs.items() if name.startswith("cold_") and num in (0, whole)}
    main = {"mrr": "mrr", f"ndcg@{min(report.ks)}": f"ndcg_at_{min(report.ks)}"}
    metrics: dict[str, Any] = {}
    per_query: dict[str, Any] = {}
    for row in (row for row in report.rows if row.slice not in redundant):
        inputs = row.inputs or "-"
        metrics.setdefault(row.method, {}).setdefault(inputs, {})[row.slice] = {
            str(recall.k): recall.expected for recall in row.recalls if recall.expected is not None
        }
        if row.slice == "all" and row.num_queries:
            of_row = {title: row.per_query[name] for name, title in main.items()}
            per_query.setdefault(row.method, {})[inputs] = of_row
    return {**metrics, "per_query": per_query}  # last, because the asset's page shows them in this order


def _order(rows: list[tuple[str, str]]) -> Any:
    """The sort key of `rows`: FIRST in its order, other methods in the order of `rows`, LAST; then the inputs."""
    middle = list(dict.fromkeys(m for m, _ in rows if m not in FIRST and m not in LAST))
    methods = {m: n for n, m in enumerate([*FIRST, *middle, *LAST])}

    def key(row: tuple[str, str]) -> tuple[int, int]:
        return methods[row[0]], INPUTS.index(row[1]) if row[1] in INPUTS else len(INPUTS)

    return key
