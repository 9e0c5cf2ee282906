"""Exports the embeddings of notes: sharded, resumable, of multimodal, image-only or text-only inputs.

    python -m notellm2_core.inference.export --config FILE --model DIR --notes DIR --images DIR --store DIR
        --inputs multimodal,image,text [--note-ids PARQUET] [--single-modality-note-ids PARQUET] --out DIR
        [--reuse DIR ...] [--image-folders NOTES SOURCE]

writes OUT/<inputs>/part-00000.parquet (schema.embeddings: unit vectors, fp32). Under torchrun, each rank writes every
WORLD_SIZE-th shard on its own device, on one machine or on several that share OUT.

A shard is written whole. A killed export resumes with the shards that it had not finished, and writes the same files
as an uninterrupted one, because no batch spans two shards.

If the model's vision encoder was trained, the store has no features of it, and the images are encoded during export.

Precision: fp32 on a CPU; on a GPU the weights are bf16, or fp32 if training.precision is fp32, as in training. The
normalisation is always in fp32.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.embeddings.shards import EmbeddingKey, ShardPlan, plan_shards, write_shards
from notellm2_core.embeddings.table import read_note_ids
from notellm2_core.inference.batch_embedder import VECTORS_VERSION, BatchEmbedder, FeatureSource
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.open_inputs import InputReader, OpenInputs, load_model_and_reader
from notellm2_core.model.weights import weight_files, weights_id
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import InputKind
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.processes import die_with_parent, is_torchrun_rank
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.vision.feature_store import FeatureStore
from notellm2_core.vision.on_demand import OnDemandFeatures


def export(
    config: Config,
    model_dir: Path,
    inputs: NoteInputs,
    note_ids: Mapping[InputKind, Collection[str] | None],
    out: Path,
    reuse: Sequence[Path] = (),
) -> dict[str, Any]:
    """Embed the notes `note_ids[kind]` (None: all) for each kind of input into OUT/<kind>.

    Vectors are reused if OUT, or one of the earlier exports `reuse`, has them from the same model and content. Returns
    counts and notes per second. Raises ValueError if a note is missing, or model, notes and images do not belong
    together.
    """
    model, reader = load_model_and_reader(model_dir, inputs, config.source.max_image_pixels)
    notes = _open_all(reader, note_ids.values())
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
        "notes_without_image": sum(notes.image_ids[note_id] is None for note_id in notes.tokens),
        "images": "stored features" if reader.encoder is None else "encoded anew",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "reused": {},  # of this rank's shards, the number of reused vectors
        "notes_per_second": {},
    }
    for kind, wanted in note_ids.items():
        version = [VECTORS_VERSION, weights, reader.encoder_id, kind, str(dtype), config.export.batch_notes]
        model_id = fingerprint([*version, "fused"] if fused else version)
        key = EmbeddingKey(model_id, partial(_content_ids, notes, kind), weights_id(weights, reader.encoder_id))
        plan = plan_shards(out / kind, list(notes.tokens if wanted is None else wanted), key, config.export.shard_notes)
        num_reused, notes_per_second = _export_kind(embedder, kind, plan, [folder / kind for folder in reuse])
        counts["reused"][kind], counts["notes_per_second"][kind] = num_reused, notes_per_second
    return counts


def _open_all(reader: InputReader, note_ids: Collection[Collection[str] | None]) -> OpenInputs:
    """The inputs of all these notes. Raises ValueError if one is missing."""
    wanted: set[str] = set().union(*(ids for ids in note_ids if ids is not None))
    if None not in note_ids:
        return reader.open(wanted)
    notes = reader.open()
    if missing := wanted - notes.tokens.keys():
        raise ValueError(f"{len(missing)} notes are not in {reader.inputs.notes}, among them {min(missing)!r}.")
    return notes


def _feature_source(notes: OpenInputs, reader: InputReader, config: Config, device: torch.device) -> FeatureSource:
    if isinstance(notes.images, FeatureStore):
        return notes.images
    assert reader.encoder is not None
    return OnDemandFeatures(reader.encoder.to(device), notes.images, config.model.vision.batch_size)


def _content_ids(notes: OpenInputs, kind: InputKind, note_ids: Sequence[str]) -> list[str]:
    """A fingerprint for each note of what this kind of input reads: its tokens, its image."""
    content_ids = []
    for note_id in note_ids:
        fields = [] if kind == "image" else [field.tolist() for field in notes.tokens[note_id]]
        content_ids.append(fingerprint([*fields, None if kind == "text" else notes.image_ids[note_id]]))
    return content_ids


def _export_kind(embedder: BatchEmbedder, kind: InputKind, plan: ShardPlan, reuse: Sequence[Path]) -> tuple[int, float]:
    """Write this rank's shards. Returns how many of their vectors were reused, and all ranks' notes per second."""
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    num_notes = sum(len(shard.note_ids) for shard in plan.shards)
    total = -(-num_notes // num_ranks)
    with ProgressBar(total=total, desc=f"embed {kind}", unit="notes", disable=rank != 0) as progress:

        def embed(note_ids: Sequence[str]) -> np.ndarray:
            return embedder.embed(note_ids, kind, progress)

        start = time.monotonic()
        num_reused = write_shards(plan, embed, rank, num_ranks, progress, reuse)
        seconds = max(time.monotonic() - start, 1e-6)
    num_embedded = sum(len(shard.note_ids) for shard in plan.shards[rank::num_ranks]) - num_reused
    return num_reused, round(num_embedded / seconds * num_ranks, 1)


def parse_inputs(text: str) -> list[InputKind]:
    """ "multimodal,image" -> the kinds of input. Raises ValueError, listing the choices, for anything else."""
    kinds = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    wrong = [k for k in kinds if k not in get_args(InputKind)]
    if wrong or not kinds:
        raise ValueError(f"--inputs {text!r} must be a comma-separated list of {', '.join(get_args(InputKind))}.")
    return kinds  # type: ignore[return-value]  # checked above


def _device(config: Config) -> tuple[torch.device, torch.dtype]:
    """This rank's device, and the precision of the weights. Raises ValueError if there are fewer GPUs than ranks."""
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
        die_with_parent("torch")  # an orphaned rank would write into the shards of the next run
    parser = argparse.ArgumentParser(description="Embed notes with a trained model.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained (or initial) model")
    NoteInputs.add_arguments(parser)
    parser.add_argument("--note-ids", type=Path, help="Parquet with a note_id column, or pairs; default: all notes")
    parser.add_argument(
        "--single-modality-note-ids", type=Path, help="the notes of the inputs image and text; default: as --note-ids"
    )
    parser.add_argument("--inputs", default="multimodal", help="comma-separated list of multimodal, image, text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--reuse", type=Path, nargs="*", default=[], help="earlier exports, whose vectors of unchanged notes are reused"
    )
    args = parser.parse_args(argv)
    with user_errors():
        note_ids = read_note_ids(args.note_ids) if args.note_ids else None
        of_one_modality = read_note_ids(args.single_modality_note_ids) if args.single_modality_note_ids else note_ids
        by_kind = {k: note_ids if k == "multimodal" else of_one_modality for k in parse_inputs(args.inputs)}
        counts = export(load_config(args.config), args.model, NoteInputs.of(args), by_kind, args.out, args.reuse)
        if os.environ.get("RANK", "0") == "0":
            json.dump(counts, sys.stdout)
            print()


if __name__ == "__main__":
    main()
