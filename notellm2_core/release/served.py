"""Which releases a service has in memory. It says so again and again; retention keeps them.

LAKE/serving/RELEASE/in_use   its time: when a service last said that it has this release
"""

import time
from pathlib import Path

from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import SERVING_FOLDER

LEASE_SECONDS = 6 * 3600.0  # after which a release is no longer in use
_FILE = "in_use"


def mark_served(lake: Lake, release_id: str) -> None:
    """Say that a service has this release."""
    file = lake.root / SERVING_FOLDER / release_id / _FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def served_releases(lake: Lake) -> set[str]:
    """The releases that a service has, or had until less than a lease ago."""
    oldest = time.time() - LEASE_SECONDS
    return {file.parent.name for file in (lake.root / SERVING_FOLDER).glob(f"*/{_FILE}") if _time(file) > oldest}


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # removed meanwhile
        return 0.0
