"""The paper's 7B model on one GPU: longest notes embedded per second, and the training step with its MFU and memory.

    python benchmarks/gpu.py [--config pipelines/configs/paper_mtomato_base.yaml] [--rounds 1] [--pairs 16 128]

Written for one H200 (139 GiB), where a round takes a few minutes; `--layers 2` and the like try it on less. Weights,
pictures' features and words are random, in the shapes of the configuration (`model.llm.config`); nothing is downloaded.
Each contender runs in a process of its own.

  export          `BatchEmbedder` in bf16, 50 of the longest notes at a time: 20 words of title, 20 of topics, 80 of
                  content, a token each. With the prompt and L_c = 16 that is 182 tokens; the paper's have at most 174
                  (Table 5: a visual token more costs a 174th of the time at L_c = 16)
  llm             the bare LLM's forward over as many tokens, without the vectors' way back to the CPU
  step-16         a training step of the paper's 16 pairs per GPU, notes of mixed lengths: ZeRO-3, bf16
  step-128        its whole batch on this one GPU

What a step of 6.8e9 weights should hold on one GPU, in GB: weights in bf16 14; master weights and Adam's two moments in
fp32 81; gradients in bf16 14; buffers 3; and 6 while Adam goes through a billion weights at a time. That is 118 of 149
(139 GiB) without activations, which are 6 MB per token: step-16 just fits without gradient checkpointing, step-128 does
not. With it (the paper's configuration) a token needs 0.3 MB, and 0.2 MB more for the layer at work, and both fit.
`--micro-batch-tokens` bounds activations too, for as much computed again.

MFU counts no recomputation (`notellm2_core.training.speed`). On a CPU nothing is written.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from export import Pictures
from training import NUM_IMAGES, RESULTS, WARM_UP, heading, medians, synchronize, timed, timed_steps, training_data

from notellm2_core.config import Config
from notellm2_core.config_file import load_config
from notellm2_core.inference.batch_embedder import BatchEmbedder
from notellm2_core.model.build import build_processor, mlrm_config
from notellm2_core.model.llm import llm_architecture, tiny_tokenizer
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.parts import set_trained
from notellm2_core.notes.batch import MLRMProcessor
from notellm2_core.notes.records import Note
from notellm2_core.training.engine import set_up_processes
from notellm2_core.training.speed import Speed

PAPER = Path(__file__).parents[1] / "pipelines" / "configs" / "paper_mtomato_base.yaml"
WORDS = ["note", "one", "this", "word", "into", "content"]  # of the prompts, so that each is one token
EXPORTED_BATCHES = 20
ON_GPU = torch.cuda.is_available()


def settings(options: argparse.Namespace, pairs: int = 2) -> Config:
    changed = {"training.batch_pairs": pairs, "training.num_ranks": 1}
    given = {
        "model.llm.num_layers": options.layers,
        "training.micro_batch_tokens": options.micro_batch_tokens,
        "training.gradient_checkpointing": options.gradient_checkpointing,
    }
    return load_config(options.config, changed | {key: value for key, value in given.items() if value is not None})


def random_model(config: Config) -> tuple[MLRMModel, MLRMProcessor]:
    """Straight in its last precision, where it will be used: bf16 on a GPU, fp32 on a CPU."""
    processor = build_processor(config, tiny_tokenizer())
    architecture = llm_architecture(config.model.llm)
    architecture.vocab_size = max(architecture.vocab_size, len(processor.tokenizer))
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.bfloat16 if ON_GPU else torch.float32)
    try:
        with torch.device("cuda" if ON_GPU else "cpu"):
            model = MLRMModel(mlrm_config(config, architecture, processor.num_patches, processor.vision_width))
    finally:
        torch.set_default_dtype(torch.float32)
    return model, processor


def export(options: argparse.Namespace) -> dict[str, float]:
    model, processor = random_model(settings(options))
    text, num_notes = processor.text, options.batch_notes * EXPORTED_BATCHES
    title, topics, content = (
        " ".join((WORDS * num)[:num]) for num in (text.title_words, text.topic_words, text.content_words)
    )
    (longest,) = processor.tokenize([Note("", title, (topics,), content)])
    tokens = {str(i): longest for i in range(num_notes)}
    images = {note_id: str(i % NUM_IMAGES) for i, note_id in enumerate(tokens)}
    ours = BatchEmbedder(
        model.eval(), processor, tokens, images, Pictures(processor), options.batch_notes,
        torch.device("cuda" if ON_GPU else "cpu"),
    )  # fmt: skip

    def run(_: int) -> int:
        ours.embed(list(tokens), "multimodal")
        return num_notes * processor.num_tokens(longest)

    return with_memory(timed(run, options.steps, num_notes))


def llm(options: argparse.Namespace) -> dict[str, float]:
    model, processor = random_model(settings(options))
    text = processor.text
    num_words = text.title_words + text.topic_words + text.content_words
    num_tokens = sum(num for *_, num in processor.layout()) + num_words
    bare = model.llm.eval()
    bare.set_attn_implementation("sdpa")
    ids = torch.randint(0, len(processor.tokenizer), (options.batch_notes, num_tokens))

    @torch.inference_mode()
    def run(_: int) -> int:
        for _ in range(EXPORTED_BATCHES):
            bare(input_ids=ids.to(bare.device), use_cache=False)
        synchronize()
        return ids.numel() * EXPORTED_BATCHES

    return with_memory(timed(run, options.steps, options.batch_notes * EXPORTED_BATCHES))


def step(options: argparse.Namespace, pairs: int) -> dict[str, float]:
    config = settings(options, pairs)
    device = set_up_processes()
    model, processor = random_model(config)
    data = training_data(processor, pairs * (options.steps + WARM_UP), True, WORDS)
    set_trained(model, config)
    speed = Speed(model, device, 1)
    found = timed_steps(model, data, config, options.steps, device)
    lengths = data.num_tokens(np.arange(2 * pairs * (options.steps + WARM_UP)))
    squares = np.square(lengths).sum() / lengths.sum() * found["tokens_per_s"]
    figures = speed.figures(found["tokens_per_s"], squares, 1.0)
    share = {"tflops": figures["tflops"], "mfu": figures.get("mfu", 0.0)}
    return with_memory(found) | share | {"seconds_per_1000_steps": 2000 * pairs / found["notes_per_s"]}


def with_memory(found: dict[str, float]) -> dict[str, float]:
    """On a GPU, its memory instead of the process's."""
    return found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if ON_GPU else found


def contenders(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    steps = {f"step-{pairs}": lambda pairs=pairs: step(options, pairs) for pairs in options.pairs}
    return {"export": lambda: export(options), "llm": lambda: llm(options), **steps}


def out_of_memory() -> dict[str, float]:
    """The figures of a contender that does not fit; the others' are not lost."""
    names = ("tokens_per_s", "notes_per_s", "tflops", "mfu", "seconds_per_1000_steps")
    return with_memory(dict.fromkeys(names, float("nan")))


def to_markdown(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    config = settings(options)
    training = config.training
    recomputed = "with" if training.gradient_checkpointing else "without"
    lines = [
        *heading("The paper's model on one GPU"),
        f"{config.name}, {llm_architecture(config.model.llm).num_hidden_layers} layers, random weights; ZeRO-"
        f"{training.zero_stage} {recomputed} gradient checkpointing, micro-batches of "
        f"{training.micro_batch_tokens or 'all'} tokens. nan: out of memory.",
        "",
        "| contender | tokens/s | notes/s | TFLOP/s | MFU | seconds per 1,000 steps | peak GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        trained = ["", "", ""]
        if name.startswith("step"):
            trained = [f"{row['tflops']:.0f}", f"{row['mfu']:.1%}", f"{row['seconds_per_1000_steps']:,.0f}"]
        cells = [f"{row['tokens_per_s']:,.0f}", f"{row['notes_per_s']:.1f}", *trained, f"{row['peak_gb']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    exported, bare = results["export"], results["llm"]
    best = max((row["mfu"] for row in results.values() if row.get("mfu", 0) > 0), default=0.0)  # nan is not
    lines += [
        "",
        f"- {exported['notes_per_s']:.1f} longest notes per second, {options.batch_notes} at a time (asked: 200 on an "
        f"H200; the paper's A100: 48.2); {exported['tokens_per_s'] / bare['tokens_per_s']:.0%} of the bare forward's "
        "token throughput.",
        f"- Training at {best:.1%} MFU at best (asked: 40 %).",
    ]
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=PAPER)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round, and exports of 20 batches")
    parser.add_argument("--layers", type=int, help="cut the LLM to its first layers")
    parser.add_argument("--batch-notes", type=int, default=50, help="exported at a time")
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 128], help="batches to train on")
    parser.add_argument("--micro-batch-tokens", type=int, help="as training.micro_batch_tokens")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.one:
        try:
            print(json.dumps(contenders(options)[options.one[0]]()))
        except torch.OutOfMemoryError:
            print(json.dumps(out_of_memory()))
        return
    results = medians(__file__, contenders(options), options.rounds, *sys.argv[1:])
    print(shown := to_markdown(results, options))
    if ON_GPU:
        (RESULTS / "gpu.json").write_text(json.dumps(results, indent=1))
        (RESULTS / "gpu.md").write_text(shown)
    else:
        print("No CUDA device: nothing was written into benchmarks/results.")


if __name__ == "__main__":
    main()
