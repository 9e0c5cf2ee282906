"""What people see in the Dagster UI, in a real browser."""

import shutil
from collections.abc import Collection

import pytest

from docs.screenshots import BROWSERS, GRAPH_SIZE, GROUPS, browse, dagster_webserver
from notellm2_core.lake.lineage import STAGES
from tests.pipelines.conftest import Workplace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} on PATH"),
]


def not_shown(url: str, size: tuple[int, int], names: Collection[str]) -> set[str]:
    """Those of `names` that the page does not show, also when a busy server is given a second and a third chance."""
    missing = set(names)
    for _ in range(3):
        page = browse(url, f"--window-size={size[0]},{size[1]}", "--dump-dom")
        missing = {name for name in names if f">{name}<" not in page}
        if not missing:
            break
    return missing


def test_the_graph_and_the_report_are_shown(finished: Workplace) -> None:
    """Every asset (long names are cut off); the table, contact sheet and figures of eval_recall."""
    assets = [name for name in STAGES if len(name) <= 16]
    report = ("recall", "neighbours", "plot", "notellm2.multimodal.all.10")
    with dagster_webserver(**finished.environment()) as dagster:
        assert not_shown(f"{dagster}/asset-groups?expanded={GROUPS}", GRAPH_SIZE, assets) == set()
        assert not_shown(f"{dagster}/assets/eval_recall?view=overview", (1600, 1400), report) == set()
