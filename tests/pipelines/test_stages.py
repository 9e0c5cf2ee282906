"""The settings that STAGES lists for each stage against those that its code read while the tiny graph was made."""

from collections.abc import Iterable

import pytest

from notellm2_core.config.training import RunSettings
from notellm2_core.lake.lineage import STAGES, settings_of
from tests.pipelines.conftest import Workplace

pytestmark = pytest.mark.slow

# Settings that every stage may read and no dataset depends on: where the work is done, and names. The files at
# source.path enter a fingerprint by themselves.
FREE = ("name", "lake", "spark", "tracking", "source.path", "export.num_ranks",
        *settings_of("training", RunSettings))  # fmt: skip
ONLY_LOOKED_AT = {
    ("initial_model", "model.license"),  # for a card that eval_recall and `notellm2 package` write again
    ("checkpoint", "model.license"),
    ("hard_negatives", "training.hard_negatives.num"),  # whether it is 0: the dataset is then empty by configuration
}

NOT_ASKED = ("rival_embeddings",)  # a first release has no rivals


def _covers(row: Iterable[str], leaf: str) -> bool:
    return any(leaf == key or leaf.startswith(f"{key}.") for key in row)


def _ancestors(name: str) -> set[str]:
    inputs = set(STAGES[name].inputs)
    return inputs.union(*map(_ancestors, inputs))


def test_every_stage_lists_the_settings_that_its_code_reads_and_no_more(finished: Workplace) -> None:
    recorded = {
        name: {leaf for file in (finished.home / "settings" / name).glob("*") for leaf in file.read_text().split()}
        for name in STAGES
    }
    missing, idle, config = set(), set(), finished.catalog.config
    for name, stage in STAGES.items():
        rows = [STAGES[upstream].settings for upstream in (name, *_ancestors(name))]
        listed = {key for row in rows for key in row} | set(FREE)
        read = {leaf for leaf in recorded[name] if (name, leaf) not in ONLY_LOOKED_AT}
        missing |= {f"{name}: {leaf}" for leaf in read if not _covers(listed, leaf)}
        counted = [key for key in stage.settings if stage.counts(key, config) and name not in NOT_ASKED]
        idle |= {f"{name}: {key}" for key in counted if not any(_covers([key], leaf) for leaf in read)}
    assert (missing, idle) == (set(), set())
    assert recorded["raw_events"] and recorded["eval_recall"]  # something was recorded
