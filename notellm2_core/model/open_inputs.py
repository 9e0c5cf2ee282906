"""From the folders of `NoteInputs` to what a model reads of the notes: tokens, image ids, and features or pictures."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from notellm2_core.config.data import SourceSettings
from notellm2_core.model.build import load_encoder, load_model, require_its_encoder
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import FieldTokens, MLRMProcessor
from notellm2_core.notes.token_store import read_tokens
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.feature_store import FeatureStore, encoder_id, read_note_images
from notellm2_core.vision.note_images import NoteImages


@dataclass(frozen=True)
class OpenInputs:
    """What a model reads of some notes."""

    tokens: Mapping[str, FieldTokens]  # by note id
    image_ids: Mapping[str, str | None]  # by note id; None: no usable picture
    images: FeatureStore | NoteImages  # features by image id, or the pictures where an encoder is to read them


@dataclass(frozen=True)
class InputReader:
    """How one model reads note inputs."""

    processor: MLRMProcessor
    inputs: NoteInputs
    encoder: VisionEncoder | None = None  # is to read the pictures; None: their features are in the store
    max_pixels: int = SourceSettings().max_image_pixels  # of a picture

    @property
    def encoder_id(self) -> str:
        """Of the vision encoder whose features the model reads."""
        return encoder_id(self.inputs.images) if self.encoder is None else self.encoder.encoder_id

    def open(self, note_ids: Collection[str] | None = None) -> OpenInputs:
        """Open the inputs of these notes (None: of all).

        Raises ValueError where a note is missing, there is no store, or there are no pictures for `encoder`.
        """
        tokens = read_tokens(self.inputs.notes, self.processor.note_tokenizer, note_ids)
        image_ids = {n: i for n, i in read_note_images(self.inputs.images).items() if n in tokens}
        if self.encoder is None:
            return OpenInputs(tokens, image_ids, FeatureStore(self.inputs.store / self.encoder_id))
        if self.inputs.image_folders is None:
            raise ValueError(
                "the vision encoder is trained, or was: say where the pictures are (--pictures NOTES SOURCE)"
            )
        return OpenInputs(
            tokens, image_ids, NoteImages(self.inputs.image_folders, image_ids, tokens.keys(), self.max_pixels)
        )


def load_model_and_reader(folder: Path, inputs: NoteInputs, max_pixels: int) -> tuple[MLRMModel, InputReader]:
    """The saved model in `folder`, and how it reads `inputs`: with its own vision encoder where the store has features
    of another one, as it has when the encoder was trained.

    Raises ValueError where the model cannot be loaded, or it has another encoder and there are no pictures to read.
    """
    model, processor = load_model(folder)
    encoder = None
    if model.config.encoder_id not in ("", encoder_id(inputs.images)):  # a bare save_pretrained names none
        if inputs.image_folders is None:
            require_its_encoder(model.config, encoder_id(inputs.images))
        encoder = load_encoder(folder)
    return model, InputReader(processor, inputs, encoder, max_pixels)
