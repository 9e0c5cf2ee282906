"""The release's page: what is live, since when, how good beside last week, what was refused and why, how to go back."""

import io
from collections.abc import Sequence
from typing import Any

from notellm2_core.lake.ledger import Decision, State

NUM_DECISIONS = 20  # of the table, the last ones
_COLOURS = {"challenger": "tab:green", "champion": "tab:blue", "anchor": "tab:purple", "best baseline": "0.6"}


def summary(state: State) -> str:
    """A few sentences, in Markdown."""
    if not state.reigns:
        return "**Nothing is live.** No release has been promoted yet."
    reign = state.reigns[-1]
    how = "gone back to" if reign.action == "rolled_back" else "promoted"
    lines = [
        f"**Live: `{reign.release}`** of the week {reign.week}, {how} on {reign.time[:10]} by {reign.by}. {reign.why}",
        f"Before it: `{state.previous}`. To go back: `notellm2 release rollback --why '...'`"
        if state.previous
        else "There is no earlier release to go back to.",
    ]
    since = [d for d in state.decisions if d.number > reign.number and d.action not in ("banned", "allowed")]
    lines += [f"Since then: `{d.release}` of the week {d.week} was {d.action}. {d.why}" for d in since[-3:]]
    return "\n\n".join(lines)


def history(decisions: Sequence[Decision]) -> list[dict[str, Any]]:
    """The last decisions as rows of a table, the newest first."""
    return [
        {
            "week": d.week,
            "decision": d.action,
            **{name: _rounded(d.figures.get("recalls", {}).get(name)) for name in ("challenger", "champion")},
            "why": d.why,  # a narrow window cuts off the columns after it
            "by": d.by,
            "time": d.time[:16].replace("T", " "),
            "release": d.release,
        }
        for d in reversed(decisions[-NUM_DECISIONS:])
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def curve(decisions: Sequence[Decision]) -> bytes | None:
    """Recall by week: each week's model beside champion, anchor and best baseline on the same pairs.

    A filled mark was promoted. PNG bytes; None without a measured release.
    """
    from matplotlib.figure import Figure

    # Of an older week, later models may have trained on all notes: then no pair counts, and there is no recall.
    measured = [d for d in decisions if "challenger" in d.figures.get("recalls", {})]
    by_week = {d.week: d for d in measured if d.action not in ("banned", "allowed")}
    if not by_week:
        return None
    weeks = sorted(by_week)
    figure = Figure(figsize=(max(4.0, 0.6 * len(weeks) + 2), 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, colour in _COLOURS.items():
        points = [(n, by_week[week].figures["recalls"].get(name)) for n, week in enumerate(weeks)]
        known = [(n, recall) for n, recall in points if recall is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=".", label=name, linewidth=1)
    for n, week in enumerate(weeks):
        decision = by_week[week]
        filled = "tab:green" if decision.action == "promoted" else "white"
        recall = decision.figures["recalls"]["challenger"]
        axes.plot(n, recall, "o", markerfacecolor=filled, markeredgecolor="tab:green")
    axes.set_xticks(range(len(weeks)), weeks, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel(f"R@{by_week[weeks[-1]].figures['k']} (%)", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
