"""The best weights of a run: chosen by validation recall, the same after a kill, and whole under ZeRO."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from notellm2_core.config.training import SelectionSettings
from notellm2_core.model.build import load_model
from notellm2_core.training.engine.deepspeed import set_up_processes
from notellm2_core.training.state.metrics import read_metrics
from notellm2_core.training.state.selection import Selection
from tests.support import rank_checks
from tests.support.ranks import run_ranks
from tests.support.world import World, pair_dataset, tiny_config, train, write_config, write_world

pytestmark = pytest.mark.usefixtures("one_rank")
BEST = SelectionSettings(select="best", validate_every_steps=1)
RECALL = "validation_recall_at_10"


class Module(nn.Module):
    """A trained and a frozen weight, both of which are the number of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)

    def at(self, step: int) -> "Module":
        for weight in self.parameters():
            weight.data.fill_(step)
        return self


def validated(selection: Selection, module: Module, recalls: list[float], steps: range, every: int) -> None:
    """Validate after each of `steps`, as training does: with a checkpoint every `every` steps, of which two stay."""
    for step in steps:
        checkpoints = [c for c in range(1, step) if c % every == 0][-2:]
        selection.add(step, recalls[step - 1], module.at(step), checkpoints)


@settings(max_examples=40)
@given(
    recalls=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12),
    every=st.integers(1, 4),
    data=st.data(),
)
def test_a_kill_after_any_step_changes_nothing(recalls: list[float], every: int, data: st.DataObject) -> None:
    """Killed after any validation and resumed from either checkpoint, the run ends with the first of the best steps.

    After the kill, validations may come out otherwise, as on a GPU: only those of the resumed run count.
    """
    set_up_processes()
    killed = data.draw(st.integers(1, len(recalls)))
    resumed = data.draw(st.sampled_from([0, *[c for c in range(1, killed + 1) if c % every == 0][-2:]]))
    again = recalls[:resumed] + data.draw(st.permutations(recalls[resumed:]))
    with tempfile.TemporaryDirectory() as folder:
        module = Module()
        validated(Selection(Path(folder), BEST, 0), module, recalls, range(1, killed + 1), every)
        selection = Selection(Path(folder), BEST, resumed)
        before = recalls[:resumed]
        assert selection.best_step == (1 + before.index(max(before)) if before else 0)
        validated(selection, module, again, range(resumed + 1, len(recalls) + 1), every)
        best = 1 + again.index(max(again))
        assert (selection.best_step, selection.best_recall) == (best, max(again))
        selection.restore(module.at(99))
        assert (module.trained.tolist(), module.frozen.tolist()) == ([best] * 2, [99] * 2)
        assert len(list(Path(folder).glob("*.json"))) <= 3  # the best of all, and up to each checkpoint


def test_the_weights_after_the_last_step_leave_no_files(tmp_path: Path) -> None:
    set_up_processes()
    selection = Selection(tmp_path / "best", SelectionSettings(), 0)
    selection.add(1, 0.5, Module(), [])
    assert not (tmp_path / "best").exists() and selection.chosen_step(7) == 7 and not selection.stops(10**6)


def test_patience(tmp_path: Path) -> None:
    """Validations every 10 steps, patience 2: equal is no better. The best recall outlives a kill."""
    set_up_processes()
    chosen = SelectionSettings(patience=2, validate_every_steps=10)
    selection = Selection(tmp_path, chosen, 0)
    stops = []
    for step, recall in zip(range(10, 60, 10), (0.2, 0.3, 0.3, 0.1, 0.9), strict=True):
        selection.add(step, recall, Module(), [30])
        stops.append(selection.stops(step))
    assert stops == [False, False, False, True, False]
    resumed = Selection(tmp_path, chosen, 30)
    assert (resumed.best_step, resumed.stops(30), resumed.stops(40)) == (20, False, True)
    assert not list(tmp_path.glob("*.safetensors")) and resumed.chosen_step(40) == 40


def test_damage_and_a_full_disk(tmp_path: Path) -> None:
    set_up_processes()
    selection = Selection(tmp_path, BEST, 0)
    selection.add(1, 0.5, Module().at(1), [])
    weights = tmp_path / "step-1.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="step-1.safetensors is damaged"):
        selection.restore(Module())
    (tmp_path / "step-1.json").write_text("{}")
    with pytest.raises(ValueError, match="step-1.json is damaged"):
        Selection(tmp_path, BEST, 1)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="those after step 3, could not be written into .*/file/best .*: make room"):
        Selection(blocked / "best", BEST, 0).add(3, 0.5, Module(), [])


SETTINGS: dict[str, Any] = {
    "num_steps": 10, "batch_pairs": 4, "learning_rate": 3e-3, "select": "best", "validate_every_steps": 2,
    "checkpoint_every_steps": 2, "num_checkpoints": 99,
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with 32 training and 40 validation pairs, so that the recall at 10 differs from step to step."""
    return write_world(tmp_path_factory.mktemp("wide"), num_validation=40)


def recalls_of(folder: Path) -> dict[int, float]:
    return {line["step"]: line[RECALL] for line in read_metrics(folder / "work" / "metrics.jsonl") if RECALL in line}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "zero_stage", "lora"), [(1, 0, None), (1, 2, {"rank": 4}), (2, 3, None)])
def test_the_best_weights_are_saved_and_a_resumed_run_saves_the_same(
    num_ranks: int, zero_stage: int, lora: dict[str, Any] | None, wide_world: World, tmp_path: Path
) -> None:
    """The saved weights are those of the checkpoint at the first step with the highest recall.

    Then the run's state is that of a kill after an earlier checkpoint: the resumed run ends with the same bytes.
    """
    config = tiny_config({**SETTINGS, "zero_stage": zero_stage, "num_ranks": num_ranks}, lora=lora)
    file = write_config(tmp_path / "c.yaml", config)

    def run() -> tuple[bytes, dict[str, Any]]:
        if num_ranks == 1:
            train(wide_world, config, tmp_path)
        else:
            run_ranks(num_ranks, rank_checks.train_partitioned, file, wide_world.root, tmp_path)
        out = tmp_path / "out"
        return (out / "model.safetensors").read_bytes(), json.loads((out / "training.json").read_text())

    weights, summary = run()
    recalls = {step: recall for step, recall in recalls_of(tmp_path).items() if step}
    best = max(recalls, key=lambda step: (recalls[step], -step))
    assert (summary["chosen_step"], summary["steps"], summary[RECALL]) == (best, 10, recalls[best])
    assert best < 10 and len(set(recalls.values())) > 1, "the last step is the best: nothing is shown"
    checkpoints = tmp_path / "work" / "checkpoints"
    if zero_stage == 0:
        state = torch.load(checkpoints / f"step-{best}" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        saved = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(saved[name], state[f"model.{name}"]) for name in saved)

    for after in (best - 2, best + 2) if zero_stage == 0 else (best - 2,):
        for checkpoint in checkpoints.glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > after:
                shutil.rmtree(checkpoint)
        shutil.rmtree(tmp_path / "out")
        resumed, summary_of_resumed = run()
        assert resumed == weights and summary_of_resumed["chosen_step"] == best
    assert os.listdir(tmp_path / "work" / "best")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_centred_embeddings(zero_stage: int, wide_world: World, tmp_path: Path) -> None:
    """With training.centre_embeddings, the saved model's embeddings of training notes have mean 0. Only the projector's
    bias differs from the best weights of the run.
    """
    settings = {**SETTINGS, "zero_stage": zero_stage, "num_ranks": 2, "centre_embeddings": True}
    config = tiny_config(settings, init={"pca_projector": True})
    file = write_config(tmp_path / "c.yaml", config)
    run_ranks(2, rank_checks.train_partitioned, file, wide_world.root, tmp_path)
    model, processor = load_model(tmp_path / "out")
    data = pair_dataset(wide_world, processor, tmp_path)
    with torch.no_grad():
        rows = model.eval()(data.note_batch(data.train_notes)).multimodal  # all of them are measured
    assert rows.mean(dim=0).abs().max() < 1e-4 * rows.std()

    recalls = {step: recall for step, recall in recalls_of(tmp_path).items() if step}
    best = max(recalls, key=lambda step: (recalls[step], -step))
    assert best < 10, "the last step is the best: nothing is shown"
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kept = load_file(tmp_path / "work" / "best" / f"step-{best}.safetensors")
    different = [name for name, weight in kept.items() if not torch.equal(saved[name.removeprefix("model.")], weight)]
    assert different == ["model.projector.bias"]


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_early(wide_world: World, tmp_path: Path) -> None:
    """With hardly any learning rate the recall of step 2 stays the best: two validations later, at step 6, it ends.

    The learning rates are those of 40 steps. Run again, it makes no further step; with the settings changed, it is
    refused, as they decide which weights are saved.
    """
    chosen = {**SETTINGS, "num_steps": 40, "learning_rate": 1e-12, "patience": 2, "log_every_steps": 1}
    config = tiny_config({**chosen, "select": "last", "warmup_ratio": 0.25})
    out = train(wide_world, config, tmp_path)
    summary = json.loads((out / "training.json").read_text())
    assert (summary["steps"], summary["chosen_step"]) == (6, 6)
    lines = read_metrics(tmp_path / "work" / "metrics.jsonl")
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == pytest.approx([1e-13 * step for step in range(1, 7)])
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    train(wide_world, config, tmp_path)
    assert read_metrics(tmp_path / "work" / "metrics.jsonl")[-1]["step"] == 6
    assert (out / "model.safetensors").read_bytes() == weights
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="holds a training run with training.validate_every_steps = 2, not 3"):
        train(wide_world, tiny_config({**chosen, "select": "last", "warmup_ratio": 0.25, "validate_every_steps": 3}),
              tmp_path)  # fmt: skip


@pytest.mark.slow
def test_selection_needs_validation_pairs(tmp_path: Path) -> None:
    world = write_world(tmp_path, num_validation=0)
    with pytest.raises(
        ValueError, match=r"training.select = best .* needs validation pairs, .*: raise split.validation"
    ):
        train(world, tiny_config({"num_steps": 1, "select": "best"}), tmp_path)
    assert not (tmp_path / "work" / "run.json").exists()
