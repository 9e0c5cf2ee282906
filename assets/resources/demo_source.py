"""The embedded source: where the user brings none, the demo world is generated into the lake, once."""

import dagster as dg

from notellm2_core.lake.catalog import Recipe


def ensure_source(context: dg.AssetExecutionContext, recipe: Recipe) -> None:
    """Generate the demo world where source.path is not set. Raises ValueError where there is none to generate."""
    if recipe.config.source.path is not None or recipe.lake.find("demo_world", recipe.source.name):
        return
    from notellm2_core.demo import generate

    world = recipe.config.source.demo
    assert world is not None  # or recipe.source has raised
    context.log.info(f"no source.path: generating the demo world at {recipe.source}")
    with recipe.lake.publish("demo_world", recipe.source.name, {}, world.model_dump()) as draft:
        draft.metrics |= generate(draft.path, world)
