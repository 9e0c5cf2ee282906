"""Embedding notes: token throughput against the bare LLM's forward, and against a plain loop.

    .venv/bin/python benchmarks/export.py [--rounds 3] [--notes 512]

The model and the notes are those of training.py, in fp32, as exports are on a CPU. Contenders take turns, each round
in its own process; medians are reported.

  export          `BatchEmbedder`, as notellm2_core.inference.export uses it
  llm             the bare LLM's forward over the same number of real tokens, in rows without padding, 16 at a time
                  (faster than 64 on a CPU)
  plain           our model in batches of 64 notes in the order of arrival, each padded to its longest note
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from training import NUM_IMAGES, RESULTS, heading, medians, notes, settings, timed

from notellm2_core.inference.batch_embedder import BatchEmbedder
from notellm2_core.model.build import build_model
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.vision.feature_store import Features

BATCH, ROWS = 64, 16


class InMemoryFeatures:
    """The features of a few images, in memory."""

    def __init__(self, processor: MLRMProcessor) -> None:
        rng = np.random.default_rng(1)
        patches, width = processor.num_patches, processor.vision_width
        self.patches = rng.normal(size=(NUM_IMAGES, patches, width)).astype(np.float16)
        self.pooled = rng.normal(size=(NUM_IMAGES, width)).astype(np.float16)

    def load(self, image_ids: Sequence[str]) -> Features:
        rows = [int(i) for i in image_ids]
        return Features(tuple(image_ids), self.patches[rows], self.pooled[rows])


def embedder(cache: Path, num_notes: int) -> BatchEmbedder:
    torch.set_num_threads(os.cpu_count() or 1)
    model, processor = build_model(settings(BATCH, cache), cache)
    all_notes = notes(num_notes)
    tokens = dict(zip((note.note_id for note in all_notes), processor.note_tokenizer.tokenize(all_notes), strict=True))
    images = {n: str(i % NUM_IMAGES) for i, n in enumerate(tokens)}
    return BatchEmbedder(model, processor, tokens, images, InMemoryFeatures(processor), BATCH, torch.device("cpu"))


def num_tokens(ours: BatchEmbedder) -> int:
    return sum(ours.processor.num_tokens(tokens) for tokens in ours.notes.values())


def export(cache: Path, num_notes: int) -> dict[str, float]:
    ours = embedder(cache, num_notes)
    total = num_tokens(ours)

    def run(_: int) -> int:
        ours.embed(list(ours.notes), "multimodal")
        return total

    return timed(run, 2, num_notes)


def llm(cache: Path, num_notes: int) -> dict[str, float]:
    ours = embedder(cache, num_notes)
    rows = num_tokens(ours) // num_notes
    bare = ours.model.llm
    bare.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def run(_: int) -> int:
        for _ in range(0, num_notes, ROWS):
            bare(input_ids=torch.randint(0, 40_000, (ROWS, rows)), use_cache=False)
        return rows * num_notes

    return timed(run, 2, num_notes)


def plain(cache: Path, num_notes: int) -> dict[str, float]:
    ours = embedder(cache, num_notes)
    ours.model.llm.set_attn_implementation("sdpa")  # padded
    ids, total = list(ours.notes), num_tokens(ours)

    @torch.inference_mode()
    def run(_: int) -> int:
        for start in range(0, num_notes, BATCH):
            note_ids = ids[start : start + BATCH]
            features = ours.features.load([str(ours.images[i]) for i in note_ids])
            encoded = [ours.processor.lay_out(ours.notes[i]) for i in note_ids]
            has_image = np.ones(len(encoded), bool)
            batch = ours.processor.collate(encoded, features.patches, features.global_feature, has_image)
            functional.normalize(ours.model(batch).multimodal, dim=-1)
        return total

    return timed(run, 2, num_notes)


CONTENDERS: dict[str, Callable[[Path, int], dict[str, float]]] = {"export": export, "llm": llm, "plain": plain}


def to_markdown(results: dict[str, dict[str, float]]) -> str:
    lines = [
        *heading("Embedding notes"),
        "| contender | tokens/s | notes/s | peak GB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        lines.append(f"| {name} | {row['tokens_per_s']:,.0f} | {row['notes_per_s']:.1f} | {row['peak_gb']:.2f} |")
    rate = {name: row["tokens_per_s"] for name, row in results.items()}
    lines += [
        "",
        f"- {rate['export'] / rate['llm']:.0%} of the bare forward's token throughput (asked: 85 %).",
        f"- {rate['export'] / rate['plain']:.2f} times a plain loop in the order of arrival (asked: 2).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--notes", type=int, default=512)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, cache = options.one
        print(json.dumps({name: CONTENDERS[name](Path(cache), options.notes)}))
        return
    results = medians(__file__, CONTENDERS, options.rounds, "--notes", str(options.notes))
    (RESULTS / "export.json").write_text(json.dumps(results, indent=1))
    (RESULTS / "export.md").write_text(table := to_markdown(results))
    print(table)


if __name__ == "__main__":
    main()
