"""MLflow's names, and its store after a kill."""

import subprocess
import sys
from pathlib import Path

import pytest

from assets.resources.tracking import make_store, tracked_names
from tests.support.waiting import wait_for


def test_names_that_mlflow_allows() -> None:
    tree = {"a": {"b": 1, "c d": {"e": 2.5}}, "f": [1, 2], "recall@10": {"k (%)": 3}}
    assert tracked_names(tree) == {"a.b": 1, "a.c d.e": 2.5, "f": [1, 2], "recall_10.k ___": 3}


@pytest.mark.slow
def test_a_store_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    """The process is killed when MLflow has made its first tables. These are not used as a store."""
    file = tmp_path / "mlflow" / "mlflow.db"
    code = (
        f"from pathlib import Path; from assets.resources.tracking import make_store; make_store(Path({str(file)!r}))"
    )
    making = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: any(f.stat().st_size for f in tmp_path.rglob("mlflow.db")))
    assert not file.exists()
    making.kill()
    making.wait()
    make_store(file)
    from mlflow import MlflowClient

    assert MlflowClient(f"sqlite:///{file}").search_experiments()
