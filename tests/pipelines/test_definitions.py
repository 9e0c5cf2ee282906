"""The graph as a literal, what loading it imports, and the schedule."""

import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import dagster as dg
import pytest

from assets.resources.partitions import log_partitions, require_partitions
from assets.resources.pipeline import Pipeline
from notellm2_core.config.drift import CONTENT_GATES, WEEK_GATES
from notellm2_core.config.source import SourceSettings
from notellm2_core.lake.lineage import STAGES
from pipelines.definitions import defs

GRAPH = {
    "raw_events": set(),
    "notes": set(),
    "interactions": {"raw_events", "notes"},
    "cooccurrence": {"interactions"},
    "note_split": {"notes", "interactions", "vision_features"},
    "related_pairs": {"cooccurrence", "note_split"},
    "pair_datasets": {"related_pairs", "note_split"},
    "weekly_activity": {"raw_events", "interactions"},
    "data_profile": {"notes", "vision_features", "pair_datasets"},
    "data_card": {"raw_events", "notes", "interactions", "cooccurrence", "related_pairs", "pair_datasets"},
    "vision_features": {"notes"},
    "note_tokens": {"notes"},
    "initial_model": {"note_tokens", "vision_features", "pair_datasets"},
    "hard_negatives": {"initial_model", "note_tokens", "vision_features", "pair_datasets", "note_split"},
    "checkpoint": {"note_tokens", "vision_features", "pair_datasets", "hard_negatives"},
    "initial_embeddings": {"initial_model", "note_tokens", "vision_features", "pair_datasets"},
    "baseline_embeddings": {"notes", "pair_datasets"},
    "note_embeddings": {"checkpoint", "note_tokens", "vision_features", "pair_datasets"},
    "faiss_index": {"note_embeddings"},
    "saliency": {"checkpoint", "note_tokens", "vision_features", "pair_datasets"},
    "eval_recall": {
        "note_embeddings", "faiss_index", "initial_embeddings", "baseline_embeddings", "pair_datasets", "cooccurrence",
        "checkpoint", "notes", "saliency",
    },
    "rival_embeddings": {"notes", "vision_features", "pair_datasets"},
    "canary": {"checkpoint", "faiss_index", "note_embeddings", "pair_datasets", "notes"},
    "verdict": {
        "notes", "weekly_activity", "pair_datasets", "data_profile", "checkpoint", "note_embeddings", "faiss_index",
        "eval_recall", "rival_embeddings", "canary",
    },
    "release": {
        "checkpoint", "note_embeddings", "faiss_index", "eval_recall", "pair_datasets", "verdict", "canary",
    },
    "offline_replay": {"release", "rival_embeddings", "interactions"},
}  # fmt: skip


def test_the_graph_is_the_lineage() -> None:
    graph = defs.resolve_asset_graph()
    asset_graph = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    stopped = {"cooccurrence": "weekly_activity", "note_split": "weekly_activity", "initial_model": "data_profile",
               "checkpoint": "data_profile"}  # fmt: skip
    for name, by in stopped.items():  # they do not read it: its checks stop them
        asset_graph[name].remove(by)
    assert asset_graph == GRAPH == {name: set(stage.inputs) for name, stage in STAGES.items()}


def test_only_the_raw_logs_are_partitioned() -> None:
    graph = defs.resolve_asset_graph()
    assert {k.to_user_string() for k in graph.materializable_asset_keys if graph.get(k).is_partitioned} == {
        "raw_events"
    }


def test_checks_of_data_block_and_the_gates_of_a_release_do_not() -> None:
    checks = {
        (spec.asset_key.to_user_string(), spec.name)
        for check in defs.asset_checks or []
        for spec in check.check_specs
        if spec.blocking
    }
    assert checks == {
        ("raw_events", "undated_share"),
        ("notes", "dropped_share"),
        ("interactions", "dropped_share"),
        ("vision_features", "unusable_images"),
        ("pair_datasets", "no_leakage"),
        ("pair_datasets", "enough_pairs"),
        ("checkpoint", "finite_loss"),
        *(("weekly_activity", gate) for gate in WEEK_GATES),
        *(("data_profile", gate) for gate in CONTENT_GATES),
    }


@pytest.mark.slow
def test_definitions_load_fast_without_torch_or_spark() -> None:
    """Loading takes under three seconds on an idle machine. The test asserts the modules and only prints the time."""
    heavy = "('torch', 'pyspark', 'mlflow', 'pandas')"
    code = f"import sys, pipelines.definitions; print([m for m in {heavy} if m in sys.modules])"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    print(f"loaded in {time.monotonic() - started:.1f} s")
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_graph_loads_with_a_wrong_configuration_and_every_asset_names_the_error(tmp_path: Path) -> None:
    """A page that does not load could not show which setting to correct."""
    config = tmp_path / "wrong.yaml"
    config.write_text("name: x\nnonsense: 1\n")
    env = {**os.environ, "NOTELLM2_CONFIG": str(config)}
    command = [sys.executable, "-W", "ignore", "-c", "import pipelines.definitions"]
    loaded = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert f"warning: {config}: " in loaded.stderr and "nonsense: no such setting" in loaded.stderr
    with pytest.raises(dg.Failure) as caught:
        Pipeline(config_path=str(config)).catalog()
    assert str(config) in str(caught.value.description) and "nonsense" in str(caught.value.description)
    assert caught.value.allow_retries is False


def test_a_run_with_the_partitions_of_another_configuration_is_refused() -> None:
    loaded = log_partitions(SourceSettings(first_day=date(2025, 1, 5)))
    require_partitions(loaded, SourceSettings(first_day=date(2025, 1, 5)))
    for source in (
        SourceSettings(first_day=date(2024, 1, 7)),
        SourceSettings(first_day=date(2025, 1, 5), partition="year"),
    ):
        with pytest.raises(ValueError, match=f"source.first_day = {source.first_day}, source.last_day = null"):
            require_partitions(loaded, source)


def test_each_asset_has_the_code_version_of_its_stage() -> None:
    """Dagster's UI then shows which assets are stale."""
    graph = defs.resolve_asset_graph()
    versions = {key.to_user_string(): graph.get(key).code_version for key in graph.materializable_asset_keys}
    assert versions == {name: str(stage.version) for name, stage in STAGES.items()}


def test_a_week_in_the_launchpad_keeps_configuration_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run configuration of docs/operations.md sets the week; the rest still comes from the environment."""
    job = defs.resolve_job_def("weekly_retrain")
    dg.validate_run_config(job, {"resources": {"pipeline": {"config": {"week": "2025-01-19"}}}})
    monkeypatch.setenv("NOTELLM2_CONFIG", "pipelines/configs/tiny.yaml")
    monkeypatch.setenv("SOURCE", str(tmp_path))
    catalog = Pipeline(week="2025-01-19").catalog()
    assert (catalog.config.name, catalog.source, catalog.window.test.end) == ("tiny", tmp_path, date(2025, 1, 26))
    assert catalog.command().endswith(f"SOURCE={tmp_path} WEEK=2025-01-19")
    monkeypatch.setenv("WEEK", "last week")
    with pytest.raises(dg.Failure, match="week = last week is not a day"):
        Pipeline().catalog()
