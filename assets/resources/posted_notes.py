"""The notes that were written to a service: the weekly run takes them as part of its source."""

from datetime import UTC, datetime

import dagster as dg

from notellm2_core.lake.catalog import Catalog


def take_posted_notes(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    """Read them from the log, once in a calendar week. Raises ValueError and OSError where it cannot be read."""
    from notellm2_core.serving.posted import publish_posted_notes

    posted = publish_posted_notes(catalog.config, datetime.now(UTC).date())
    if posted is not None:
        metrics = posted.manifest.metrics
        context.log.info(
            f"notes that were written to a service, up to entry {metrics['cut_seq']} of its log: {metrics['notes']}; "
            f"deleted ones: {metrics['deleted']}"
        )
