"""A trained model as one object: notes with images in, unit vectors out. Needs the model's folder and nothing else.

    from notellm2_core.inference.embedder import Embedder

    embedder = Embedder.from_pretrained("FOLDER")
    vectors = embedder.embed([{"title": "Red kite", "topics": ["toys"], "content": "Flies well.", "image": "kite.jpg"}])

Shapes: N notes, d embedding width.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from notellm2_core.config.model import VisionSettings
from notellm2_core.config.settings import ExportSettings
from notellm2_core.config.source import SourceSettings
from notellm2_core.embeddings.table import truncate_dims
from notellm2_core.embeddings.unit_vectors import OF_A_MODEL, require_unit_vectors
from notellm2_core.inference.batch_embedder import WINDOW_BATCHES, BatchEmbedder
from notellm2_core.model.build import load_encoder, load_model, require_its_encoder, require_its_processor
from notellm2_core.model.hub import model_folder
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.mlrm import MLRMConfig, MLRMModel
from notellm2_core.notes.note import NoteLike, NoteWithImage, as_note
from notellm2_core.notes.processor import InputKind, MLRMProcessor, require_input_kind
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.image_status import Status
from notellm2_core.vision.on_demand import ImageFeatures

BATCH_NOTES = ExportSettings().batch_notes


class Embedder:
    """A model with its processor and its own vision encoder."""

    def __init__(
        self,
        model: MLRMModel,
        processor: MLRMProcessor,
        encoder: VisionEncoder,
        device: torch.device | str | None = None,
    ) -> None:
        """Moves the model to `device` (None: a GPU if there is one), in fp32 on a CPU and bf16 on a GPU.

        On a GPU its kernels are replaced by fused ones, so it cannot move back to a CPU. Raises ValueError if `encoder`
        is not the one that the model was trained with, or `processor` is another model's.
        """
        assert isinstance(model.config, MLRMConfig)
        require_its_encoder(model.config, encoder.encoder_id)
        require_its_processor(model.config, processor)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        nn.Module.to(model.eval(), self.device, self.dtype)
        self.is_fused = fuse_kernels(model.llm, self.device)
        self.model, self.processor, self.encoder = model, processor, encoder.to(self.device)
        self.image_statuses: Counter[Status] = Counter()  # of all notes embedded so far

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str | None = None, **hub: Any) -> "Embedder":
        """The model of a folder, or of a hub name. hub: options of the download, see `model_folder`.

        Raises ValueError if it is missing or incomplete, or `vision/` is damaged or another encoder.
        """
        folder = model_folder(name, **hub)
        model, processor = load_model(folder)
        return cls(model, processor, load_encoder(folder), device)

    def embed(
        self,
        notes: Sequence[NoteLike],
        inputs: InputKind = "multimodal",
        batch_notes: int = BATCH_NOTES,
        dim: int | None = None,
        *,
        folder: Path | None = None,
        progress: ProgressBar | None = None,
    ) -> np.ndarray:
        """Unit vectors [N, d] in fp32; with `dim`, their first `dim` dimensions, normalised again.

        A note whose image cannot be used is embedded without one; `image_statuses` counts it. folder: image paths are
        relative to it, and nothing outside it is read; None: image paths are used unchanged.
        Raises ValueError for a note with an unknown or invalid field, where the model gives NaN or zero, and as
        `require_options` does.
        """
        self.require_options(inputs, batch_notes, dim)
        with_images = [as_note(note) for note in notes]
        vectors = np.empty((len(with_images), self.model.config.projection_dim), dtype=np.float32)
        window = WINDOW_BATCHES * batch_notes  # notes whose images are in memory together
        for first in range(0, len(with_images), window):
            chunk = with_images[first : first + window]
            vectors[first : first + len(chunk)] = self._embed(chunk, inputs, batch_notes, folder, progress)
        vectors = truncate_dims(vectors, dim)
        note_ids = [note.note.note_id for note in with_images]
        require_unit_vectors(vectors, note_ids if all(note_ids) else None, reason=OF_A_MODEL)
        return vectors

    def require_options(self, inputs: str, batch_notes: int, dim: int | None) -> None:
        """Raises ValueError for an unknown kind of input, empty batches, or a `dim` out of the model's range."""
        require_input_kind(inputs)
        if batch_notes < 1:
            raise ValueError(f"batch_notes = {batch_notes} must be 1 or more.")
        truncate_dims(np.empty((0, self.model.config.projection_dim), dtype=np.float32), dim)  # checks `dim`

    def _embed(
        self,
        notes: Sequence[NoteWithImage],
        inputs: InputKind,
        batch_notes: int,
        folder: Path | None,
        progress: ProgressBar | None,
    ) -> np.ndarray:
        features, image_ids = self.read_images(notes, inputs, folder)
        names = [str(n) for n in range(len(notes))]  # notes may lack ids, or share them
        tokens = dict(zip(names, self.processor.note_tokenizer.tokenize([n.note for n in notes]), strict=True))
        images = dict(zip(names, image_ids, strict=True))
        embedder = BatchEmbedder(self.model, self.processor, tokens, images, features, batch_notes, self.device)
        return embedder.embed(names, inputs, progress)

    def read_images(
        self, notes: Sequence[NoteWithImage], inputs: InputKind, folder: Path | None = None
    ) -> tuple[ImageFeatures, list[str | None]]:
        """The features of the notes' images, and each note's image id in them (None: no usable image)."""
        features = ImageFeatures(self.encoder, SourceSettings().max_image_pixels, VisionSettings().batch_size)
        if inputs == "text":
            return features, [None] * len(notes)
        images = features.read([n.image for n in notes], folder)
        self.image_statuses.update(status for status, _ in images)
        return features, [image_id for _, image_id in images]
