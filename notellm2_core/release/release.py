"""A release: everything that goes live together, in one immutable dataset of the lake.

    model/  embeddings/  index/     the model, the multimodal vectors of all notes, their index with its table of ids
    neighbours/                     the nearest notes of each note, and the vectors, as mapped arrays
    report/                         the recall report
    verdict.json, .md, .png         how it was judged; golden.json: queries with their answers
    neighbours_*.jpg                the nearest notes of test queries, before by the champion, and after by this model
    config.yaml, lineage.json       its settings; its window, and the weeks and releases that it was trained from
    trained_notes.parquet           the notes that its lineage has trained on

Its id is the dataset's fingerprint, and whatever comes from it carries the id. Files are hard links where possible.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import read_note_ids
from notellm2_core.lake.lake import Dataset, Draft, Lake
from notellm2_core.lake.window import ResolvedWindow, weeks_of
from notellm2_core.release.measure import trained_note_ids
from notellm2_core.release.verdict import VERDICT_FILE, VERDICT_FILES
from notellm2_core.runtime.files import sha256_of
from notellm2_core.schema import GOLDEN_FILE, INDEX_FOLDER

NAME = "release"  # of the dataset
SERVING_FOLDER = "serving"  # of the lake: what compaction makes of releases, by their ids
CONFIG_FILE, LINEAGE_FILE, TRAINED_FILE = "config.yaml", "lineage.json", "trained_notes.parquet"
_SHORT = 4  # fewest letters of an id that a person types


@dataclass(frozen=True)
class Release:
    """A published release."""

    dataset: Dataset

    @property
    def id(self) -> str:
        return self.dataset.manifest.fingerprint

    @property
    def path(self) -> Path:
        return self.dataset.path

    @property
    def model(self) -> str:
        """The fingerprint of its checkpoint."""
        return self.dataset.manifest.inputs["checkpoint"]

    @property
    def weights_id(self) -> str | None:
        """Identifies the model that made its vectors (`model.weights`); None: its index does not say."""
        weights_id: str | None = json.loads((self.path / INDEX_FOLDER / "index.json").read_text())["weights_id"]
        return weights_id

    @cached_property
    def lineage(self) -> Mapping[str, Any]:
        """week, train and test (days), weeks (all that it and its predecessors trained on), releases (these)."""
        lineage: Mapping[str, Any] = json.loads((self.path / LINEAGE_FILE).read_text())
        return lineage

    @property
    def week(self) -> str:
        """The first day of the last week of its window."""
        return str(self.lineage["week"])

    @property
    def posted(self) -> str | None:
        """The mark of the log of a service up to which it holds the log's notes; None: it holds none of them."""
        mark: str | None = self.lineage.get("posted")
        return mark

    @cached_property
    def verdict(self) -> Mapping[str, Any]:
        verdict: Mapping[str, Any] = json.loads((self.path / VERDICT_FILE).read_text())
        return verdict

    def trained_notes(self) -> set[str]:
        """The notes that this release, or one that it was trained from, has trained on."""
        return set(read_note_ids(self.path / TRAINED_FILE))

    def verify(self) -> None:
        """Read every file. Raises ValueError naming the first whose checksum is not that of the manifest."""
        for name, entry in self.dataset.manifest.files.items():
            if sha256_of(self.path / name) != entry["sha256"]:
                raise ValueError(f"{self.path / name} is damaged: its checksum is not that of the release's manifest")


def open_release(lake: Lake, release_id: str) -> Release:
    """The release of this id, or whose id begins so. Raises ValueError if there is none, or several."""
    found = [d for d in lake.datasets(NAME) if d.manifest.fingerprint.startswith(release_id)]
    if len(found) == 1 and (len(release_id) >= _SHORT):
        return Release(found[0])
    if not found:
        known = ", ".join(d.manifest.fingerprint for d in lake.datasets(NAME)) or "none"
        raise ValueError(f"there is no release {release_id} in {lake.root}; there are: {known}")
    raise ValueError(f"{release_id} is the beginning of {len(found)} releases: write more of the id")


def write_release(
    draft: Draft,
    inputs: Mapping[str, Dataset],
    config: Config,
    window: ResolvedWindow,
    parent: Release | None = None,
    posted: Dataset | None = None,
) -> dict[str, Any]:
    """Fill the draft of a release from its inputs. parent: the release that its model was trained from. posted: the
    notes of the log of a service that it was made of.

    Returns its week, outcome and why of its verdict, and the number of notes that its lineage trained on.
    """
    folders = {"checkpoint": "model", "eval_recall": "report"}
    for name, folder in folders.items():
        for file in inputs[name].manifest.files:
            draft.link(f"{folder}/{file}", inputs[name], file)
    for file in inputs["note_embeddings"].manifest.files:
        if (inner := Path(file)).parts[0] == "multimodal":
            draft.link(f"embeddings/{inner.relative_to('multimodal')}", inputs["note_embeddings"], file)
    for file in inputs["faiss_index"].manifest.files:
        draft.link(file, inputs["faiss_index"], file)
    for name, files in {"verdict": VERDICT_FILES, "canary": (GOLDEN_FILE,)}.items():
        for file in files:
            if file in inputs[name].manifest.files:
                draft.link(file, inputs[name], file)
    week = str(window.last_week)
    lineage = {
        "week": week,
        "train": window.train.iso(),
        "test": window.test.iso(),
        "weeks": sorted({*(parent.lineage["weeks"] if parent else ()), *map(str, weeks_of(window.train))}),
        "releases": [*(parent.lineage["releases"] if parent else ()), *([parent.id] if parent else ())],
        "posted": None if posted is None else posted.manifest.fingerprint,
    }
    (draft.path / LINEAGE_FILE).write_text(json.dumps(lineage, indent=1))
    (draft.path / CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    trained = trained_note_ids(inputs["pair_datasets"].path) | (parent.trained_notes() if parent else set())
    pq.write_table(pa.table({"note_id": pa.array(sorted(trained), pa.string())}), draft.path / TRAINED_FILE)
    verdict = inputs["verdict"].manifest.metrics
    return {"week": week, "outcome": verdict["outcome"], "why": verdict["why"], "trained_notes": len(trained)}
