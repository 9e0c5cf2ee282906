"""The whole graph with Spark, two DeepSpeed ranks, FAISS and MLflow on sqlite; then kills at six places."""

import json
import re
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import dagster as dg
import psutil
import pytest

from notellm2_core.config.drift import DATA_GATES
from notellm2_core.release.release import Release
from notellm2_core.retrieval.index import Index
from notellm2_core.schema import INDEX_FOLDER
from notellm2_core.serving.base import open_base
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.log_url import log_url
from tests.pipelines.conftest import DELETED, POSTED, RECALL, Workplace, make_workplace
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow
MATERIALIZE = (str(Path(sys.executable).parent / "dagster"), "asset", "materialize", "--select")


def test_recall_ends_with_a_table_and_a_second_run_makes_nothing_again(finished: Workplace) -> None:
    assert "fine-tuned" in finished.log.read_text() and "Saliency (Eq. 3-6)" in finished.log.read_text()
    files = finished.files()
    code, output = finished.recall()
    assert code == 0 and "R@10" in output
    assert " made at " not in output and output.count(": exists at ") >= 17
    assert finished.files() == files
    assert finished.processes() == []


def test_a_first_release_is_promoted_and_a_second_run_decides_nothing_again(finished: Workplace) -> None:
    ledger = finished.catalog.ledger
    (decision,) = ledger.state().decisions
    release = finished.catalog.dataset("release")
    assert (decision.action, decision.release, decision.week) == ("promoted", release.path.name, "2025-01-19")
    assert json.loads(ledger.pointer.read_text()) == {"release": release.path.name, "decisions": 1}
    assert f"Release {decision.release}: promoted." in finished.log.read_text()
    verdict = Release(release).verdict
    assert [gate["name"] for gate in verdict["gates"]] == [
        "recall_of_chance", "image_recall", "has_learned", "not_collapsed", "index_recall", "no_leakage", "canary",
        *DATA_GATES,
    ]  # fmt: skip
    assert {gate["outcome"] for gate in verdict["gates"]} == {"passed"}
    assert len(json.loads((release.path / "golden.json").read_text())) >= 10
    Release(release).verify()


def test_what_was_written_to_a_service_is_in_the_release_and_what_was_deleted_is_not(finished: Workplace) -> None:
    catalog = finished.catalog
    counts = catalog.dataset("notes").manifest.metrics
    assert (counts["posted"], counts["deleted"]) == (1, 1)
    release = Release(catalog.dataset("release"))
    ids = set(Index.load(release.path / INDEX_FOLDER).note_ids)
    assert POSTED.note_id in ids and DELETED not in ids
    with closing(NoteLog.open(log_url(catalog.config, catalog.ledger))) as log:
        base = open_base(catalog.lake, release, log)
    assert (base.cut_seq, base.waiting) == (2, ())


def test_a_model_that_fails_a_gate_is_refused_and_the_run_succeeds_with_its_table(copy_of_finished: Workplace) -> None:
    workplace = make_workplace(copy_of_finished.home, {"checks.max_mean_cosine": 1e-9})
    code, output = workplace.recall()
    assert code == 0 and "R@10" in output
    assert re.search(r"Release \w+: refused\. The mean cosine of random notes is 0\.\d+ \(the limit is 1e-09", output)
    state = workplace.catalog.ledger.state()
    assert [decision.action for decision in state.decisions] == ["promoted", "refused"]
    assert state.champion == state.decisions[0].release


def test_every_materialization_is_a_child_run_with_its_tags(finished: Workplace) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished.home / 'lake' / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("notellm2")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = {r.info.run_id: r for r in runs if "mlflow.parentRunId" not in r.data.tags}
    assert all(parent.info.status == "FINISHED" for parent in parents.values())
    parent = next(p for p in parents.values() if "recall_at_10" in p.data.metrics)
    assert parent.info.run_name == "tiny, week 2025-01-19"
    assert {"recall_at_100", "image_recall_at_10", "text_recall_at_10"} <= parent.data.metrics.keys()
    first = [r for r in runs if r.data.tags.get("asset_key") == "checkpoint"][-1]
    assert first.data.tags["mlflow.parentRunId"] in parents
    assert {"dagster_run_id", "asset_key", "partition", "code_version", "fingerprint"} <= set(first.data.tags)
    curve = client.get_metric_history(first.info.run_id, "loss")
    assert len({m.step for m in curve}) >= 3
    artifacts = {a.path for a in client.list_artifacts(first.info.run_id)}
    assert "manifest.json" in artifacts
    report = next(r for r in runs if r.data.tags.get("asset_key") == "eval_recall")
    assert {"neighbours.jpg", "saliency.png"} <= {a.path for a in client.list_artifacts(report.info.run_id)}


def test_asset_materialize_works_by_itself_and_names_a_missing_dataset(
    copy_of_finished: Workplace, tmp_path: Path
) -> None:
    copy_of_finished.forget("eval_recall")
    code, output = copy_of_finished.run(*MATERIALIZE, "eval_recall")
    assert code == 0, output[-3000:]
    empty = make_workplace(tmp_path / "empty", {"window.end": "2025-01-26"})
    code, output = empty.run(*MATERIALIZE, "eval_recall")
    assert code != 0
    assert re.search(r"has not been made yet for this configuration and window; run: make recall CONFIG=", output)
    assert "RETRY" not in output


def _training_ranks(workplace: Workplace) -> list[psutil.Process]:
    """The ranks; none before training has saved its first checkpoint."""
    if not list((workplace.home / "lake" / ".work").rglob("checkpoints/step-*")):
        return []
    ranks = []
    for process in workplace.processes():
        with suppress(psutil.Error):  # it may have ended
            if "LOCAL_RANK" in process.environ():
                ranks.append(process)
    return ranks


def _same_as(finished: Workplace, killed: Workplace) -> None:
    expected, actual = finished.files(), killed.files()
    assert set(actual) == set(expected)
    assert {n for n in expected if actual[n] != expected[n]} == set()
    wait_for(lambda: not killed.processes(), 20)


def test_a_killed_rank_is_tried_again_and_a_killed_run_leaves_no_process_and_is_resumed(
    finished: Workplace, copy_of_finished: Workplace
) -> None:
    """Kills training in `make recall`, then in a run of that asset alone. The next `make recall` completes it."""

    def kill(run: subprocess.Popen) -> None:
        run.kill()
        run.wait()
        wait_for(lambda: not copy_of_finished.processes(), 20)
        assert copy_of_finished.catalog.find("checkpoint") is None

    copy_of_finished.forget("checkpoint", "note_embeddings", "faiss_index", "eval_recall")
    run = copy_of_finished.start(*RECALL)
    ranks = wait_for(lambda: _training_ranks(copy_of_finished))
    ranks[0].kill()
    wait_for(lambda: set(_training_ranks(copy_of_finished)) - set(ranks))
    kill(run)

    run = copy_of_finished.start(*MATERIALIZE, "checkpoint")
    wait_for(lambda: _training_ranks(copy_of_finished))
    kill(run)

    code, output = copy_of_finished.recall()
    assert code == 0, output[-5000:]
    _same_as(finished, copy_of_finished)
    with dg.DagsterInstance.from_config(str(copy_of_finished.home)) as instance:
        runs = instance.get_runs(dg.RunsFilter(job_name="weekly_retrain"))
    assert {run.status for run in runs} == {dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.SUCCESS}


@pytest.mark.spark
def test_a_run_killed_while_spark_writes_is_completed_and_a_killed_jvm_is_tried_again(
    finished: Workplace, copy_of_finished: Workplace
) -> None:
    copy_of_finished.forget("interactions", "cooccurrence", "note_split", "related_pairs", "pair_datasets")
    lake = copy_of_finished.home / "lake"
    run = copy_of_finished.start(*RECALL)
    wait_for(lambda: list((lake / "cooccurrence").glob(".*")))
    run.kill()
    run.wait()
    wait_for(lambda: not copy_of_finished.processes(), 30)
    leftovers = set(lake.glob("*/.*"))
    run = copy_of_finished.start(*RECALL)

    def killed_a_jvm() -> bool:
        drafts = set(lake.glob("*/.*")) - leftovers
        for process in copy_of_finished.processes() if drafts else []:
            with suppress(psutil.NoSuchProcess):  # it may end by itself
                if "java" in process.name():
                    process.kill()
                    return True
        return False

    wait_for(killed_a_jvm)
    assert run.wait(timeout=600) == 0, copy_of_finished.log.read_text()[-5000:]
    assert not set(lake.glob("*/.*"))
    _same_as(finished, copy_of_finished)


def test_a_silent_tracking_server_neither_stops_nor_delays_the_run(copy_of_finished: Workplace) -> None:
    """The server accepts the connection and never answers, which costs more time than a refused connection."""
    copy_of_finished.forget("faiss_index", "eval_recall")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code, output = copy_of_finished.run(
            *MATERIALIZE, "faiss_index", MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT="2"
        )
    assert code == 0, output[-3000:]
    assert "MLflow fails, this step does without it" in output


@pytest.mark.parametrize(("setting", "value"), [("window.end", "2031-01-05"), ("pairs.low", 29.0)])
def test_an_error_that_the_user_can_correct_ends_with_one_sentence(
    copy_of_finished: Workplace, setting: str, value: object
) -> None:
    """Before the run, and in one of its steps."""
    workplace = make_workplace(copy_of_finished.home, {setting: value})
    code, output = workplace.recall()
    last = output.strip().splitlines()[-1]
    assert code != 0 and last.startswith("error: ") and setting in last, output[-3000:]
