"""Notes -> embeddings: sharded, resumable, with multimodal, image-only or text-only inputs.

    python -m notellm2_core.inference.export --config FILE --model DIR --notes DIR --images DIR --store DIR
        [--note-ids PARQUET] --inputs multimodal,image,text --out DIR [--reuse DIR ...] [--pictures NOTES SOURCE]

writes OUT/<inputs>/part-00000.parquet (schema.embeddings: unit vectors, fp32). Started by torchrun, each rank does
every WORLD_SIZE-th shard on its own device, on as many machines as share OUT.

A shard is written whole; a killed export goes on with the shards that it had not finished, and gives the same files
as one that was not killed, because batches never reach over a shard.

A model whose vision encoder was trained has one that the store knows nothing of: its pictures are encoded anew.

Precision: fp32 on a CPU; on a GPU the weights are bf16 unless training.precision is fp32 (what training's forward
computes in), with the normalisation in fp32 either way.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.embeddings.shards import EmbeddingKey, plan_shards, write_shards
from notellm2_core.embeddings.table import read_note_ids
from notellm2_core.inference.batch_embedder import VECTORS_VERSION, BatchEmbedder, FeatureSource
from notellm2_core.lake import lake
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.open_inputs import InputReader, OpenInputs, load_model_and_reader
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import InputKind
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import sha256_of
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.processes import die_with_parent, is_torchrun_rank
from notellm2_core.vision.feature_store import FeatureStore
from notellm2_core.vision.on_demand import OnDemandFeatures


def weight_files(model_dir: Path) -> dict[str, str]:
    """Name -> checksum of the files of a model that decide its vectors: weights, configuration, tokens; no records."""
    records = ("training.json", "card.json", lake.MANIFEST)
    files = (p for p in sorted(model_dir.iterdir()) if p.suffix in (".safetensors", ".json") and p.name not in records)
    return {p.name: sha256_of(p) for p in files}


def export(
    config: Config, model_dir: Path, inputs: NoteInputs, kinds: Sequence[InputKind], out: Path,
    note_ids: Sequence[str] | None = None, reuse: Sequence[Path] = (),
) -> dict[str, Any]:  # fmt: skip
    """Embed the notes (or those of `note_ids`) for each kind of input into OUT/<kind>. Returns counts and speed.

    Vectors are reused where OUT, or one of the earlier exports `reuse`, has them by the same model and of the same
    content.

    Raises ValueError where model, notes and images do not belong together.
    """
    model, reader = load_model_and_reader(model_dir, inputs, config.source.max_image_pixels)
    notes = reader.open(note_ids)
    if missing := notes.tokens.keys() - notes.image_ids.keys():
        raise ValueError(
            f"{len(missing)} notes are not in {inputs.images}: run notellm2_core.vision.extract on them first."
        )
    device, dtype = _device(config)
    nn.Module.to(model, device, dtype)
    fused = fuse_kernels(model.llm, device)
    features = _feature_source(notes, reader, config, device)
    embedder = BatchEmbedder(
        model, reader.processor, notes.tokens, notes.image_ids, features, config.export.batch_notes, device
    )
    weights = weight_files(model_dir)
    counts: dict[str, Any] = {
        "notes": len(notes.tokens),
        "notes_without_picture": sum(notes.image_ids[note_id] is None for note_id in notes.tokens),
        "pictures": "stored features" if reader.encoder is None else "encoded anew",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "reused": {},  # of this rank's shards, notes that were not embedded
        "notes_per_second": {},
    }
    for kind in kinds:
        version = [VECTORS_VERSION, weights, reader.encoder_id, kind, str(dtype), config.export.batch_notes]
        model_id = fingerprint([*version, "fused"] if fused else version)
        key = EmbeddingKey(model_id, partial(_content_ids, notes, kind))
        earlier = [folder / kind for folder in reuse]
        num_reused, speed = _export_kind(embedder, kind, key, out / kind, config.export.shard_notes, earlier)
        counts["reused"][kind], counts["notes_per_second"][kind] = num_reused, speed
    return counts


def _feature_source(notes: OpenInputs, reader: InputReader, config: Config, device: torch.device) -> FeatureSource:
    if isinstance(notes.images, FeatureStore):
        return notes.images
    assert reader.encoder is not None
    return OnDemandFeatures(reader.encoder.to(device), notes.images, config.model.vision.batch_size)


def _content_ids(notes: OpenInputs, kind: InputKind, note_ids: Sequence[str]) -> list[str]:
    """Of what this kind of input reads of each note: its tokens, its picture."""
    content_ids = []
    for note_id in note_ids:
        fields = [] if kind == "image" else [field.tolist() for field in notes.tokens[note_id]]
        content_ids.append(fingerprint([*fields, None if kind == "text" else notes.image_ids[note_id]]))
    return content_ids


def _export_kind(
    embedder: BatchEmbedder, kind: InputKind, key: EmbeddingKey, out: Path, shard_notes: int, reuse: Sequence[Path]
) -> tuple[int, float]:
    """Write this rank's shards. Returns how many of their notes were not embedded, and all ranks' notes per second."""
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    total = -(-len(embedder.notes) // num_ranks)
    with tqdm(total=total, desc=f"embed {kind}", unit="notes", disable=rank != 0) as progress:

        def embed(note_ids: Sequence[str]) -> np.ndarray:
            return embedder.embed(note_ids, kind, progress)

        began = time.monotonic()
        plan = plan_shards(out, list(embedder.notes), key, shard_notes)
        num_reused = write_shards(plan, embed, rank, num_ranks, progress, reuse)
        seconds = max(time.monotonic() - began, 1e-6)
    num_embedded = sum(len(shard.note_ids) for shard in plan.shards[rank::num_ranks]) - num_reused
    return num_reused, round(num_embedded / seconds * num_ranks, 1)


def parse_inputs(text: str) -> list[InputKind]:
    """ "multimodal,image" -> its kinds of input. Raises ValueError listing the choices."""
    kinds = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [k for k in kinds if k not in get_args(InputKind)]
    if wrong or not kinds:
        raise ValueError(f"--inputs {text!r} must be a list out of {', '.join(get_args(InputKind))}.")
    return kinds  # type: ignore[return-value]  # checked above


def _device(config: Config) -> tuple[torch.device, torch.dtype]:
    """Raises ValueError where this machine has fewer GPUs than ranks."""
    on_gpu = torch.float32 if config.training.precision == "fp32" else torch.bfloat16
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32
    rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if rank >= num_devices:
        raise ValueError(f"export.num_ranks is above the {num_devices} GPUs of this machine: lower it")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank), on_gpu


def main(argv: Sequence[str] | None = None) -> None:
    if is_torchrun_rank():
        die_with_parent("torch")  # a rank left behind would write into the shards of the next run
    parser = argparse.ArgumentParser(description="Embed notes with a trained model.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained (or start) model")
    NoteInputs.add_arguments(parser)
    parser.add_argument("--note-ids", type=Path, help="Parquet with a note_id column, or pairs; default: all notes")
    parser.add_argument("--inputs", default="multimodal", help="list out of multimodal, image, text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reuse", type=Path, nargs="*", default=[], help="former exports: what is unchanged is taken")
    args = parser.parse_args(argv)
    with user_errors():
        counts = export(
            load_config(args.config), args.model, NoteInputs.of(args), parse_inputs(args.inputs), args.out,
            read_note_ids(args.note_ids) if args.note_ids else None, args.reuse,
        )  # fmt: skip
        if os.environ.get("RANK", "0") == "0":
            json.dump(counts, sys.stdout)
            print()


if __name__ == "__main__":
    main()
