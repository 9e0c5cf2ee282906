"""Packages are complete in both layouts, have the table of their model's report, and overwrite nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notellm2_core.cli import main
from notellm2_core.inference.embedder import Embedder
from notellm2_core.inference.package import package
from tests.support.released import Release, write_release


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return write_release(tmp_path_factory.mktemp("release"))


def write_report(folder: Path, checkpoint: str) -> Path:
    folder.mkdir()
    (folder / "recall.md").write_text("| notellm2 | 12.3 |\n")
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"checkpoint": checkpoint}}))
    return folder


@pytest.mark.parametrize("layout", ["huggingface", "sentence-transformers"])
def test_a_package_is_the_model_with_its_table(
    release: Release, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = Path(shutil.copytree(release.model, tmp_path / "model")), tmp_path / "out"
    (model / "manifest.json").write_text(json.dumps({"fingerprint": "abc"}))
    report = write_report(tmp_path / "report", "abc")
    options = {"model": model, "out": out, "report": report, "layout": layout, "license": "mit"}
    main(["package", *(x for k, v in options.items() for x in (f"--{k}", str(v)))])
    files = json.loads(capsys.readouterr().out)["files"]
    assert set(files) >= {"config.json", "model.safetensors", "vision/config.json", "vision/model.safetensors",
                          "processor_config.json", "tokenizer.json", "README.md", "card.json"}  # fmt: skip
    assert "manifest.json" not in files and ("modules.json" in files) == (layout == "sentence-transformers")
    card, library = (out / "README.md").read_text(), layout.replace("huggingface", "transformers")
    assert "| notellm2 | 12.3 |" in card and "license: mit" in card and f"library_name: {library}\n" in card
    assert (out / "model.safetensors").samefile(model / "model.safetensors")  # no second copy of the weights
    assert not (out / "config.json").samefile(model / "config.json")  # editing the package edits no dataset
    vectors = Embedder.from_pretrained(out).embed(release.notes)
    np.testing.assert_array_equal(vectors, Embedder.from_pretrained(model).embed(release.notes))
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("FOLDER", str(out)), names)
    note = {"title": "Red kite", "topics": ["toys"], "content": "Flies well."}
    np.testing.assert_allclose(names["vectors"][0], Embedder.from_pretrained(out).embed([note])[0], atol=2e-6)
    package(out, tmp_path / "again", report)  # a package can be packaged, with its own report only
    assert "| notellm2 | 12.3 |" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(ValueError, match="measured checkpoint xyz"):
        package(tmp_path / "again", tmp_path / "wrong", write_report(tmp_path / "other", "xyz"))


def test_wrong_packages_are_refused(release: Release, tmp_path: Path) -> None:
    """A full OUT, no model, an unknown layout, no report, another model's report and a damaged encoder are refused."""
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        package(release.model, tmp_path / "full")
    with pytest.raises(ValueError, match="holds no model"):
        package(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="choose one of huggingface, sentence-transformers"):
        package(release.model, tmp_path / "out", layout="zip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"holds no recall\.md"):
        package(release.model, tmp_path / "out", tmp_path)
    model = Path(shutil.copytree(release.model, tmp_path / "model"))
    (model / "manifest.json").write_text(json.dumps({"fingerprint": "abc"}))
    with pytest.raises(ValueError, match="measured checkpoint xyz"):
        package(model, tmp_path / "out", write_report(tmp_path / "report", "xyz"))
    (model / "vision" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be loaded"):
        package(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model", "report"]


def test_a_report_and_its_model_must_both_name_the_checkpoint(release: Release, tmp_path: Path) -> None:
    report = write_report(tmp_path / "report", "abc")
    with pytest.raises(ValueError, match="does not say which checkpoint it is"):
        package(release.model, tmp_path / "out", report)  # the training command's folder is no dataset of the lake
    model = Path(shutil.copytree(release.model, tmp_path / "model"))
    (model / "manifest.json").write_text(json.dumps({"fingerprint": "abc"}))
    (report / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"measured checkpoint \(it does not say which\)"):
        package(model, tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("half", [True, False])
def test_an_incomplete_model_is_not_packaged(release: Release, name: str, half: bool, tmp_path: Path) -> None:
    """Each file that the model needs is cut in the middle, or missing."""
    model = Path(shutil.copytree(release.model, tmp_path / "model"))
    whole = (model / name).read_bytes()
    (model / name).unlink()
    if half:
        (model / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError):
        package(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
