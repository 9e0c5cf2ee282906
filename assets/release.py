"""The release: the new model beside its rivals, the verdict, and what follows from it."""

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from assets.resources.arguments import feature_store, image_folders, write_config
from assets.resources.export import MULTIMODAL
from assets.resources.history import sweep_history
from assets.resources.metadata import image_markdown, table
from assets.resources.pipeline import user_errors
from assets.resources.steps import GPU, PROCESS, Machine, Metrics, Step, dataset
from notellm2_core.lake.catalog import CHAMPION, IMAGE_LIFT, NOTES_PROFILE, Catalog
from notellm2_core.lake.ledger import State
from notellm2_core.lake.lineage import STAGES
from notellm2_core.lake.window import first_day_of_week
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.release.verdict import NEIGHBOURS_AFTER, NEIGHBOURS_BEFORE
from notellm2_core.schema import COUNTS_FILE, INDEX_FOLDER, NOTES_TABLE, POOL_TABLE
from notellm2_core.training.launch import torchrun


@dataset("release", {"pytorch", "parquet"}, on=GPU)
def rival_embeddings(step: Step) -> Metrics:
    """Embeddings of this week's pool by the champion and by the anchor, each with its own tokenizer and encoder."""
    from notellm2_core.release.release import open_release

    notes, folders = step.path("notes", NOTES_TABLE), image_folders(step.catalog)
    inputs = NoteInputs(notes, step.path("vision_features"), feature_store(step.catalog), folders)
    for release_id in sorted({*step.catalog.rivals.values()}):
        model = open_release(step.catalog.lake, release_id).path / "model"
        step.command([*torchrun("notellm2_core.inference.export", 1), "--config", write_config(step.catalog),
                      *inputs.arguments(), "--model", model, "--inputs", MULTIMODAL, "--out", step.out / release_id,
                      "--note-ids", step.path("pair_datasets", POOL_TABLE)])  # fmt: skip
    return dict(step.catalog.rivals)


@dataset("release", {"faiss", "pytorch"}, on=PROCESS)
def canary(step: Step) -> Metrics:
    """The model and its index, loaded as a service loads them, answer golden queries."""
    notes, source = image_folders(step.catalog)
    step.command([sys.executable, "-m", "notellm2_core.release.canary", "--model", step.path("checkpoint"),
                  "--index", step.path("faiss_index", INDEX_FOLDER), "--pairs", step.path("pair_datasets"),
                  "--embeddings", step.path("note_embeddings", MULTIMODAL), "--notes", notes, "--source", source,
                  "--out", step.out])  # fmt: skip
    return json.loads((step.out / COUNTS_FILE).read_text())


@dataset("release", {"numpy"}, show={"verdict": ["verdict.md", "verdict.png"]})
def verdict(step: Step) -> Metrics:
    """Whether the new model may replace the champion: every gate with its figure and its limit."""
    from notellm2_core.release.judge import Candidate, judge
    from notellm2_core.release.release import open_release

    rivals, start = step.catalog.rivals, step.catalog.start
    known = [open_release(step.catalog.lake, release) for release in {*rivals.values(), *([start] if start else ())}]
    candidate = Candidate(
        source=step.catalog.source,
        notes=step.path("notes", NOTES_TABLE),
        pairs=step.path("pair_datasets"),
        model=step.path("checkpoint"),
        embeddings=step.path("note_embeddings"),
        report=step.path("eval_recall"),
        rivals={role: step.path("rival_embeddings", release_id) for role, release_id in rivals.items()},
        trained=frozenset().union(*(release.trained_notes() for release in known)),
        past_lifts=step.catalog.past(IMAGE_LIFT),
        past_notes=step.catalog.past(NOTES_PROFILE),
        metrics={name: upstream.manifest.metrics for name, upstream in step.inputs.items()},
    )
    return judge(candidate, step.config, step.out)


def _decide(context: dg.AssetExecutionContext, catalog: Catalog) -> Mapping[str, Any]:
    """Promote, refuse or leave the release: a refusal fails no run. Returns what the page shows first."""
    from notellm2_core.release.promotion import decide
    from notellm2_core.release.release import Release

    config = catalog.config
    with user_errors():
        end = catalog.end_of_log() if config.window.end is None else config.window.end
        newest = first_day_of_week(end - timedelta(days=1))
        release = Release(catalog.dataset("release"))
        decision = decide(catalog.ledger, release, str(newest), config.promotion, catalog.state)
    context.log.info(f"release {release.id}: {decision.action}. {decision.why}")
    shown = {"decision": decision.action, "why": decision.why, **release_page(catalog.ledger.state())}
    shown |= _sweep(context, catalog)
    if (days := config.retention.history_days) is not None:
        shown |= sweep_history(context, catalog, timedelta(days=days))
    return shown


def _sweep(context: dg.AssetExecutionContext, catalog: Catalog) -> dict[str, Any]:
    """Remove what nothing needs any more, where `retention.keep_releases` is set. Returns what the page shows of it."""
    from notellm2_core.release.retention import lake_bytes, sweep_lake

    retention = catalog.config.retention
    if retention.keep_releases is None:
        return {"lake_gb": round(lake_bytes(catalog.lake) / 1e9, 3)}
    present = {(name, catalog.fingerprint(name)) for name in STAGES}
    present |= {("release", release) for release in (*catalog.rivals.values(), catalog.start) if release is not None}
    anchor_weeks, grace = catalog.config.promotion.anchor_weeks, timedelta(days=retention.grace_days)
    with user_errors():
        swept = sweep_lake(catalog.lake, catalog.config.name, retention.keep_releases, anchor_weeks, grace, present)
    context.log.info(f"removed {swept.num_datasets} datasets, and {swept.num_work_folders} folders of unfinished work")
    return {"lake_gb": round(swept.lake_bytes / 1e9, 3), "removed_gb": round(swept.removed_bytes / 1e9, 3)}


def release_page(state: State) -> dict[str, Any]:
    """What is live, the history of decisions, and recall by week."""
    from notellm2_core.release.page import curve, history, summary

    shown: dict[str, Any] = {"live": dg.MetadataValue.md(summary(state))}
    if rows := history(state.decisions):
        shown["decisions"] = table(rows, floats=("challenger", "champion"))
    if (plot := curve(state.decisions)) is not None:
        shown["recall_by_week"] = dg.MetadataValue.md(image_markdown("recall by week", "png", plot))
    return shown


_SHOWN = {
    "verdict": ["verdict.md", "verdict.png"], "neighbours_before": [NEIGHBOURS_BEFORE],
    "neighbours_after": [NEIGHBOURS_AFTER],
}  # fmt: skip


@dataset("release", {"parquet"}, on=Machine("gpu"), after=_decide, show=_SHOWN)
def release(step: Step) -> Metrics:
    """Model, embeddings, index, report, window, settings and verdict in one immutable dataset: what goes live."""
    from notellm2_core.release.release import open_release, write_release

    start = step.catalog.start
    parent = None if start is None else open_release(step.catalog.lake, start)
    return write_release(step.draft, step.inputs, step.config, step.catalog.window, parent, step.catalog.posted)


@dataset("release", {"faiss"}, on=PROCESS, show={"replay": ["replay.md"]})
def offline_replay(step: Step) -> Metrics:
    """The held-out clicks of the week, asked of the new release and of the one that was live; it stops nothing."""
    champion = step.catalog.rivals.get(CHAMPION)
    step.command([sys.executable, "-m", "notellm2_core.serving.replay", "--config", write_config(step.catalog),
                  *(["--champion", champion] if champion is not None else []),
                  "--challenger", step.inputs["release"].manifest.fingerprint, "--out", step.out])  # fmt: skip
    return json.loads((step.out / "replay.json").read_text())
