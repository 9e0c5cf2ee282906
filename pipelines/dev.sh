#!/usr/bin/env bash
# Dagster and MLflow side by side; both end with this script.
set -euo pipefail
: "${DAGSTER_HOME:?run it through make dev}"
store="$DAGSTER_HOME/.dagster/lake/mlflow"
mkdir -p "$store"
mlflow server --host 127.0.0.1 --port "${MLFLOW_PORT:-5000}" --backend-store-uri "sqlite:///$store/mlflow.db" \
  --artifacts-destination "$store/artifacts" --workers 1 &
mlflow=$!
trap 'kill $mlflow 2>/dev/null || true' EXIT
echo "Dagster: http://127.0.0.1:${DAGSTER_PORT:-3000}   MLflow: http://127.0.0.1:${MLFLOW_PORT:-5000}"
dagster dev -m pipelines.definitions --host 127.0.0.1 --port "${DAGSTER_PORT:-3000}"
