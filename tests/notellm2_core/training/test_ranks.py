"""One global batch gives one result: plain torch in one process against DeepSpeed on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from notellm2_core.model.build import build_model
from notellm2_core.training.data import load_training_data, schedule
from notellm2_core.training.engine import optimizer_groups
from notellm2_core.training.losses import note_losses
from tests.notellm2_core.training import rank_checks
from tests.notellm2_core.training.ranks import run_ranks
from tests.notellm2_core.training.world import World


@pytest.fixture(scope="module")
def reference(world: World) -> dict[str, Any]:
    """The first step of rank_checks.py, without ranks and without DeepSpeed."""
    config = rank_checks.settings(0)
    model, processor = build_model(config, world.path("models"))
    folders = [world.path(n) for n in ("notes", "images", "store", "pairs", "cache")]
    data = load_training_data(processor, *folders)
    rows = data.train_pairs[schedule(data.train_pairs, 8, 1, config.seed)[0]].reshape(-1)
    output, known = model.train()(data.note_batch(rows)), data.facts(rows).known
    has_image = torch.from_numpy(data.has_image(rows))
    assert 0 < has_image.sum() < len(rows)
    views, masks = (output.multimodal, output.visual), (known["multimodal"], known["image"])
    losses = note_losses(*views, model.tau, config.training.alpha, *masks, has_image)
    losses.total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_grad_norm)
    torch.optim.AdamW(optimizer_groups(model.parameter_groups(), config.training)).step()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {"loss": losses.total.item(), "norm": norm.item(), "grads": grads, "weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "stages"), [(2, (0, 1, 2, 3)), (4, (2,))])
def test_ranks_agree_with_one_process(
    num_ranks: int, stages: tuple[int, ...], world: World, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Loss, every gradient (tau's too), the clipped norm, and the weights after AdamW; and a resume is exact."""
    run_ranks(num_ranks, rank_checks.check_stages, world.root, tmp_path, stages)
    for stage in stages:
        result = torch.load(tmp_path / f"ranks-{num_ranks}-stage-{stage}.pt")
        assert result["loss"] == pytest.approx(reference["loss"], abs=1e-5)
        assert result["norm"] == pytest.approx(reference["norm"], rel=1e-4)
        assert result["grads"].keys() == reference["grads"].keys()
        for name, expected in reference["grads"].items():
            found = result["grads"][name].reshape(expected.shape)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert result["grads"]["tau"].abs().item() > 1e-3  # the comparison above is not one of zeros
        for name, expected in reference["weights"].items():
            # Where a gradient is nearly 0, Adam's first step is its sign: rounding decides. Elsewhere they agree.
            firm = reference["grads"][name].abs() > 1e-5
            torch.testing.assert_close(result["weights"][name][firm], expected[firm], rtol=1e-4, atol=1e-5)
