"""The vision features of the training notes as one memory-mapped file.

Batches read a few rows at random; the feature store's Parquet parts are made for reading whole. All ranks of a
machine map the same file, so its pages are in memory once, and a table larger than the memory still works.

Shapes: n images, L patches, h_v width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from notellm2_core.lake import fingerprint
from notellm2_core.notes.feature_store import FeatureStore

_CHUNK_IMAGES = 512


@dataclass(frozen=True)
class FeatureTable:
    """fp16 [n, L + 1, h_v]: the patch features of an image, then its global feature."""

    values: np.ndarray
    rows: dict[str, int]  # image_id -> row

    @classmethod
    def build(cls, store: FeatureStore, image_ids: Sequence[str], folder: Path) -> "FeatureTable":
        """The table of these images, made in `folder` unless it is there already.

        Raises ValueError if the store lacks one of them.
        """
        shape = (len(image_ids), store.num_patches + 1, store.width)
        path = folder / f"features-{fingerprint([store.root.name, *image_ids])}.npy"
        if not path.exists() and len(image_ids):
            folder.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}.draft")
            try:
                values = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float16, shape=shape)
                for i in range(0, len(image_ids), _CHUNK_IMAGES):
                    part = store.load(image_ids[i : i + _CHUNK_IMAGES])
                    values[i : i + _CHUNK_IMAGES, :-1] = part.patches
                    values[i : i + _CHUNK_IMAGES, -1] = part.global_feature
                values.flush()
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        try:
            table = np.load(path, mmap_mode="r") if len(image_ids) else np.zeros(shape, np.float16)
        except (ValueError, EOFError) as e:
            raise ValueError(f"{path} is damaged ({e}): delete it and run again") from e
        return cls(table, {image_id: row for row, image_id in enumerate(image_ids)})

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(patches [len(rows), L, h_v], global features [len(rows), h_v]); zeros where the row is -1."""
        values = np.zeros((len(rows), *self.values.shape[1:]), dtype=np.float16)
        values[rows >= 0] = self.values[rows[rows >= 0]]
        return values[:, :-1], values[:, -1]
