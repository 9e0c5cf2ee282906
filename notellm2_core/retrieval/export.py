"""Notes -> embeddings: sharded, resumable, with multimodal, image-only or text-only inputs.

    python -m notellm2_core.retrieval.export --config FILE --model DIR --notes DIR --images DIR --store DIR
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
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from notellm2_core import lake
from notellm2_core.cli_errors import one_line_errors
from notellm2_core.config import Config
from notellm2_core.config_file import load_config
from notellm2_core.embeddings import Made, read_note_ids, write_shards
from notellm2_core.inference.batch_embedder import VECTORS_VERSION, BatchEmbedder, FeatureSource
from notellm2_core.inference.pictures import EncodedWhenAsked
from notellm2_core.model.build import its_own_encoder, load_model
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.notes.batch import InputKind
from notellm2_core.notes.feature_store import FeatureStore, encoder_id, read_note_images
from notellm2_core.notes.lake_pictures import PICTURES_OPTION, LakePictures, PictureFolders
from notellm2_core.notes.token_table import read_tokens
from notellm2_core.processes import die_with_parent, is_of_torchrun
from notellm2_core.runtime.files import sha256_of


def deciding_files(model_dir: Path) -> dict[str, str]:
    """Name -> checksum of the files of a model that decide its vectors: weights, configuration, tokens; no records."""
    records = ("training.json", "card.json", lake.MANIFEST)
    files = (p for p in sorted(model_dir.iterdir()) if p.suffix in (".safetensors", ".json") and p.name not in records)
    return {p.name: sha256_of(p) for p in files}


def export(
    config: Config, model_dir: Path, notes_dir: Path, images_dir: Path, store_dir: Path, inputs: Sequence[InputKind],
    out: Path, note_ids: Sequence[str] | None = None, reuse: Sequence[Path] = (),
    pictures: PictureFolders | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Embed the notes (or those of `note_ids`) for each kind of input into OUT/<inputs>. Returns counts and speed.

    A note whose content OUT or one of the former exports `reuse` has by the same model is not embedded again.
    `pictures`: needed where the model's vision encoder is not that of the store.

    Raises ValueError where model, notes and images do not belong together.
    """
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    stored = encoder_id(images_dir)
    images = read_note_images(images_dir)
    model, processor = load_model(model_dir)
    encoder = its_own_encoder(model, model_dir, stored, pictures)
    vision_encoder = stored if encoder is None else encoder.encoder_id
    notes = read_tokens(notes_dir, processor.note_tokenizer, note_ids)
    if unknown := notes.keys() - images.keys():
        raise ValueError(
            f"{len(unknown)} notes are not in {images_dir}: run notellm2_core.notes.features on them first."
        )
    device, dtype = _device(config)
    nn.Module.to(model, device, dtype)
    fused = fuse_kernels(model.llm, device)
    features: FeatureSource
    if encoder is None:
        features = FeatureStore(store_dir / vision_encoder)
    else:
        assert pictures is not None
        of_notes = LakePictures(pictures, images, notes.keys(), config.source.max_image_pixels)
        features = EncodedWhenAsked(encoder.to(device), of_notes, config.model.vision.batch_size)
    embedder = BatchEmbedder(model, processor, notes, images, features, config.export.batch_notes, device)
    weights = deciding_files(model_dir)
    counts: dict[str, Any] = {
        "notes": len(notes),
        "notes_without_picture": sum(images[i] is None for i in notes),
        "pictures": "stored features" if encoder is None else "encoded anew",
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "reused": {},  # of the first rank's shards, notes whose vectors were there already
        "notes_per_second": {},
    }
    for kind in inputs:

        def contents(ids: Sequence[str], kind: InputKind = kind) -> list[str]:
            read = (([] if kind == "image" else notes[i], None if kind == "text" else images[i]) for i in ids)
            return [lake.fingerprint([*(field.tolist() for field in fields), image]) for fields, image in read]

        def embed(ids: Sequence[str], kind: InputKind = kind) -> np.ndarray:
            return embedder.embed(ids, kind, progress)

        with tqdm(total=-(-len(notes) // num_ranks), desc=f"embed {kind}", unit="notes", disable=rank != 0) as progress:
            began = time.monotonic()
            decides = [VECTORS_VERSION, weights, vision_encoder, kind, str(dtype), config.export.batch_notes]
            decides += ["fused"] if fused else []
            made = Made(lake.fingerprint(decides), contents)
            kept = write_shards(
                out / kind, list(notes), embed, made, config.export.shard_notes, rank, num_ranks, progress,
                [folder / kind for folder in reuse],
            )  # fmt: skip
            seconds = max(time.monotonic() - began, 1e-6)
            if rank == 0:
                counts["reused"][kind] = kept
                counts["notes_per_second"][kind] = round((progress.n - progress.initial) / seconds * num_ranks, 1)
    return counts


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
    if is_of_torchrun():
        die_with_parent("torch")  # a rank left behind would write into the shards of the next run
    parser = argparse.ArgumentParser(description="Embed notes with a trained model.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained (or start) model")
    parser.add_argument("--notes", type=Path, required=True, help="folder of the notes dataset, or of its tokens")
    parser.add_argument("--images", type=Path, required=True, help="output folder of notellm2_core.notes.features")
    parser.add_argument("--store", type=Path, required=True, help="parent of the feature stores")
    parser.add_argument("--note-ids", type=Path, help="Parquet with a note_id column, or pairs; default: all notes")
    parser.add_argument("--inputs", default="multimodal", help="list out of multimodal, image, text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reuse", type=Path, nargs="*", default=[], help="former exports: what is unchanged is taken")
    parser.add_argument("--pictures", **PICTURES_OPTION)
    args = parser.parse_args(argv)
    with one_line_errors():
        counts = export(
            load_config(args.config), args.model, args.notes, args.images, args.store, parse_inputs(args.inputs),
            args.out, read_note_ids(args.note_ids) if args.note_ids else None, args.reuse,
            args.pictures and PictureFolders(*args.pictures),
        )  # fmt: skip
        if os.environ.get("RANK", "0") == "0":
            json.dump(counts, sys.stdout)
            print()


if __name__ == "__main__":
    main()
