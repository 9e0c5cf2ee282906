"""Tokens of notes and the features of their pictures -> unit vectors: the one place where inference makes its batches.

Shapes: N notes of a batch, d embedding width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.processor import FieldTokens, InputKind, MLRMProcessor, NoteBatch
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.vision.feature_store import Features

VECTORS_VERSION = 1  # raise it when code computes other vectors from the same weights: old ones are not taken over then
WINDOW_BATCHES = 8  # batches whose notes are sorted by length together, and whose features are held at a time
_CPU_TOKENS = 2048  # of a batch on a CPU: the memory for larger ones is new each time, and slower than the sums in it


class FeatureSource(Protocol):
    """The feature store, or whatever else knows the features of pictures."""

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of `image_ids`, in that order."""


@dataclass(frozen=True)
class BatchEmbedder:
    """A model, and everything that it reads of the notes."""

    model: MLRMModel
    processor: MLRMProcessor
    notes: Mapping[str, FieldTokens]
    images: Mapping[str, str | None]  # note_id -> image_id; None: no usable picture
    features: FeatureSource
    batch_notes: int
    device: torch.device

    def embed(self, note_ids: Sequence[str], inputs: InputKind, progress: "tqdm[Any] | None" = None) -> np.ndarray:
        """Unit vectors [len(note_ids), d] in fp32, in the order given.

        Notes of like length share a batch, so that little is computed on padding; padding is masked, so what a note
        gets does not depend on its company (up to rounding). What every prompt begins with is computed once for all
        notes of a batch.
        """
        vectors = np.empty((len(note_ids), self.model.config.projection_dim), dtype=np.float32)
        for places, batch in Prefetcher(self._batches(note_ids, inputs)):
            with torch.inference_mode():
                output = self.model(batch.to(self.device), self.processor.num_shared).multimodal  # [N, d]
            vectors[places] = functional.normalize(output.float(), dim=-1).cpu().numpy()
            if progress is not None:
                progress.update(len(places))
        return vectors

    def _batches(self, note_ids: Sequence[str], inputs: InputKind) -> Iterator[tuple[np.ndarray, NoteBatch]]:
        """Every batch, and the places of its notes in `note_ids`."""
        window = WINDOW_BATCHES * self.batch_notes
        for first in range(0, len(note_ids), window):
            ids = note_ids[first : first + window]
            encoded = [self.processor.lay_out(self.notes[i], inputs) for i in ids]
            rows, patches, pooled = self._features(ids, inputs)
            for batch in self._cut(np.array([len(e) for e in encoded])):
                shown = rows[batch]  # -1: no picture; reads any row, which collate blanks
                yield (
                    first + batch,
                    self.processor.collate(
                        [encoded[n] for n in batch],
                        patches[shown] if len(patches) else None,
                        pooled[shown] if len(patches) else None,
                        shown >= 0,
                    ),
                )

    def _cut(self, num_tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Notes of `num_tokens` each, the shortest first, in batches that are not too large."""
        most = _CPU_TOKENS if self.device.type == "cpu" else None
        order = np.argsort(num_tokens, kind="stable")
        first = 0
        while first < len(order):
            some = order[first : first + self.batch_notes]
            if most is not None:
                some = some[: max(1, int(np.searchsorted(num_tokens[some].cumsum(), most, "right")))]
            yield some
            first += len(some)

    def _features(self, ids: Sequence[str], inputs: InputKind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [n] of the notes in the features, -1 without picture, and the features of the distinct pictures."""
        image_ids = [None if inputs == "text" else self.images[i] for i in ids]
        distinct = list(dict.fromkeys(i for i in image_ids if i is not None))
        features = self.features.load(distinct)
        row = {image_id: n for n, image_id in enumerate(distinct)}
        return np.array([-1 if i is None else row[i] for i in image_ids]), features.patches, features.global_feature
