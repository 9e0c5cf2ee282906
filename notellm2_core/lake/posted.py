"""The notes that were written to the services of a configuration, as datasets that are made of no other."""

from notellm2_core.lake.lake import Dataset, Lake
from notellm2_core.schema import POSTED_NOTES


def of_configuration(lake: Lake, name: str) -> Dataset | None:
    """The newest one; None: there is none."""
    found = [d for d in lake.datasets(POSTED_NOTES) if d.manifest.settings["config"] == name]
    return max(found, key=lambda d: (d.manifest.created, d.manifest.metrics["cut_seq"]), default=None)
