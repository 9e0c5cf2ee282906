"""The features of pictures that no store knows: read, checked and encoded when they are asked for.

Shapes: n pictures, L patches of width h_v.
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
from notellm2_core.vision.note_images import NoteImages


@dataclass(frozen=True)
class _Prepared:
    status: images.Status
    image_id: str = ""
    pixels: Tensor | None = None  # [3, S, S]; None where the features are known already


class ImageFeatures:
    """A source of features like the feature store, for the pictures that `read` has seen; kept in memory, as fp16."""

    def __init__(self, encoder: VisionEncoder, max_pixels: int, batch_pictures: int) -> None:
        images.allow_pixels(max_pixels)
        self._encoder, self._max_pixels, self._batch_pictures = encoder, max_pixels, batch_pictures
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # patches [L, h_v] and global feature [h_v]

    def read(self, pictures: Sequence[ImageLike | None], folder: Path | None) -> list[tuple[images.Status, str | None]]:
        """Status and image id of each picture; the id is None unless the status is "ok".

        folder: what paths are relative to, and nothing outside it is read; None: paths are taken as they are.
        Raises ValueError where the encoder's answer does not fit into fp16.
        """
        found: list[tuple[images.Status, str | None]] = []
        with ThreadPoolExecutor(max_workers=min(8, max(1, (os.cpu_count() or 1) // 2))) as pool:
            for start in range(0, len(pictures), self._batch_pictures):
                part = list(pool.map(partial(self._prepare, folder), pictures[start : start + self._batch_pictures]))
                new = {p.image_id: p.pixels for p in part if p.pixels is not None}
                if new:
                    self._encode(list(new), torch.stack(list(new.values())))
                found += [(p.status, p.image_id or None) for p in part]
        return found

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of pictures that were read, in this order."""
        shape = (len(image_ids), self._encoder.num_patches, self._encoder.width)
        patches, pooled = np.empty(shape, np.float16), np.empty((shape[0], shape[2]), np.float16)
        for row, image_id in enumerate(image_ids):
            patches[row], pooled[row] = self._known[image_id]
        return Features(tuple(image_ids), patches, pooled)

    def _prepare(self, folder: Path | None, picture: ImageLike | None) -> _Prepared:
        if isinstance(picture, Image.Image):
            status, image = images.to_rgb(picture, self._max_pixels)
            if image is None:
                return _Prepared(status)
            image_id = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
            return _Prepared("ok", image_id, None if image_id in self._known else self._encoder.preprocess(image))
        encoded = self._fetch(folder, picture)
        if encoded.status != "ok":
            return _Prepared(encoded.status)
        if encoded.image_id in self._known:
            return _Prepared("ok", encoded.image_id)
        status, image = images.decode(encoded.data, self._max_pixels)
        return (
            _Prepared(status) if image is None else _Prepared("ok", encoded.image_id, self._encoder.preprocess(image))
        )

    def _fetch(self, folder: Path | None, picture: str | Path | bytes | None) -> images.EncodedImage:
        if isinstance(picture, bytes):
            return images.fetch(Path(), None, picture, self._max_pixels)
        name = None if picture is None else str(picture)
        if not name or folder is not None or "\0" in name:  # no file has such a name
            return images.fetch(folder or Path(), name, None, self._max_pixels)
        path = Path(os.path.realpath(name))  # the caller's own path: links may lead anywhere
        return images.fetch(path.parent, path.name, None, self._max_pixels)

    def _encode(self, image_ids: Sequence[str], pixels: Tensor) -> None:
        with torch.inference_mode():
            features = self._encoder(pixels.to(next(self._encoder.parameters()).device))
        patches, pooled = (f.half().cpu().numpy() for f in features)  # as the feature store keeps them
        for image_id, *values in zip(image_ids, patches, pooled, strict=True):
            if not all(np.isfinite(v).all() for v in values):
                raise ValueError(f"the vision encoder gives features beyond the range of fp16 for picture {image_id}.")
            self._known[image_id] = (values[0], values[1])


@dataclass(frozen=True)
class OnDemandFeatures:
    """A source of features like the feature store, for an encoder that no store knows; it keeps nothing."""

    encoder: VisionEncoder
    pictures: NoteImages
    batch_pictures: int

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of these pictures, in this order. Raises ValueError where one is no longer what it was."""
        features = ImageFeatures(self.encoder, self.pictures.max_pixels, self.batch_pictures)
        found = features.read(self.pictures.read(image_ids), None)
        if broken := [status for status, image_id in found if image_id is None]:
            raise ValueError(f"{len(broken)} pictures can no longer be decoded ({broken[0]}): run everything again.")
        return features.load(image_ids)
