"""Releases without a model, for tests of what is decided about them."""

import json
from typing import Any

from notellm2_core.lake.lake import Lake
from notellm2_core.release.release import LINEAGE_FILE, NAME, Release, open_release
from notellm2_core.release.verdict import VERDICT_FILE

FIGURES = {"k": 10, "recalls": {"challenger": 50.0, "champion": 49.0}, "image_lift": 3.0}


def publish_release(lake: Lake, release_id: str, week: str, outcome: str = "passed", model: str = "") -> Release:
    """A release of this week with this verdict; `model`: the fingerprint of its checkpoint."""
    files: dict[str, dict[str, Any]] = {
        LINEAGE_FILE: {"week": week, "weeks": [week], "releases": []},
        VERDICT_FILE: {"outcome": outcome, "why": f"It {outcome}.", "gates": [], "figures": FIGURES},
    }
    with lake.publish(NAME, release_id, {"checkpoint": model or f"model of {release_id}"}, {}) as draft:
        for name, content in files.items():
            (draft.path / name).write_text(json.dumps(content))
    return open_release(lake, release_id)
