"""`notellm2 release promote | rollback | ban` as Dagster jobs: their page is that of the asset `release`."""

from typing import Any

import dagster as dg

from assets.release import release_page
from assets.resources.pipeline import Pipeline, user_errors
from notellm2_core.lake.ledger import Decision

ONCE = {"dagster/max_retries": "0"}  # a second rollback would go back one release more


class Promote(dg.Config):
    """`release`: its id, or the first letters. `force`: even one that was refused; it needs a reason in `why`."""

    release: str
    why: str = ""
    force: bool = False


class RollBack(dg.Config):
    """`why`: the reason, for the ledger. `to`: an earlier release that was live; empty: the previous one."""

    why: str
    to: str = ""


class Ban(dg.Config):
    """`why`: the reason, for the ledger. `lift`: allow the release again."""

    release: str
    why: str
    lift: bool = False


@dg.op
def promote_release(context: dg.OpExecutionContext, config: Promote, pipeline: Pipeline) -> None:
    """Make a release live."""
    from notellm2_core.release.promotion import promote

    catalog = pipeline.catalog()
    with user_errors():
        decision = promote(catalog.lake, catalog.ledger, config.release, config.why or None, config.force)
    _show(context, pipeline, decision)


@dg.op
def roll_back_release(context: dg.OpExecutionContext, config: RollBack, pipeline: Pipeline) -> None:
    """Go back to an earlier release, and ban the present one."""
    from notellm2_core.release.promotion import rollback

    catalog = pipeline.catalog()
    with user_errors():
        decision = rollback(catalog.lake, catalog.ledger, config.why, config.to or None)
    _show(context, pipeline, decision)


@dg.op
def ban_release(context: dg.OpExecutionContext, config: Ban, pipeline: Pipeline) -> None:
    """Forbid, or allow again, the promotion of a release's model."""
    from notellm2_core.release.promotion import ban

    catalog = pipeline.catalog()
    with user_errors():
        decision = ban(catalog.lake, catalog.ledger, config.release, config.why, config.lift)
    _show(context, pipeline, decision)


def _show(context: dg.OpExecutionContext, pipeline: Pipeline, decision: Decision) -> None:
    """The new page of the asset `release`."""
    context.log.info(f"release {decision.release}: {decision.action}. {decision.why}")
    page: dict[str, Any] = release_page(pipeline.catalog().ledger.state())
    shown = {"decision": decision.action, "why": decision.why, **page}
    context.log_event(dg.AssetMaterialization("release", metadata=shown))


@dg.job(tags=ONCE, description="Make a release live: one that waits for approval or, by force, one that was refused.")
def release_promote() -> None:
    promote_release()


@dg.job(tags=ONCE, description="Go back to the previous release, and ban the present one.")
def release_rollback() -> None:
    roll_back_release()


@dg.job(tags=ONCE, description="Forbid, or allow again, the promotion of a release's model.")
def release_ban() -> None:
    ban_release()


RELEASE_JOBS = [release_promote, release_rollback, release_ban]
