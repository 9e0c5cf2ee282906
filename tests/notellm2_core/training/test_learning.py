"""A run that learns nothing is reported, one that learns is not; and what is advised where a loss is not finite."""

import json
import math
from pathlib import Path

import pytest
import torch

from notellm2_core.config.training import TrainingSettings
from notellm2_core.training.learning import learned_nothing
from notellm2_core.training.loop import TrainingError
from notellm2_core.training.objective.losses import BatchLabels, chance_loss
from notellm2_core.training.state.metrics import Progress
from tests.support.world import World, tiny_config, train, write_world

pytestmark = pytest.mark.usefixtures("one_rank")
RECALL = "validation_recall_at_10"


def labels(num_notes: int, related: list[tuple[int, int]], num_paired: int | None = None) -> BatchLabels:
    positives = torch.eye(num_notes, dtype=torch.bool)
    for a, b in related:
        positives[a, b] = positives[b, a] = True
    every = torch.ones(num_notes, dtype=torch.bool)
    return BatchLabels({"image": every, "text": every}, {"multimodal": positives}, num_paired)


def test_the_loss_of_equal_embeddings() -> None:
    """B = 3: each of 6 notes has 5 candidates, ln 5. If notes 0 and 2 are related, both have 4. With two hard
    negatives, 6 notes have 7.
    """
    pairs = [(0, 1), (2, 3), (4, 5)]
    assert chance_loss(labels(6, pairs)).item() == pytest.approx(math.log(5))
    expected = (4 * math.log(5) + 2 * math.log(4)) / 6
    assert chance_loss(labels(6, [*pairs, (0, 2)])).item() == pytest.approx(expected)
    assert chance_loss(labels(8, pairs, num_paired=6)).item() == pytest.approx(math.log(7))


@pytest.mark.parametrize(
    ("share", "recall", "done", "is_reported"),
    [
        (0.99, 0.3, 40, True),
        (1.20, 0.1, 40, True),
        (0.97, 0.1, 40, False),  # the loss is falling
        (0.99, 0.38, 40, True),  # risen by 0.08, two standard errors: the root of 0.34 * 0.66 / 100 / 2 is 0.0335
        (0.99, 0.44, 40, False),  # risen by 0.14, two standard errors are 0.137
        (0.99, 0.1, 39, False),  # too early: the warm-up has 20 steps
    ],
)
def test_the_signs(share: float, recall: float, done: int, is_reported: bool, tmp_path: Path) -> None:
    """200 steps, a tenth of them warm-up. Only the last 20 steps count: before them the loss was low."""
    progress = Progress(tmp_path / "metrics.jsonl", 0, 200)
    progress.report(0, {RECALL: 0.3})
    progress.report(done - 20, {"loss_vs_chance": 0.1})
    for step in (done - 10, done):
        progress.report(step, {"loss_vs_chance": share})
    assert learned_nothing(progress, TrainingSettings(), 200, done, 100) is None  # no validation yet
    progress.report(done, {RECALL: recall})
    sentence = learned_nothing(progress, TrainingSettings(), 200, done, 100)
    progress.close()
    assert (sentence is not None) == is_reported
    if sentence:
        assert f"the loss is {share:.3f} times that of equal embeddings" in sentence
        assert f"the validation recall is {recall:.3f}, 0.300 before training." in sentence
        assert "set training.centre_embeddings = true, or lower training.learning_rate (now 3e-06)" in sentence


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "is_reported"), [(3.0, True), (3e-3, False)])
def test_a_collapsed_run_is_reported_and_one_that_learns_is_not(
    rate: float, is_reported: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A learning rate of 3 brings all embeddings to one point. 3e-3 learns these pairs by heart: the loss is halved."""
    world = write_world(tmp_path / "world", num_validation=20)
    config = tiny_config({"num_steps": 40, "learning_rate": rate, "validate_every_steps": 20, "zero_stage": 0})
    summary = json.loads((train(world, config, tmp_path) / "training.json").read_text())
    assert (summary["loss_last"] < 0.65 * summary["loss_first"]) != is_reported
    said = [line for line in capfd.readouterr().err.splitlines() if "has learned nothing" in line]
    assert [line.partition("the model")[0] for line in said] == ["warning: after 40 steps "] * is_reported
    assert ("warning" in summary) == is_reported
    assert said == [f"warning: {summary['warning']}" for _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_is_advised_only_in_bf16(precision: str, world: World, tmp_path: Path) -> None:
    """Nor are lower learning rates where no weight has changed yet: there the start, here a gate of NaN, is wrong."""

    def message(folder: str, init: dict[str, float], rate: float) -> str:
        config = tiny_config({"num_steps": 2, "precision": precision, "learning_rate": rate}, init=init)
        with pytest.raises(TrainingError) as caught:
            train(world, config, tmp_path / folder)
        return str(caught.value).replace(str(tmp_path), "")

    fp32 = "; or use training.precision = fp32" if precision == "bf16" else ""
    rates = "lower the learning rates, or raise training.warmup_ratio"
    assert f"of step 2 is nan: {rates}{fp32} (pairs in /a" in message("a", {}, 1e30)
    start = "no weight has changed yet, so check the weights that training starts from, and the image features"
    assert f"the loss of step 1 is nan: {start}{fp32} (pairs in /b" in message("b", {"gate_bias": math.nan}, 1e-3)
