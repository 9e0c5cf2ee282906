"""The model inside sentence-transformers has the vectors of `Embedder`, and works with the library's functions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from notellm2_core.embeddings.table import truncate_dims
from notellm2_core.inference.embedder import Embedder
from notellm2_core.inference.package import package
from notellm2_core.inference.sentence_transformer import sentence_transformer
from tests.support.released import Release, write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def packaged(release: Release) -> Path:
    package(release.model, release.root / "package", layout="sentence-transformers")
    return release.root / "package"


@pytest.fixture(scope="module")
def model(packaged: Path) -> SentenceTransformer:
    return sentence_transformer(packaged, device="cpu")


@pytest.fixture(scope="module")
def embedder(release: Release) -> Embedder:
    return Embedder.from_pretrained(release.model)


def test_notes_texts_and_images(release: Release, model: SentenceTransformer, embedder: Embedder) -> None:
    """A dict is a note, a text is a note's content, an image is a note without text; batches do not matter."""
    np.testing.assert_allclose(model.encode(release.notes, batch_size=3), embedder.embed(release.notes), atol=2e-6)
    texts = ["red ship", "tea on an old hill", "kite.jpg", ""]
    expected = embedder.embed([{"content": t} for t in texts])
    np.testing.assert_allclose(model.encode(texts), expected, atol=2e-6)
    np.testing.assert_allclose(model.encode(texts[1]), expected[1], atol=2e-6)  # one alone
    np.testing.assert_allclose(model.encode("hill", prompt="tea on an old "), expected[1], atol=2e-6)
    image = Image.open(release.source / "8.png")
    np.testing.assert_allclose(model.encode([image]), embedder.embed([{"image": image}]), atol=2e-6)
    with pytest.raises(ValueError, match="no field 'titel'"):
        model.encode([{"titel": "a"}])


def test_the_folder_loads_with_trust_remote_code(release: Release, packaged: Path, model: SentenceTransformer) -> None:
    """sentence-transformers imports an installed class of another package only with trust_remote_code."""
    loaded = SentenceTransformer(str(packaged), trust_remote_code=True, device="cpu", local_files_only=True)
    np.testing.assert_array_equal(loaded.encode(release.notes), model.encode(release.notes))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(packaged), device="cpu", local_files_only=True)


def test_similarity_and_fewer_dimensions(
    release: Release, packaged: Path, model: SentenceTransformer, embedder: Embedder
) -> None:
    vectors = embedder.embed(release.notes)
    similarity = model.similarity(model.encode(release.notes), vectors).numpy()
    np.testing.assert_allclose(similarity, vectors @ vectors.T, atol=1e-5)
    assert model.get_embedding_dimension() == 16
    short = sentence_transformer(packaged, device="cpu", truncate_dim=4)
    assert short.get_embedding_dimension() == 4
    np.testing.assert_allclose(short.encode(release.notes), vectors[:, :4], atol=2e-6)
    unit = short.encode(release.notes, normalize_embeddings=True)
    np.testing.assert_allclose(unit, truncate_dims(vectors, 4), atol=1e-5)


def test_precision(release: Release, packaged: Path, embedder: Embedder, tmp_path: Path) -> None:
    """The frozen vision encoder stays as it was trained with, so that a saved model can be loaded again."""
    vectors = embedder.embed(release.notes)
    for make in ("half", "bfloat16"):
        model = getattr(sentence_transformer(packaged, device="cpu"), make)()
        np.testing.assert_allclose(model.encode(release.notes), vectors, atol=0.02)
    model.save_pretrained(str(tmp_path), create_model_card=False)
    np.testing.assert_allclose(sentence_transformer(tmp_path).encode(release.notes), vectors, atol=0.02)


@pytest.mark.parametrize("settings", [{"backend": "onnx"}, {"model_kwargs": {"torch_dtype": "float16"}}])
def test_settings_without_effect_are_refused(packaged: Path, settings: dict[str, Any]) -> None:
    message = rf"^{min(settings)} has no effect: PyTorch loads the model, in fp32; \.half\(\)"
    with pytest.raises(ValueError, match=message):
        sentence_transformer(packaged, device="cpu", **settings)
    with pytest.raises(ValueError, match=message):
        SentenceTransformer(str(packaged), trust_remote_code=True, local_files_only=True, **settings)
    sentence_transformer(packaged, device="cpu", backend="torch", model_kwargs=None)


def test_an_evaluator_finds_each_text_first(model: SentenceTransformer) -> None:
    """Queries that are their own documents are at rank 1: accuracy@1 is 1, and 1/2 if half have another target."""
    corpus = {str(n): f"a note of {word}" for n, word in enumerate(["tea", "ships", "hills", "kites"])}
    own = InformationRetrievalEvaluator(corpus, corpus, {n: {n} for n in corpus}, name="own", accuracy_at_k=[1])
    assert own(model)["own_cosine_accuracy@1"] == 1
    half = {n: {n if int(n) < 2 else str(5 - int(n))} for n in corpus}
    swapped = InformationRetrievalEvaluator(corpus, corpus, half, name="half", accuracy_at_k=[1])
    assert swapped(model)["half_cosine_accuracy@1"] == 0.5


def test_saved_by_the_library_and_loaded_again(release: Release, model: SentenceTransformer, tmp_path: Path) -> None:
    model.save_pretrained(str(tmp_path), create_model_card=False)
    again = sentence_transformer(tmp_path, device="cpu")
    np.testing.assert_array_equal(again.encode(release.notes), model.encode(release.notes))
    with pytest.raises(ValueError, match="safetensors only"):
        model.save_pretrained(str(tmp_path), create_model_card=False, safe_serialization=False)
