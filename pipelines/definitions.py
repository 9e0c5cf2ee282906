"""Everything gathered for Dagster. Imports neither torch nor pyspark, so it loads in a blink."""

import dagster as dg

import assets
from assets.checks import CHECKS
from assets.resources import Pipeline
from pipelines.jobs import weekly_retrain, weekly_retrain_schedule

defs = dg.Definitions(
    assets=dg.load_assets_from_package_module(assets),
    asset_checks=CHECKS,
    jobs=[weekly_retrain],
    schedules=[weekly_retrain_schedule],
    # One step at a time: the machine is one resource. Raise it where Spark and the GPUs are machines of their own.
    executor=dg.multi_or_in_process_executor.configured({"multiprocess": {"max_concurrent": 1}}),
    resources={"pipeline": Pipeline()},
)
