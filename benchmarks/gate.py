"""How often the gate of the recall refuses equal and worse models, on vectors of a simulated week.

    notellm2 simulate weeks --out FOLDER --changes
    .venv/bin/python benchmarks/gate.py FOLDER/site

The models are stand-ins that differ in their seed, so that all vectors are drawn anew, and in their noise. The result
is written to benchmarks/results/gate.md.
"""

import argparse
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from tqdm import tqdm

from notellm2_core.config.load import load_config
from notellm2_core.config.promotion import GateSettings
from notellm2_core.embeddings.table import Embeddings
from notellm2_core.evaluation.recall import target_ranks
from notellm2_core.evaluation.slices import SLICES
from notellm2_core.lake.catalog import Catalog
from notellm2_core.release.comparison import hits
from notellm2_core.release.measure import TestSet
from notellm2_core.release.release import open_release
from notellm2_core.release.verdict import Measured, recall_gate
from notellm2_core.schema import NOTE_IMAGES_FILE, NOTES_TABLE
from notellm2_core.simulation.stand_ins import stand_in_vectors
from notellm2_core.simulation.world import TRUTH

RESULT = Path(__file__).parent / "results" / "gate.md"
NUM_MODELS, NUM_COMPARISONS = 60, 200


@dataclass(frozen=True)
class Week:
    """The test pairs of a simulated week, and the themes and styles of its notes."""

    test: TestSet
    notes: Sequence[str]
    themes: Sequence[int]
    styles: Sequence[int]
    k: int

    @classmethod
    def last(cls, site: Path) -> "Week":
        config = load_config(site / "config.yaml")
        catalog = Catalog(config)
        release = open_release(catalog.lake, str(catalog.ledger.state().champion))
        inputs = release.dataset.manifest.inputs
        of_verdict = catalog.lake.open("verdict", inputs["verdict"]).manifest.inputs
        datasets = {name: catalog.lake.open(name, key) for name, key in of_verdict.items()}
        checkpoint = datasets["checkpoint"].manifest.inputs
        vision = catalog.lake.open("vision_features", checkpoint["vision_features"]).path
        test = TestSet.read(
            datasets["pair_datasets"].path,
            datasets["notes"].path / NOTES_TABLE,
            set(),
            config,
            datasets["checkpoint"].path,
        )
        notes = sorted({*test.pool_ids, *test.pairs.query_ids, *test.pairs.target_ids})
        truth = dict(zip(*pq.read_table(site / TRUTH).to_pydict().values(), strict=True))
        images = pq.read_table(vision / NOTE_IMAGES_FILE, columns=["note_id", "image_id"]).to_pydict()
        style_of = json.loads(next(vision.rglob("styles.json")).read_text())
        style = {note: style_of.get(image, -1) for note, image in zip(*images.values(), strict=True)}
        return cls(test, notes, [truth[n] for n in notes], [style[n] for n in notes], config.promotion_k)

    def hits(self, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """The hits [P] of a model, and the number of each pair's query."""
        model = {"seed": seed, "noise": noise}
        vectors = stand_in_vectors(model, "multimodal", self.themes, self.styles, self.notes)
        table = Embeddings(tuple(self.notes), vectors, Path("model"))
        pool = Embeddings(self.test.pool_ids, vectors[table.rows(self.test.pool_ids)], Path("model"))
        ranks = target_ranks(table, pool, self.test.pairs)
        return hits(ranks, self.k), ranks.queries


def outcomes(
    week: Week, models: np.ndarray, rivals: np.ndarray, queries: np.ndarray, settings: GateSettings
) -> Mapping[str, int]:
    """The outcomes of comparisons of random models with random rivals of other seeds; "slice": refused by a slice."""
    generator, found = np.random.default_rng(0), Counter[str]()
    _, targets = np.unique(week.test.pairs.target_ids, return_inverse=True)
    for _ in range(NUM_COMPARISONS):
        model, rival = generator.choice(len(models), 2, replace=False)
        measured = Measured(models[model], rivals[rival], queries, week.test.slices, targets)
        gate = recall_gate("champion", measured, settings.max_loss, settings, SLICES[1:], week.k)
        found["slice" if gate.outcome == "refused" and " on " in gate.why.partition(":")[0] else gate.outcome] += 1
        old = generator.choice(np.setdiff1d(np.arange(len(rivals)), [model, rival]))
        beside_anchor = Measured(models[model], rivals[old], queries, week.test.slices, targets)
        anchored = recall_gate("anchor", beside_anchor, settings.max_total_loss, settings, k=week.k, has_to_show=False)
        found["anchor"] += anchored.outcome == "refused"
        found["either"] += "refused" in (gate.outcome, anchored.outcome)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--noises", type=float, nargs="+", default=[1.0, 1.05, 1.1, 1.15, 1.2])
    options = parser.parse_args()
    week, settings = Week.last(options.site), GateSettings()
    hits_of: dict[float, np.ndarray] = {}
    for noise in options.noises:
        pairs = [week.hits(seed, noise) for seed in tqdm(range(NUM_MODELS), desc=f"noise {noise}")]
        hits_of[noise], queries = np.array([hit for hit, _ in pairs]), pairs[0][1]
    champions = hits_of[options.noises[0]]
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# The gate of the recall on vectors",
        "",
        f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`",
        "",
        f"{len(queries):,} test pairs of {len(np.unique(queries)):,} queries; R@{week.k} of the champions "
        f"{100 * champions.mean():.1f}. {NUM_MODELS} models of each noise, whose vectors have nothing in common but "
        f"what the notes are about; {NUM_COMPARISONS} random comparisons of one with a champion. promotion.max_loss = "
        f"{settings.max_loss:g} points.",
        "",
        "| noise | lost, points | refused beside the champion | of these by a slice | undecided | passed "
        "| refused beside an anchor | refused by either |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for noise, models in hits_of.items():
        found = outcomes(week, models, champions, queries, settings)
        lost = 100 * (champions.mean() - models.mean())
        refused = found["refused"] + found["slice"]
        lines.append(
            f"| {noise:g} | {lost:.1f} | {refused} | {found['slice']} | {found['undecided']} | {found['passed']} "
            f"| {found['anchor']} | {found['either']} |"
        )
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
