"""The vision encoder in front of the model, where it is trained: pixels of a batch -> features."""

from dataclasses import replace

import torch

from notellm2_core.notes.processor import NoteBatch
from notellm2_core.vision.encoder import VisionEncoder, normalise


def with_features(batch: NoteBatch, encoder: VisionEncoder | None) -> NoteBatch:
    """`batch` with the features of its pictures, by `encoder`, in place of their pixels. None: it has features."""
    if encoder is None:
        return batch
    assert batch.pixels is not None and batch.image_index is not None
    dtype = next(encoder.parameters()).dtype
    pixels = normalise(batch.pixels, encoder.architecture.preprocess).to(dtype)
    features = encoder(pixels)  # [M, L, h_v], [M, h_v]
    # The last row, that of notes without picture (-1), is zeros.
    patches, pooled = (torch.cat([of, torch.zeros_like(of[:1])])[batch.image_index] for of in features)
    return replace(batch, patches=patches, global_feature=pooled, pixels=None, image_index=None)
