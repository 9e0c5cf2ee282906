"""Trial runs: which rates survive, what a kill leaves, and that a trial is the beginning of the whole run."""

import json
from pathlib import Path

import pytest

from notellm2_core.config.settings import Config
from notellm2_core.training.run import run
from notellm2_core.training.state.metrics import RECALL, read_metrics
from notellm2_core.training.trials import LLM_RATES, NEW_MODULE_RATES, choose_rates
from tests.support.world import World, tiny_config


def config(**training: object) -> Config:
    return tiny_config({"learning_rate": "auto", "new_module_learning_rate": None, **training})


class Runs:
    """Stands for training: the recall of a run is a function of its rates and its share of the steps."""

    def __init__(self, diverging: tuple[float, ...] = (), stop_after: int | None = None) -> None:
        self.calls: list[tuple[float, float, float]] = []
        self.diverging, self.stop_after = diverging, stop_after

    def __call__(self, config: Config, folder: Path, share: float) -> None:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        rates = config.training.rates
        self.calls.append((rates.llm, rates.new_modules, share))
        folder.mkdir(exist_ok=True)
        if rates.llm in self.diverging:
            (folder / "nan_batch.json").touch()
            return
        # Slower new modules begin better and end worse.
        recall = {5e-4: 0.1, 1.5e-4: 0.3, 5e-5: 0.2, 5e-6: 0.05}[rates.llm] + (share - 0.3) * rates.new_modules
        lines = [{"step": 0, "seconds": 0, RECALL: 0.9}, {"step": 5, "seconds": 1, RECALL: recall}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_best_quarter_survives_each_time(tmp_path: Path) -> None:
    """Eight trials for a quarter of the steps, two of them for half, of which the better continues."""
    runs = Runs()
    lines: list[str] = []
    chosen, folder, trials = choose_rates(config(), tmp_path, runs, lines.append)
    assert chosen.training.rates[:2] == (1.5e-4, 2e-4) and folder == tmp_path / "0.00015-0.0002"
    assert [share for _, _, share in runs.calls] == [1 / 4] * 8 + [1 / 2] * 2
    assert {call[:2] for call in runs.calls[:8]} == {(llm, new) for llm in LLM_RATES for new in NEW_MODULE_RATES}
    assert [call[:2] for call in runs.calls[8:]] == [(1.5e-4, 3e-5), (1.5e-4, 2e-4)]
    best = trials[0]
    assert (best["learning_rate"], best["new_module_learning_rate"]) == (1.5e-4, 2e-4)
    assert best["recalls"] == pytest.approx([0.3 - 0.05 * 2e-4, 0.3 + 0.2 * 2e-4])
    assert [len(trial["recalls"]) for trial in trials] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert [folder.name for folder in tmp_path.iterdir() if folder.is_dir()] == ["0.00015-0.0002"]
    assert lines[0] == "trial 1 of 8, 25% of the steps, LLM 0.0005, new modules 0.0002: validation recall 0.100"


def test_a_rate_that_is_set_is_kept(tmp_path: Path) -> None:
    runs = Runs()
    chosen, _, _ = choose_rates(config(new_module_learning_rate=1e-3), tmp_path, runs, lambda line: None)
    assert chosen.training.rates[:2] == (1.5e-4, 1e-3) and {call[1] for call in runs.calls} == {1e-3}
    assert [share for _, _, share in runs.calls] == [1 / 4] * 4


@pytest.mark.parametrize("stop_after", range(10))
def test_a_kill_costs_one_trial(stop_after: int, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        choose_rates(config(), tmp_path, Runs(stop_after=stop_after), lambda line: None)
    again = Runs()
    chosen, _, trials = choose_rates(config(), tmp_path, again, lambda line: None)
    assert len(again.calls) == 10 - stop_after
    (tmp_path / "whole").mkdir()
    expected, _, expected_trials = choose_rates(config(), tmp_path / "whole", Runs(), lambda line: None)
    assert (chosen, trials) == (expected, expected_trials)


def test_a_trial_that_diverges_loses(tmp_path: Path) -> None:
    chosen, _, trials = choose_rates(config(), tmp_path, Runs(diverging=(5e-4, 1.5e-4)), lambda line: None)
    assert chosen.training.rates.llm == 5e-5
    assert [trial["recalls"] for trial in trials if trial["learning_rate"] == 5e-4] == [[-1.0], [-1.0]]
    (tmp_path / "all").mkdir()
    with pytest.raises(ValueError, match="learning_rate = auto: every trial diverged"):
        choose_rates(config(), tmp_path / "all", Runs(diverging=LLM_RATES), lambda line: None)


def test_the_training_command_takes_numbers_alone() -> None:
    with pytest.raises(ValueError, match="auto has no value here: the asset checkpoint chooses one by trial"):
        _ = config().training.rates


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
def test_a_trial_is_the_beginning_of_the_whole_run(world: World, tmp_path: Path) -> None:
    """A run that stopped after a quarter and after half of its steps has the weights of one that did not stop."""
    settings = tiny_config({"num_steps": 8, "learning_rate": 3e-3, "validate_every_steps": 100})
    for share, steps in ((0.25, [0, 2]), (0.25, [0, 2]), (0.5, [0, 2, 4]), (1.0, [0, 2, 4, 8])):
        run(settings, world.paths(tmp_path / "trial"), share=share)
        lines = read_metrics(tmp_path / "trial" / "work" / "metrics.jsonl")
        assert [line["step"] for line in lines if RECALL in line] == steps
        assert (tmp_path / "trial" / "out").exists() == (share == 1.0)
    run(settings, world.paths(tmp_path / "whole"))
    weights = [tmp_path / name / "out" / "model.safetensors" for name in ("trial", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
