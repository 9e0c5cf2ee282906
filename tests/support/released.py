"""A small source, and a model saved for it as the training command saves one."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from notellm2_core.model.build import build_model
from notellm2_core.schema import NOTES
from notellm2_core.training.state.save import save_model
from notellm2_core.vision import extract as features
from notellm2_core.vision.encoder import load_vision_encoder
from tests.support.world import tiny_config, write_config

NUM_NOTES = 20
TRAINING_SUMMARY = {"steps": 8, "num_train_pairs": 32, "num_train_notes": 64, "num_validation_pairs": 6,
         "validation_recall_at_10": 0.25}  # fmt: skip


@dataclass(frozen=True)
class Release:
    """Folders: source/ (notes.parquet and images), model/."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.source / "notes.parquet").to_pylist()

    @property
    def notes(self) -> list[dict[str, Any]]:
        """The notes as `Embedder` takes them, with absolute image paths."""
        return [
            {"title": r["title"], "topics": r["topics"], "content": r["content"],
             "image": r["image_path"] and str(self.source / r["image_path"])}
            for r in self.rows
        ]  # fmt: skip

    def features(self) -> list[str]:
        """Runs the pipeline's features command. Returns the options of the export command for its output."""
        config = write_config(self.root / "config.yaml", tiny_config())
        parts = {"config": config, "notes": self.root / "notes", "store": self.root / "store"}
        common = [x for name, path in parts.items() for x in (f"--{name}", str(path))]
        features.main([*common, "--source", str(self.source), "--out", str(self.root / "images")])
        return [*common, "--images", str(self.root / "images"), "--model", str(self.model)]


def write_release(root: Path) -> Release:
    """NUM_NOTES notes of many lengths. Every third has no image, n04's is broken, n07 and n08 have the same."""
    release, rng = Release(root), np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    (root / "source").mkdir(parents=True), (root / "notes").mkdir()
    for n in range(NUM_NOTES):
        if n % 3:
            (root / "source" / f"{n}.png").write_bytes(b"no image" if n == 4 else png(8 if n == 7 else n))
        words = [str(w) for w in rng.choice(["red", "old", "ship", "tea", "hill"], rng.integers(0, 20))]
        rows.append(
            {"note_id": f"n{n:02d}", "title": f"note {n}", "topics": words[:2], "content": " ".join(words),
             "image_path": f"{n}.png" if n % 3 else None}
        )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=NOTES)
    pq.write_table(table, root / "notes" / "notes.parquet")
    pq.write_table(table, root / "source" / "notes.parquet")
    save_release(root / "model")
    return release


def save_release(out: Path) -> None:
    """Save a model as the training command does."""
    config = tiny_config()
    model, processor = build_model(config, out.parent / "cache")
    encoder = load_vision_encoder(config.model.vision)
    encoder.save_pretrained(out.parent / "vision")
    save_model(model, processor, out.parent / "vision", out, config, ("2025-01-05", "2025-01-19"), TRAINING_SUMMARY)


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()
