"""Vision features: the frozen encoder runs once per distinct picture, and its answers are kept.

`python -m notellm2_core.notes.features` runs it over the notes' pictures; what the store knows is reused. Pictures
are read and prepared by threads while the encoder works.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core import schema
from notellm2_core.cli_errors import one_line_errors
from notellm2_core.config import Config
from notellm2_core.config_file import load_config
from notellm2_core.notes import images
from notellm2_core.notes.feature_store import FeatureStore
from notellm2_core.runtime.files import naming, parquet_files

if TYPE_CHECKING:  # readers of the store need no torch
    from torch import Tensor

    from notellm2_core.model.vision import VisionEncoder

_PART_IMAGES = 512  # what a kill can cost


@dataclass(frozen=True)
class _Prepared:
    """One note after its picture was looked at. `pixels` only where the encoder still has to run."""

    note_id: str
    status: images.Status
    image_id: str | None = None
    perceptual_hash: str | None = None
    pixels: "Tensor | None" = None


def compute(
    encoder: "VisionEncoder", store: FeatureStore, notes: Path, source: Path, config: Config, part_images: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Bring the store up to date with the notes' pictures: (schema.NOTE_IMAGES table, counts).

    Parts end where batches end, so a run that continues a killed one forms the same batches and gets the same bits.
    """
    import torch
    from tqdm import tqdm

    max_pixels, batch_size = config.source.max_image_pixels, config.model.vision.batch_size
    images.allow_pixels(max_pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    before = store.known()
    hashes = {image_id: store.perceptual_hash(image_id) for image_id in before}  # and of what this run has taken on
    batch: dict[str, Tensor] = {}
    part: list[tuple[list[str], np.ndarray, np.ndarray]] = []
    rows: list[tuple[str, str | None, str | None, str]] = []

    def prepare(note: tuple[str, str | None, bytes | None]) -> _Prepared:
        note_id, image_path, data = note
        encoded = images.fetch(source, image_path, data, max_pixels)
        if encoded.status != "ok":
            return _Prepared(note_id, encoded.status)
        image_id = encoded.image_id
        if image_id in hashes:
            status = images.check_header(encoded.data, max_pixels)
            return _Prepared(note_id, status, image_id if status == "ok" else None)
        status, image = images.decode(encoded.data, max_pixels)
        if image is None:
            return _Prepared(note_id, status)
        return _Prepared(note_id, "ok", image_id, images.perceptual_hash(image), encoder.preprocess(image))

    def encode() -> None:
        with torch.inference_mode():
            patches, pooled = encoder(torch.stack(list(batch.values())).to(device))
        part.append((list(batch), patches.half().cpu().numpy(), pooled.half().cpu().numpy()))
        batch.clear()

    def flush() -> None:
        ids, patches, pooled = zip(*part, strict=True)
        image_ids = [i for some in ids for i in some]
        store.append(image_ids, np.concatenate(patches), np.concatenate(pooled), [hashes[i] for i in image_ids])
        part.clear()

    total = sum(pq.read_metadata(file).num_rows for file in _note_files(notes))
    with ThreadPoolExecutor(max_workers=min(8, max(1, (os.cpu_count() or 1) // 2))) as pool:
        done = _in_order(pool, prepare, _read_notes(notes), ahead=2 * batch_size)
        for found in tqdm(done, total=total, desc="vision features", unit="note", mininterval=1):
            if found.pixels is not None and found.image_id is not None and found.image_id not in hashes:
                hashes[found.image_id] = found.perceptual_hash
                batch[found.image_id] = found.pixels
                if len(batch) == batch_size:
                    encode()
                    if len(part) * batch_size >= part_images:
                        flush()
            picture_hash = None if found.image_id is None else hashes[found.image_id]
            rows.append((found.note_id, found.image_id, picture_hash, found.status))
    if batch:
        encode()
    if part:
        flush()

    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    statuses = Counter(columns[3])
    distinct = {image_id for image_id in columns[1] if image_id}
    counts: dict[str, Any] = {"notes": len(rows)} | {status: statuses[status] for status in images.STATUSES}
    counts |= {"distinct_images": len(distinct), "computed": len(distinct - before), "reused": len(distinct & before)}
    counts |= {"encoder_id": encoder.encoder_id, "num_patches": store.num_patches, "width": store.width}
    return pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=schema.NOTE_IMAGES), counts


def _in_order(pool: ThreadPoolExecutor, work: Any, items: Iterable[Any], ahead: int) -> Iterator[_Prepared]:
    """`map(work, items)` on the pool, at most `ahead` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _note_files(notes: Path) -> list[Path]:
    files = parquet_files(notes)
    if not files:
        raise ValueError(f"{notes} holds no notes (no *.parquet)")
    return files


def _read_notes(notes: Path) -> Iterator[tuple[str, str | None, bytes | None]]:
    """(note_id, image_path, image) of every note; a few at a time, for the pictures may be in the table."""
    columns = ["note_id", "image_path", "image"]
    for path in _note_files(notes):
        with naming(path), pq.ParquetFile(path) as file:
            if absent := [c for c in columns if c not in file.schema_arrow.names]:
                raise ValueError(f"no column {', '.join(absent)}")
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the frozen vision encoder once per distinct picture.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of Parquet in schema.NOTES")
    parser.add_argument("--source", type=Path, required=True, help="folder that image_path is relative to")
    parser.add_argument("--store", type=Path, required=True, help="parent of the stores, one per encoder")
    parser.add_argument("--out", type=Path, required=True, help="note_images.parquet, counts.json, vision/")
    parser.add_argument("--part-images", type=int, default=_PART_IMAGES, help="pictures per part: what a kill costs")
    args = parser.parse_args(argv)
    with one_line_errors():
        config = load_config(args.config)
        _note_files(args.notes)
        if not args.source.is_dir():
            raise ValueError(f"--source {args.source} is not a folder")
        from notellm2_core.model.vision import load_vision_encoder

        encoder = load_vision_encoder(config.model.vision)
        store = FeatureStore.create(args.store / encoder.encoder_id, encoder.num_patches, encoder.width)
        start = time.monotonic()
        table, counts = compute(encoder, store, args.notes, args.source, config, args.part_images)
        seconds = time.monotonic() - start
        args.out.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, args.out / "note_images.parquet")
        encoder.save_pretrained(args.out / "vision")
        (args.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
        print(json.dumps(counts), file=sys.stderr)
        print(f"{counts['computed'] / seconds:.1f} new images per second", file=sys.stderr)


if __name__ == "__main__":
    main()
