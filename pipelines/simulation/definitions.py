"""The definitions of a simulated year, for its daemon: the same graph with stand-ins, and quick sensors."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import dagster as dg

from assets.resources.commands import stand_ins
from notellm2_core.config.load import config_in_force
from notellm2_core.simulation.stand_ins import STAND_INS
from pipelines.definitions import definitions
from pipelines.jobs import week_has_landed
from pipelines.messages import send_messages
from pipelines.mirror import mirror_releases

PACE_SECONDS = 4


def quick(sensor: dg.SensorDefinition, jobs: Sequence[Any] | None = None) -> dg.SensorDefinition:
    """The same sensor, switched on, and quicker."""
    return dg.SensorDefinition(
        name=sensor.name,
        evaluation_fn=lambda context: sensor(context),
        jobs=jobs,
        minimum_interval_seconds=PACE_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
    )


IN_FORCE = ExitStack()  # until this process ends
IN_FORCE.enter_context(stand_ins(STAND_INS))
SENSORS = [quick(week_has_landed, week_has_landed.jobs), quick(send_messages), quick(mirror_releases)]
defs = definitions(config_in_force().source, SENSORS)
