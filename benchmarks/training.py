"""The training step against its parts, and against other trainers.

    .venv/bin/python benchmarks/training.py [--rounds 3] [--steps 4]

The model is the small profile (SmolLM2's first 4 layers, a Q-Former, L_c = 4, word embeddings frozen), on generated
notes of widely different lengths. The two contenders of a comparison take turns in one process, step by step, so that
changes in the machine's speed affect both. Each round has its own processes; medians are reported.

  step            one training step as `notellm2_core.training` runs it: 32 pairs, images, Eq. 9, DeepSpeed's AdamW
  llm             the bare LLM's forward and backward over the same number of real tokens, in rows without padding
  text            the step again, on texts alone, without a connector
  trainer         sentence-transformers' trainer and its MultipleNegativesRankingLoss with the same LLM on the same
                  texts (needs `pip install datasets`); without it a plain loop that pads each batch to its longest
  direct          a step of 16 pairs, with all activations in memory
  gradcache       a step of 256 pairs in micro-batches of half the tokens, since memory also holds the gradients

Tokens exclude padding. Memory is measured for the last two, each in its own process (`-alone`): the largest resident
size, and its growth since the model was loaded.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
from transformers import AutoConfig, AutoModel, PreTrainedModel

from notellm2_core.config.settings import Config
from notellm2_core.demo.words import THEMES
from notellm2_core.model.build import build_model
from notellm2_core.model.trainable import set_trained
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.training.data.dataset import PairDataset
from notellm2_core.training.data.micro_batches import Share
from notellm2_core.training.engine import deepspeed as engines
from notellm2_core.training.objective.losses import BatchLabels
from notellm2_core.training.step import batch_gradient, prepare
from notellm2_core.vision.feature_table import FeatureTable

RESULTS = Path(__file__).parent / "results"
PAIRS, SMALL, LARGE = 32, 16, 256
WARM_UP = 2
NUM_IMAGES = 64


def settings(batch_pairs: int, cache: Path, micro_batch_tokens: int | None = None, method: str = "notellm2") -> Config:
    return Config.model_validate(
        {
            "name": "benchmark",
            "lake": cache,
            "model": {
                "method": method,
                "llm": {"name": "package:smollm2", "num_layers": 4},
                "vision": {
                    "library": "timm", "name": "tf_efficientnet_lite0", "pretrained": "package:efficientnet-lite0",
                },
                "connector": {
                    "num_queries": 4, "num_layers": 2, "hidden_size": 256, "num_heads": 4, "intermediate_size": 512,
                },
            },
            "training": {
                "batch_pairs": batch_pairs, "zero_stage": 2, "precision": "bf16", "learning_rate": 2e-4,
                "trainable": ["llm", "connector", "fusion", "projector", "temperature"],
                "micro_batch_tokens": micro_batch_tokens,
            },
        }
    )  # fmt: skip


def notes(num: int, words: Sequence[str] | None = None) -> list[Note]:
    """Contents of 5 to 80 words, most of them short and a few long, as on a real platform."""
    rng = np.random.default_rng(0)
    words = words or [word for phrases in THEMES.values() for phrase in phrases for word in phrase.split()]

    def text(num_words: float) -> str:
        return " ".join(rng.choice(words, max(1, int(num_words))))

    lengths = np.clip(rng.lognormal(3.0, 0.9, num), 5, 80)
    return [Note(f"n{i:06d}", text(float(rng.integers(3, 12))), (text(2),), text(n)) for i, n in enumerate(lengths)]


def pair_dataset(
    processor: MLRMProcessor, num_pairs: int, with_images: bool, words: Sequence[str] | None = None
) -> PairDataset:
    all_notes = {note.note_id: note for note in notes(2 * num_pairs, words)}
    ids = list(all_notes)
    shape = (NUM_IMAGES, processor.num_patches + 1, processor.vision_width)
    features = np.random.default_rng(1).normal(size=shape).astype(np.float16)
    table = FeatureTable(features, {f"i{i}": i for i in range(NUM_IMAGES)})
    images = {n: f"i{i % NUM_IMAGES}" if with_images else None for i, n in enumerate(ids)}
    tokens = dict(zip(ids, processor.note_tokenizer.tokenize(list(all_notes.values())), strict=True))
    return PairDataset(processor, tokens, images, table, list(zip(ids[::2], ids[1::2], strict=True)))


Step = Callable[[int], int]  # runs the step of this number, and returns its number of tokens


def our_step(config: Config, cache: Path, num_steps: int, with_images: bool = True) -> Step:
    device = engines.set_up_processes()
    model, processor = build_model(config, cache)
    data = pair_dataset(processor, config.training.batch_pairs * num_steps, with_images)
    set_trained(model, config)
    return step_of(engines.make_engine(model.train(), config, "bf16"), data, config, device)


def step_of(engine: Any, data: PairDataset, config: Config, device: torch.device) -> Step:
    """A step on the next batch of `data`, prefetched as in the training loop."""

    def batch_of(rows: np.ndarray) -> tuple[Share, BatchLabels]:
        return prepare(data, rows, config, device)

    batches = iter(Prefetcher(map(batch_of, data.train_pairs.reshape(-1, 2 * config.training.batch_pairs))))

    def run(number: int) -> int:
        share, labels = next(batches)
        batch_gradient(engine, share, labels, config, (0, number)).losses.total.item()
        engines.optimizer_step(engine)
        synchronize()
        return share.num_tokens

    return run


def synchronize() -> None:
    """Wait until the GPU has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def llm_step(cache: Path, num_steps: int) -> Step:
    config = settings(PAIRS, cache)
    model, processor = build_model(config, cache)
    set_trained(model, config)
    data = pair_dataset(processor, PAIRS * num_steps, True)
    bare = model.llm.train()
    bare.set_attn_implementation("sdpa")

    def run(number: int) -> int:
        total = int(data.num_tokens(np.arange(2 * PAIRS) + 2 * PAIRS * number).sum())
        ids = torch.randint(0, 40_000, (2 * PAIRS, total // (2 * PAIRS)))
        with torch.autocast("cpu", torch.bfloat16):
            states = bare(input_ids=ids, use_cache=False).last_hidden_state
        states.float().square().mean().backward()
        bare.zero_grad(set_to_none=True)
        return ids.numel()

    return run


def gradcache_step(cache: Path, num_steps: int) -> Step:
    _, processor = build_model(settings(SMALL, cache), cache)
    tokens = pair_dataset(processor, LARGE, True).num_tokens(np.arange(2 * LARGE)).sum() / LARGE * SMALL
    return our_step(settings(LARGE, cache, int(tokens / 2)), cache, num_steps)


def step(cache: Path, steps: int) -> dict[str, dict[str, float]]:
    num = WARM_UP + steps
    ours, bare = our_step(settings(PAIRS, cache), cache, num), llm_step(cache, num)
    return in_turns({"step": (ours, 2 * PAIRS, 1), "llm": (bare, 2 * PAIRS, 1)}, steps)


def gradcache(cache: Path, steps: int) -> dict[str, dict[str, float]]:
    often = LARGE // SMALL // 2
    small = our_step(settings(SMALL, cache), cache, often * (WARM_UP + steps))
    large = gradcache_step(cache, WARM_UP + steps)
    return in_turns({"direct": (small, 2 * SMALL, often), "gradcache": (large, 2 * LARGE, 1)}, steps)


def direct_alone(cache: Path, steps: int) -> dict[str, dict[str, float]]:
    ours = our_step(settings(SMALL, cache), cache, WARM_UP + 8)
    return {"direct-alone": timed(ours, 8, 2 * SMALL)}


def gradcache_alone(cache: Path, steps: int) -> dict[str, dict[str, float]]:
    return {"gradcache-alone": timed(gradcache_step(cache, WARM_UP + 1), 1, 2 * LARGE)}


def in_turns(contenders: dict[str, tuple[Step, int, int]], steps: int) -> dict[str, dict[str, float]]:
    """The metrics of each contender: (its step, notes of a step, steps of a turn)."""
    timings: dict[str, tuple[list[float], list[int]]] = {name: ([], []) for name in contenders}
    for turn in range(WARM_UP + steps):
        for name, (run, _, often) in contenders.items():
            for number in range(turn * often, (turn + 1) * often):
                started = time.monotonic()
                tokens = run(number)
                if turn >= WARM_UP:
                    timings[name][0].append(time.monotonic() - started)
                    timings[name][1].append(tokens)
    return {name: metrics(*timing, contenders[name][1]) for name, timing in timings.items()}


def texts(processor: MLRMProcessor, num_pairs: int, words: Sequence[str] | None = None) -> list[str]:
    """The notes as the prompts of our model, for other tokenizers."""
    data = pair_dataset(processor, num_pairs, False, words)
    ids = [data.note_batch(np.array([i])).input_ids[0] for i in range(2 * num_pairs)]
    return [str(processor.tokenizer.decode(i)) for i in ids]


def text(cache: Path, steps: int) -> dict[str, dict[str, float]]:
    config = settings(PAIRS, cache, method="only_late_fusion")
    num = WARM_UP + steps
    ours = our_step(config, cache, num, with_images=False)
    model, processor = build_model(config, cache)
    prompts = texts(processor, PAIRS * num)
    set_trained(model, config)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # set by our engine; with them, theirs would run DDP on one rank
        del os.environ[name]
    tokens: list[int] = []
    seconds: list[float] = []

    def between() -> None:
        started = time.monotonic()
        tokens.append(ours(len(tokens)))
        seconds.append(time.monotonic() - started)

    with tempfile.TemporaryDirectory(dir=cache) as folder:
        try:
            theirs = trained_by_others(model.llm, processor, prompts, PAIRS, Path(folder), between=between)
        except ImportError:
            plain = plain_step(model.llm, processor, prompts)
            rows = in_turns({"text": (ours, 2 * PAIRS, 1), "plain loop": (plain, 2 * PAIRS, 1)}, steps)
            return {"text": rows["text"], "trainer": rows["plain loop"]}
    return {"text": metrics(seconds[WARM_UP:], tokens[WARM_UP:], 2 * PAIRS), "trainer": theirs}


def trained_by_others(
    llm: PreTrainedModel, processor: MLRMProcessor, prompts: list[str], pairs: int, folder: Path,
    gradient_checkpointing: bool = False, between: Callable[[], None] = lambda: None,
) -> dict[str, float]:  # fmt: skip
    """sentence-transformers' trainer on pairs of `prompts`; after each of its steps it calls `between`.

    Raises ImportError where it cannot run.
    """
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import TrainerCallback

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    AutoModel.from_config(AutoConfig.for_model(llm.config.model_type, **sizes, **heads)).save_pretrained(folder)
    tokenizer = processor.tokenizer
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))  # from a folder of small weights, which `llm` replaces
    llm.set_attn_implementation("sdpa")
    if gradient_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    transformer.model = llm
    width = transformer.get_embedding_dimension()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = SentenceTransformer(
        modules=[transformer, Pooling(width, pooling_mode="lasttoken"), Dense(width, 64)], device=device
    )
    began = [time.monotonic()]  # each step, its batch included
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **options: Any) -> None:
            synchronize()
            seconds.append(time.monotonic() - began[-1])
            between()
            began.append(time.monotonic())

    steps = len(prompts) // (2 * pairs)
    arguments = Arguments(
        str(folder / "out"), per_device_train_batch_size=pairs, max_steps=steps, learning_rate=2e-4, bf16=True,
        use_cpu=device == "cpu", report_to="none", save_strategy="no",
        disable_tqdm=True, logging_strategy="no", dataloader_num_workers=0,
    )  # fmt: skip
    pair_columns = datasets.Dataset.from_dict({"anchor": prompts[::2], "positive": prompts[1::2]})
    SentenceTransformerTrainer(
        student, arguments, train_dataset=pair_columns, loss=MultipleNegativesRankingLoss(student), callbacks=[Clock()]
    ).train()
    tokens = sum(len(ids) for ids in tokenizer(prompts)["input_ids"]) / steps
    return metrics(seconds[WARM_UP:], [tokens] * (steps - WARM_UP), 2 * pairs)


def plain_step(llm: PreTrainedModel, processor: MLRMProcessor, prompts: list[str]) -> Step:
    """A loop in place of sentence-transformers' trainer: queries and targets, each padded to its longest."""
    tokenizer = processor.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    llm.set_attn_implementation("sdpa")
    projector = torch.nn.Linear(llm.config.hidden_size, 64)
    weights = [p for p in (*llm.parameters(), *projector.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)

    def embed(batch_prompts: list[str]) -> tuple[Tensor, int]:
        batch = tokenizer(batch_prompts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            states = llm(**batch, use_cache=False).last_hidden_state
            last = batch["attention_mask"].sum(1) - 1
            rows = projector(states[torch.arange(len(last)), last]).float()
        return torch.nn.functional.normalize(rows, dim=1), int(batch["attention_mask"].sum())

    def run(number: int) -> int:
        batch = prompts[2 * PAIRS * number : 2 * PAIRS * (number + 1)]
        (queries, query_tokens), (targets, target_tokens) = embed(batch[::2]), embed(batch[1::2])
        torch.nn.functional.cross_entropy(20 * queries @ targets.T, torch.arange(PAIRS)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return query_tokens + target_tokens

    return run


PROCESSES: dict[str, Callable[[Path, int], dict[str, dict[str, float]]]] = {
    "step": step, "text": text, "gradcache": gradcache, "direct-alone": direct_alone,
    "gradcache-alone": gradcache_alone,
}  # fmt: skip


class Memory:
    """The largest resident size from now on, sampled often."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.before = self.largest = self._process.memory_info().rss
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.largest = max(self.largest, self._process.memory_info().rss)
            time.sleep(0.02)


def timed(run: Step, steps: int, num_notes: int) -> dict[str, float]:
    """The metrics of `steps` steps of `num_notes` notes, with their memory."""
    memory, seconds, tokens = Memory(), [], []
    for number in range(WARM_UP + steps):
        started = time.monotonic()
        num_tokens = run(number)
        if number >= WARM_UP:
            seconds.append(time.monotonic() - started)
            tokens.append(num_tokens)
    memory_gb = {"peak_gb": memory.largest / 1e9, "step_gb": (memory.largest - memory.before) / 1e9}
    return metrics(seconds, tokens, num_notes) | memory_gb


def metrics(seconds: Sequence[float], tokens: Sequence[float], num_notes: int) -> dict[str, float]:
    """The metrics of steps of `num_notes` notes that took `seconds` and had `tokens`, one of each per step."""
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "notes_per_s": num_notes * len(seconds) / sum(seconds),
        "seconds_per_pair": 2 * sum(seconds) / len(seconds) / num_notes,
    }


def medians(script: str, processes: Iterable[str], num_rounds: int, *options: str) -> dict[str, dict[str, float]]:
    """Each contender's metrics over the rounds. `script --one PROCESS CACHE` prints those of one process."""
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(num_rounds):
            for process in processes:
                command = [sys.executable, "-W", "ignore", script, "--one", process, cache, *options]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{process} failed:\n{done.stderr[-3000:]}")
                for name, row in json.loads(done.stdout.splitlines()[-1]).items():
                    rounds.setdefault(name, []).append(row)
                    print(name, json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()
    }


def heading(title: str) -> list[str]:
    total = psutil.virtual_memory().total >> 30
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {total} GB, torch {torch.__version__}"
    if torch.cuda.is_available():
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return [f"# {title}", "", f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`. Medians.", ""]


def to_markdown(results: dict[str, dict[str, float]], trainer_name: str) -> str:
    r = results
    slower = r["gradcache"]["seconds_per_pair"] / r["direct"]["seconds_per_pair"]
    lines = [
        *heading("The training step"),
        f"`trainer` is {trainer_name}.",
        "",
        "| contender | tokens/s | notes/s | seconds per pair | peak GB | of the step GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in r.items():
        memory = [f"{row[key]:.2f}" if key in row else "" for key in ("peak_gb", "step_gb")]
        lines.append(
            f"| {name} | {row['tokens_per_s']:,.0f} | {row['notes_per_s']:.1f} | {row['seconds_per_pair']:.4f} "
            f"| {' | '.join(memory)} |"
        )
    lines += [
        "",
        f"- The step has {r['step']['tokens_per_s'] / r['llm']['tokens_per_s']:.0%} of the bare LLM's token throughput "
        "(asked: 80 %).",
        f"- On texts alone, {r['text']['notes_per_s'] / r['trainer']['notes_per_s']:.2f} times the notes per second of "
        f"{trainer_name} (asked: 2).",
        f"- GradCache: {LARGE // SMALL} times the batch, {slower:.2f} times the time per pair (asked: at most 1.5), "
        f"{r['gradcache-alone']['step_gb']:.2f} GB for the step where the small batch takes "
        f"{r['direct-alone']['step_gb']:.2f} GB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a round")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, cache = options.one
        print(json.dumps(PROCESSES[name](Path(cache), options.steps)))
        return
    results = medians(__file__, PROCESSES, options.rounds, "--steps", str(options.steps))
    try:
        import datasets  # noqa: F401

        trainer_name = "sentence-transformers' trainer"
    except ImportError:
        trainer_name = "a plain loop with padding to the longest"
    (RESULTS / "training.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "training.md").write_text(table := to_markdown(results, trainer_name))
    print(table)


if __name__ == "__main__":
    main()
