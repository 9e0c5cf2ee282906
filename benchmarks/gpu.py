"""The paper's 7B model on one GPU: longest notes embedded per second, and the training step with its MFU and memory.

    python benchmarks/gpu.py [--config pipelines/configs/paper_mtomato_base.yaml] [--rounds 1] [--pairs 16 128 256]

For one H200 (139 GiB), where a round takes about five minutes; `--layers 2` makes it fit smaller machines. Weights,
image features and words are random, in the shapes of the configuration (`model.llm.config`); nothing is downloaded.
Contenders that share a model share a process. All run in bf16.

  llm             the bare LLM's forward, unchanged from transformers, over rows as long as the longest notes
  llm-fused       the same with our fused kernels (`notellm2_core.model.kernels`)
  export          `BatchEmbedder`, 50 of the longest notes at a time: 20 words of title, 20 of topics, 80 of content, a
                  token each. With the prompt and L_c = 16 that is 182 tokens; the paper's have at most 174 (Table 5: a
                  visual token more costs a 174th of the time at L_c = 16)
  export-mixed    the same on notes of mixed lengths
  plain           the model without fused kernels on the same notes in the order of arrival, each padded to the longest
                  of its batch
  plain-fused     the same with fused kernels
  llm-training    the bare LLM's forward and backward with fused kernels, over the tokens of the largest step, in rows
                  without padding
  step-16         a training step of the paper's 16 pairs per GPU, notes of mixed lengths: ZeRO-3
  step-128        the paper's whole batch on this one GPU; likewise for each of `--pairs`
  text            a step of 128 pairs again, on texts alone, without a connector
  trainer         sentence-transformers' trainer and its MultipleNegativesRankingLoss with the same LLM on the same
                  texts (needs `pip install datasets`), which keeps no fp32 weights for the optimiser

What a step of 6.8e9 weights holds on one GPU, in GB: weights in bf16 14; master weights and Adam's two moments in fp32
81; gradients in bf16 14; buffers 3; with gradient checkpointing (the paper's configuration) half a megabyte per token,
so that 256 pairs peak at 134 of 149 GB (139 GiB). Without it a token takes 6 MB, and hardly more than 16 pairs fit.
`--micro-batch-tokens` bounds activations too, at the same cost in recomputation.

MFU counts no recomputation (`notellm2_core.training.engine.throughput`). On a CPU no result is written.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from export import InMemoryFeatures
from torch.nn import functional
from training import (
    NUM_IMAGES,
    RESULTS,
    WARM_UP,
    heading,
    medians,
    notes,
    pair_dataset,
    step_of,
    synchronize,
    texts,
    timed,
    trained_by_others,
)

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.inference.batch_embedder import BatchEmbedder
from notellm2_core.model.build import build_processor, mlrm_config
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.llm import llm_architecture, tiny_tokenizer
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.trainable import set_trained
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import FieldTokens, MLRMProcessor
from notellm2_core.training.engine.deepspeed import make_engine, set_up_processes
from notellm2_core.training.engine.throughput import Throughput

PAPER = Path(__file__).parents[1] / "pipelines" / "configs" / "paper_mtomato_base.yaml"
WORDS = ["note", "one", "this", "word", "into", "content"]  # words of the prompts; each is one token
EXPORTED_BATCHES = 8
TEXT_PAIRS, TEXT_METHOD = 128, "only_late_fusion"  # without images: only the LLM and the projector
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def settings(options: argparse.Namespace, **changes: object) -> Config:
    """The configuration of a contender; `changes`: dotted names with __ for dots."""
    overrides = {
        "training.num_ranks": 1,
        **{name.replace("__", "."): value for name, value in changes.items()},
        "model.llm.num_layers": options.layers,
        "training.micro_batch_tokens": options.micro_batch_tokens,
        "training.gradient_checkpointing": options.gradient_checkpointing,
    }
    return load_config(options.config, {key: value for key, value in overrides.items() if value is not None})


def random_model(config: Config) -> tuple[MLRMModel, MLRMProcessor]:
    """The model, created on its device and in its precision: bf16 on a GPU, fp32 on a CPU."""
    processor = build_processor(config, tiny_tokenizer())
    architecture = llm_architecture(config.model.llm)
    architecture.vocab_size = max(architecture.vocab_size, len(processor.tokenizer))
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.bfloat16 if ON_GPU else torch.float32)
    try:
        with torch.device(DEVICE):
            model = MLRMModel(mlrm_config(config, architecture, processor.num_patches, processor.vision_width))
    finally:
        torch.set_default_dtype(torch.float32)
    return model, processor


def inference(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    model, processor = random_model(settings(options))
    size, num_notes = options.batch_notes, options.batch_notes * EXPORTED_BATCHES
    text, image_features = processor.note_tokenizer.text, InMemoryFeatures(processor)
    title, topics, content = (
        " ".join((WORDS * num)[:num]) for num in (text.title_words, text.topic_words, text.content_words)
    )
    (longest,) = processor.note_tokenizer.tokenize([Note("", title, (topics,), content)])
    mixed = processor.note_tokenizer.tokenize(notes(num_notes, WORDS))
    rows = torch.randint(0, len(processor.tokenizer), (size, processor.num_tokens(longest)), device=DEVICE)

    @torch.inference_mode()
    def forward(_: int) -> int:
        for _ in range(EXPORTED_BATCHES):
            model.llm(input_ids=rows, use_cache=False)
        synchronize()
        return rows.numel() * EXPORTED_BATCHES

    @torch.inference_mode()
    def plain(_: int) -> int:
        for start in range(0, num_notes, size):
            encoded = [processor.lay_out(tokens) for tokens in mixed[start : start + size]]
            features = image_features.load([str(i % NUM_IMAGES) for i in range(len(encoded))])
            batch = processor.collate(encoded, features.patches, features.global_feature, np.ones(len(encoded), bool))
            functional.normalize(model(batch.to(DEVICE)).multimodal.float(), dim=-1).cpu()
        return sum(map(processor.num_tokens, mixed))

    def export(tokens: Sequence[FieldTokens]) -> Callable[[int], int]:
        by_id = {str(i): fields for i, fields in enumerate(tokens)}
        images = {note_id: str(i % NUM_IMAGES) for i, note_id in enumerate(by_id)}
        ours = BatchEmbedder(model, processor, by_id, images, image_features, size, torch.device(DEVICE))

        def run(_: int) -> int:
            ours.embed(list(by_id), "multimodal")
            return sum(map(processor.num_tokens, tokens))

        return run

    def clocked(run: Callable[[int], int]) -> dict[str, float]:
        return with_memory(lambda: timed(run, options.steps, num_notes))

    model.eval()
    packed = model.llm.config._attn_implementation
    results = {}
    model.llm.set_attn_implementation("sdpa")
    results["llm"], results["plain"] = clocked(forward), clocked(plain)
    if not fuse_kernels(model.llm, torch.device(DEVICE)) and ON_GPU:
        raise SystemExit("no fused kernels: install liger-kernel and gcc")
    results["llm-fused"], results["plain-fused"] = clocked(forward), clocked(plain)
    results["llm-training"] = llm_training(model, processor, options)
    model.llm.set_attn_implementation(packed)
    return results | {"export": clocked(export([longest] * num_notes)), "export-mixed": clocked(export(mixed))}


def llm_training(model: MLRMModel, processor: MLRMProcessor, options: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of the bare LLM, in rows without padding."""
    config, pairs = settings(options), max(options.pairs)
    set_trained(model, config)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    average = int(pair_dataset(processor, pairs, True, WORDS).num_tokens(np.arange(2 * pairs)).mean())

    def run(_: int) -> int:
        ids = torch.randint(0, len(processor.tokenizer), (2 * pairs, average), device=DEVICE)
        model.llm(input_ids=ids, use_cache=False).last_hidden_state.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        synchronize()
        return ids.numel()

    row = with_memory(lambda: timed(run, options.steps, 2 * pairs))
    model.eval()
    return row


def training(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    return steps_of(options, options.pairs, "step-{}")


def text(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    return steps_of(options, [TEXT_PAIRS], "text", model__method=TEXT_METHOD)


def steps_of(
    options: argparse.Namespace, num_pairs: Sequence[int], name: str, **changes: object
) -> dict[str, dict[str, float]]:
    """Steps of one engine on batches of each size, smallest first: a size that does not fit must spoil no other."""
    device = set_up_processes()
    config = settings(options, **changes)
    model, processor = random_model(config)
    set_trained(model, config)
    throughput = Throughput(model, device, 1)
    engine = make_engine(model.train(), config, "bf16")
    results: dict[str, dict[str, float]] = {}
    for pairs in sorted(num_pairs):
        sized = settings(options, training__batch_pairs=pairs, **changes)
        all_pairs = pairs * (options.steps + WARM_UP)
        data = pair_dataset(processor, all_pairs, config.model.method != TEXT_METHOD, WORDS)
        row = with_memory(partial(timed, step_of(engine, data, sized, device), options.steps, 2 * pairs))
        lengths = data.num_tokens(np.arange(2 * all_pairs))
        squares = np.square(lengths).sum() / lengths.sum() * row["tokens_per_s"]
        metrics = throughput.metrics(row["tokens_per_s"], squares, 1.0)
        share = {"tflops": metrics["tflops"], "mfu": metrics.get("mfu", 0.0)}
        results[name.format(pairs)] = row | share | {"seconds_per_1000_steps": 2000 * pairs / row["notes_per_s"]}
    return results


def trainer(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    config = settings(options, model__method=TEXT_METHOD)
    model, processor = random_model(config)
    set_trained(model, config)
    prompts = texts(processor, TEXT_PAIRS * (options.steps + WARM_UP), WORDS)
    checkpointing = config.training.gradient_checkpointing
    with tempfile.TemporaryDirectory() as folder:
        theirs = partial(trained_by_others, model.llm, processor, prompts, TEXT_PAIRS, Path(folder), checkpointing)
        try:
            return {"trainer": with_memory(theirs)}
        except ImportError as e:
            print(f"without sentence-transformers' trainer: {e}", file=sys.stderr)
            return {}


def with_memory(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The metrics of `measure`; on a GPU with the GPU's memory instead of the process's, and nan if it runs out."""
    if not ON_GPU:
        return measure()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        metrics = measure()
    except torch.OutOfMemoryError:
        metrics = dict.fromkeys(("tokens_per_s", "notes_per_s", "seconds_per_pair"), math.nan)
    metrics.pop("step_gb", None)  # of the process
    return metrics | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}


PROCESSES: dict[str, Callable[[argparse.Namespace], dict[str, dict[str, float]]]] = {
    "inference": inference, "training": training, "text": text, "trainer": trainer,
}  # fmt: skip


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
        training_cells = ["", "", ""]
        if "mfu" in row:
            training_cells = [f"{row['tflops']:.0f}", f"{row['mfu']:.1%}", f"{row['seconds_per_1000_steps']:,.0f}"]
        memory = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
        cells = [f"{row['tokens_per_s']:,.0f}", f"{row['notes_per_s']:.1f}", *training_cells, memory]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rate = {name: row["tokens_per_s"] for name, row in results.items()}
    largest = f"step-{max(options.pairs)}"
    steps = [row["mfu"] for name, row in results.items() if name.startswith("step-")]
    best = max((mfu for mfu in steps if mfu >= 0), default=math.nan)  # nan: out of memory
    lines += [
        "",
        f"- {results['export']['notes_per_s']:.1f} longest notes per second, {options.batch_notes} at a time (asked: "
        "200 on an H200; the paper's A100: 48.2).",
        f"- Export: {rate['export'] / rate['llm']:.0%} of the bare forward's token throughput (asked: 85 %), "
        f"{rate['export'] / rate['llm-fused']:.0%} of that with the same fused kernels; "
        f"{rate['export-mixed'] / rate['plain']:.2f} times a plain loop in the order of arrival (asked: 2), "
        f"{rate['export-mixed'] / rate['plain-fused']:.2f} times one with fused kernels.",
        f"- Training at {best:.1%} MFU at best (asked: 40 %).",
        f"- {largest} has {rate[largest] / rate['llm-training']:.0%} of the bare LLM's token throughput, forward and "
        "backward with the same fused kernels (asked: 80 %).",
    ]
    if "trainer" in results:
        times = results["text"]["notes_per_s"] / results["trainer"]["notes_per_s"]
        lines.append(
            f"- On texts alone, {times:.2f} times the notes per second of sentence-transformers' trainer (asked: 2)."
        )
    return "\n".join(lines) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=PAPER)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round, and exports of 8 batches")
    parser.add_argument("--layers", type=int, help="cut the LLM to its first layers")
    parser.add_argument("--batch-notes", type=int, default=50, help="exported at a time")
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 128, 256], help="batches to train on")
    parser.add_argument("--micro-batch-tokens", type=int, help="as training.micro_batch_tokens")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--one", nargs=2, metavar=("PROCESS", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.one:
        print(json.dumps(PROCESSES[options.one[0]](options)))
        return
    results = medians(__file__, PROCESSES, options.rounds, *sys.argv[1:])
    print(table := to_markdown(results, options))
    if ON_GPU:
        (RESULTS / "gpu.json").write_text(json.dumps(results, indent=1))
        (RESULTS / "gpu.md").write_text(table)
    else:
        print("No CUDA device: nothing was written into benchmarks/results.")


if __name__ == "__main__":
    main()
