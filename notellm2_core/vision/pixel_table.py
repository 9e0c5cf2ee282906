"""The training notes' pictures, ready for a vision encoder that is trained, as one memory-mapped file.

What feature_table.py is to a frozen encoder: resized and cut once, so that a step reads, and decodes nothing.

Shapes: n images, S input side in pixels.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.memory_map import memory_mapped
from notellm2_core.vision.architecture import Preprocess
from notellm2_core.vision.encoder import cut_out
from notellm2_core.vision.note_images import NoteImages

_CHUNK_IMAGES = 256


@dataclass(frozen=True)
class PixelTable:
    """uint8 [n, S, S, 3]."""

    values: np.ndarray
    rows: dict[str, int]  # image_id -> row

    @classmethod
    def build(cls, pictures: NoteImages, how: Preprocess, folder: Path) -> "PixelTable":
        """The table of all of `pictures`, made in `folder` unless it is there already.

        Raises ValueError where one of them is no longer what it was, or the file is damaged.
        """
        image_ids = pictures.image_ids
        shape = (len(image_ids), how.size_px, how.size_px, 3)
        path = folder / f"pixels-{fingerprint([asdict(how), *image_ids])}.npy"

        def cut(data: bytes) -> np.ndarray:
            return cut_out(pictures.decode(data), how)

        def fill(values: np.ndarray) -> None:
            chunks = range(0, len(image_ids), _CHUNK_IMAGES)
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                for i in tqdm(chunks, desc="pictures", unit="chunk", disable=len(chunks) < 2):
                    part = pool.map(cut, pictures.read(image_ids[i : i + _CHUNK_IMAGES]))
                    values[i : i + _CHUNK_IMAGES] = np.stack(list(part))

        table = memory_mapped(path, shape, np.uint8, fill)
        return cls(table, {image_id: row for row, image_id in enumerate(image_ids)})

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(distinct pictures [M, S, S, 3], which of them [len(rows)] each row is); -1 stays -1.

        M is 1 at least, if need be of a black picture that nobody has: all ranks run the encoder in every step.
        """
        distinct, which = np.unique(rows[rows >= 0], return_inverse=True)
        picture = np.full(len(rows), -1, dtype=np.int64)
        picture[rows >= 0] = which
        none = np.zeros((1, *self.values.shape[1:]), np.uint8)
        return (self.values[distinct] if len(distinct) else none), picture
