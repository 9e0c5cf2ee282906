"""Judges a new model: measures it beside its rivals, asks every gate, and writes the verdict as JSON, table and plot.

The gates, in this order: the recall beside the champion (or, for a first release, beside chance) and beside the anchor;
whether the image is used; whether the model learned, and its vectors are spread; the index; leakage; the canary; and
the gates of the data, which a run passes before the training unless somebody leaves their checks out.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from notellm2_core.config.baselines import BASELINES
from notellm2_core.config.drift import DATA_GATES
from notellm2_core.config.promotion import GateSettings
from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.evaluation.evaluate import image_reader, neighbour_sheet
from notellm2_core.evaluation.recall import Ranks
from notellm2_core.evaluation.slices import SLICES
from notellm2_core.lake.catalog import ANCHOR, CHAMPION, IMAGE_LIFT, NOTES_PROFILE
from notellm2_core.release.comparison import compare, hits
from notellm2_core.release.drift import data_gates, of_content, of_week
from notellm2_core.release.measure import TestSet, effective_rank, trained_note_ids
from notellm2_core.release.verdict import (
    ALL,
    NEIGHBOURS_AFTER,
    NEIGHBOURS_BEFORE,
    VERDICT_FILE,
    VERDICT_PLOT,
    VERDICT_TABLE,
    Gate,
    Measured,
    Outcome,
    Verdict,
    recall_gate,
)

_MIN_LIFT = 2.0  # of the image-only recall over chance, below which images do not help on this data
_MIN_FIRST_QUERIES = 10
_KEPT_LIFT = 0.5  # share of the usual lift that a release has to keep

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """What a new model is judged by: datasets by folder, and the metrics of their manifests."""

    source: Path  # holds the images
    notes: Path
    pairs: Path  # pair_datasets
    model: Path  # checkpoint
    embeddings: Path  # note_embeddings
    report: Path  # eval_recall
    rivals: Mapping[str, Path]  # role -> folder of its embeddings of this week's pool
    trained: frozenset[str]  # notes that a lineage of the rivals, or of the model's own predecessors, has trained on
    past_lifts: Sequence[float]  # of the image-only recall, of the champions so far
    past_notes: Sequence[Metrics]  # the profiles of their notes
    metrics: Mapping[str, Metrics]  # of the datasets, by name


def judge(candidate: Candidate, config: Config, out: Path) -> dict[str, Any]:
    """Write the files VERDICT_FILES into `out`. Returns outcome, why, and the figures that later releases need."""
    settings, k = GateSettings.of(config.promotion), config.promotion_k
    trained = candidate.trained | trained_note_ids(candidate.pairs)
    test = TestSet.read(candidate.pairs, candidate.notes, trained, config, candidate.model)
    ours = candidate.embeddings / "multimodal"
    lift = image_lift(test, candidate.embeddings / "image", k)
    ranks = test.ranks(ours)
    measured = {role: test.measure(ranks, folder / "multimodal", k) for role, folder in candidate.rivals.items()}
    gates = [*recall_gates(measured, settings, k)]
    if CHAMPION not in measured:
        gates.insert(0, first_gate(ranks, k))
    gates += [image_gate(lift, candidate.past_lifts), *model_gates(candidate, config, ours)]
    profile, weeks = candidate.metrics["data_profile"], candidate.metrics["weekly_activity"]["weeks"]
    drifts = [*of_week(weeks), *of_content(profile, candidate.past_notes)]
    gates += data_gates(DATA_GATES, drifts, config.checks.accepted_drift)
    verdict = Verdict(tuple(gates))
    figures = {
        "k": k,
        "recalls": recalls(ranks, measured, k) | best_baseline(candidate.report, k),
        IMAGE_LIFT: lift,
        NOTES_PROFILE: profile["notes"],
        "num_pairs": len(test.pairs),
        "num_left_out": test.num_left_out,
    }
    (out / VERDICT_FILE).write_text(json.dumps(verdict.to_dict() | {"figures": figures}, indent=1))
    (out / VERDICT_TABLE).write_text(to_markdown(verdict, test.num_left_out))
    if plot := to_plot(verdict, k):
        (out / VERDICT_PLOT).write_bytes(plot)
    if CHAMPION in candidate.rivals:
        write_neighbours(candidate, config, out)
    return {"outcome": verdict.outcome, "why": verdict.why, **figures}


def write_neighbours(candidate: Candidate, config: Config, out: Path) -> None:
    """Draw the nearest notes of the same test queries by the champion, and by the new model."""
    image = image_reader(candidate.notes, candidate.source, config.source.max_image_pixels)
    folders = {NEIGHBOURS_BEFORE: candidate.rivals[CHAMPION], NEIGHBOURS_AFTER: candidate.embeddings}
    for name, folder in folders.items():
        notes, pairs, num_queries = candidate.notes, candidate.pairs, config.evaluation.num_sheet_queries
        sheet = neighbour_sheet(folder / "multimodal", notes, pairs, num_queries, image, config.seed)
        (out / name).write_bytes(sheet)


def recalls(ranks: Ranks, measured: Mapping[str, Measured], k: int) -> dict[str, float]:
    """Recall in percent on all pairs that count, of the challenger and its rivals."""
    if not len(ranks.higher):
        return {}
    found = {role: 100 * float(pair.rival.mean()) for role, pair in measured.items()}
    return {"challenger": 100 * float(hits(ranks, k).mean()), **found}


def best_baseline(report: Path, k: int) -> dict[str, float]:
    """The best recall of a baseline in the report, on all its pairs."""
    rows = json.loads((report / "recall.json").read_text())["rows"]
    found = [row["recall"].get(str(k)) for row in rows if row["slice"] == ALL and row["method"] in BASELINES]
    known = [recall for recall in found if recall is not None]
    return {"best baseline": max(known)} if known else {}


def recall_gates(measured: Mapping[str, Measured], settings: GateSettings, k: int) -> list[Gate]:
    """The recall beside each rival: beside the champion also on the slices, beside the anchor on all pairs.

    Only beside the champion a release has to show that it lost little: two such tests would leave many good ones
    undecided.
    """
    gates = []
    if CHAMPION in measured:
        gates.append(recall_gate(CHAMPION, measured[CHAMPION], settings.max_loss, settings, SLICES[1:], k))
    if ANCHOR in measured:
        limit = settings.max_total_loss
        gates.append(recall_gate(ANCHOR, measured[ANCHOR], limit, settings, k=k, has_to_show=False))
    return gates


def first_gate(ranks: Ranks, k: int) -> Gate:
    """A first release has no champion to be compared with: it has to be better than chance."""
    if (num_queries := len(np.unique(ranks.queries))) < _MIN_FIRST_QUERIES:
        why = f"{num_queries} queries are too few to tell a first release from chance (at least {_MIN_FIRST_QUERIES})."
        return Gate("recall_of_chance", "undecided", why, {"queries": num_queries})
    chance = np.minimum(1.0, k / ranks.candidates)
    found = compare(hits(ranks, k), chance, ranks.queries)
    interval = f"{found.lower:+.1f} to {found.upper:+.1f} points"
    shown = f"R@{k} {found.challenger:.1f}, by chance {found.rival:.1f} ({interval})"
    figures = {"recall": found.challenger, "chance": found.rival, "lower": found.lower}
    if found.lower <= 0:
        return Gate("recall_of_chance", "refused", f"The first release is no better than chance: {shown}.", figures)
    return Gate("recall_of_chance", "passed", f"The first release: {shown}.", figures)


def image_lift(test: TestSet, embeddings: Path, k: int) -> float | None:
    """How many times the recall of chance the model finds with the image alone; None where nothing can be measured."""
    if not embeddings.exists() or not len(test.pairs):
        return None
    ranks = test.ranks(embeddings)
    return float(hits(ranks, k).mean() / np.minimum(1.0, k / ranks.candidates).mean())


def image_gate(lift: float | None, past: Sequence[float]) -> Gate:
    """The neglect alarm: with the image alone, the model finds at least half as much over chance as the champions did.

    It shows images that belong to other notes, and a model that no longer looks at them, on data where images help.
    """
    usual = median(past) if past else 0.0
    figures = {"image_lift": lift, "usual": usual}
    if lift is None:
        outcome: Outcome = "passed" if usual < _MIN_LIFT else "undecided"
        return Gate("image_recall", outcome, "Image-only recall was not measured.", figures)
    if usual < _MIN_LIFT:
        known = "no champion found much by the image alone" if past else "there is no champion to compare with"
        return Gate("image_recall", "passed", f"Image-only recall is {lift:.1f} times chance; {known}.", figures)
    shown = f"Image-only recall is {lift:.1f} times chance, usually {usual:.1f} times"
    if lift < _KEPT_LIFT * usual:
        return Gate("image_recall", "refused", f"{shown}: the model neglects the image, or images are wrong.", figures)
    return Gate("image_recall", "passed", f"{shown}.", figures)


def model_gates(candidate: Candidate, config: Config, embeddings: Path) -> list[Gate]:
    """What the metrics of the model, its vectors and its index say by themselves."""
    metrics = candidate.metrics
    warning = metrics["checkpoint"].get("warning")
    cosine, limit = metrics["note_embeddings"]["mean_cosine"]["multimodal"], config.checks.max_mean_cosine
    rank = effective_rank(read_embeddings(embeddings).vectors)
    index = metrics["faiss_index"]
    recall, target = index["recall"].get(str(index["search_k"])), 100 * index["target_recall"]
    leaks = {name: number for name, number in metrics["pair_datasets"]["leakage"].items() if number}
    answers = metrics["canary"]
    return [
        _gate("has_learned", warning is None, warning or "Training lowered the loss.", {}),
        _gate("not_collapsed", cosine <= limit,
              f"The mean cosine of random notes is {cosine:.3f} (the limit is {limit:g}, checks.max_mean_cosine); the "
              f"vectors use {rank:.0f} directions.",
              {"mean_cosine": cosine, "effective_rank": rank, "checks.max_mean_cosine": limit}),
        _gate("index_recall", recall is None or recall >= target,
              f"The index finds {100 if recall is None else recall:.1f} % of the {index['search_k']} nearest (the "
              f"target is {target:g} %, index.target_recall).", {"recall": recall, "target": target}),
        _gate("no_leakage", not leaks, f"Leaks between training and test: {leaks or 'none'}.", leaks),
        _gate("canary", answers["failed"] is None,
              answers["failed"] or f"Loaded as a service loads it, it answers its {answers['queries']} golden queries.",
              {"queries": answers["queries"]}),
    ]  # fmt: skip


def _gate(name: str, passed: bool, why: str, figures: Metrics) -> Gate:
    return Gate(name, "passed" if passed else "refused", why, figures)


_SIGN = {"passed": "✓", "refused": "✗", "undecided": "?"}


def to_markdown(verdict: Verdict, num_left_out: int) -> str:
    """The verdict as a table, a gate a row."""
    lines = [
        f"**{verdict.outcome.capitalize()}.** {verdict.why}",
        "",
        "| gate | | why |",
        "| --- | --- | --- |",
        *(f"| {gate.name} | {_SIGN[gate.outcome]} {gate.outcome} | {gate.why} |" for gate in verdict.gates),
    ]
    if num_left_out:
        lines += ["", f"{num_left_out:,} test pairs do not count: one of the models has trained on a note of theirs."]
    return "\n".join(lines) + "\n"


def to_plot(verdict: Verdict, k: int) -> bytes | None:
    """The differences to each rival with their intervals, and the loss that is allowed. PNG bytes; None without any."""
    from matplotlib.figure import Figure

    rows: list[tuple[str, Metrics, float]] = [
        (f"{gate.name.removeprefix('recall_of_')}, {name.replace('_', ' ')}", difference, gate.figures["max_loss"])
        for gate in verdict.gates
        for name, difference in gate.figures.items()
        if isinstance(difference, Mapping) and name in (ALL, *SLICES)
    ]
    if not rows:
        return None
    figure = Figure(figsize=(7, 0.4 * len(rows) + 1.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for row, (_, d, max_loss) in enumerate(rows):
        points = d["challenger"] - d["rival"]
        colour = "tab:red" if d["lower"] < -max_loss else "tab:green"
        interval = [[points - d["lower"]], [d["upper"] - points]]
        axes.errorbar(points, row, xerr=interval, fmt="o", color=colour, capsize=3)
        axes.plot([-max_loss, -max_loss], [row - 0.35, row + 0.35], color="0.4", linewidth=2)
    axes.axvline(0, color="0.8", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{label} ({d['num_pairs']:,})" for label, d, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"difference of R@{k}, points; dark line: the loss that is allowed", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
