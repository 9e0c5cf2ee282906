"""Features of images that no store has: the images are read, checked and encoded on demand.

Shapes: n images, S input side in pixels, L patches of width h_v.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from notellm2_core.notes.note import ImageLike
from notellm2_core.vision import images
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.feature_store import Features
from notellm2_core.vision.image_status import Status
from notellm2_core.vision.note_images import NoteImages


@dataclass(frozen=True)
class _Prepared:
    status: Status
    image_id: str = ""
    pixels: Tensor | None = None  # [3, S, S]; None where the features are already in memory


class ImageFeatures:
    """A source of features like `FeatureStore`, for the images that `read` was given. It keeps features in memory."""

    def __init__(self, encoder: VisionEncoder, max_pixels: int, batch_size: int) -> None:
        images.allow_pixels(max_pixels)
        self._encoder, self._max_pixels, self._batch_size = encoder, max_pixels, batch_size
        self._features: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # patches [L, h_v] and global feature [h_v]
        self._statuses: dict[str, Status] = {}  # of the same images

    def read(self, note_images: Sequence[ImageLike | None], folder: Path | None) -> list[tuple[Status, str | None]]:
        """Status and image id of each image; the id is None unless the image can be used.

        folder: paths are relative to it, and nothing outside it is read; None: paths are used unchanged. Raises
        ValueError where the encoder's output does not fit into fp16.
        """
        results: list[tuple[Status, str | None]] = []
        with ThreadPoolExecutor(max_workers=min(8, max(1, (os.cpu_count() or 1) // 2))) as pool:
            for start in range(0, len(note_images), self._batch_size):
                batch = list(pool.map(partial(self._prepare, folder), note_images[start : start + self._batch_size]))
                new_pixels = {p.image_id: p.pixels for p in batch if p.pixels is not None}
                self._statuses |= {p.image_id: p.status for p in batch if p.pixels is not None}
                if new_pixels:
                    self._encode(list(new_pixels), torch.stack(list(new_pixels.values())))
                results += [(p.status, p.image_id or None) for p in batch]
        return results

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of images that were read, in this order."""
        shape = (len(image_ids), self._encoder.num_patches, self._encoder.width)
        patches, pooled = np.empty(shape, np.float16), np.empty((shape[0], shape[2]), np.float16)
        for row, image_id in enumerate(image_ids):
            patches[row], pooled[row] = self._features[image_id]
        return Features(tuple(image_ids), patches, pooled)

    def _prepare(self, folder: Path | None, note_image: ImageLike | None) -> _Prepared:
        if isinstance(note_image, Image.Image):
            status, image = images.to_rgb(note_image, self._max_pixels)
            if image is None:
                return _Prepared(status)
            image_id = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            return _Prepared(status, image_id, None if image_id in self._features else self._encoder.preprocess(image))
        encoded = self._fetch(folder, note_image)
        if encoded.status != "ok":
            return _Prepared(encoded.status)
        if encoded.image_id in self._features:
            return _Prepared(self._statuses[encoded.image_id], encoded.image_id)
        status, image = images.decode(encoded.data, self._max_pixels)
        return (
            _Prepared(status) if image is None else _Prepared(status, encoded.image_id, self._encoder.preprocess(image))
        )

    def _fetch(self, folder: Path | None, note_image: str | Path | bytes | None) -> images.EncodedImage:
        if isinstance(note_image, bytes):
            return images.fetch(Path(), None, note_image, self._max_pixels)
        name = None if note_image is None else str(note_image)
        if not name or folder is not None or "\0" in name:  # no file has such a name
            return images.fetch(folder or Path(), name, None, self._max_pixels)
        path = Path(os.path.realpath(name))  # the caller's own path: links may lead anywhere
        return images.fetch(path.parent, path.name, None, self._max_pixels)

    def _encode(self, image_ids: Sequence[str], pixels: Tensor) -> None:
        with torch.inference_mode():
            features = self._encoder(pixels.to(next(self._encoder.parameters()).device))
        patches, pooled = (f.half().cpu().numpy() for f in features)  # in the precision of the feature store
        for image_id, *values in zip(image_ids, patches, pooled, strict=True):
            if not all(np.isfinite(v).all() for v in values):
                raise ValueError(f"the vision encoder gives features beyond the range of fp16 for image {image_id}.")
            self._features[image_id] = (values[0], values[1])


@dataclass(frozen=True)
class OnDemandFeatures:
    """A source of features like `FeatureStore`, for an encoder that no store has features of. It keeps nothing."""

    encoder: VisionEncoder
    note_images: NoteImages
    batch_size: int

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of these images, in this order.

        Raises ValueError where an image has changed since its id was computed, or can no longer be decoded.
        """
        features = ImageFeatures(self.encoder, self.note_images.max_pixels, self.batch_size)
        results = features.read(self.note_images.read(image_ids), None)
        broken = [
            f"{image_id} ({status})"
            for image_id, (status, decoded_id) in zip(image_ids, results, strict=True)
            if decoded_id is None
        ]
        if broken:
            raise ValueError(
                f"{len(broken)} images can no longer be decoded, the first is {broken[0]}: run everything again."
            )
        return features.load(image_ids)
