"""A global batch gives the same result in plain torch in one process and with DeepSpeed on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from notellm2_core.config.methods import get_method
from notellm2_core.model.encode_images import with_features
from notellm2_core.training.data.sampler import batch_schedule
from notellm2_core.training.engine.deepspeed import optimizer_groups
from notellm2_core.training.objective.views import method_losses
from tests.support import rank_checks
from tests.support.ranks import run_ranks
from tests.support.world import World


def reference(world: World, variant: str) -> dict[str, Any]:
    """The first step of rank_checks.py, without ranks and without DeepSpeed."""
    config = rank_checks.settings(0, variant)
    model, data, encoder = rank_checks.build(config, world)
    rows = data.train_pairs[batch_schedule(data.train_pairs, 8, 1, config.seed)[0]].reshape(-1)
    labels = data.labels(rows := rank_checks.with_negatives(data, rows, config, 0), config.training.known_positives, 16)
    method = get_method(config.model.method)
    assert 0 < labels.has["image"].sum() < len(rows)
    views = {kind: model(with_features(data.note_batch(rows, [kind]), encoder)).multimodal for kind in method.inputs}
    if method.prompt == "micl":
        views["visual"] = model(with_features(data.note_batch(rows), encoder)).visual
    losses = method_losses(method, views, model.tau, config.training.alpha, labels, config.model.matryoshka_dims)
    losses.total.backward()
    named = rank_checks.named_parameters(model, encoder)
    grads = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), config.training.max_grad_norm)
    groups = model.parameter_groups()
    groups["llm"] += [(n, p) for n, p in named.items() if n.startswith("encoder.")]
    torch.optim.AdamW(optimizer_groups(groups, config.training)).step()
    weights = {n: p.detach() for n, p in named.items()}
    return {"loss": losses.total.item(), "norm": norm.item(), "grads": grads, "weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "stages", "variant"),
    [
        (2, (0, 1, 2, 3), "notellm2"),
        (4, (2,), "notellm2"),
        (1, (0,), "gradcache"),
        (2, (0, 1, 2, 3), "gradcache"),
        (4, (3,), "gradcache"),
        (2, (2,), "omni_gradcache"),
        (2, (2, 3), "negatives_gradcache"),
        (2, (3,), "adapters"),
        (2, (3,), "omni_retrieval"),
        (2, (3,), "only_late_fusion"),
        (2, (0, 2, 3), "vision"),
        (2, (3,), "vision_gradcache"),
    ],
)
def test_ranks_agree_with_one_process(
    num_ranks: int, stages: tuple[int, ...], variant: str, world: World, tmp_path: Path
) -> None:
    """Loss, all gradients (tau's too), the clipped norm and the weights after AdamW agree; a resume is exact.

    "adapters" has frozen parts, which keep all bits, and adapters, which are merged into W + (alpha / rank) B A.
    """
    one = reference(world, variant)
    run_ranks(num_ranks, rank_checks.check_stages, world.root, tmp_path, stages, variant)
    for stage in stages:
        result = torch.load(tmp_path / f"ranks-{num_ranks}-stage-{stage}.pt")
        assert result["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert result["norm"] == pytest.approx(one["norm"], rel=1e-4)
        assert result["grads"].keys() == one["grads"].keys()
        for name, expected in one["grads"].items():
            actual = result["grads"][name].reshape(expected.shape)
            size = expected.norm().item()
            error, allowed = (actual - expected).norm().item(), (1e-4 if name == "tau" else 1e-5) * size + 1e-9
            assert error <= allowed, f"{name}: off by {error} of {size}"
            # Half of a gradient would not pass. (A bias of keys has none, because softmax ignores it.)
            assert allowed < size / 4 or name.endswith("key.bias"), f"{name}: {size} is too small to compare"
        assert result["grads"]["tau"].abs().item() > 1e-3  # so zeros are not compared
        for name, expected in one["weights"].items():
            if name not in one["grads"]:
                assert torch.equal(result["weights"][name], expected), name
                continue
            # If a gradient is nearly 0, Adam's first step is its sign, which rounding decides. Others agree.
            gradient = one["grads"][name]
            firm = gradient.abs() > 1e-2 * gradient.square().mean().sqrt()
            actual = result["weights"][name][firm]  # a step is 1e-3 or more
            torch.testing.assert_close(actual, expected[firm], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        check_merged(result["weights"], result["plain"], variant == "adapters")


@pytest.mark.slow
def test_the_precision_of_gpus(world: World, tmp_path: Path) -> None:
    """With weights in bf16 and gradients of micro-batches summed in fp32, the results equal those of fp32 up to the 8
    bits of each product, and a resume is exact. ZeRO-2 replaces 0 and 1.
    """
    one = reference(world, "gradcache")
    run_ranks(2, rank_checks.check_stages, world.root, tmp_path, (0, 3), "gradcache", "bf16")
    for stage in (0, 3):
        result = torch.load(tmp_path / f"ranks-2-stage-{stage}.pt")
        assert result["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert result["norm"] == pytest.approx(one["norm"], rel=0.05)
        actual, expected = (
            torch.cat([run["grads"][name].float().flatten() for name in one["grads"]]) for run in (result, one)
        )
        assert (actual - expected).norm() < 0.1 * expected.norm()


def check_merged(weights: dict[str, Any], plain: dict[str, Any], adapted: bool) -> None:
    """The merged weights are those of the formula, with alpha = 16 and rank = 4."""
    bases = [n.removesuffix(".base_layer.weight") for n in weights if n.endswith(".base_layer.weight")]
    assert len(bases) == (14 if adapted else 0) and not any("lora" in n or "base_layer" in n for n in plain)
    for name in bases:
        a, b = (weights[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
        expected = weights[f"{name}.base_layer.weight"] + 16 / 4 * b @ a
        torch.testing.assert_close(plain[f"{name}.weight"], expected)
    for name in plain.keys() & weights.keys():
        assert torch.equal(plain[name], weights[name])
