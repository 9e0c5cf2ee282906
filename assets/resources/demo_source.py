"""The demo world as the source: generated into the lake once, if the user brings no data."""

import dagster as dg

from notellm2_core.lake.catalog import Catalog


def ensure_source(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    """Generate the demo world, unless source.path is set or it exists. Raises ValueError if source.demo is null too."""
    if catalog.config.source.path is not None or catalog.lake.find("demo_world", catalog.source.name):
        return
    from notellm2_core.demo.world import generate

    world = catalog.config.source.demo
    assert world is not None  # catalog.source raises without it
    context.log.info(f"no source.path: generating the demo world at {catalog.source}")
    with catalog.lake.publish("demo_world", catalog.source.name, {}, world.model_dump()) as draft:
        draft.metrics |= generate(draft.path, world)
