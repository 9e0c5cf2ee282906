"""What people see in the Dagster UI, in a real browser."""

import shutil

import pytest

from docs.screenshots import BROWSERS, GRAPH_SIZE, GROUPS, browse, dagster_webserver
from notellm2_core.recipe import STAGES
from tests.pipelines.conftest import Workplace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"none of {', '.join(BROWSERS)} on PATH"),
]


def test_the_graph_and_the_report_are_shown(finished: Workplace) -> None:
    """Every asset (long names are shortened); the table, contact sheet and figures of eval_recall."""
    with dagster_webserver(**finished.environment()) as dagster:
        size = f"--window-size={GRAPH_SIZE[0]},{GRAPH_SIZE[1]}"
        graph = browse(f"{dagster}/asset-groups?expanded={GROUPS}", size, "--dump-dom")
        report = browse(f"{dagster}/assets/eval_recall?view=overview", "--window-size=1600,1400", "--dump-dom")
    assert {name for name in STAGES if len(name) <= 16 and f">{name}<" not in graph} == set()
    shown = ("recall", "neighbours", "plot", "notellm2.multimodal.all.10", "mlflow_run", "fingerprint")
    assert {name for name in shown if f">{name}<" not in report} == set()
