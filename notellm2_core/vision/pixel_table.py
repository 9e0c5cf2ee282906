"""The training notes' images as one memory-mapped lookup table, for a vision encoder that is trained.

They are resized and cropped once, so that a step decodes nothing. For a frozen encoder, see feature_table.py.

Shapes: n images, M distinct images of a batch, S input side in pixels.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.memory_map import memory_mapped
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.vision.architecture import Preprocess
from notellm2_core.vision.encoder import resize_and_crop
from notellm2_core.vision.note_images import NoteImages

_CHUNK_IMAGES = 256


@dataclass(frozen=True)
class PixelTable:
    """Images in the encoder's input size, before `encoder.normalise`."""

    values: np.ndarray  # uint8 [n, S, S, 3]
    rows: dict[str, int]  # image_id -> row

    @classmethod
    def build(cls, note_images: NoteImages, how: Preprocess, folder: Path) -> "PixelTable":
        """The table of all `note_images`, written to `folder` unless its file exists.

        Raises ValueError where an image has changed since its id was computed, or the file is damaged.
        """
        image_ids = note_images.image_ids
        shape = (len(image_ids), how.size_px, how.size_px, 3)
        path = folder / f"pixels-{fingerprint([asdict(how), *image_ids])}.npy"

        def to_row(data: bytes) -> np.ndarray:
            return resize_and_crop(note_images.decode(data), how)

        def fill(values: np.ndarray) -> None:
            chunks = range(0, len(image_ids), _CHUNK_IMAGES)
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                for i in ProgressBar(chunks, desc="images", unit="chunk", disable=len(chunks) < 2):
                    rows = pool.map(to_row, note_images.read(image_ids[i : i + _CHUNK_IMAGES]))
                    values[i : i + _CHUNK_IMAGES] = np.stack(list(rows))

        table = memory_mapped(path, shape, np.uint8, fill)
        return cls(table, {image_id: row for row, image_id in enumerate(image_ids)})

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(distinct images [M, S, S, 3], the index [len(rows)] of each row in them); -1 stays -1.

        M is at least 1, with a black image where no row has one: all ranks run the encoder in every step.
        """
        distinct, inverse = np.unique(rows[rows >= 0], return_inverse=True)
        image_index = np.full(len(rows), -1, dtype=np.int64)
        image_index[rows >= 0] = inverse
        black = np.zeros((1, *self.values.shape[1:]), np.uint8)
        return (self.values[distinct] if len(distinct) else black), image_index
