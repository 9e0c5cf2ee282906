"""Checkpoints are written in the background, are complete or missing, and serve any number of ranks."""

import errno
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from notellm2_core.training.engine.deepspeed import set_up_processes
from notellm2_core.training.state import checkpoints as module
from notellm2_core.training.state.checkpoints import Checkpoints
from tests.support import rank_checks
from tests.support.ranks import run_ranks
from tests.support.world import World

pytestmark = pytest.mark.usefixtures("one_rank")


class Engine:
    """The part of DeepSpeed's engine that saves and loads, with one tensor."""

    def __init__(self, file: str = "w.pt") -> None:
        self.file = file
        self.weight = torch.zeros(3)
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        state = {"weight": self.weight, "more": [(1, {"x": self.weight})]}
        self.checkpoint_engine.save(state, f"{folder}/{tag}/{self.file}")

    def load_checkpoint(self, folder: str, tag: str, load_lr_scheduler_states: bool) -> tuple[str, None]:
        state = torch.load(f"{folder}/{tag}/{self.file}")
        assert torch.equal(state["weight"], state["more"][0][1]["x"])
        self.weight = state["weight"]
        return tag, None


@pytest.fixture
def engine() -> Engine:
    set_up_processes()
    return Engine()


def saved(engine: Engine, checkpoints: Checkpoints, step: int) -> None:
    """Save weights equal to `step`, which change while their copies are written."""
    engine.weight += step - engine.weight
    checkpoints.save(engine, step)
    engine.weight -= 99
    checkpoints.settle(wait=True)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_last_checkpoints_stay_and_hold_the_weights_of_their_step(engine: Engine, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", num_checkpoints=3)
    assert checkpoints.last_step() == 0
    for step in (2, 4, 6, 10):
        saved(engine, checkpoints, step)
    assert names(tmp_path / "c") == ["step-10", "step-4", "step-6"] and checkpoints.last_step() == 10
    assert names(tmp_path / "c" / "step-10") == ["rank-0.json", "w.pt"] and checkpoints.num_ranks(10) == 1
    checkpoints.load(engine, 10)
    assert engine.weight.tolist() == [10.0] * 3


def test_training_continues_while_a_checkpoint_is_written(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint gets its name when it is complete, and the next save waits for it."""
    reader, writer = os.pipe()
    save = torch.save
    monkeypatch.setattr(module.torch, "save", lambda state, file: (os.read(reader, 1), save(state, file)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, 1)  # type: ignore[arg-type]
    for _ in range(3):
        checkpoints.settle()
        assert names(tmp_path) == ["draft-1"] and Checkpoints(tmp_path).last_step() == 0
    os.write(writer, b"12")
    checkpoints.save(engine, 2)
    assert "step-1" in names(tmp_path)
    checkpoints.close()
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "unlisted", "null", "a rank missing"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved(engine, checkpoints, 1)
    saved(engine, checkpoints, 2)
    file = tmp_path / "step-2" / "w.pt"
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, 10)
    elif damage == "gone":
        file.unlink()
    elif damage in ("unlisted", "null"):
        (tmp_path / "step-2" / "rank-0.json").write_text("{" if damage == "unlisted" else "null")
    else:
        listing = tmp_path / "step-2" / "rank-0.json"
        listing.write_text(listing.read_text().replace('"num_ranks": 1', '"num_ranks": 2'))
    assert checkpoints.last_step() == 1
    assert f"{tmp_path / 'step-2'} is damaged: using the one before" in capsys.readouterr().err
    one = Checkpoints(tmp_path, num_checkpoints=1)  # the damaged one no longer counts as the last
    saved(engine, one, 2)
    assert names(tmp_path) == ["step-2"] and one.last_step() == 2


def test_a_full_disk_does_not_stop_training(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path)
    saved(engine, checkpoints, 1)

    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "save", full)
        saved(engine, checkpoints, 2)
    assert names(tmp_path) == ["step-1"] and checkpoints.last_step() == 1
    assert "the checkpoint after step 2 could not be written ([Errno 28] No space left" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # torch.save raises its own error for a full disk
    try:
        saved(engine, checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-1"]
    assert "the checkpoint after step 2 could not be written ([Errno 27] File too large" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        saved(engine, checkpoints, 3)
    assert "no checkpoint after step 3 ([Errno 28]" in capsys.readouterr().err
    saved(engine, checkpoints, 3)
    assert names(tmp_path) == ["step-1", "step-3"]


@pytest.mark.parametrize(
    ("where", "remaining"),
    [("sync", [1, 2]), ("os.rename", [1, 2]), ("shutil.rmtree", [1, 2, 3])],
)
def test_a_disk_that_refuses_a_rename_or_a_removal_does_not_stop_training(
    where: str, remaining: list[int], engine: Engine, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    checkpoints = Checkpoints(tmp_path)
    saved(engine, checkpoints, 1)
    saved(engine, checkpoints, 2)
    with monkeypatch.context() as patch:
        patch.setattr(f"{module.__name__}.{where}", full)
        saved(engine, checkpoints, 3)
    not_removed = r"warning: checkpoints before step 3 could not be removed \(\[Errno 28\] .*\)\n"
    not_saved = r"warning: the checkpoint after step 3 could not be saved \(\[Errno 28\] .*\); training continues\n"
    assert re.search(not_removed if 3 in remaining else not_saved, capsys.readouterr().err)
    assert checkpoints.last_step() == remaining[-1]
    assert [step for step in (1, 2, 3) if (tmp_path / f"step-{step}").exists()] == remaining
    saved(engine, checkpoints, 4)
    assert names(tmp_path) == [f"step-{remaining[-1]}", "step-4"]


def full(*arguments: Any, **options: Any) -> None:
    if not options.get("ignore_errors"):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_ranks_continue_together_and_end_together(tmp_path: Path) -> None:
    run_ranks(2, check_failing, tmp_path, timeout_s=100)


def check_failing(folder: Path) -> None:
    """If the disk refuses the first rank's rename, or the second one's writes, both ranks warn and continue. A bug of
    the second rank ends both.
    """
    set_up_processes()
    rank = dist.get_rank()
    engine, checkpoints = Engine(f"{rank}.pt"), Checkpoints(folder)
    for name, raised in (("os.rename", full), ("_write", full), ("_write", lambda *_: {}["bug"])):
        saved(engine, checkpoints, 1)
        with pytest.MonkeyPatch.context() as patch:
            if rank == (name == "_write"):
                patch.setattr(f"{module.__name__}.{name}", raised)
            if raised is full:
                saved(engine, checkpoints, 2)
                assert checkpoints.last_step() == 1
            else:
                with pytest.raises(RuntimeError, match="the checkpoint after step 2 could not be made"):
                    saved(engine, checkpoints, 2)


def test_due_by_steps_or_by_time(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    by_steps, by_both = Checkpoints(tmp_path, 10), Checkpoints(tmp_path, 10, every_minutes=2)
    now = 100.0
    assert [step for step in range(1, 31) if by_steps.due(step)] == [10, 20, 30]
    assert [step for step in range(1, 31) if by_both.due(step)] == [10, 20, 30]
    now = 120.0
    assert by_both.due(7) and not by_steps.due(7)
    saved(engine, by_both, 7)
    assert not by_both.due(8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "stages", "variant"),
    [(2, 1, (0, 1, 2, 3), "notellm2"), (1, 2, (0, 1, 2, 3), "notellm2"), (2, 1, (2, 3), "adapters")],
)
def test_resuming_with_another_number_of_ranks(
    before: int, after: int, stages: tuple[int, ...], variant: str, world: World, tmp_path: Path
) -> None:
    """Resumed ranks have, after the second step, the weights of the ranks that did both steps, up to rounding."""
    run_ranks(before, rank_checks.check_resharded, world.root, tmp_path, stages, variant, True)
    run_ranks(after, rank_checks.check_resharded, world.root, tmp_path, stages, variant, False)
    for stage in stages:
        expected, actual = (torch.load(tmp_path / f"{kind}-{stage}.pt") for kind in ("saved", "resharded"))
        for name, weight in expected.items():
            # If a gradient is nearly 0, Adam's steps are its sign, which rounding decides: at most 2e-2 apart.
            near = (actual[name] - weight).abs() <= 1e-5 + 1e-4 * weight.abs()
            assert near.float().mean() > 0.99, f"{stage}: {name}"
            torch.testing.assert_close(actual[name], weight, atol=2e-2, rtol=0)
