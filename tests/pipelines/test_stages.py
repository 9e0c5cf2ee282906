"""The rows of the stage table against what the code of each stage reads, recorded while the tiny graph was made."""

from collections.abc import Iterable

import pytest

from notellm2_core.config.training import RunSettings
from notellm2_core.lake.lineage import STAGES, settings_of
from tests.pipelines.conftest import Workplace

pytestmark = pytest.mark.slow

# Read everywhere, and no dataset depends on them: where the work is done, and what it is called. What lies at
# source.path is part of an address by its files.
FREE = ("name", "lake", "spark", "tracking", "source.path", "export.num_ranks",
        *settings_of("training", RunSettings))  # fmt: skip
ONLY_LOOKED_AT = {
    ("initial_model", "model.license"),  # for a card that eval_recall and `notellm2 package` write again
    ("checkpoint", "model.license"),
}


def _covers(row: Iterable[str], leaf: str) -> bool:
    return any(leaf == key or leaf.startswith(f"{key}.") for key in row)


def _ancestors(name: str) -> set[str]:
    found = set(STAGES[name].inputs)
    return found.union(*map(_ancestors, found))


def test_every_row_names_what_its_code_reads_and_no_more(finished: Workplace) -> None:
    recorded = {
        name: {leaf for file in (finished.home / "settings" / name).glob("*") for leaf in file.read_text().split()}
        for name in STAGES
    }
    missing, idle = set(), set()
    for name, stage in STAGES.items():
        rows = [STAGES[upstream].settings for upstream in (name, *_ancestors(name))]
        known = {key for row in rows for key in row} | set(FREE)
        read = {leaf for leaf in recorded[name] if (name, leaf) not in ONLY_LOOKED_AT}
        missing |= {f"{name}: {leaf}" for leaf in read if not _covers(known, leaf)}
        idle |= {f"{name}: {key}" for key in stage.settings if not any(_covers([key], leaf) for leaf in read)}
    assert (missing, idle) == (set(), set())
    assert recorded["raw_events"] and recorded["eval_recall"]  # something was recorded
