"""A model's input: stored features, or images for its own vision encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from notellm2_core.model.build import build_model
from notellm2_core.model.open_inputs import InputReader, load_model_and_reader
from notellm2_core.model.tokenise import tokenise
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.notes.token_store import read_tokens
from notellm2_core.schema import TOKENS_FILE
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.feature_store import FeatureStore
from notellm2_core.vision.note_images import NoteImages
from tests.support.world import World, tiny_config, write_world

NOTES = ["n004", "n005", "n006"]  # the second has no image


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), num_pairs=4, num_validation=0)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MLRMProcessor:
    return build_model(tiny_config(), tmp_path_factory.mktemp("models"))[1]


def test_stored_features(world: World, processor: MLRMProcessor, tmp_path: Path) -> None:
    """Three notes and all eight are opened. The notes and their stored tokens give the same tokens."""
    reader = InputReader(processor, world.inputs)
    notes = reader.open(NOTES)
    assert sorted(notes.tokens) == sorted(notes.image_ids) == NOTES
    assert [notes.image_ids[note_id] is None for note_id in NOTES] == [False, True, False]
    assert isinstance(notes.images, FeatureStore) and notes.images.root == world.path("store") / reader.encoder_id
    assert len(notes.images.load([i for i in notes.image_ids.values() if i is not None]).patches) == 2
    assert len(reader.open().tokens) == len(reader.open().image_ids) == 8

    tokenise(processor.note_tokenizer, world.path("notes"), tmp_path)
    assert (tmp_path / TOKENS_FILE).exists()
    tokens = replace(reader, inputs=replace(world.inputs, notes=tmp_path)).open(NOTES).tokens
    for note_id, fields in read_tokens(world.path("notes"), processor.note_tokenizer, NOTES).items():
        assert all(map(np.array_equal, tokens[note_id], fields))


def test_images_on_demand(world: World, processor: MLRMProcessor) -> None:
    """A reader with an encoder needs the images, and not the store, which is missing here."""
    encoder = VisionEncoder.from_pretrained(world.inputs.vision)
    inputs = replace(world.with_image_folders, store=world.path("nowhere"))
    notes = InputReader(processor, inputs, encoder).open(NOTES)
    assert isinstance(notes.images, NoteImages)
    assert notes.images.image_ids == [notes.image_ids["n004"], notes.image_ids["n006"]]
    assert all(notes.images.read(notes.images.image_ids))
    with pytest.raises(ValueError, match=r"give the folders of the images \(--image-folders NOTES SOURCE\)"):
        InputReader(processor, replace(inputs, image_folders=None), encoder).open(NOTES)
    with pytest.raises(ValueError, match="holds no vision features"):
        InputReader(processor, inputs).open(NOTES)


def test_a_saved_model_reads_with_its_own_encoder(world: World, tmp_path: Path) -> None:
    """A frozen encoder has stored features, a trained one has none: without image folders its model is refused."""

    def read(name: str, inputs: NoteInputs) -> InputReader:
        return load_model_and_reader(tmp_path / name, inputs, 10_000)[1]

    config = tiny_config()
    frozen = VisionEncoder.from_pretrained(world.inputs.vision)
    trained = frozen.with_weights({name: weight + 1 for name, weight in frozen.state_dict().items()})
    for name, vision in (("frozen", world.inputs.vision), ("trained", trained)):
        save_model(*build_model(config, tmp_path / "models"), vision, tmp_path / name, config)
    assert read("frozen", world.with_image_folders).encoder is None
    assert read("frozen", world.inputs).encoder_id == frozen.encoder_id
    reader = read("trained", world.with_image_folders)
    assert reader.encoder is not None and reader.max_pixels == 10_000
    assert reader.encoder_id == reader.encoder.encoder_id == trained.encoder_id != frozen.encoder_id
    with pytest.raises(ValueError, match=f"trained with vision encoder {trained.encoder_id}"):
        read("trained", world.inputs)
