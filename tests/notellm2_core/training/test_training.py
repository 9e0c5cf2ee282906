"""Training runs of tiny models: they learn, stop when they must, resume, and leave no process behind."""

import base64
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dagster_pipes import encode_param
from safetensors import SafetensorError

from notellm2_core.config.training import PARTS, TrainingSettings
from notellm2_core.model.build import build_model, load_model
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.training import validation
from notellm2_core.training.engine.precision import choose_precision
from notellm2_core.training.launch import launch_command
from notellm2_core.training.loop import TrainingError
from notellm2_core.training.state.metrics import MlflowCurves, Progress, read_metrics
from notellm2_core.training.state.run_folder import locked, open_run
from notellm2_core.training.validation import recall_at
from tests.support import rank_checks
from tests.support.ranks import run_ranks
from tests.support.world import World, pair_dataset, tiny_config, train, write_config

pytestmark = pytest.mark.usefixtures("one_rank")
INIT = {"pca_projector": True, "fusion_scale": 0.3, "gate_bias": -1.0}


@pytest.mark.slow
def test_the_metrics_of_a_training_run(world: World, tmp_path: Path) -> None:
    """training.json and metrics.jsonl are complete, although validation, before the first step and after 3 and 6,
    restarts the clock.
    """
    settings = {"num_steps": 7, "learning_rate": 3e-3, "log_every_steps": 5, "validate_every_steps": 3}
    out = train(world, tiny_config(settings, init=INIT), tmp_path)
    summary = json.loads((out / "training.json").read_text())
    assert summary["loss_last"] < summary["loss_first"]
    assert (summary["steps"], summary["num_train_pairs"], summary["precision"]) == (7, 32, "fp32")
    assert 0 <= summary["validation_recall_at_10"] <= 1 and "loss_v" in summary
    lines = read_metrics(tmp_path / "work" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 5, 6, 7]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 3, 6, 7]


@pytest.mark.slow
def test_frozen_word_embeddings_and_bf16_and_a_finished_folder(world: World, tmp_path: Path) -> None:
    """Frozen word embeddings are saved too. The forward runs under autocast, and the weights stay in fp32. The same run
    again finds its model, as after a kill at the exit; another run into OUT is refused.
    """
    parts = [part for part in PARTS if part != "word_embeddings"]
    config = tiny_config({"num_steps": 2, "trainable": parts, "precision": "bf16", "zero_stage": 3})
    out = train(world, config, tmp_path)
    before, (after, _) = build_model(config, tmp_path)[0].state_dict(), load_model(out)
    changed = {n for n, w in after.state_dict().items() if not torch.equal(w, before[n])}
    assert "llm.embed_tokens.weight" in before and "llm.embed_tokens.weight" not in changed
    assert {"tau", "projector.weight", "fusion.gate.weight", "fusion.visual.weight"} <= changed
    assert any(n.startswith("connector.") for n in changed) and any(n.startswith("llm.layers.") for n in changed)
    assert {w.dtype for w in after.state_dict().values()} == {torch.float32}
    assert json.loads((tmp_path / "work" / "run.json").read_text())["precision"] == "bf16"
    saved = (out / "model.safetensors").stat().st_mtime_ns
    train(world, config, tmp_path)
    assert (out / "model.safetensors").stat().st_mtime_ns == saved
    (tmp_path / "work").rename(tmp_path / "another")
    with pytest.raises(ValueError, match="holds a trained model already"):
        train(world, config, tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_training(world: World, tmp_path: Path) -> None:
    """With a learning rate of 1e30 step 2 is NaN: the run reports it, writes the batch's pairs, and no checkpoint."""
    config = tiny_config({"num_steps": 4, "learning_rate": 1e30, "checkpoint_every_steps": 2})
    with pytest.raises(
        TrainingError, match=r"of step 2 is .*: lower the learning rates, or raise training.warmup_ratio \(pairs"
    ):
        train(world, config, tmp_path)
    report = json.loads((tmp_path / "work" / "nan_batch.json").read_text())
    assert report["step"] == 2 and len(report["pairs"]) == 8 and report["pairs"][0][0].startswith("n")
    assert not list((tmp_path / "work" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_last_step_that_spoils_the_model_is_an_error(world: World, tmp_path: Path) -> None:
    """A step's loss is that of the weights before it, so only the validation measures the weights after the last."""
    config = tiny_config({"num_steps": 1, "learning_rate": 1e30, "warmup_ratio": 0})
    with pytest.raises(TrainingError, match=r"the validation loss of step 1 is nan: lower the learning rates"):
        train(world, config, tmp_path)
    assert not list((tmp_path / "work" / "checkpoints").glob("step-*")) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_epoch_is_so_many_steps(world: World, tmp_path: Path) -> None:
    """32 pairs in batches of 12 are 3 steps: the weights are those of num_steps = 3, bit for bit."""
    lengths: tuple[dict[str, Any], ...] = ({"num_steps": 3}, {"num_steps": None, "num_epochs": 1})
    out = [train(world, tiny_config({"batch_pairs": 12, **n}), tmp_path / str(i)) for i, n in enumerate(lengths)]
    assert (out[0] / "model.safetensors").read_bytes() == (out[1] / "model.safetensors").read_bytes()
    assert json.loads((out[1] / "training.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_out_is_checked_before_training(world: World, tmp_path: Path) -> None:
    """A file, or a folder with other files, is refused before training, not after hours of it."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out is a file: give --out an empty folder"):
        train(world, tiny_config({"num_steps": 1}), tmp_path)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="out holds model.safetensors: give --out an empty folder"):
        train(world, tiny_config({"num_steps": 1}), tmp_path)
    assert not (tmp_path / "work" / "run.json").exists()


@pytest.mark.slow
def test_a_model_that_does_not_fit_on_the_disk(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence. With room again, the same command saves the trained model."""

    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(MLRMModel, "save_pretrained", full)
        with pytest.raises(OSError, match="the model could not be written into .*/out: I/O error: No space left"):
            train(world, tiny_config({"num_steps": 1}), tmp_path)
    assert (train(world, tiny_config({"num_steps": 1}), tmp_path) / "training.json").exists()


@pytest.mark.parametrize("content", [b"", b'{"settings', b"[1]", b"{}", b"null", b'{"settings": {}}', b"\xff\xfe"])
def test_a_damaged_run_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json is damaged .*: give --run-dir a new folder"):
        open_run(tmp_path, {})


@pytest.mark.slow
def test_a_work_folder_of_another_run_is_refused(world: World, tmp_path: Path) -> None:
    """Settings that change the weights must be equal; those of logging and memory may differ."""
    train(world, tiny_config({"num_steps": 2}), tmp_path)
    (tmp_path / "out" / "training.json").unlink()
    with pytest.raises(ValueError, match=r"training.alpha = 9.0, not 5.0: give --run-dir a new folder"):
        train(world, tiny_config({"num_steps": 2, "alpha": 5.0}), tmp_path)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    less_memory = {"micro_batch_tokens": 500, "gradient_checkpointing": True, "log_every_steps": 1}
    train(world, tiny_config({"num_steps": 2, **less_memory}), tmp_path)  # the model is saved again, as after a kill
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_precision_auto_is_one_of_two(world: World, tmp_path: Path) -> None:
    from notellm2_core.training.engine.deepspeed import set_up_processes

    device = set_up_processes()
    config = tiny_config({"precision": "auto"})
    model, processor = build_model(config, tmp_path)
    data = pair_dataset(world, processor, tmp_path)
    assert choose_precision(model, data, np.arange(8), config, device) in ("bf16", "fp32")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(world: World, tmp_path: Path) -> None:
    """After kill -9 of torchrun, when the first checkpoint exists, its two ranks die too. The same command again ends
    with the weights of an uninterrupted run, bit for bit.
    """
    settings = {"num_steps": 24, "batch_pairs": 4, "zero_stage": 2, "num_ranks": 2, "log_every_steps": 5}
    intervals = {"checkpoint_every_steps": 4, "validate_every_steps": 12}
    config = write_config(tmp_path / "c.yaml", tiny_config({**settings, **intervals}, init=INIT))
    run_ranks(2, rank_checks.train, config, world.root, tmp_path / "straight")

    paths = world.paths(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = launch_command(config, TrainingSettings(num_ranks=2), paths)
    killed = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    checkpoints = paths.run_dir / "checkpoints"
    until(lambda: list(checkpoints.glob("step-*")) or killed.poll() is not None)
    assert killed.poll() is None, "it ended before it could be killed"
    ranks = children(killed.pid)
    assert len(ranks) == 2
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    until(lambda: not any(Path(f"/proc/{r}").exists() for r in ranks), 10)
    assert 0 < max(int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")) < 24
    assert not (paths.out / "training.json").exists()

    messages = tmp_path / "pipes"  # of Dagster Pipes
    context = {"extras": {}, "run_id": "r", "retry_number": 0, "job_name": None, "asset_keys": None}
    (tmp_path / "context").write_text(json.dumps(context))
    environment |= {
        "DAGSTER_PIPES_CONTEXT": encode_param({"path": str(tmp_path / "context")}),
        "DAGSTER_PIPES_MESSAGES": encode_param({"path": str(messages)}),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [m["params"]["message"] for m in map(json.loads, messages.read_text().splitlines()) if m["method"] == "log"]
    assert any(line.startswith("step 24/24, 0 s to go: validation_loss") for line in log)
    weights = [(d / "model.safetensors").read_bytes() for d in (paths.out, tmp_path / "straight" / "out")]
    assert weights[0] == weights[1]
    steps = [line["step"] for line in read_metrics(paths.run_dir / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps)) and {1, 24} <= set(steps)
    assert len(list(checkpoints.glob("step-*"))) == 2


@pytest.mark.slow
def test_two_nodes(world: World, tmp_path: Path) -> None:
    """Two launchers with a rank each, which meet at an address, make the bits of two ranks on one node."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {"num_steps": 3, "batch_pairs": 4, "zero_stage": 2}
    nodes = tiny_config({**settings, "num_nodes": 2, "rendezvous": rendezvous})
    config = write_config(tmp_path / "nodes.yaml", nodes)
    run_ranks(2, rank_checks.train, config, world.root, tmp_path / "one")
    paths = world.paths(tmp_path)
    command = launch_command(config, nodes.training, paths)
    running = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    assert [node.wait(200) for node in running] == [0, 0]
    weights = [(d / "model.safetensors").read_bytes() for d in (paths.out, tmp_path / "one" / "out")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_by_deepspeeds_launcher(world: World, tmp_path: Path) -> None:
    """DeepSpeed's launcher runs this command on each node of a hostfile by ssh. It runs here without ssh."""
    training = {"num_steps": 2, "batch_pairs": 4, "num_nodes": 2, "hostfile": "hosts"}
    config = write_config(tmp_path / "c.yaml", tiny_config(training))
    command = launch_command(config, TrainingSettings(num_nodes=2, hostfile=Path("hosts")), world.paths(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={ranks}", f"--master_port={port}"]
    launcher_variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in launcher_variables}
    done = subprocess.run(
        [*launcher, *command[command.index("--no_local_rank") :]],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (summary["steps"], summary["num_ranks"]) == (2, 2)


@pytest.mark.slow
def test_user_errors_end_in_one_line(world: World, tmp_path: Path) -> None:
    """A folder without pairs is one sentence on stderr, without a traceback of our code."""
    config = write_config(tmp_path / "c.yaml", tiny_config())
    command = launch_command(config, TrainingSettings(), replace(world.paths(tmp_path), pairs=tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    line = f"{tmp_path}/train holds no pairs: nothing to train on"
    assert done.stderr.splitlines().count(f"error: {line}") == 1 and "in load_pair_dataset" not in done.stderr


def test_two_runs_do_not_share_a_work_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A second run is refused while the first lives. If the first is killed meanwhile, the second starts."""
    code = "import sys, time, pathlib; from notellm2_core.training.state.run_folder import locked\n"
    code += f"with locked(pathlib.Path({str(tmp_path)!r})): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"another training run uses {tmp_path}"), locked(tmp_path, 0.5):
            pass
        killer = threading.Timer(1, first.kill)
        killer.start()
        with locked(tmp_path):
            assert not killer.is_alive()
    message = f"another training run uses {tmp_path}: waiting"
    assert [line.startswith(message) for line in capfd.readouterr().err.splitlines()] == [True, True]


def test_progress_removes_lines_after_the_checkpoint(tmp_path: Path) -> None:
    """Lines after the checkpoint, and a cut line, are removed. Seconds continue, and means are over the new steps."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 9.0, "seconds": 10.0 * s, "eta_s": 1.0} for s in (1, 2, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    log: list[str] = []
    progress = Progress(path, 2, 4, log=log.append)
    progress.add(8, 90, 990, {"loss": 1.0})
    progress.add(8, 70, 770, {"loss": 2.0})
    progress.report_steps(4)
    progress.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 4]
    last = read_metrics(path)[-1]
    assert last["loss"] == 1.5 and last["seconds"] >= 20
    assert last["notes_per_s"] == pytest.approx(8 * last["steps_per_s"], rel=1e-3)
    assert progress.series("loss") == [9.0, 9.0, 1.5]
    assert len(log) == 1 and log[0].startswith("step 4/4, 0 s to go: loss 1.5")


def test_a_disk_that_fills_up_within_a_line_loses_no_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10 bytes of the second line fit (a limit on file sizes acts as a full disk). The third report writes both."""
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, 0, 3)
    progress.report(1, {"loss": 1.0})
    size = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        progress.report(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == size + 10 and "could not be written" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(path)] == [1]
    progress.report(3, {"loss": 3.0})
    progress.close()
    assert [line["step"] for line in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]
    path.write_text(path.read_text().replace('{"step": 2, ', '{"step": 2, {"step": 2, '))  # as once written
    assert [line["step"] for line in read_metrics(path)] == [1, 3]


def test_a_disk_that_is_full_at_the_start_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines of a killed run after its last checkpoint are then removed with the first report."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 9.0, "seconds": 1.0}) + "\n" for step in (1, 2, 3)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        progress = Progress(path, 2, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in capsys.readouterr().err
    progress.report(3, {"loss": 1.0})
    progress.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 9.0), (2, 9.0), (3, 1.0)]


@pytest.mark.parametrize("slow", [True, False])
def test_data_wait(slow: bool, tmp_path: Path) -> None:
    """The share is near 1 if a batch takes 0.1 s to make and 0 to use, and near 0 if it is the other way round."""
    path = tmp_path / "metrics.jsonl"
    progress = Progress(path, 0, 8)
    making, using = (0.1, 0.0) if slow else (0.0, 0.1)
    batches = Prefetcher(time.sleep(making) for _ in range(8))
    for _ in batches:
        time.sleep(using)
        progress.add(8, 90, 990, {"loss": 1.0}, batches.seconds_waited)
    progress.report_steps(8)
    progress.add(8, 90, 990, {"loss": 1.0})
    progress.report_steps(9)
    progress.close()
    share, next_share = progress.series("data_wait")
    assert share > 0.9 if slow else share < 0.1
    assert next_share == 0  # each wait counts once


def test_invalid_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Invalid lines in the curves do not stop a training run."""
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 9.0, "seconds": 1.0}\n'
    path.write_bytes(good + b'{"step": 2, "lo{"step": 2, "seconds": 1}\n\0\0\n[]\n\xff\n{"step": 2}\n' + good + b'{"st')
    assert [line["step"] for line in read_metrics(path)] == [1, 1]
    assert capsys.readouterr().err.count("has a line that is no step's metrics") == 5


@pytest.mark.slow
def test_curves_reach_mlflow_and_a_dead_server_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    run_id = client.create_run("0").info.run_id
    curves = MlflowCurves(uri, run_id, 5)
    for step in (1, 2):
        curves.send(step, {"loss": 3.0 / step, "tau": 3.0})
    curves.close()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == [(1, 3.0), (2, 1.5)]
    capsys.readouterr()

    dead = MlflowCurves("http://127.0.0.1:9", "none", 1)
    start = time.monotonic()
    for step in range(100):
        dead.send(step, {"loss": 1.0})
    assert time.monotonic() - start < 0.5
    dead.close()
    assert time.monotonic() - start < 20
    assert capsys.readouterr().err.count("no curves in MLflow at http://127.0.0.1:9") == 1


def test_recall_of_validation() -> None:
    """For query 0, rows 1, 2 and 3 score 0.8, 1 and 0, so target 1 has rank 2. (The query, row 0, does not count.)"""
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [2.0, 0.0], [0.0, 1.0]])
    pairs = torch.tensor([[0, 1]])
    assert recall_at(x, pairs, 1) == 0.0
    assert recall_at(x, pairs, 2) == 1.0


@pytest.mark.parametrize("centre", [True, False])
def test_a_validation_is_centred_as_the_loss_is(
    centre: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With training.centre_embeddings, what all embeddings share changes neither its recall nor its loss."""
    config = tiny_config({"centre_embeddings": centre}, method="basic")
    data = pair_dataset(world, build_model(config, tmp_path)[1], tmp_path)
    engine = SimpleNamespace(eval=lambda: None, train=lambda: None)
    embeddings = torch.randn(len(np.unique(data.validation_pairs)), 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for shared in (0.0, 30.0):
        monkeypatch.setattr(validation, "_embed", lambda *_, shared=shared: embeddings + shared)
        monkeypatch.setattr(validation, "_tau", lambda engine: torch.tensor([3.0]))
        device = torch.device("cpu")
        scores.append(validation.validate(engine, data, data.validation_pairs, config, device))
    assert (scores[0] == pytest.approx(scores[1], rel=1e-3)) == centre


def until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
