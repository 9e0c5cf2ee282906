"""The Embedder has the pipeline's vectors, the same bits in a fresh process, and refuses another vision encoder."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference import export
from notellm2_core.inference.embedder import Embedder
from notellm2_core.model.build import load_model
from notellm2_core.notes.note import Note
from notellm2_core.vision.encoder import VisionEncoder
from notellm2_core.vision.towers import TinyTower
from tests.support.released import NUM_NOTES, Release, png, write_release

IN_A_FRESH_PROCESS = """
import json, sys
import numpy as np, torch
from notellm2_core.inference.embedder import Embedder
torch.set_num_threads(1)
np.save(sys.argv[2], Embedder.from_pretrained(sys.argv[1]).embed(json.load(sys.stdin), batch_notes=4))
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def embedder(release: Release) -> Embedder:
    return Embedder.from_pretrained(release.model)


@pytest.fixture
def copy(release: Release, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release.model, tmp_path / "copy"))


def test_equal_to_the_pipelines_export(release: Release, embedder: Embedder, tmp_path: Path) -> None:
    """The export, from stored features, and the Embedder, with its own encoder, agree up to rounding."""
    export.main([*release.features(), "--inputs", "multimodal,image,text", "--out", str(tmp_path)])
    for inputs in ("multimodal", "image", "text"):
        exported = read_embeddings(tmp_path / inputs).vectors
        np.testing.assert_allclose(embedder.embed(release.notes, inputs), exported, atol=2e-6)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bits(release: Release, embedder: Embedder, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    vectors = embedder.embed(release.notes, batch_notes=4)
    torch.set_num_threads(threads)
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(release.model), str(tmp_path / "v.npy")]
    subprocess.run(command, input=json.dumps(release.notes), text=True, check=True, timeout=120)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), vectors)


def test_the_five_lines_of_the_readme(release: Release, embedder: Embedder) -> None:
    """The README's lines run unchanged. Their image file does not exist, so the note is embedded without it."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"DIR": str(release.model)}
    exec(lines, names)
    note = {"title": "Red kite", "topics": ["toys"], "content": "It flies."}
    assert names["vectors"].shape == (1, 16)
    np.testing.assert_array_equal(names["vectors"], embedder.embed([note]))


def test_images_come_as_path_bytes_or_image(release: Release, embedder: Embedder) -> None:
    """One image as text path, Path, bytes and PIL image gives the same vector."""
    path = release.source / "8.png"
    images = [str(path), path, path.read_bytes(), Image.open(path)]
    vectors = embedder.embed([{"title": "a", "image": image} for image in images])
    np.testing.assert_allclose(vectors, vectors[[0] * 4], atol=2e-6)
    assert np.abs(vectors[0] - embedder.embed([Note("", "a", (), "")])[0]).max() > 1e-4


def test_broken_images_are_counted_and_count_as_none(release: Release) -> None:
    """7 of 20 notes name no image (0, 3, ..., 18), and the file of one is broken."""
    embedder = Embedder.from_pretrained(release.model)
    embedder.embed(release.notes)
    assert embedder.image_statuses == {"ok": 12, "missing": 7, "broken": 1}
    wrong = [b"", b"no image", "not/there.png", "a\0b", Image.new("RGB", (0, 4))]
    vectors = embedder.embed([{"title": "a", "image": i} for i in (None, *wrong)])
    np.testing.assert_allclose(vectors, vectors[[0] * 6], atol=2e-6)
    assert embedder.image_statuses == {"ok": 12, "missing": 8, "broken": 4, "not_found": 2}


def test_a_truncated_jpeg_is_used_and_counted(release: Release, tmp_path: Path) -> None:
    """As a path, bytes and an opened image, also where its features are in memory already; the vectors are equal."""
    embedder = Embedder.from_pretrained(release.model)
    out = io.BytesIO()
    Image.open(release.source / "8.png").resize((64, 64)).save(out, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data := out.getvalue()[:-300])
    opened = Image.open(io.BytesIO(data))
    vectors = embedder.embed([{"title": "a", "image": i} for i in (data, data, tmp_path / "cut.jpg", opened, opened)])
    np.testing.assert_allclose(vectors, vectors[[0] * 5], atol=2e-6)
    assert embedder.image_statuses == {"truncated": 5}
    assert np.abs(vectors[0] - embedder.embed([{"title": "a"}])[0]).max() > 1e-4


def test_no_image_outside_the_folder_is_read(release: Release, tmp_path: Path) -> None:
    embedder = Embedder.from_pretrained(release.model)
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "inside").mkdir()
    embedder.embed([{"image": "../secret.png"}, {"image": str(tmp_path / "secret.png")}], folder=tmp_path / "inside")
    assert embedder.image_statuses == {"escapes": 2}


def test_windows_batches_and_order_change_nothing(
    release: Release, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedder.embed(release.notes)
    np.testing.assert_allclose(embedder.embed(release.notes, batch_notes=1), whole, atol=2e-6)  # windows of 8
    np.testing.assert_allclose(embedder.embed(release.notes[::-1], batch_notes=3)[::-1], whole, atol=2e-6)
    assert embedder.embed([]).shape == (0, 16) and whole.shape == (NUM_NOTES, 16)


def test_truncated_vectors_have_unit_length_again(release: Release, embedder: Embedder) -> None:
    whole, short = embedder.embed(release.notes), embedder.embed(release.notes, dim=5)
    np.testing.assert_allclose(short, whole[:, :5] / np.sqrt((whole[:, :5] ** 2).sum(1))[:, None], atol=1e-6)
    for dim in (0, 17, -1):
        with pytest.raises(ValueError, match=f"dim = {dim} must be between 1 and the model's 16"):
            embedder.embed(release.notes, dim=dim)


def test_wrong_options_are_refused_before_any_work(release: Release) -> None:
    """No image is read, and the error does not depend on the notes."""
    embedder = Embedder.from_pretrained(release.model)
    for notes in ([], release.notes):
        with pytest.raises(ValueError, match=r"dim = 17 must be between 1 and the model's 16"):
            embedder.embed(notes, dim=17)
        with pytest.raises(ValueError, match="batch_notes = 0 must be 1 or more"):
            embedder.embed(notes, batch_notes=0)
        with pytest.raises(ValueError, match="inputs = 'img'; choose one of multimodal, image, text"):
            embedder.embed(notes, "img")  # type: ignore[arg-type]
    assert not embedder.image_statuses


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("a text", "a note is a dict"),
        ({"titel": "a"}, "no field 'titel'"),
        ({"title": 3}, "title of a note is text"),
        ({"image": 3}, "image of a note is a path"),
        ({"topics": ["a", 3]}, "a topic is text"),
        ({"topics": 3}, "topics of a note are a list or a text, not int '3'"),
    ],
)
def test_wrong_notes_are_refused(embedder: Embedder, note: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder.embed([note])


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_model_that_gives_no_unit_vectors_is_refused(copy: Path, release: Release, value: float) -> None:
    """The same for all notes at once, and for the first dimensions alone."""
    embedder = Embedder.from_pretrained(copy)
    with torch.no_grad():
        for parameter in embedder.model.projector.parameters():
            parameter.fill_(value)
    for dim in (None, 5):
        with pytest.raises(ValueError, match=r"20 of 20 embeddings .*row 0 .*; the model gives NaN or zero there"):
            embedder.embed(release.notes, dim=dim)


def test_another_vision_encoder_is_refused(copy: Path) -> None:
    """A valid encoder that the model was not trained with has features of the same shape, but of another meaning."""
    own = VisionEncoder.from_pretrained(copy / "vision")
    tower = TinyTower()
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    other = VisionEncoder(own.architecture, tower)
    other.save_pretrained(copy / "vision")
    for load in (load_model, Embedder.from_pretrained):
        with pytest.raises(ValueError, match=f"trained with vision encoder {own.encoder_id}, and this one is"):
            load(copy)


def test_a_damaged_vision_folder_is_refused(copy: Path) -> None:
    """One changed weight, half a weight file and a missing folder are refused."""
    file = copy / "vision" / "model.safetensors"
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, file)
    with pytest.raises(ValueError, match="does not match its checksum"):
        Embedder.from_pretrained(copy)
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Embedder.from_pretrained(copy)
    shutil.rmtree(copy / "vision")
    with pytest.raises(ValueError, match="holds no vision encoder"):
        Embedder.from_pretrained(copy)


def test_a_model_that_names_no_encoder_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    assert config["encoder_id"] == json.loads((copy / "vision" / "config.json").read_text())["encoder_id"]
    (copy / "config.json").write_text(json.dumps(config | {"encoder_id": ""}))
    with pytest.raises(ValueError, match=r"does not name \(encoder_id\)"):
        Embedder.from_pretrained(copy)


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no folder; give the folder of a trained model"):
        Embedder.from_pretrained(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"nobody/nothing is no folder, and the hub does not provide it \(.*; give the"
    ):
        Embedder.from_pretrained("nobody/nothing")
