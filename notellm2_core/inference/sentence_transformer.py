"""The model as a sentence-transformers module, so that `encode`, `similarity` and its evaluators work on it.

An input is a text, which is read as a note's content; a PIL image, which is a note with that image alone; or a dict
with title, topics, content and image. The vectors are those of `Embedder`.

    model = sentence_transformer("FOLDER")
    vectors = model.encode([{"title": "Red kite", "image": "kite.jpg"}, "flies well"])

Since version 6, `SentenceTransformer(FOLDER)` imports classes from outside its own package only with
trust_remote_code=True, even if the class is installed and the folder holds no code. `sentence_transformer` passes it
the module instead, which needs no such trust.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers
from notellm2_core.schema import VISION_FOLDER

# isort: split
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn import functional

from notellm2_core.inference.embedder import Embedder
from notellm2_core.model.hub import model_folder
from notellm2_core.notes.note import Note, NoteLike, NoteWithImage, as_note
from notellm2_core.notes.processor import NoteBatch

_UNREAD = ("backend", "model_kwargs", "processor_kwargs", "tokenizer_kwargs", "config_kwargs")


def sentence_transformer(
    name: str | Path,
    device: str | None = None,
    *,
    token: bool | str | None = None,
    cache_folder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    **settings: Any,
) -> SentenceTransformer:
    """The model of a folder or hub name, with the arguments of SentenceTransformer. `settings`: e.g. truncate_dim.

    `half()` and `bfloat16()` change its precision; the vision encoder stays in fp32. Raises ValueError for a setting
    that has no effect.
    """
    _require_effect(settings)
    module = NoteModule.load(
        str(name), token=token, cache_folder=cache_folder, revision=revision, local_files_only=local_files_only
    )
    return SentenceTransformer(modules=[module], device=device, **settings)


def _require_effect(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of SentenceTransformer that nothing reads here."""
    unread = [name for name in _UNREAD if settings.get(name) not in (None, "torch")]
    if unread:
        raise ValueError(
            f"{', '.join(unread)} has no effect: PyTorch loads the model, in fp32; .half() or .bfloat16() of the "
            "loaded model change its precision."
        )


class NoteModule(InputModule):
    """The whole model as the first and only module. Its vision encoder is no submodule, so it stays in fp32."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.model, self.tokenizer = embedder.model, embedder.processor.tokenizer
        self._embedder = embedder

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Notes -> the fields of a NoteBatch. `prompt` comes before a text's content.

        Raises ValueError for a note with an unknown or invalid field.
        """
        notes = [_as_note(i, prompt or "") for i in inputs]
        self._embedder.encoder.to(next(self.model.parameters()).device)
        features, image_ids = self._embedder.read_images(notes, "multimodal")
        distinct = list(dict.fromkeys(i for i in image_ids if i is not None))
        rows = np.array([-1 if i is None else distinct.index(i) for i in image_ids])  # -1: set to zero by collate
        loaded = features.load(distinct)
        batch = self._embedder.processor.collate(
            [self._embedder.processor.encode(n.note) for n in notes],
            loaded.patches[rows] if distinct else None,
            loaded.global_feature[rows] if distinct else None,
            rows >= 0,
        )
        return {f.name: getattr(batch, f.name) for f in fields(batch)}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [N, d], unit vectors in fp32."""
        batch = NoteBatch(**{f.name: features[f.name] for f in fields(NoteBatch)})
        features["sentence_embedding"] = functional.normalize(self.model(batch).multimodal.float(), dim=-1)
        return features

    def get_embedding_dimension(self) -> int:
        return int(self.model.config.projection_dim)

    def save(self, output_path: str, *_: Any, safe_serialization: bool = True, **__: Any) -> None:
        """Model, processor and vision encoder, as `save_model` lays them out. Raises ValueError for pickled weights."""
        if not safe_serialization:
            raise ValueError(
                "safe_serialization = False would write a pickle; this model is saved as safetensors only."
            )
        self.model.save_pretrained(output_path)
        self._embedder.processor.save_pretrained(output_path)
        self._embedder.encoder.save_pretrained(Path(output_path) / VISION_FOLDER)

    @classmethod
    def load(  # the parameters are those of sentence-transformers' Module
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **settings: Any,
    ) -> "NoteModule":
        """The model of a folder or hub name, in fp32 on the CPU; SentenceTransformer moves it to its device."""
        _require_effect(settings)
        folder = model_folder(
            model_name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_folder,
            local_files_only=local_files_only,
        )
        return cls(Embedder.from_pretrained(folder / subfolder, device="cpu"))


def _as_note(value: str | Image.Image | NoteLike, prompt: str) -> NoteWithImage:
    if isinstance(value, str):
        return NoteWithImage(Note("", "", (), prompt + value))
    if isinstance(value, Image.Image):
        return NoteWithImage(Note("", "", (), ""), value)
    return as_note(value)
