"""`make dev`: the Dagster UI, and beside it the MLflow UI on the store that this configuration tracks to."""

import os
import subprocess
import sys
from pathlib import Path

from assets.tracking import tracking_uri
from notellm2_core.cli_errors import one_line_errors
from notellm2_core.config import config_in_force
from notellm2_core.recipe import Recipe
from notellm2_core.training.launch import die_with_parent

BIN = Path(sys.executable).parent


def main() -> int:
    with one_line_errors():
        recipe = Recipe(config_in_force())
    uri = tracking_uri(recipe.config.tracking, recipe.lake.root)
    dagster, mlflow = os.environ.get("DAGSTER_PORT", "3000"), os.environ.get("MLFLOW_PORT", "5000")
    if not uri.startswith("http"):
        store = recipe.lake.root / "mlflow"
        store.mkdir(parents=True, exist_ok=True)
        server = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", mlflow, "--workers", "1",
                  "--backend-store-uri", uri, "--artifacts-destination", str(store / "artifacts")]  # fmt: skip
        subprocess.Popen(server, preexec_fn=die_with_parent)
        uri = f"http://127.0.0.1:{mlflow}"
    print(f"Dagster: http://127.0.0.1:{dagster}   MLflow: {uri}", flush=True)
    command = [str(BIN / "dagster"), "dev", "-m", "pipelines.definitions", "--host", "127.0.0.1", "--port", dagster]
    try:
        return subprocess.call(command)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
