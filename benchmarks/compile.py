"""Does torch.compile pay? The training step with compiled decoder layers against the same step without.

    .venv/bin/python benchmarks/compile.py [--steps 10] [--part mlp|layer]

The model and the notes are those of training.py. Each batch has another number of tokens, so graphs are dynamic. Both
contenders run in one process and take turns; on a CPU a C++ compiler is needed. `mlp`: each layer's MLP and norms;
`layer`: whole layers, except attention over packed notes, which torch.compile cannot trace.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from training import PAIRS, RESULTS, heading, pair_dataset, settings, synchronize
from transformers import AttentionInterface

from notellm2_core.config.settings import Config
from notellm2_core.model.build import build_model
from notellm2_core.model.packed_attention import PACKED_SDPA
from notellm2_core.model.trainable import set_trained
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.step import batch_gradient, prepare

WARM_UP = 3  # steps, in which graphs are compiled


def compile_layer(layer: nn.Module, part: str) -> None:
    """Compile this part of a decoder layer in place."""
    names = [""] if part == "layer" else ["mlp", "input_layernorm", "post_attention_layernorm"]
    for name in names:
        layer.get_submodule(name).compile(dynamic=True)


def contender(config: Config, cache: Path, part: str | None) -> tuple[Any, MLRMProcessor]:
    torch.manual_seed(0)
    model, processor = build_model(config, cache)
    set_trained(model, config)
    if part is not None:
        for layer in cast(nn.ModuleList, model.llm.layers):
            compile_layer(layer, part)
    return engines.make_engine(model.train(), config, "bf16"), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--part", choices=["mlp", "layer"], default="mlp")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    if options.part == "layer":
        packed = AttentionInterface()[PACKED_SDPA]
        AttentionInterface.register(PACKED_SDPA, torch.compiler.disable(packed))
    device = engines.set_up_processes()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(PAIRS // 2, Path(folder))
        plain, processor = contender(config, Path(folder), None)
        contenders = {"plain": plain, "compiled": contender(config, Path(folder), options.part)[0]}
    num_steps = WARM_UP + options.steps
    data = pair_dataset(processor, config.training.batch_pairs * num_steps, True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step, rows in enumerate(data.train_pairs.reshape(num_steps, -1)):
        for name, engine in contenders.items():
            started = time.monotonic()
            batch_gradient(engine, *prepare(data, rows, config, device), config, (0, step)).losses.total.item()
            engines.optimizer_step(engine)
            synchronize()
            seconds[name].append(time.monotonic() - started)
            print(f"step {step} {name} {seconds[name][-1]:.2f} s", flush=True)
    median = {name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()}
    compile_seconds = sum(seconds["compiled"][:WARM_UP]) - WARM_UP * median["compiled"]
    uncompiled, compiled = median["plain"], median["compiled"]
    lines = [
        *heading(f"torch.compile ({options.part})"),
        f"- A step of {config.training.batch_pairs} pairs: {uncompiled:.2f} s, compiled {compiled:.2f} s, "
        f"{uncompiled / compiled:.2f} times as fast; {compile_seconds:.0f} s to compile in the first {WARM_UP} steps.",
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"compile_{options.part}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
