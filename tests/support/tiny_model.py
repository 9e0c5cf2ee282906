"""A model that takes a tenth of a second to build, with notes and features for it."""

from pathlib import Path
from typing import Any

import numpy as np

from notellm2_core.config.settings import Config
from notellm2_core.model.build import build_model
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.notes.note import Note
from notellm2_core.notes.processor import InputKind, MLRMProcessor, NoteBatch

NUM_PATCHES, VISION_WIDTH = 16, 32  # the tiny vision encoder's
SHORT = Note("short", "A red kite", ("toys",), "Flies well.")
LONG = Note("long", "Ten walks around the lake", ("travel", "lakes"), "Start early and take the northern path. " * 4)
EMPTY = Note("empty", "", (), "")


def tiny_config(method: str = "notellm2", seed: int = 0, connector: str = "qformer", **llm: Any) -> Config:
    sizes = {"num_queries": 4, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    model = {"method": method, "llm": {"name": "tiny", **llm}, "vision": {"library": "tiny"}}
    model["connector"] = {"kind": connector, **sizes}
    return Config(name="tiny", seed=seed, model=model)


def tiny_model(method: str = "notellm2", seed: int = 0, **settings: Any) -> tuple[MLRMModel, MLRMProcessor]:
    return build_model(tiny_config(method, seed, **settings), Path("unused"))


def features(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random patches [n, L, h_v] and global features [n, h_v] in fp16, the feature store's precision."""
    rng = np.random.default_rng(seed)
    patches = rng.standard_normal((n, NUM_PATCHES, VISION_WIDTH)).astype(np.float16)
    return patches, rng.standard_normal((n, VISION_WIDTH)).astype(np.float16)


def batch_of(processor: MLRMProcessor, notes: list[Note], inputs: InputKind = "multimodal") -> NoteBatch:
    """The notes as a batch; every note has an image, with random features."""
    patches, global_feature = features(len(notes))
    return processor.collate(
        [processor.encode(n, inputs) for n in notes], patches, global_feature, np.ones(len(notes), dtype=bool)
    )
