"""The saliency report: the shares of S_v, S_t and S_o per layer (Figures 3 and 4) as a table and a plot. No torch.

    python -m notellm2_core.evaluation.saliency_report basic=DIR notellm2=DIR --out FILE.png     (Figure 4)

DIR: a folder that `notellm2_core.training.measure_saliency` wrote.
"""

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from notellm2_core.runtime.errors import user_errors

# Score in saliency.json -> the paper's name, its sign in the text bar, its colour in the plot.
SCORES = {
    "visual": ("S_v", "█", "tab:green"),
    "text": ("S_t", "▒", "tab:blue"),
    "other": ("S_o", "░", "0.55"),
}
BAR_WIDTH = 20  # characters

Record = Mapping[str, Any]  # the object of saliency.json
Shares = dict[str, float | None]


def read_saliency(folder: Path) -> Record | None:
    """saliency.json of `folder`; None if saliency was not measured (evaluation.saliency_pairs = 0)."""
    file = folder / "saliency.json"
    record: Record | None = json.loads(file.read_text()) if file.exists() else None
    return record


def shares(layer: Mapping[str, float | None]) -> Shares:
    """Each score as a share of the sum of the defined scores; None if it is undefined or all are 0."""
    total = sum(score for score in layer.values() if score is not None)
    return {name: None if score is None or not total else score / total for name, score in layer.items()}


def to_markdown(record: Record) -> str:
    """A row per layer: the three shares in percent, and as a bar of characters."""
    names = [name for name, _, _ in SCORES.values()]
    key = " ".join(f"{sign} {name}" for name, sign, _ in SCORES.values())
    left_out = f" ({n:,} without an image left out)" if (n := record["num_without_image"]) else ""
    lines = [
        f"Saliency (Eq. 3-6): relative sizes of S_v, S_t and S_o, mean of {record['num_notes']:,} training notes"
        f"{left_out}. S_v: from the image to the final compressed word, S_t: from the text to it, "
        "S_o: among all others.",
        "",
        f"| layer | {' | '.join(f'{name} %' for name in names)} | {key} |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for number, layer in enumerate(record["layers"], start=1):
        layer_shares = shares(layer)
        cells = ["–" if share is None else f"{100 * share:.1f}" for share in layer_shares.values()]
        lines.append(f"| {number} | {' | '.join(cells)} | {_bar(layer_shares)} |")
    return "\n".join([*lines, ""])


def to_plot(records: Mapping[str, Record]) -> bytes:
    """Shares by layer, one panel per model (label -> record), as Figures 3 and 4. PNG bytes."""
    from matplotlib.figure import Figure  # no pyplot: it keeps state and looks for a display; a Figure draws with Agg

    figure = Figure(figsize=(3.8 * len(records) + 0.8, 3.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(records), sharey=True, squeeze=False)[0]
    for panel, (label, record) in zip(panels, records.items(), strict=True):
        layers = range(1, len(record["layers"]) + 1)
        by_layer = [shares(layer) for layer in record["layers"]]
        for score, (name, _, colour) in SCORES.items():
            values = [float("nan") if (share := row[score]) is None else share for row in by_layer]
            panel.plot(layers, values, label=f"${name}$", color=colour, marker="o", markersize=3)
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("layer", fontsize=9)
        panel.set_ylim(0, 1)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the three", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def visual_shares(record: Record) -> dict[str, float]:
    """S_v's share by layer number, for tracking; without layers where it is undefined."""
    by_layer = {str(n): shares(layer)["visual"] for n, layer in enumerate(record["layers"], start=1)}
    return {n: share for n, share in by_layer.items() if share is not None}


def _bar(layer_shares: Shares) -> str:
    """A bar of BAR_WIDTH characters, – without shares. The ends of its parts are rounded, so they always fill it."""
    bar, end = "", 0.0
    for score, (_, sign, _) in SCORES.items():
        end += layer_shares[score] or 0.0
        bar += sign * (round(end * BAR_WIDTH) - len(bar))
    return f"`{bar}`" if bar else "–"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.evaluation.saliency_report", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="LABEL=DIR", help="folders with a saliency.json")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args(arguments)
    with user_errors():
        records = {}
        for model in options.models:
            label, _, folder = model.partition("=")
            record = read_saliency(Path(folder)) if folder else None
            if record is None:
                raise ValueError(f"{model} is not LABEL=DIR with a saliency.json in DIR")
            records[label] = record
        options.out.write_bytes(to_plot(records))
        for label, record in records.items():
            print(f"{label}. {to_markdown(record)}")


if __name__ == "__main__":
    main()
