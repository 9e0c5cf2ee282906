"""Extracts vision features: the frozen encoder runs once per distinct image, and its output is stored.

    python -m notellm2_core.vision.extract --config YAML --notes DIR --source DIR --store DIR --out DIR

Features that the store has are reused. Threads read and prepare images while the encoder runs.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core import schema
from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import parquet_files, read_errors
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.schema import COUNTS_FILE, NOTE_IMAGES_FILE, VISION_FOLDER
from notellm2_core.vision import images
from notellm2_core.vision.feature_store import Features, FeatureStore
from notellm2_core.vision.image_status import STATUSES, UNUSABLE, Status

if TYPE_CHECKING:  # readers of the store need no torch
    from torch import Tensor

    from notellm2_core.vision.encoder import VisionEncoder

_PART_IMAGES = 512  # images per part of the store: a kill loses less than one part

NoteRow = tuple[str, str | None, bytes | None]  # note_id, image_path, image


@dataclass(frozen=True)
class PreparedNote:
    """A note whose image was read and checked."""

    note_id: str
    status: Status
    image_id: str | None = None  # None unless the image can be used
    perceptual_hash: str | None = None
    pixels: "Tensor | None" = None  # [3, S, S]; None where the store has the features


class FeatureExtractor:
    """Brings a store up to date with the images of notes: each distinct image is encoded once.

    `prepare` runs in threads, `encode` takes the prepared notes in their order, and `flush` comes last. Parts of the
    store end where batches end, so a run that resumes a killed one forms the same batches and computes the same bits.
    """

    def __init__(
        self, encoder: "VisionEncoder", store: FeatureStore, source: Path, config: Config, part_images: int
    ) -> None:
        """`source`: the folder of the images. `part_images`: the least number of images of a part of the store."""
        import torch

        self._encoder, self._store, self._source, self._part_images = encoder, store, source, part_images
        self._max_pixels, self._batch_size = config.source.max_image_pixels, config.model.vision.batch_size
        images.allow_pixels(self._max_pixels)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder.to(self._device)
        self.reusable = store.image_ids()
        self._hashes = {image_id: store.perceptual_hash(image_id) for image_id in self.reusable}
        self._batch: dict[str, Tensor] = {}  # image_id -> pixels, to be encoded
        self._part: list[Features] = []  # to be stored

    def prepare(self, note: NoteRow) -> PreparedNote:
        """Read and check the image of a note, and decode it unless its features are stored."""
        note_id, image_path, data = note
        encoded = images.fetch(self._source, image_path, data, self._max_pixels)
        if encoded.status != "ok":
            return PreparedNote(note_id, encoded.status)
        image_id = encoded.image_id
        if image_id in self._hashes:
            status = images.check(encoded.data, self._max_pixels)
            return PreparedNote(note_id, status, None if status in UNUSABLE else image_id)
        status, image = images.decode(encoded.data, self._max_pixels)
        if image is None:
            return PreparedNote(note_id, status)
        image_hash = None if status == "truncated" else images.perceptual_hash(image)  # else of the grey, too
        return PreparedNote(note_id, status, image_id, image_hash, self._encoder.preprocess(image))

    def encode(self, note: PreparedNote) -> None:
        """Add the note's image to the batch if it is new. A full batch is encoded, and a full part stored."""
        if note.pixels is None or note.image_id is None or note.image_id in self._hashes:
            return
        self._hashes[note.image_id] = note.perceptual_hash
        self._batch[note.image_id] = note.pixels
        if len(self._batch) == self._batch_size:
            self._encode_batch()
            if sum(len(features.image_ids) for features in self._part) >= self._part_images:
                self._store_part()

    def flush(self) -> None:
        """Encode and store the remaining images."""
        if self._batch:
            self._encode_batch()
        if self._part:
            self._store_part()

    def perceptual_hash(self, image_id: str) -> str | None:
        """The perceptual hash of an image of the store or of this run."""
        return self._hashes[image_id]

    def _encode_batch(self) -> None:
        import torch

        with torch.inference_mode():
            outputs = self._encoder(torch.stack(list(self._batch.values())).to(self._device))
        patches, pooled = (output.half().cpu().numpy() for output in outputs)
        self._part.append(Features(tuple(self._batch), patches, pooled))
        self._batch.clear()

    def _store_part(self) -> None:
        image_ids = [image_id for features in self._part for image_id in features.image_ids]
        self._store.append(
            image_ids,
            np.concatenate([features.patches for features in self._part]),
            np.concatenate([features.global_feature for features in self._part]),
            [self._hashes[image_id] for image_id in image_ids],
        )
        self._part.clear()


def compute(
    encoder: "VisionEncoder", store: FeatureStore, notes: Path, source: Path, config: Config, part_images: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Bring the store up to date with the images of the notes. Returns the table (schema.NOTE_IMAGES) and counts."""
    extractor = FeatureExtractor(encoder, store, source, config, part_images)
    total = sum(pq.read_metadata(file).num_rows for file in _note_files(notes))
    rows: list[tuple[str, str | None, str | None, str]] = []
    with ThreadPoolExecutor(max_workers=min(8, max(1, (os.cpu_count() or 1) // 2))) as pool:
        max_waiting = 2 * config.model.vision.batch_size
        prepared = _in_order(pool, extractor.prepare, _read_notes(notes), max_waiting)
        for note in ProgressBar(prepared, total=total, desc="vision features", unit="note"):
            extractor.encode(note)
            image_hash = None if note.image_id is None else extractor.perceptual_hash(note.image_id)
            rows.append((note.note_id, note.image_id, image_hash, note.status))
    extractor.flush()

    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
    statuses = Counter(columns[3])
    distinct = {image_id for image_id in columns[1] if image_id}
    counts: dict[str, Any] = {
        "notes": len(rows),
        **{status: statuses[status] for status in STATUSES},
        "distinct_images": len(distinct),
        "computed": len(distinct - extractor.reusable),
        "reused": len(distinct & extractor.reusable),
        "encoder_id": encoder.encoder_id,
        "num_patches": store.num_patches,
        "width": store.width,
    }
    return pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=schema.NOTE_IMAGES), counts


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[NoteRow], PreparedNote], items: Iterable[NoteRow], max_waiting: int
) -> Iterator[PreparedNote]:
    """`map(work, items)` on the pool, with at most `max_waiting` results waiting."""
    waiting: deque[Future[PreparedNote]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= max_waiting:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _note_files(notes: Path) -> list[Path]:
    files = parquet_files(notes)
    if not files:
        raise ValueError(f"{notes} holds no notes (no *.parquet)")
    return files


def _read_notes(notes: Path) -> Iterator[NoteRow]:
    """The rows of all notes, read in small batches, because the table may contain images."""
    columns = ["note_id", "image_path", "image"]
    for path in _note_files(notes):
        with read_errors(path), pq.ParquetFile(path) as file:
            if missing := [c for c in columns if c not in file.schema_arrow.names]:
                raise ValueError(f"no column {', '.join(missing)}")
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the frozen vision encoder once per distinct image.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of Parquet in schema.NOTES")
    parser.add_argument("--source", type=Path, required=True, help="folder that image_path is relative to")
    parser.add_argument("--store", type=Path, required=True, help="parent of the stores, one per encoder")
    parser.add_argument("--out", type=Path, required=True, help="note_images.parquet, counts.json, vision/")
    parser.add_argument("--part-images", type=int, default=_PART_IMAGES, help="images per part: what a kill costs")
    args = parser.parse_args(argv)
    with user_errors():
        config = load_config(args.config)
        _note_files(args.notes)
        if not args.source.is_dir():
            raise ValueError(f"--source {args.source} is not a folder")
        from notellm2_core.vision.encoder import load_vision_encoder

        encoder = load_vision_encoder(config.model.vision)
        store = FeatureStore.create(args.store / encoder.encoder_id, encoder.num_patches, encoder.width)
        start = time.monotonic()
        table, counts = compute(encoder, store, args.notes, args.source, config, args.part_images)
        seconds = time.monotonic() - start
        args.out.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, args.out / NOTE_IMAGES_FILE)
        encoder.save_pretrained(args.out / VISION_FOLDER)
        (args.out / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n")
        print(json.dumps(counts), file=sys.stderr)
        print(f"{counts['computed'] / seconds:.1f} new images per second", file=sys.stderr)


if __name__ == "__main__":
    main()
