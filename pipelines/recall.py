"""`make recall`: the whole graph in one process, then the recall table.

It runs the job of the weekly schedule, without a daemon or a browser. Existing datasets are reused.
"""

import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
from dagster import DagsterEventType, DagsterInstance

from assets.resources.commands import forked_commands
from assets.resources.partitions import week_partition
from assets.resources.steps import why_failed
from notellm2_core.config.load import config_in_force, week_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import LakeError
from notellm2_core.runtime.files import host
from notellm2_core.runtime.processes import die_with_parent

_HOST, _PROCESS = "notellm2/host", "notellm2/process"  # run tags: the machine and the process id


def main() -> int:
    """Run in a child process, so that a signal ends everything at once; the next run resumes.

    Dagster itself would take an interrupt for the failure of one step, and retry it.
    """
    child = os.fork()
    if child == 0:
        die_with_parent()
        code = _run_to_the_end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def stop(number: int, frame: object) -> None:
        os.kill(child, signal.SIGKILL)
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_to_the_end() -> int:
    try:
        return _run()
    except (LakeError, ValueError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


def _run() -> int:
    started = time.monotonic()
    catalog = Catalog(config_in_force(), week_in_force())
    with ExitStack() as stack:
        instance = stack.enter_context(DagsterInstance.get())
        _close_runs_of_the_dead(instance)
        stack.enter_context(forked_commands())
        if catalog.needs_log and catalog.find("raw_events") is None:  # its last complete week is not known yet
            result = _execute(instance, "ingest_logs", None)
            if not result.success:
                print(f"\nerror: {_why(result)}", file=sys.stderr)
                return 1
        partition = week_partition(catalog.window.last_week, catalog.config.source)
        result = _execute(instance, "weekly_retrain", partition)
    if result.success or _is_measured(result):
        _print_report(Catalog(catalog.config, catalog.week, result.run_id, partition), time.monotonic() - started)
    if not result.success:
        sys.stdout.flush()
        print(f"\nerror: {_why(result)}", file=sys.stderr)
    return 0 if result.success else 1


def _execute(instance: DagsterInstance, job: str, partition: str | None) -> dg.ExecuteInProcessResult:
    from pipelines.definitions import defs

    return defs.resolve_job_def(job).execute_in_process(
        instance=instance,
        partition_key=partition,
        tags={_HOST: host(), _PROCESS: str(os.getpid())},
        run_config={"loggers": {"console": {"config": {"log_level": "INFO"}}}},
        raise_on_error=False,
    )


def _is_measured(result: dg.ExecuteInProcessResult) -> bool:
    """Whether this run came as far as the recall table. A check on the model may still have failed."""
    made = (event for event in result.all_events if event.event_type == DagsterEventType.ASSET_MATERIALIZATION)
    return any(event.asset_key == dg.AssetKey("eval_recall") for event in made)


def _print_report(catalog: Catalog, seconds: float) -> None:
    """The tables, what became of the release, and where the results are."""
    report, checkpoint = catalog.dataset("eval_recall"), catalog.dataset("checkpoint")
    for name in ("recall.md", "saliency.md"):
        if (report.path / name).exists():
            print(f"\n{(report.path / name).read_text()}")
    if warning := checkpoint.manifest.metrics.get("warning"):
        print(f"warning: {warning}\n")
    release = catalog.find("release")
    if release is not None and (decision := catalog.ledger.state().last(release.manifest.fingerprint)) is not None:
        print(f"Release {decision.release}: {decision.action}. {decision.why}\n")
    print(f"{seconds:.0f} s. Images of neighbours: {_relative(report.path / 'neighbours.jpg')}")
    print(f"The model: {_relative(checkpoint.path)}")
    print(f"The vectors of all notes: {_relative(catalog.dataset('note_embeddings').path / 'multimodal')}")
    index = _relative(catalog.dataset("faiss_index").path / "index")
    print(f"Their index: {index}")
    print(f"The neighbours of a note: notellm2 index search --index {index} --note-id ID")
    print("The asset graph, all metrics and the MLflow curves: make dev")


def _close_runs_of_the_dead(instance: DagsterInstance) -> None:
    """Cancel runs whose process was killed: they count as started for ever, and ten of them block the run queue."""
    started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED], tags={_HOST: host()})
    for run in instance.get_runs(started):
        is_retry = run.parent_run_id is not None  # by Dagster, with copied tags that name another process
        if not is_retry and not Path(f"/proc/{run.tags[_PROCESS]}").exists():
            instance.report_run_canceled(run, message="its process was killed")  # a failed one would be retried


def _why(result: dg.ExecuteInProcessResult) -> str:
    """The first failure of the run, in one sentence."""
    return why_failed(result.all_events) or "the run failed, and no step reported why; see the log above"


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
