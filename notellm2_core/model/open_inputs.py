"""Opens the folders of `NoteInputs` as a model reads them: tokens, image ids, and features or images."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from notellm2_core.config.source import SourceSettings
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
    """A model's input for a set of notes."""

    tokens: Mapping[str, FieldTokens]  # by note id
    image_ids: Mapping[str, str | None]  # by note id; None: no usable image
    images: FeatureStore | NoteImages  # features by image id, or the images if an encoder reads them


@dataclass(frozen=True)
class InputReader:
    """Reads note inputs for one model."""

    processor: MLRMProcessor
    inputs: NoteInputs
    encoder: VisionEncoder | None = None  # reads the images; None: the store has their features
    max_pixels: int = SourceSettings().max_image_pixels  # of an image

    @property
    def encoder_id(self) -> str:
        """The id of the vision encoder whose features the model reads."""
        return encoder_id(self.inputs.images) if self.encoder is None else self.encoder.encoder_id

    def open(self, note_ids: Collection[str] | None = None) -> OpenInputs:
        """Open the inputs of these notes (None: of all).

        Raises ValueError if a note or the store is missing, or there are no images for `encoder` to read.
        """
        tokens = read_tokens(self.inputs.notes, self.processor.note_tokenizer, note_ids)
        image_ids = {n: i for n, i in read_note_images(self.inputs.images).items() if n in tokens}
        if self.encoder is None:
            return OpenInputs(tokens, image_ids, FeatureStore(self.inputs.store / self.encoder_id))
        if self.inputs.image_folders is None:
            raise ValueError(
                "the vision encoder is trained, or was: give the folders of the images (--image-folders NOTES SOURCE)"
            )
        return OpenInputs(
            tokens, image_ids, NoteImages(self.inputs.image_folders, image_ids, tokens.keys(), self.max_pixels)
        )


def load_model_and_reader(folder: Path, inputs: NoteInputs, max_pixels: int) -> tuple[MLRMModel, InputReader]:
    """The saved model in `folder`, and its reader of `inputs`.

    If the model has another vision encoder than that of the stored features, as it has when the encoder was trained,
    the reader encodes the images with the model's own. Raises ValueError if the model cannot be loaded, or it has
    another encoder and `inputs` gives no images.
    """
    model, processor = load_model(folder)
    encoder = None
    if model.config.encoder_id not in ("", encoder_id(inputs.images)):  # a bare save_pretrained names none
        if inputs.image_folders is None:
            require_its_encoder(model.config, encoder_id(inputs.images))
        encoder = load_encoder(folder)
    return model, InputReader(processor, inputs, encoder, max_pixels)
