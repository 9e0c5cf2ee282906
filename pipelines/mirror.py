"""The sensor that mirrors the ledger of releases in MLflow's registry."""

import dagster as dg

from assets.resources.tracking import reachable_client, tracking_uri
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog


@dg.sensor(
    minimum_interval_seconds=30,
    description="Registers each champion in MLflow, and sets the aliases champion, previous and anchor.",
)
def mirror_releases(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """A server that does not answer makes the tick fail; a later one brings the mirror up to date."""
    catalog = Catalog(config_in_force())
    state, config = catalog.ledger.settle(), catalog.config
    done = f"{catalog.ledger.folder} {state.number}"
    if not state.reigns or context.cursor == done:
        return dg.SkipReason("MLflow names the releases that are live")
    from notellm2_core.release.mirror import mirror

    uri = tracking_uri(config.tracking, catalog.lake.root)
    reachable_client(uri, config.tracking)
    mirror(uri, config.name, state, config.promotion.anchor_weeks)
    context.update_cursor(done)
    return dg.SkipReason(f"MLflow names the champion {state.champion} now")
