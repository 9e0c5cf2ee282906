"""The embedded source: where the user brings none, the demo world is generated into the lake, once."""

import dagster as dg

from notellm2_core.lake.catalog import Catalog


def ensure_source(context: dg.AssetExecutionContext, catalog: Catalog) -> None:
    """Generate the demo world where source.path is not set. Raises ValueError where there is none to generate."""
    if catalog.config.source.path is not None or catalog.lake.find("demo_world", catalog.source.name):
        return
    from notellm2_core.demo import generate

    world = catalog.config.source.demo
    assert world is not None  # or catalog.source has raised
    context.log.info(f"no source.path: generating the demo world at {catalog.source}")
    with catalog.lake.publish("demo_world", catalog.source.name, {}, world.model_dump()) as draft:
        draft.metrics |= generate(draft.path, world)
