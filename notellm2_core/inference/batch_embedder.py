"""Batched inference: tokens of notes and features of their images -> unit vectors.

Shapes: N notes of a batch, d embedding width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.processor import FieldTokens, InputKind, MLRMProcessor, NoteBatch
from notellm2_core.runtime.prefetch import Prefetcher
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.vision.feature_store import Features

VECTORS_VERSION = 2  # raise it when code changes the vectors of the same weights: old vectors are then not reused
WINDOW_BATCHES = 8  # batches whose notes are sorted by length together, and whose features are in memory together
_CPU_TOKENS = 2048  # per batch on a CPU: allocating memory for larger ones takes longer than computing them


class FeatureSource(Protocol):
    """Provides image features: the feature store, or an encoder that computes them."""

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of `image_ids`, in that order."""


@dataclass(frozen=True)
class BatchEmbedder:
    """A model with its input: the tokens and images of all notes."""

    model: MLRMModel
    processor: MLRMProcessor
    notes: Mapping[str, FieldTokens]
    images: Mapping[str, str | None]  # note_id -> image_id; None: no usable image
    features: FeatureSource
    batch_notes: int
    device: torch.device

    def embed(self, note_ids: Sequence[str], inputs: InputKind, progress: ProgressBar | None = None) -> np.ndarray:
        """Unit vectors [len(note_ids), d] in fp32, in the order given.

        Notes of similar length share a batch, so that little is computed on padding. Padding is masked, so a vector
        does not depend on the other notes of its batch (up to rounding). The prefix that all prompts share is computed
        once per batch.
        """
        vectors = np.empty((len(note_ids), self.model.config.projection_dim), dtype=np.float32)
        for positions, batch in Prefetcher(self._batches(note_ids, inputs)):
            with torch.inference_mode():
                output = self.model(batch.to(self.device), self.processor.num_shared).multimodal  # [N, d]
            vectors[positions] = functional.normalize(output.float(), dim=-1).cpu().numpy()
            if progress is not None:
                progress.update(len(positions))
        return vectors

    def _batches(self, note_ids: Sequence[str], inputs: InputKind) -> Iterator[tuple[np.ndarray, NoteBatch]]:
        """All batches, each with the positions of its notes in `note_ids`."""
        window = WINDOW_BATCHES * self.batch_notes
        for first in range(0, len(note_ids), window):
            ids = note_ids[first : first + window]
            encoded = [self.processor.lay_out(self.notes[i], inputs) for i in ids]
            rows, patches, pooled = self._features(ids, inputs)
            for batch in self._cut(np.array([len(e) for e in encoded])):
                image_rows = rows[batch]  # -1 (no image) reads the last row, which collate sets to zero
                yield (
                    first + batch,
                    self.processor.collate(
                        [encoded[n] for n in batch],
                        patches[image_rows] if len(patches) else None,
                        pooled[image_rows] if len(patches) else None,
                        image_rows >= 0,
                    ),
                )

    def _cut(self, num_tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Batches of note indices, the shortest notes first: at most `batch_notes` and, on a CPU, _CPU_TOKENS each."""
        max_tokens = _CPU_TOKENS if self.device.type == "cpu" else None
        order = np.argsort(num_tokens, kind="stable")
        first = 0
        while first < len(order):
            batch = order[first : first + self.batch_notes]
            if max_tokens is not None:
                batch = batch[: max(1, int(np.searchsorted(num_tokens[batch].cumsum(), max_tokens, "right")))]
            yield batch
            first += len(batch)

    def _features(self, ids: Sequence[str], inputs: InputKind) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row [n] of each note in the features (-1: no image), patches and global features of the distinct images."""
        image_ids = [None if inputs == "text" else self.images[i] for i in ids]
        distinct = list(dict.fromkeys(i for i in image_ids if i is not None))
        features = self.features.load(distinct)
        row = {image_id: n for n, image_id in enumerate(distinct)}
        return np.array([-1 if i is None else row[i] for i in image_ids]), features.patches, features.global_feature
