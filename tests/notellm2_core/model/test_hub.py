"""Every way to load a model of the hub gives the requested revision. The tests use a cache instead of a network."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from notellm2_core.inference.embedder import Embedder
from notellm2_core.inference.sentence_transformer import NoteModule, sentence_transformer
from notellm2_core.model.card import HUB_NAME
from notellm2_core.model.hub import model_folder
from notellm2_core.notes.processor import MLRMProcessor
from tests.support.hub_cache import cache_model
from tests.support.released import save_release
from tests.support.world import tiny_config

NAME = "owner/model"
NOTES = [{"title": "Red kite", "content": "It flies well."}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1/ and v2/, with other weights and another limit of words, and cache/, where v1 is the hub's main revision."""
    root = tmp_path_factory.mktemp("hub")
    save_release(root / "v1")
    shutil.copytree(root / "v1", root / "v2")
    weights = load_file(root / "v2" / "model.safetensors")
    weights["projector.weight"] = weights["projector.weight"].flip(0).contiguous()
    save_file(weights, root / "v2" / "model.safetensors", {"format": "pt"})
    settings = json.loads((root / "v2" / "processor_config.json").read_text())
    settings["text"]["content_words"] = 7
    (root / "v2" / "processor_config.json").write_text(json.dumps(settings))
    cache_model(root / "cache", NAME, root / "v1")
    cache_model(root / "cache", NAME, root / "v2", "v2")
    return root


def test_the_requested_revision_is_loaded(root: Path) -> None:
    """The default is main. The vectors have the same bits as those of the folder."""
    v1, v2 = (Embedder.from_pretrained(root / v).embed(NOTES) for v in ("v1", "v2"))
    assert np.abs(v1 - v2).max() > 1e-3
    for revision, expected in ((None, v1), ("v2", v2)):
        options: dict[str, Any] = {"revision": revision, "local_files_only": True}
        actual = Embedder.from_pretrained(NAME, cache_dir=root / "cache", **options).embed(NOTES)
        np.testing.assert_array_equal(actual, expected)
        sentence = sentence_transformer(NAME, device="cpu", cache_folder=str(root / "cache"), **options)
        np.testing.assert_allclose(sentence.encode(NOTES), expected, atol=2e-6)
        words = AutoProcessor.from_pretrained(
            NAME, cache_dir=root / "cache", **options
        ).note_tokenizer.text.content_words
        assert words == {None: tiny_config().text.content_words, "v2": 7}[revision]


def test_every_option_reaches_the_client(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def client(name: str, **options: Any) -> str:
        calls.append(options)
        return str(root / "v1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", client)
    options: dict[str, Any] = {"revision": "v2", "token": "t", "local_files_only": True}
    Embedder.from_pretrained(NAME, "cpu", cache_dir="c", **options)
    NoteModule.load(NAME, cache_folder="c", **options)
    sentence_transformer(NAME, "cpu", cache_folder="c", **options)
    assert calls == [{"cache_dir": "c", **options}] * 3
    with pytest.raises(TypeError, match="revison"):
        Embedder.from_pretrained(root / "v1", revison="v2")


def test_a_missing_revision_is_one_sentence(root: Path) -> None:
    for load in (model_folder, Embedder.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{NAME} is no folder, and the hub does not provide it \(.*model\.$"):
            load(NAME, cache_dir=root / "cache", revision="v3")
    with pytest.raises(ValueError, match=rf"^{NAME} gives no processor \(.*model\.$"):
        MLRMProcessor.from_pretrained(NAME, cache_dir=root / "cache", revision="v3")


def test_hub_names() -> None:
    assert all(HUB_NAME.fullmatch(name) for name in ("owner/model", "Qwen/Qwen2.5-0.5B", "a_b/c-d"))
    for name in ("model", "./model", "../model", "/owner/model", "a/b/c", "package:smollm2"):
        assert not HUB_NAME.fullmatch(name)
        with pytest.raises(ValueError, match="is no folder; give the folder of a trained model, or a hub name"):
            model_folder(name)
