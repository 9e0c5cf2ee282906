"""The vision features of the training notes as one memory-mapped lookup table.

Batches read a few rows at random, while the feature store's Parquet parts suit sequential reads. The table may be
larger than the memory.

Shapes: n images, L patches, h_v width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.memory_map import memory_mapped
from notellm2_core.vision.feature_store import FeatureStore

_CHUNK_IMAGES = 512


@dataclass(frozen=True)
class FeatureTable:
    """The patch features of each image, then its global feature."""

    values: np.ndarray  # fp16 [n, L + 1, h_v]
    rows: dict[str, int]  # image_id -> row

    @classmethod
    def build(cls, store: FeatureStore, image_ids: Sequence[str], folder: Path) -> "FeatureTable":
        """The table of these images, written to `folder` unless its file exists.

        Raises ValueError if the store lacks one of them, or the file is damaged.
        """
        shape = (len(image_ids), store.num_patches + 1, store.width)
        path = folder / f"features-{fingerprint([store.root.name, *image_ids])}.npy"

        def fill(values: np.ndarray) -> None:
            for i in range(0, len(image_ids), _CHUNK_IMAGES):
                part = store.load(image_ids[i : i + _CHUNK_IMAGES])
                values[i : i + _CHUNK_IMAGES, :-1] = part.patches
                values[i : i + _CHUNK_IMAGES, -1] = part.global_feature

        table = memory_mapped(path, shape, np.float16, fill)
        return cls(table, {image_id: row for row, image_id in enumerate(image_ids)})

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(patches [len(rows), L, h_v], global features [len(rows), h_v]); zeros where the row is -1."""
        values = np.zeros((len(rows), *self.values.shape[1:]), dtype=np.float16)
        values[rows >= 0] = self.values[rows[rows >= 0]]
        return values[:, :-1], values[:, -1]
