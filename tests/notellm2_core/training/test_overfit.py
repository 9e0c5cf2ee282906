"""Training memorises 32 random pairs, with every method and with LoRA."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from notellm2_core.config.methods import METHODS
from notellm2_core.config.settings import Config
from notellm2_core.model.build import load_model
from tests.support.world import World, pair_dataset, tiny_config, train, write_world

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]
SHORT = {"title_words": 3, "content_words": 1, "topic_words": 1}  # enough to distinguish the notes
CASES: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "basic, LoRA": {"method": "basic", "lora": {"rank": 8, "alpha": 8}},
}


@pytest.fixture(scope="module")
def complete_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in which every note has an image and a text, so that each of them alone identifies it."""
    return write_world(Path(tmp_path_factory.mktemp("complete")), num_validation=0, complete=True)


@pytest.mark.parametrize("case", CASES)
def test_overfits_32_random_pairs(case: str, complete_world: World, tmp_path: Path) -> None:
    """The notes of a pair have nothing in common. After training each partner ranks first of 64, with a margin."""
    rates = {"learning_rate": 3e-3, "new_module_learning_rate": 6e-3, "betas": (0.9, 0.95)}  # moments for few steps
    settings = {"num_steps": 90 if "omni" in case else 75, "batch_pairs": 32, "zero_stage": 2, **rates}
    config = Config(**tiny_config(settings, **CASES[case]).model_dump() | {"text": SHORT})
    out = train(complete_world, config, tmp_path)
    model, processor = load_model(out)
    data = pair_dataset(complete_world, processor, tmp_path)
    with torch.no_grad():
        unit = functional.normalize(model(data.note_batch(data.train_notes)).multimodal, dim=-1)  # [64, d]
    query, target = torch.from_numpy(np.searchsorted(data.train_notes, data.train_pairs)).T
    scores = (unit @ unit.T).fill_diagonal_(-1)
    own = scores[query, target]
    best_other = scores[query].scatter(1, target[:, None], -1).amax(1)
    assert (own > best_other + 0.02).all()  # Recall@1 = 1
    summary = json.loads((out / "training.json").read_text())
    assert summary["loss_last"] < 0.25 * summary["loss_first"]
