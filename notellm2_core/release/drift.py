"""The gates of the data: a week beside the weeks before, and the notes beside those of the releases before.

Each compares one figure with its usual range, which is wide enough for a holiday, a larger catalogue or a new topic. A
gate without enough of a past, or of too few events to tell, has nothing to judge and passes.
"""

import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from notellm2_core.release.verdict import Gate, Outcome

NUM_WEEKS = 9  # the newest, and those that it is compared with
_MIN_WEEKS = 2  # to compare with
_MIN_ROWS = 500  # of a week that is compared with
_MIN_COUNT = 100  # of what a share is of
_MIN_PAIRS = 100

Profile = Mapping[str, Any]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """One figure beside its past."""

    gate: str
    what: str  # the figure, in a sentence
    figure: float
    past: Sequence[float]
    bounds: Bounds

    @property
    def is_usual(self) -> bool:
        return self.bounds[0] <= self.figure <= self.bounds[1]

    @property
    def sentence(self) -> str:
        low, high = self.bounds
        at_most, at_least = f"at most {_number(high)}", f"at least {_number(low)}"
        limits = at_most if low == -inf else at_least if high == inf else f"from {_number(low)} to {_number(high)}"
        return f"{self.what} is {_number(self.figure)}, usually {_number(median(self.past))}; accepted is {limits}."


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(low: float, high: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds in multiples: of the least and of the largest figure of the past, so that a catalogue may grow."""
    return lambda past: (low * min(past), high * max(past))


def times_usual(low: float, high: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds in multiples of the median: one bad week of the past does not widen them."""
    return lambda past: (low * median(past), high * median(past))


def points(below: float, above: float) -> Callable[[Sequence[float]], Bounds]:
    """Bounds of a share, around the median of the past. Beyond 0 and 1 there are none."""

    def bounds(past: Sequence[float]) -> Bounds:
        low, high = median(past) - below, median(past) + above
        return low if low > 0 else -inf, high if high < 1 else inf

    return bounds


@dataclass(frozen=True)
class Comparison:
    """What a gate compares: a figure of a week, or of the notes, and the bounds that follow from its past."""

    gate: str
    what: str
    figure: Callable[[Profile], float | None]  # None: of too few to be compared
    bounds: Callable[[Sequence[float]], Bounds]


def _share(part: str, whole: str, profile: Profile) -> float | None:
    return profile[part] / profile[whole] if profile[whole] >= _MIN_COUNT else None


def _clicks(week: Profile) -> float | None:
    return _share("clicks", "events", week)


def _repeated(week: Profile) -> float | None:
    return week["repeated"] if week["clicked"] >= _MIN_COUNT else None


def _busy_users(week: Profile) -> float | None:
    return week["busy_users"] if week["users"] >= _MIN_COUNT else None


OF_WEEKS = (
    Comparison("clicks", "The share of clicks among the events", _clicks, times_usual(0.5, 2.0)),
    Comparison("views_before_clicks", "The share of clicks after a view of the same note",
               partial(_share, "viewed_before", "clicked"), points(0.25, 0.25)),
    Comparison("busy_users", "The share of events by users with ten times the mean user's", _busy_users,
               points(inf, 0.12)),
    Comparison("top_note", "The busiest note's share of the events", lambda week: week["top_note"],
               points(inf, 0.06)),
    Comparison("repeated", "The share of clicks that an earlier week had too", _repeated, points(inf, 0.2)),
)  # fmt: skip
OF_NOTES = (
    Comparison("num_notes", "The number of notes", lambda notes: notes["num_notes"], times(0.7, 2.0)),
    Comparison("text_lengths", "The mean length of the texts, in characters,", lambda notes: notes["text_length"],
               times(0.7, 1.5)),
    Comparison("characters", "The share of texts with signs of wrong decoding",
               lambda notes: notes["wrongly_decoded"], points(inf, 0.05)),
    Comparison("image_share", "The share of notes with an image", lambda notes: notes["image_share"],
               points(0.25, inf)),
    Comparison("repeated_images", "The share of images that belong to several notes",
               lambda notes: notes["repeated_images"], points(inf, 0.25)),
)  # fmt: skip
_VOLUME = times_usual(0.4, 4.0)  # of rows a week
_MAX_MOVED_HOURS = 0.15  # share of the events that fall on another hour than usual; or three times the largest so far
_MAX_OTHER_CHARACTERS = 0.25  # share of the characters that are others than usual
_KEPT_SIMILARITY = 0.3  # share of the usual similarity of related texts


def of_week(weeks: Sequence[Profile]) -> list[Drift]:
    """The figures of the last of `weeks` that can be compared with those before it.

    Each has `rows`; those of `spark_jobs.weekly_activity` are there only for weeks that the log's partitions are.
    """
    if not weeks:
        return []
    *before, week = weeks
    past = [w["rows"] for w in before if w["rows"] >= _MIN_ROWS]
    if len(past) < _MIN_WEEKS:
        return []
    found = [Drift("volume", "The number of the week's rows", week["rows"], past, _VOLUME(past))]
    known = [w for w in before if w["rows"] >= _MIN_ROWS and w.get("events", 0) >= _MIN_COUNT]
    if week.get("events", 0) < _MIN_COUNT or len(known) < _MIN_WEEKS:
        return found
    if median(w["clicks"] for w in known) >= _MIN_COUNT:
        found += [drift for c in OF_WEEKS if (drift := _compare(c, week, known)) is not None]
    return [*found, _hours(week, known)]


def of_content(profile: Profile, past: Sequence[Profile]) -> list[Drift]:
    """The figures of the dataset data_profile that can be compared. `past`: profiles of the notes of the releases
    before.
    """
    found = [] if (texts := _related_texts(profile["related_texts"])) is None else [texts]
    if not past:
        return found
    notes = profile["notes"]
    found += [drift for c in OF_NOTES if (drift := _compare(c, notes, past)) is not None]
    return [*found, _characters(notes, past)]


def data_gates(names: Iterable[str], drifts: Sequence[Drift], accepted: Collection[str] = ()) -> list[Gate]:
    """The gates `names`. `accepted`: those that refuse nothing."""
    gates = []
    for name in names:
        own = [drift for drift in drifts if drift.gate == name]
        unusual = [drift for drift in own if not drift.is_usual]
        outcome: Outcome = "refused" if unusual else "passed"
        why = " ".join(drift.sentence for drift in unusual or own)
        if outcome == "refused" and name in accepted:
            outcome, why = "passed", f"{why} It is accepted by checks.accepted_drift."
        figures = {}
        for drift in (unusual or own)[:1]:
            bounds = dict(zip(("low", "high"), drift.bounds, strict=True))
            figures = {"figure": drift.figure, "usual": median(drift.past)}
            figures |= {key: bound for key, bound in bounds.items() if abs(bound) != inf}
        gates.append(Gate(name, outcome, why or "There is not enough of a past to compare with.", figures))
    return gates


def _compare(comparison: Comparison, now: Profile, past: Sequence[Profile]) -> Drift | None:
    figure = comparison.figure(now)
    known = [value for p in past if (value := comparison.figure(p)) is not None]
    if figure is None or not known:
        return None
    return Drift(comparison.gate, comparison.what, figure, known, comparison.bounds(known))


def _moved(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """The share of one distribution that lies elsewhere in the other (total variation distance)."""
    return float(np.abs(np.subtract(a, b)).sum() / 2)


def _hours(week: Profile, before: Sequence[Profile]) -> Drift:
    """The hours of the day: the share of the events that fall on others than usual.

    A difference of one hour does not count: clocks change.

    Hours that fit better when they are moved are named.
    """
    usual = np.mean([w["hours"] for w in before], axis=0)

    def moved(hours: Sequence[float], by: Sequence[int] = (-1, 0, 1)) -> float:
        return min(_moved(np.roll(hours, shift), usual) for shift in by)

    now, past = moved(week["hours"]), [moved(w["hours"]) for w in before]
    shifted = {shift: moved(week["hours"], [-shift]) for shift in range(-11, 13)}
    best = min(shifted, key=lambda shift: shifted[shift])
    what = "The share of the events that fall on another hour of the day"
    if shifted[best] < now / 2:
        what += f" (they are {best:+d} h off)"
    return Drift("hours", what, now, past, (-inf, max(_MAX_MOVED_HOURS, 3 * max(past))))


def _characters(notes: Profile, past: Sequence[Profile]) -> Drift:
    known = [dict(p["characters"]) for p in past]
    usual = {c: max(shares.get(c, 0.0) for shares in known) for c in {c for shares in known for c in shares}}
    other = sum(max(0.0, share - usual.get(c, 0.0)) for c, share in notes["characters"])
    what = "The share of characters that are others than usual"
    return Drift("characters", what, other, [0.0], (-inf, _MAX_OTHER_CHARACTERS))


def _related_texts(texts: Profile) -> Drift | None:
    """The test pairs beside the training pairs, where the texts of these are clearly alike."""
    train, test = texts["train"], texts["test"]
    is_clear = train["similarity"] > max(0.005, 5 * train["error"])
    if not is_clear or min(train["num_pairs"], test["num_pairs"]) < _MIN_PAIRS:
        return None
    least = _KEPT_SIMILARITY * train["similarity"] - 2 * test["error"]
    what = "The similarity of the texts of related notes above that of others, in the test days,"
    return Drift("related_texts", what, test["similarity"], [train["similarity"]], (least, inf))


def to_markdown(gates: Sequence[Gate]) -> str:
    """The gates as a table."""
    rows = [f"| {gate.name} | {'✓' if gate.outcome == 'passed' else '✗'} | {gate.why} |" for gate in gates]
    return "\n".join(["| gate | | why |", "| --- | --- | --- |", *rows, ""])


def to_plot(shown: Sequence[Drift]) -> bytes | None:
    """Each figure beside its past, with the range that is accepted. PNG bytes; None without any."""
    from matplotlib.figure import Figure

    if not shown:
        return None
    columns = 4
    num_rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3 * columns, 1.7 * num_rows), dpi=80, layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for panel, drift in zip(panels, shown, strict=False):
        values = [*drift.past, drift.figure]
        ends = [bound for bound in drift.bounds if abs(bound) != inf]
        spread = max([*values, *ends]) - min([*values, *ends]) or abs(drift.figure) or 1.0
        bottom, top = min([*values, *ends]) - 0.1 * spread, max([*values, *ends]) + 0.1 * spread
        panel.axhspan(max(drift.bounds[0], bottom), min(drift.bounds[1], top), color="tab:green", alpha=0.12)
        panel.plot(range(len(drift.past)), drift.past, "o-", color="0.5", markersize=3, linewidth=1)
        panel.plot(len(drift.past), drift.figure, "o", color="tab:green" if drift.is_usual else "tab:red")
        panel.set(title=drift.gate.replace("_", " "), ylim=(bottom, top), xticks=[])
        panel.title.set_fontsize(9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
