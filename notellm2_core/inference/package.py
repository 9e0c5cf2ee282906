"""Packages a trained model for publication: weights, vision encoder, processor, and a README with the recall table.

Layouts: huggingface (`AutoModel`, `Embedder`), and the same with the two files that make it a sentence-transformers
model. Weights are hard links if the file system has them; everything else is copied.
"""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

from notellm2_core.lake.lake import MANIFEST
from notellm2_core.model.build import load_encoder, load_model
from notellm2_core.model.card import CARD, CARD_FIELDS, Layout, model_card, read_card_fields
from notellm2_core.runtime.files import link_or_copy, replaced_folder, write_atomically

_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "notellm2_core.inference.sentence_transformer.NoteModule"}]
_SENTENCE_FILES: dict[str, Any] = {
    "modules.json": _MODULES,
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}
_NOT_COPIED = (MANIFEST, CARD, *_SENTENCE_FILES)


def package(
    model: Path, out: Path, report: Path | None = None, layout: Layout = "huggingface", license: str | None = None
) -> dict[str, Any]:
    """Assemble the new folder `out` from a trained model's folder. Returns its files' sizes in bytes by name.

    report: the dataset of `eval_recall`, whose table goes into the README. license: replaces the configuration's. The
    package's card.json names its checkpoint, so that a package made from this one accepts only the same report.
    Raises ValueError if `out` is not empty, the model is incomplete, its vision encoder is damaged or another one, or
    the report is not of this model.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout = {layout!r}; choose one of {', '.join(get_args(Layout))}.")
    _require_new(out)
    if not (model / "config.json").exists():
        raise ValueError(f"{model} holds no model (no config.json); give the folder of a trained model.")
    load_model(model), load_encoder(model)  # raises if the model cannot be loaded
    fields = read_card_fields(model)
    fields["license"] = license or fields["license"]
    fields["checkpoint"] = _manifest(model).get("fingerprint", fields.get("checkpoint"))
    recall = None if report is None else _recall_of(report, model, fields["checkpoint"])

    with replaced_folder(out) as new:
        for source in sorted(p for p in model.rglob("*") if p.is_file()):
            name = source.relative_to(model)
            if str(name) in _NOT_COPIED or any(part.startswith(".") for part in name.parts):
                continue
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (link_or_copy if source.suffix == ".safetensors" else shutil.copyfile)(source, new / name)
        write_atomically(new / CARD_FIELDS, json.dumps(fields, indent=1))
        write_atomically(new / CARD, model_card(fields, recall, layout))
        if layout == "sentence-transformers":
            for file_name, content in _SENTENCE_FILES.items():
                write_atomically(new / file_name, json.dumps(content, indent=1))
        _require_new(out)  # another process may have filled it meanwhile
    return {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}


def _require_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty; name a new folder.")


def _recall_of(report: Path, model: Path, checkpoint: str | None) -> str:
    """The recall table in the folder `report`. Raises ValueError if it is missing or not of `checkpoint`."""
    file = report / "recall.md"
    if not file.is_file():
        raise ValueError(f"{report} holds no recall.md; give --report the folder of eval_recall.")
    if checkpoint is None:
        raise ValueError(
            f"{model} does not say which checkpoint it is, so no report can be checked against it: package the "
            f"pipeline's dataset checkpoint (it has a {MANIFEST}), or leave --report out."
        )
    measured = _manifest(report).get("inputs", {}).get("checkpoint")
    if measured != checkpoint:
        raise ValueError(
            f"the report {report} measured checkpoint {measured or '(it does not say which)'}, not {model}, which is "
            f"{checkpoint}: give --report the eval_recall of this model."
        )
    return file.read_text()


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the dataset in `folder`; {} if it is no dataset of the lake."""
    file = folder / MANIFEST
    manifest: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return manifest
