"""The data card of a release: the rows of Table 1, what was dropped, the spread of scores, pairs and clicks.

The card is made from the outputs of the Spark jobs and the metrics in their manifests, without Spark and torch. It
ends with what the data foretell (`data_advice`).
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.config.data import PairSettings, WordUnit
from notellm2_core.evaluation.data_advice import data_advice
from notellm2_core.lake.window import ResolvedWindow
from notellm2_core.notes.prompts import count_words
from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import POOL_TABLE

Metrics = Mapping[str, Any]
_TEXTS = {
    "avg. # words per title": "title_words",
    "avg. # topics per note": "topics",
    "avg. # words per topic": "topic_words",
    "avg. # words per content": "content_words",
}


@dataclass(frozen=True)
class CardInputs:
    """What a data card is made from."""

    notes: Path
    pairs: Path  # the folder of train, validation, test and pool that `spark_jobs.split` wrote
    clicks: Path  # the folder of train_clicks and test_clicks
    manifests: Mapping[str, Metrics]  # of raw_events, notes, interactions, cooccurrence, related_pairs, pair_datasets
    window: ResolvedWindow


def write_data_card(
    inputs: CardInputs, out: Path, unit: WordUnit, settings: PairSettings
) -> tuple[dict[str, Any], list[str]]:
    """Write data_card.md, data_card.png and data_card.json into `out`.

    `unit`: text.word_unit. Returns the rows of Table 1, by split, and the sentences of `data_advice`.
    """
    pairs, manifests = inputs.pairs, inputs.manifests
    train, test = (_pairs(pairs, *names) for names in (("train", "validation"), ("test",)))
    members = {
        "train": pc.unique(pa.chunked_array([*train["query_id"].chunks, *train["target_id"].chunks], pa.string())),
        "test": pq.read_table(pairs / POOL_TABLE, columns=["note_id"])["note_id"].combine_chunks(),
    }
    table = {
        split: {"notes": len(ids), "pairs": len(split_pairs), **_texts(inputs.notes, ids, unit)}
        for (split, ids), split_pairs in zip(members.items(), (train, test), strict=True)
    }
    spread = {
        "targets per query, train": _counts(train["query_id"]),
        "queries per target, train": _counts(train["target_id"]),
        "queries per target, test": _counts(test["target_id"]),
    }
    users = {
        name: np.sort(pq.read_table(inputs.clicks / f"{name}_clicks")["num_users"].to_numpy())[::-1]
        for name in ("train", "test")
    }
    related_scores = {"train": train["score"].to_numpy(), "test": test["score"].to_numpy()}
    window = {"train": inputs.window.train.iso(), "test": inputs.window.test.iso()}
    days = inputs.window.train
    advice = data_advice(train, test.num_rows, (days.start, days.end), settings)
    card = {"table": table, "window": {name: list(days) for name, days in window.items()}, "advice": advice}
    (out / "data_card.json").write_text(json.dumps(card, indent=1))
    lines = [*_markdown(table, spread, users, manifests, window), *_advice(advice)]
    (out / "data_card.md").write_text("\n".join(lines))
    (out / "data_card.png").write_bytes(_plot(spread, users, related_scores, manifests["cooccurrence"]))
    return table, advice


def _pairs(folder: Path, *names: str) -> pa.Table:
    columns = ["query_id", "target_id", "score", "num_users"]
    return pa.concat_tables([pq.read_table(folder / name, columns=columns) for name in names])


def _counts(ids: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The number of times that each id occurs, largest first."""
    return np.sort(pc.value_counts(ids).field("counts").to_numpy())[::-1]


def _texts(notes: Path, ids: pa.Array, unit: WordUnit) -> dict[str, float]:
    """The means of Table 1 over the notes `ids`, which are read in batches. `unit`: how words are counted."""
    totals = dict.fromkeys(("title_words", "topics", "topic_words", "content_words"), 0)
    num_notes = 0
    for file in parquet_files(notes):
        for batch in pq.ParquetFile(file).iter_batches(columns=["note_id", "title", "topics", "content"]):
            chosen = batch.filter(pc.is_in(batch["note_id"], ids))
            num_notes += chosen.num_rows
            totals["topics"] += len(chosen["topics"].flatten())
            for name, texts in (("title", chosen["title"]), ("topic", chosen["topics"].flatten()),
                                ("content", chosen["content"])):  # fmt: skip
                totals[f"{name}_words"] += sum(count_words(text, unit) for text in texts.to_pylist())
    means = {name: total / max(num_notes, 1) for name, total in totals.items()}
    return means | {"topic_words": totals["topic_words"] / max(totals["topics"], 1)}


def _markdown(
    table: Mapping[str, Metrics],
    spread: Mapping[str, npt.NDArray[np.int64]],
    users: Mapping[str, npt.NDArray[np.int64]],
    manifests: Mapping[str, Metrics],
    window: Mapping[str, Sequence[str]],
) -> list[str]:
    raw, interactions, scores, related = (
        manifests[n] for n in ("raw_events", "interactions", "cooccurrence", "related_pairs")
    )
    days = {name: f"{start} to {end} (exclusive)" for name, (start, end) in window.items()}
    return [
        f"# Data card: training days {days['train']}, test days {days['test']}",
        "",
        f"The log of {raw['rows']:,} rows begins on {raw['first_day']} and ends on {raw['covered_until']}.",
        "",
        "## Table 1",
        "",
        *_table(["", "training", "test"], [
            ["# notes", *(f"{table[s]['notes']:,}" for s in ("train", "test"))],
            ["# note pairs", *(f"{table[s]['pairs']:,}" for s in ("train", "test"))],
            *([title, *(f"{table[s][key]:.2f}" for s in ("train", "test"))] for title, key in _TEXTS.items()),
        ]),
        "",
        "Training: the notes of the training and validation pairs. Test: the candidate pool and the pairs inside it.",
        "",
        "## From events to pairs",
        "",
        *_table(["", "training", "test"], [
            *([name, *(f"{interactions[s][name]:,}" for s in ("train", "test"))]
              for name in ("events", "views", "clicks", "users", "notes")),
            ["scored pairs", *(f"{scores[s]['pairs']:,}" for s in ("train", "test"))],
            *([title, *(f"{related[s][key]:,}" for s in ("train", "test"))] for title, key in (
                ("both notes in the split", "pairs_on_side"), ("enough users", "pairs_with_min_users"),
                ("score within bounds", "pairs_within_bounds"), ("strongest of the query", "pairs"))),
            ["users capped", *(f"{scores[s]['capped_users']:,}" for s in ("train", "test"))],
            ["notes whose users were capped (Swing)", *(f"{scores[s]['capped_notes']:,}" for s in ("train", "test"))],
            ["a score has lost at most", *(_loss(scores[s]["max_loss"]) for s in ("train", "test"))],
        ]),
        "",
        "## Dropped",
        "",
        *_table(["", "reason", "rows"], [
            [name, reason, f"{rows:,}"]
            for name in ("notes", "interactions")
            for reason, rows in manifests[name]["dropped"].items()
        ] or [["–", "nothing", "0"]]),
        "",
        "## Spread",
        "",
        *_table(["", "of", "mean", "median", "largest", "share of the top 1 %"], [
            *_spread_rows(spread.items()),
            *_spread_rows((f"users per clicked note, {name}", counts) for name, counts in users.items()),
        ]),
        "",
    ]  # fmt: skip


def _advice(sentences: Sequence[str]) -> list[str]:
    return ["## What to change", "", *(f"- {sentence}" for sentence in sentences), ""] if sentences else []


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _spread_rows(spreads: Iterable[tuple[str, npt.NDArray[np.int64]]]) -> list[list[str]]:
    rows = []
    for name, counts in spreads:
        top = counts[: max(1, len(counts) // 100)].sum() / max(counts.sum(), 1)
        rows.append(
            [name, f"{len(counts):,}", f"{counts.mean():.2f}", f"{np.median(counts):.0f}", f"{counts[0]:,}",
             f"{100 * top:.1f} %"] if len(counts) else [name, "0", "–", "–", "–", "–"]
        )  # fmt: skip
    return rows


def _plot(
    spread: Mapping[str, npt.NDArray[np.int64]],
    users: Mapping[str, npt.NDArray[np.int64]],
    related_scores: Mapping[str, npt.NDArray[np.float64]],
    scores: Metrics,
) -> bytes:
    """Scores before and after the filters, pairs per note, and users per clicked note by rank. PNG bytes."""
    from matplotlib.figure import Figure  # no pyplot: it keeps state and looks for a display; a Figure draws with Agg

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    histogram, pairs, popularity = figure.subplots(1, 3)
    for name, colour in (("train", "tab:blue"), ("test", "tab:green")):
        before = scores[name]["histogram"]
        histogram.stairs(before["pairs"], before["edges"], color=colour, label=f"{name}, all")
        if len(after := related_scores[name]):
            # The grid of the bins before the filters, continued: corrected scores can be outside its range.
            exponents = np.frexp([after.min(), after.max()])[1]
            bins = np.ldexp([0.5, 0.75], np.arange(exponents[0], exponents[1] + 2)[:, None]).ravel()
            counts, edges = np.histogram(after, bins)
            histogram.stairs(counts, edges, color=colour, fill=True, alpha=0.4, label=f"{name}, kept")
        popularity.plot(*_by_rank(users[name]), color=colour, label=name)
    histogram.set(xscale="log", yscale="log", xlabel="score (kept: corrected)", ylabel="pairs", title="Scores")
    popularity.set(
        xscale="log", yscale="log", xlabel="rank of the note", ylabel="users", title="Users per clicked note"
    )
    for name, counts in spread.items():
        pairs.plot(*_by_rank(counts), label=name)
    pairs.set(xscale="log", yscale="log", xlabel="rank of the note", ylabel="pairs", title="Pairs per note")
    for panel in (histogram, pairs, popularity):
        panel.legend(fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _by_rank(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks from 1 and their counts, thinned to what a logarithmic axis shows."""
    ranks = np.unique(np.geomspace(1, max(len(counts), 1), 1000).astype(np.int64))[: len(counts)]
    return ranks, counts[ranks - 1]
