"""The Dagster UI in a real browser."""

import shutil
from collections.abc import Collection

import pytest

from docs.browser import BROWSERS
from docs.screenshots import GRAPH_SIZE, GROUPS, browse, dagster_webserver
from notellm2_core.lake.lineage import STAGES
from tests.pipelines.conftest import Workplace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} on PATH"),
]


def missing_names(url: str, size: tuple[int, int], names: Collection[str]) -> set[str]:
    """Those of `names` that the page does not show in three attempts; the server may be busy."""
    missing = set(names)
    for _ in range(3):
        page = browse(url, f"--window-size={size[0]},{size[1]}", "--dump-dom")
        missing = {name for name in names if f">{name}<" not in page}
        if not missing:
            break
    return missing


def test_the_ui_shows_the_graph_and_the_report(finished: Workplace) -> None:
    """The graph shows every asset (long names are cut off); eval_recall its week, figures, table, sheet and plot;
    release what is live, and the gates of the verdict are checks.
    """
    assets = [name for name in STAGES if len(name) <= 16]
    report = ("week", "recall_at_10", "all_pairs", "recall", "neighbours", "plot")
    with dagster_webserver(**finished.environment()) as dagster:
        assert missing_names(f"{dagster}/asset-groups?expanded={GROUPS}", GRAPH_SIZE, assets) == set()
        assert missing_names(f"{dagster}/assets/eval_recall?view=overview", (1600, 1400), report) == set()
        page = ("decision", "why", "live", "decisions", "recall_by_week")
        assert missing_names(f"{dagster}/assets/release?view=overview", (1600, 1400), page) == set()
        gates = ("image_recall", "has_learned", "canary")
        assert missing_names(f"{dagster}/assets/verdict?view=checks", (1600, 1400), gates) == set()
