"""Pixels cropped once are those that the encoder's preprocessing makes of the image."""

from pathlib import Path

import numpy as np
import pytest
import torch

from notellm2_core.vision.encoder import load_vision_encoder, normalise
from notellm2_core.vision.feature_store import read_note_images
from notellm2_core.vision.note_images import NoteImages
from notellm2_core.vision.pixel_table import PixelTable
from tests.support.world import World, tiny_config


def test_a_step_takes_distinct_images(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_vision_encoder(tiny_config().model.vision)
    preprocess = encoder.architecture.preprocess
    note_images = read_note_images(world.path("images"))
    images = NoteImages(world.with_image_folders.image_folders, note_images, note_images, 10_000)
    table = PixelTable.build(images, preprocess, tmp_path)
    assert len(table.rows) == sum(image is not None for image in note_images.values())

    pixels, image_index = table.take(np.array([3, -1, 5, 3]))
    assert len(pixels) == 2 and image_index.tolist() == [0, -1, 1, 0]
    image = images.decode(images.read([images.image_ids[5]])[0])
    assert torch.equal(normalise(torch.from_numpy(pixels[1]), preprocess), encoder.preprocess(image))
    pixels, image_index = table.take(np.array([-1, -1]))
    assert not pixels.any() and len(pixels) == 1 and image_index.tolist() == [-1, -1]

    monkeypatch.setattr(images, "read", None)  # the table exists, so no image is read
    again = PixelTable.build(images, preprocess, tmp_path)
    assert again.rows == table.rows and np.array_equal(again.values, table.values)
    no_images = NoteImages(world.with_image_folders.image_folders, note_images, [], 10_000)
    empty = PixelTable.build(no_images, preprocess, tmp_path)
    assert empty.take(np.array([-1]))[0].shape == (1, preprocess.size_px, preprocess.size_px, 3)
