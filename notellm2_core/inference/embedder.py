"""A trained model as one object: notes with pictures in, unit vectors out. Needs the model's folder and nothing else.

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
from tqdm import tqdm

from notellm2_core.config.data import SourceSettings
from notellm2_core.config.model import VisionSettings
from notellm2_core.config.settings import ExportSettings
from notellm2_core.embeddings.table import truncate_dims
from notellm2_core.inference.batch_embedder import WINDOW_BATCHES, BatchEmbedder
from notellm2_core.model.build import load_encoder, load_model, require_its_encoder, require_its_processor
from notellm2_core.model.hub import model_folder
from notellm2_core.model.kernels import fuse_kernels
from notellm2_core.model.mlrm import MLRMConfig, MLRMModel
from notellm2_core.notes.note import NoteLike, NoteWithImage, as_note
from notellm2_core.notes.processor import InputKind, MLRMProcessor, require_input_kind
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.images import Status
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
        """Moves the model to `device` (None: the GPU where there is one) in fp32 on a CPU and bf16 on a GPU, for good:
        there its kernels are fused ones, which a CPU has not got.

        Raises ValueError where `encoder` is not the one that the model was trained with, or `processor` of another one.
        """
        assert isinstance(model.config, MLRMConfig)
        require_its_encoder(model.config, encoder.encoder_id)
        require_its_processor(model.config, processor)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        nn.Module.to(model.eval(), self.device, self.dtype)
        self.is_fused = fuse_kernels(model.llm, self.device)
        self.model, self.processor, self.encoder = model, processor, encoder.to(self.device)
        self.pictures: Counter[Status] = Counter()  # of all notes embedded so far, by status

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str | None = None, **hub: Any) -> "Embedder":
        """The model of a folder, or of a hub name. hub: which of its copies, see `model_folder`.

        Raises ValueError where it cannot be had, is incomplete, or `vision/` is damaged or another encoder.
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
        progress: "tqdm[Any] | None" = None,
    ) -> np.ndarray:
        """Unit vectors [N, d] in fp32; with `dim` their first `dim` numbers, made unit again.

        A picture that cannot be used counts as none, and under its status in `pictures`. folder: what the paths of
        pictures are relative to, and nothing outside it is read; None: paths are taken as they are.
        Raises ValueError for a note with an unknown or wrong field, and as `require_options` does.
        """
        self.require_options(inputs, batch_notes, dim)
        known = [as_note(note) for note in notes]
        vectors = np.empty((len(known), self.model.config.projection_dim), dtype=np.float32)
        window = WINDOW_BATCHES * batch_notes  # pictures are held for so many notes at a time
        for first in range(0, len(known), window):
            part = known[first : first + window]
            vectors[first : first + len(part)] = self._embed(part, inputs, batch_notes, folder, progress)
        return truncate_dims(vectors, dim)

    def require_options(self, inputs: str, batch_notes: int, dim: int | None) -> None:
        """Raises ValueError for an unknown kind of input, empty batches, and a `dim` that the model has not got."""
        require_input_kind(inputs)
        if batch_notes < 1:
            raise ValueError(f"batch_notes = {batch_notes} must be 1 or more.")
        truncate_dims(np.empty((0, self.model.config.projection_dim), dtype=np.float32), dim)  # refuses a wrong dim

    def _embed(
        self,
        notes: Sequence[NoteWithImage],
        inputs: InputKind,
        batch_notes: int,
        folder: Path | None,
        progress: "tqdm[Any] | None",
    ) -> np.ndarray:
        features, image_ids = self.read_pictures(notes, inputs, folder)
        names = [str(n) for n in range(len(notes))]  # two of the notes may have the same id, or none
        tokens = dict(zip(names, self.processor.note_tokenizer.tokenize([n.note for n in notes]), strict=True))
        images = dict(zip(names, image_ids, strict=True))
        core = BatchEmbedder(self.model, self.processor, tokens, images, features, batch_notes, self.device)
        return core.embed(names, inputs, progress)

    def read_pictures(
        self, notes: Sequence[NoteWithImage], inputs: InputKind, folder: Path | None = None
    ) -> tuple[ImageFeatures, list[str | None]]:
        """The features of the notes' pictures, and each note's image id in them (None: no usable picture)."""
        features = ImageFeatures(self.encoder, SourceSettings().max_image_pixels, VisionSettings().batch_size)
        if inputs == "text":
            return features, [None] * len(notes)
        found = features.read([n.image for n in notes], folder)
        self.pictures.update(status for status, _ in found)
        return features, [image_id for _, image_id in found]
