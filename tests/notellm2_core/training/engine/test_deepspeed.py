"""The DeepSpeed dictionary, the parameter groups and the learning rate of Table 8."""

from dataclasses import replace
from pathlib import Path

import pytest

from notellm2_core.config.training import PARTS, TrainingSettings
from notellm2_core.model.build import build_model
from notellm2_core.model.trainable import set_trained
from notellm2_core.notes.inputs import ImageFolders, NoteInputs
from notellm2_core.training.engine.deepspeed import deepspeed_config, learning_rate_factor, optimizer_groups
from notellm2_core.training.launch import Paths, Reports, launch_command
from tests.support.world import tiny_config


def test_learning_rate_of_ten_steps() -> None:
    """The rate warms up over 2 of 10 steps, then falls by 1/8 a step; in the last step it is not 0."""
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors == pytest.approx([1 / 2, 1, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_learning_rate_of_the_paper() -> None:
    """In 7,956 steps with ratio 0.1, the peak of 3e-6 comes after ceil(795.6) = 796 steps. The sum is about 0.012."""
    factors = [learning_rate_factor(step, 7956, 0.1) for step in range(7956)]
    assert factors.index(1.0) == 795
    assert factors[-1] == pytest.approx(1 / 7160)
    assert sum(factors) * 3e-6 == pytest.approx(0.012, rel=0.01)
    assert learning_rate_factor(0, 5, 0.0) == 1.0


def test_the_paper_as_a_deepspeed_dictionary() -> None:
    """Table 8: B = 128 over 8 GPUs is 16 pairs each, with ZeRO-3, bf16 and AdamW."""
    dictionary = deepspeed_config(TrainingSettings(), "bf16", 8, on_gpu=True)
    assert dictionary["train_micro_batch_size_per_gpu"] == 16
    assert dictionary["zero_optimization"]["stage"] == 3
    assert dictionary["bf16"] == {"enabled": True}
    assert dictionary["gradient_clipping"] == 1.0
    optimizer = dictionary["optimizer"]["params"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["eps"]) == (3e-6, [0.9, 0.999], 1e-8)
    assert optimizer["weight_decay"] == 1e-3 and optimizer["torch_adam"]
    accumulating = deepspeed_config(TrainingSettings(zero_stage=0, micro_batch_tokens=9), "bf16", 2, on_gpu=True)
    assert accumulating["data_types"] == {"grad_accum_dtype": "fp32"}
    assert accumulating["zero_optimization"]["stage"] == 2
    on_cpu = deepspeed_config(TrainingSettings(), "bf16", 2, on_gpu=False)
    assert on_cpu["bf16"] == {"enabled": False}  # fp32 weights; the forward runs under autocast
    with pytest.raises(ValueError, match=r"batch_pairs = 128 cannot be divided among 3 ranks"):
        deepspeed_config(TrainingSettings(), "bf16", 3, on_gpu=True)


def test_groups_have_their_rates_and_decay() -> None:
    """The LLM and the new modules have groups with and without decay, tau one without. Each weight is in one group."""
    config = tiny_config({"trainable": [part for part in PARTS if part != "word_embeddings"]})
    model, _ = build_model(config, Path())
    set_trained(model, config)
    training = TrainingSettings(learning_rate=1.0, new_module_learning_rate=2.0, temperature_learning_rate=3.0)
    groups = optimizer_groups(model.parameter_groups(), training)
    grouped = {id(p): g for g in groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert grouped.keys() == {id(p) for p in trained.values()}
    assert sum(len(g["params"]) for g in groups) == len(trained)
    for name, rate, decay in (
        ("tau", 3.0, 0.0),
        ("projector.weight", 2.0, 1e-3),
        ("projector.bias", 2.0, 0.0),
        ("fusion.gate.bias", 2.0, 0.0),
        ("llm.norm.weight", 1.0, 0.0),
    ):
        group = grouped[id(trained[name])]
        assert (group["peak_lr"], group["weight_decay"]) == (rate, decay), name
    assert any(n.startswith("llm.layers") and grouped[id(p)]["weight_decay"] > 0 for n, p in trained.items())
    assert all(grouped[id(p)]["weight_decay"] == 0 for n, p in trained.items() if "quer" in n.rsplit(".", 1)[-1])


def test_adapters_are_in_the_llms_group() -> None:
    config = tiny_config({"trainable": ["llm", "temperature"]}, lora={"rank": 2})
    model, _ = build_model(config, Path())
    set_trained(model, config)
    groups = optimizer_groups(
        model.parameter_groups(), TrainingSettings(learning_rate=1.0, temperature_learning_rate=3.0)
    )
    assert [(g["peak_lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1.0, 1e-3, 2 * 7 * 2),
        (3.0, 0, 1),
    ]


def test_the_command_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path("/data")
    inputs = NoteInputs(data / "notes", data / "images", data / "store")
    paths = Paths(inputs, data / "pairs", data / "work", data / "out")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reports = Reports(mlflow_uri="sqlite:///m.db", mlflow_run_id="r1")
    command = launch_command(
        Path("c.yaml"), TrainingSettings(num_ranks=2), paths, reports, ("2025-01-05", "2025-01-19")
    )
    text = " ".join(command[1:])
    assert text == (
        "-m torch.distributed.run --standalone --nproc-per-node 2 -m notellm2_core.training --config c.yaml"
        " --notes /data/notes --images /data/images --store /data/store --pairs /data/pairs"
        " --run-dir /data/work --out /data/out --train-days 2025-01-05 2025-01-19"
        " --mlflow-uri sqlite:///m.db --mlflow-run-id r1"
    )
    all_paths = Paths(replace(inputs, image_folders=ImageFolders(data / "n", data / "s")), *[data] * 3, data / "hard")
    assert " ".join(launch_command(Path("c.yaml"), TrainingSettings(), all_paths)).endswith(
        "--image-folders /data/n /data/s --pairs /data --run-dir /data --out /data --hard-negatives /data/hard"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch_command(Path("c.yaml"), TrainingSettings(num_ranks=10_000), paths)[:2] == ["env", "OMP_NUM_THREADS=1"]
    several = TrainingSettings(num_ranks=8, num_nodes=2, rendezvous="a.b:29400")
    command = " ".join(launch_command(Path("c.yaml"), several, paths))
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-id work --rdzv-endpoint a.b:29400 --nproc-per-node 8 -m" in command
    command = " ".join(launch_command(Path("c.yaml"), TrainingSettings(num_nodes=2, hostfile=Path("hosts")), paths))
    assert (
        "-m deepspeed.launcher.runner --hostfile hosts --num_nodes 2 --num_gpus 1 --no_local_rank --module note"
        in command
    )
