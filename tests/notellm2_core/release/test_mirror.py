"""MLflow's registry, on a real store, follows the ledger."""

from pathlib import Path

import pytest

from notellm2_core.lake.ledger import Ledger, Subject
from notellm2_core.release.mirror import mirror

pytestmark = pytest.mark.slow


def test_versions_and_aliases_follow_the_ledger(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, ledger = f"sqlite:///{tmp_path / 'mlflow.db'}", Ledger(tmp_path, "demo")

    def aliases() -> dict[str, str]:
        mirror(uri, "demo", ledger.state(), anchor_weeks=1)
        model = MlflowClient(tracking_uri=uri, registry_uri=uri).get_registered_model("demo")
        versions = {name: model.aliases[name] for name in model.aliases}
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return {name: client.get_model_version("demo", v).tags["release"] for name, v in versions.items()}

    mirror(uri, "demo", ledger.state(), anchor_weeks=1)  # nothing is live yet
    for release, week in (("a", "2025-01-05"), ("b", "2025-01-12"), ("c", "2025-01-19")):
        ledger.decide("promoted", Subject(release, f"m{release}", week), "It passed.")
    assert aliases() == {"champion": "c", "previous": "b", "anchor": "b"}  # three at once, as after an outage
    assert aliases() == {"champion": "c", "previous": "b", "anchor": "b"}
    ledger.decide("rolled_back", Subject("a", "ma", "2025-01-05"), "Users complained.")
    ledger.decide("banned", Subject("b", "mb", "2025-01-12"), "Likewise.")
    assert aliases() == {"champion": "a", "anchor": "a"}  # none to go back to
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    sources = sorted(v.source for v in client.search_model_versions("name = 'demo'"))
    assert sources == ["lake://release/a", "lake://release/b", "lake://release/c"]
