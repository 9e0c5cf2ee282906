"""Asset checks. What is wrong with data stops a run early; what is wrong with a model stops its release, and no run.

The checks of data block: a dataset that fails one stops the run before its downstream assets. The gates of a release
are shown as checks of `verdict` and block nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from math import isfinite

import dagster as dg

from assets.resources.pipeline import Pipeline, user_errors
from assets.resources.steps import Metrics
from notellm2_core.check.verdicts import Verdict, dropped_share, undated_share, unusable_images
from notellm2_core.config.data import CheckSettings
from notellm2_core.config.drift import CONTENT_GATES, DATA_GATES, WEEK_GATES
from notellm2_core.lake.catalog import NOTES_PROFILE, Catalog
from notellm2_core.release.drift import Drift, data_gates, of_content, of_week
from notellm2_core.release.verdict import GATES, VERDICT_FILE
from notellm2_core.runtime.nested import flatten


def no_leakage(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """Every count of the leakage report is zero."""
    return not any(metrics["leakage"].values()), dict(metrics["leakage"])


def enough_pairs(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """There are enough training pairs to learn from, and enough test pairs to measure with."""
    train, test = metrics["train"]["pairs"], metrics["test"]["pairs"]
    passed = train >= limits.min_train_pairs and test >= limits.min_test_pairs
    return passed, {
        "train_pairs": train,
        "test_pairs": test,
        "checks.min_train_pairs": limits.min_train_pairs,
        "checks.min_test_pairs": limits.min_test_pairs,
    }


def finite_loss(metrics: Metrics, limits: CheckSettings) -> Verdict:
    """The last training loss is finite."""
    return isfinite(metrics["loss_last"]), {"loss": metrics["loss_last"]}


def _check(asset: str, judge: Callable[[Metrics, CheckSettings], Verdict]) -> dg.AssetChecksDefinition:
    """A check that stops the run after `asset`."""

    @dg.asset_check(asset=asset, name=judge.__name__, description=judge.__doc__, blocking=True)
    def check(pipeline: Pipeline) -> dg.AssetCheckResult:
        catalog = pipeline.catalog()
        with user_errors():
            passed, metadata = judge(catalog.dataset(asset).manifest.metrics, catalog.config.checks)
        return dg.AssetCheckResult(passed=bool(passed), severity=dg.AssetCheckSeverity.ERROR, metadata=metadata)

    return check


def _drift_checks(
    asset: str, names: Mapping[str, str], drifts: Callable[[Catalog], list[Drift]]
) -> dg.AssetChecksDefinition:
    """Checks that stop the run where the data are unlike their past. The verdict asks the same again."""
    specs = [dg.AssetCheckSpec(name, asset=asset, description=text, blocking=True) for name, text in names.items()]

    @dg.multi_asset_check(name=f"drift_of_{asset}", specs=specs)
    def check(pipeline: Pipeline) -> Iterator[dg.AssetCheckResult]:
        catalog = pipeline.catalog()
        with user_errors():
            gates = data_gates(names, drifts(catalog), catalog.config.checks.accepted_drift)
        for gate in gates:
            yield _shown(asset, gate.name, gate.outcome, gate.why, gate.figures)

    return check


def _of_week(catalog: Catalog) -> list[Drift]:
    return of_week(catalog.dataset("weekly_activity").manifest.metrics["weeks"])


def _of_content(catalog: Catalog) -> list[Drift]:
    return of_content(catalog.dataset("data_profile").manifest.metrics, catalog.past(NOTES_PROFILE))


@dg.multi_asset_check(
    name="gates",
    specs=[dg.AssetCheckSpec(name, asset="verdict", description=text) for name, text in (GATES | DATA_GATES).items()],
)
def gates(pipeline: Pipeline) -> Iterator[dg.AssetCheckResult]:
    """Show each gate of the verdict. They stop nothing: the verdict is computed without them."""
    with user_errors():
        shown = json.loads((pipeline.catalog().dataset("verdict").path / VERDICT_FILE).read_text())["gates"]
    by_name = {gate["name"]: gate for gate in shown}
    for name in GATES | DATA_GATES:
        gate = by_name.get(name, {"outcome": "passed", "why": "This gate has nothing to judge.", "figures": {}})
        yield _shown("verdict", name, gate["outcome"], gate["why"], gate["figures"])


def _shown(asset: str, gate: str, outcome: str, why: str, figures: Metrics) -> dg.AssetCheckResult:
    """A gate as the result of a check."""
    numbers = {key: value for key, value in flatten(figures).items() if isinstance(value, int | float)}
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=gate,
        passed=outcome == "passed",
        severity=dg.AssetCheckSeverity.ERROR if outcome == "refused" else dg.AssetCheckSeverity.WARN,
        description=why,
        metadata={"outcome": outcome, **numbers},
    )


CHECKS = [
    _check("raw_events", undated_share),
    _check("notes", dropped_share),
    _check("interactions", dropped_share),
    _check("vision_features", unusable_images),
    _check("pair_datasets", no_leakage),
    _check("pair_datasets", enough_pairs),
    _drift_checks("weekly_activity", WEEK_GATES, _of_week),
    _drift_checks("data_profile", CONTENT_GATES, _of_content),
    _check("checkpoint", finite_loss),
    gates,
]
