"""A trained vision encoder in front of the model: the pixels of a batch -> features."""

from dataclasses import replace

import torch

from notellm2_core.notes.processor import NoteBatch
from notellm2_core.vision.encoder import VisionEncoder, normalise


def with_features(batch: NoteBatch, encoder: VisionEncoder | None) -> NoteBatch:
    """`batch` with its images encoded by `encoder`: features in place of pixels. None: `batch` has features already."""
    if encoder is None:
        return batch
    assert batch.pixels is not None and batch.image_index is not None
    dtype = next(encoder.parameters()).dtype
    pixels = normalise(batch.pixels, encoder.architecture.preprocess).to(dtype)
    features = encoder(pixels)  # [M, L, h_v], [M, h_v]
    # The last row, for notes without an image (-1), is zeros.
    patches, pooled = (torch.cat([x, torch.zeros_like(x[:1])])[batch.image_index] for x in features)
    return replace(batch, patches=patches, global_feature=pooled, pixels=None, image_index=None)
