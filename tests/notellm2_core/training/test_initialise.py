"""The initial model: each setting of `model.init` has its intended effect."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from notellm2_core.model.build import build_model, load_model
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.initialise import initialise, set_pca, spread
from tests.support.world import World, pair_dataset, tiny_config, write_config


def mean_cosine(x: torch.Tensor) -> float:
    unit = functional.normalize(x, dim=1)
    n = len(x)
    return float(((unit @ unit.T).sum() - n) / (n * (n - 1)))


def collapsed_states(num: int, width: int) -> torch.Tensor:
    """States with a large common part and small differences, larger in the first dimensions than in the last."""
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(num, width, generator=generator) * torch.linspace(1, 0.1, width)
    return 10 * torch.randn(1, width, generator=generator) + differences


def test_pca_spreads_out_collapsed_states() -> None:
    """The mean cosine falls from above 0.95 to about 0. The outputs have mean 0 and covariance I."""
    states = collapsed_states(300, 24)
    assert mean_cosine(states) > 0.95
    projector = nn.Linear(24, 8)
    set_pca(projector, states)
    out = projector(states).detach()
    assert abs(mean_cosine(out)) < 0.02
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(out.T, correction=0), torch.eye(8), atol=2e-3, rtol=0)
    assert spread(out).item() == pytest.approx(1, rel=1e-3)


def test_pca_with_fewer_notes_than_outputs() -> None:
    """5 notes have 4 directions; the other rows of the projector are not 0."""
    projector = nn.Linear(24, 8)
    set_pca(projector, collapsed_states(5, 24))
    assert projector.weight.isfinite().all()
    assert (projector.weight.abs().sum(dim=1) > 0).all()


def test_directions_of_noise_are_not_amplified() -> None:
    """A direction of 1e-4 the size of the other two would be amplified by 1e4 if it were whitened."""
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(200, 3, generator=generator) * torch.tensor([1.0, 0.5, 1e-4])
    projector = nn.Linear(24, 8)
    set_pca(projector, components @ torch.linalg.qr(torch.randn(24, 24, generator=generator))[0][:3])
    assert projector.weight.norm(dim=1).sort(descending=True).values[:3].tolist() == pytest.approx([2, 1, 0], abs=0.3)


def make(world: World, cache: Path, **init: object) -> tuple[MLRMModel, PairDataset]:
    config = tiny_config(init=init)
    model, processor = build_model(config, cache)
    data = pair_dataset(world, processor, cache)
    initialise(model, data, config)
    return model, data


def test_no_settings_and_all_settings(world: World, tmp_path: Path) -> None:
    """Without settings no weight changes. With all, the gate's bias is -1 and the branch's spread behind the projector
    is 0.3 of the LLM's. A second initialisation gives the same weights.
    """
    plain, data = make(world, tmp_path)
    built, _ = build_model(tiny_config(), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), built.parameters(), strict=True))

    settings = {"pca_projector": True, "fusion_scale": 0.3, "gate_bias": -1.0, "num_pca_notes": 48}
    model, _ = make(world, tmp_path, **settings)
    assert (model.fusion.gate.bias == -1).all()
    with torch.no_grad():
        states = model.states(data.note_batch(data.train_notes[data.has_image(data.train_notes)]))
    assert states.gate_mean.item() < plain.states(data.note_batch(data.train_notes)).gate_mean.item()
    with torch.no_grad():
        branch, llm = model.projector(states.global_branch), model.projector(states.llm_multimodal)
        assert (spread(branch) / spread(llm)).item() == pytest.approx(0.3, rel=0.1)
        batch = data.note_batch(data.train_notes)
        assert mean_cosine(model(batch).multimodal) < 0.1 < 0.5 < mean_cosine(plain(batch).multimodal)
    again, _ = make(world, tmp_path, **settings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_visual_words_get_their_share_of_a_words_length(gain: float, world: World, tmp_path: Path) -> None:
    """The lengths are root mean squares over the 64 notes of the training pairs, all of which are measured."""
    model, data = make(world, tmp_path, visual_token_gain=gain)
    batch = data.note_batch(data.train_notes)
    with torch.no_grad():
        visual = model.connector(batch.patches[batch.has_image]).square().sum(-1).mean().sqrt()
        text = batch.attention_mask.bool() & ~batch.image_mask
        words = model.get_input_embeddings()(batch.input_ids[text]).square().sum(-1).mean().sqrt()
    assert (visual / words).item() == pytest.approx(gain, rel=1e-4)


@pytest.mark.slow
def test_the_command_saves_the_initial_model(world: World, tmp_path: Path) -> None:
    """The folder is complete, and has the weights of `initialise`."""
    config = write_config(tmp_path / "c.yaml", tiny_config(init={"pca_projector": True}))
    folders = [*world.inputs.arguments(), "--pairs", str(world.path("pairs"))]
    command = [sys.executable, "-m", "notellm2_core.training.initialise", "--config", str(config), *folders]
    command += ["--out", str(tmp_path / "out"), "--train-days", "2025-01-05", "2025-01-19"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved, _ = load_model(tmp_path / "out")
    expected, _ = make(world, tmp_path, pca_projector=True)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(saved.state_dict()[name], weight, msg=name)
    assert (tmp_path / "out" / "vision" / "config.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "before its first step" in card and "Logs from 2025-01-05 to 2025-01-19" in card
