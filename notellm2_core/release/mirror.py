"""The registry of MLflow as a mirror of the ledger: a version per champion, and aliases for those that matter now.

The ledger is the truth. The mirror is brought up to date as a whole, so what was missed while the server was away
follows when it is back.
"""

from typing import Any

from notellm2_core.lake.ledger import Decision, State

RELEASE_TAG = "release"


def mirror(uri: str, name: str, state: State, anchor_weeks: int) -> None:
    """Register every champion so far under the model `name`, and set the aliases champion, previous and anchor.

    Raises what MLflow's client raises where the server does not answer. A version names its release by address
    (lake://release/ID); nothing is copied.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = _versions(client, name)
    for reign in state.reigns:
        if reign.release not in versions:
            versions[reign.release] = _register(client, name, reign)
    roles = {"champion": state.champion, "previous": state.previous, "anchor": state.anchor(anchor_weeks)}
    aliases = dict(client.get_registered_model(name).aliases) if versions else {}
    for alias, release in roles.items():
        wanted = None if release is None else versions[release]
        if wanted is None and alias in aliases:
            client.delete_registered_model_alias(name, alias)
        elif wanted is not None and str(aliases.get(alias)) != wanted:
            client.set_registered_model_alias(name, alias, wanted)


def _versions(client: Any, name: str) -> dict[str, str]:
    """Release -> its version."""
    found = client.search_model_versions(f"name = '{name}'", max_results=10_000)
    return {v.tags[RELEASE_TAG]: str(v.version) for v in found if RELEASE_TAG in v.tags}


def _register(client: Any, name: str, reign: Decision) -> str:
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        client.create_registered_model(name, description="Releases of the pipeline; the ledger in the lake decides.")
    tags = {RELEASE_TAG: reign.release, "week": reign.week, "model": reign.model}
    version = client.create_model_version(name, f"lake://release/{reign.release}", tags=tags, description=reign.why)
    return str(version.version)
