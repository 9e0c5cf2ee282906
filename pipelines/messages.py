"""The sensor that sends messages about releases, failed runs, late weeks and stale releases."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from assets.resources.steps import CONFIG_TAG, WEEK_TAG, why_failed
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.window import first_day_of_week
from notellm2_core.release.messages import (
    Message,
    Outbox,
    of_decision,
    of_failed_run,
    of_late_week,
    of_stale_release,
    receivers,
)
from pipelines.jobs import deadline, ingest_logs, week_of, weekly_retrain

_NUM_RUNS, _NUM_DECISIONS = 50, 500  # the last failed ones, and the last decisions, that are looked at
_JOBS = (weekly_retrain.name, ingest_logs.name)
_WILL_RETRY = "dagster/will_retry"  # Dagster's tag


@dg.sensor(
    minimum_interval_seconds=30,
    description="Sends a message about each promotion, rollback, refusal, failed run, late week and stale release.",
)
def send_messages(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Each message is sent once. A receiver that does not answer makes the tick fail, and gets it at a later one."""
    catalog = Catalog(config_in_force())
    to = receivers(catalog.config.messages)
    if not to:
        return dg.SkipReason("no receiver is configured: messages.webhook and messages.apprise are not set")
    messages = list(_messages(context.instance, catalog, datetime.now(UTC)))
    if failures := Outbox(catalog.ledger.folder).send(messages, to):
        raise dg.Failure("; ".join(failures))
    return dg.SkipReason(f"{len(messages)} messages, all sent")


def _messages(instance: dg.DagsterInstance, catalog: Catalog, now: datetime) -> Iterator[Message]:
    """What there is to say, the oldest first of each kind."""
    name, state = catalog.config.name, catalog.ledger.settle()
    for decision in state.decisions[-_NUM_DECISIONS:]:
        if (message := of_decision(name, decision)) is not None:
            yield message
    failed = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE])
    for run in reversed(instance.get_runs(failed, limit=_NUM_RUNS)):
        is_ours = run.job_name in _JOBS and run.tags.get(CONFIG_TAG, name) == name
        if is_ours and run.tags.get(_WILL_RETRY) != "true":
            yield of_failed_run(name, run.run_id, run.job_name, run.tags.get(WEEK_TAG), _why(instance, run.run_id))
    if catalog.config.source.last_day is not None:
        return
    if state.reigns:
        known = week_of(date.fromisoformat(state.reigns[-1].week)).end - timedelta(days=1)
        stale = of_stale_release(name, state, known, now.date(), catalog.config.messages.max_age_days)
        if stale is not None:
            yield stale
    week = week_of(first_day_of_week(now.date()) - timedelta(days=1))
    is_read = catalog.find("raw_events") is not None
    if is_read and now >= deadline(week) and (missing := catalog.absent_days(week)):
        yield of_late_week(name, week.start, missing)


def _why(instance: dg.DagsterInstance, run_id: str) -> str:
    """The first failed step of a run, or else the first check that stopped it, in one sentence."""
    types = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.ASSET_CHECK_EVALUATION}
    records = instance.get_records_for_run(run_id, of_type=types).records
    events = [event for record in records if (event := record.event_log_entry.dagster_event) is not None]
    if (why := why_failed(events)) is not None:
        return why
    return "No step reported why: the process of the run ended."
