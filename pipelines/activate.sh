#!/usr/bin/env bash
# Make `source .venv/bin/activate` enough for `dagster asset materialize`: Dagster reads both variables before it reads
# any file. Usage: activate.sh ROOT ACTIVATE_SCRIPT
set -euo pipefail
marker="# notellm2-pipeline"
grep -qF "$marker" "$2" && exit 0
cat >> "$2" <<END
$marker
export DAGSTER_HOME="\${DAGSTER_HOME:-$1}"
export DAGSTER_MODULE_NAME="\${DAGSTER_MODULE_NAME:-pipelines.definitions}"
END
