"""Small training data on disk (random notes, pairs, images and features), and the tiny models."""

import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from notellm2_core.config.settings import Config
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.notes.inputs import ImageFolders, NoteInputs
from notellm2_core.notes.processor import MLRMProcessor
from notellm2_core.schema import NOTE_IMAGES, NOTES, RELATED_PAIRS
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset
from notellm2_core.training.launch import Paths
from notellm2_core.training.run import run
from notellm2_core.vision.encoder import load_vision_encoder
from notellm2_core.vision.feature_store import FeatureStore

WORDS = ["tea", "cup", "red", "sky", "boat", "lamp", "fern", "moss", "opal", "quilt", "drum", "kite", "plum", "sand"]


@dataclass(frozen=True)
class World:
    """The folders of the training data."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    @property
    def inputs(self) -> NoteInputs:
        """Without image folders: stored features are read."""
        return NoteInputs(*map(self.path, ("notes", "images", "store")))

    @property
    def with_image_folders(self) -> NoteInputs:
        return replace(self.inputs, image_folders=ImageFolders(self.path("notes"), self.root))

    def paths(self, folder: Path) -> Paths:
        """The paths of a training run, with work/ and out/ below `folder`."""
        return Paths(self.with_image_folders, self.path("pairs"), folder / "work", folder / "out")


def write_world(root: Path, num_pairs: int = 32, num_validation: int = 6, complete: bool = False) -> World:
    """2 * (num_pairs + num_validation) notes, each in one pair.

    Every 8th note has no image, and every 7th no text; in a `complete` world, all have both.
    """
    rng = np.random.default_rng(0)
    world = World(root)
    num_notes = 2 * (num_pairs + num_validation)
    ids = [f"n{i:03d}" for i in range(num_notes)]
    images = [None if i % 8 == 5 and not complete else png_of(i) for i in range(num_notes)]
    image_ids = [None if data is None else hashlib.sha256(data).hexdigest() for data in images]

    def text(i: int, num_words: int) -> str:
        return "" if i % 7 == 3 and not complete else " ".join(rng.choice(WORDS, num_words))

    rows = [
        {
            "note_id": n,
            "title": text(i, 3),
            "topics": [text(i, 1)],
            "content": text(i, int(rng.integers(2, 9))),
            "image": images[i],
        }
        for i, n in enumerate(ids)
    ]
    write(world.path("notes") / "part-0.parquet", pa.Table.from_pylist(rows, schema=NOTES))
    pairs = [
        {"query_id": ids[2 * i], "target_id": ids[2 * i + 1], "score": 1.0, "num_users": 3, "rank": 1}
        for i in range(num_pairs + num_validation)
    ]
    write(world.path("pairs") / "train/part-0.parquet", pa.Table.from_pylist(pairs[:num_pairs], schema=RELATED_PAIRS))
    validation = pa.Table.from_pylist(pairs[num_pairs:], schema=RELATED_PAIRS)
    write(world.path("pairs") / "validation/part-0.parquet", validation)
    encoder = load_vision_encoder(tiny_config().model.vision)
    encoder.save_pretrained(world.path("images") / "vision")
    statuses = ["missing" if i is None else "ok" for i in image_ids]
    table = pa.table(
        [pa.array(c, pa.string()) for c in (ids, image_ids, [None] * len(ids), statuses)], schema=NOTE_IMAGES
    )
    write(world.path("images") / "note_images.parquet", table)
    stored_ids = [i for i in image_ids if i is not None]
    store = FeatureStore.create(world.path("store") / encoder.encoder_id, encoder.num_patches, encoder.width)
    patches = rng.normal(size=(len(stored_ids), encoder.num_patches, encoder.width))
    store.append(stored_ids, patches, patches.mean(axis=1), [None] * len(stored_ids))
    return world


def png_of(seed: int) -> bytes:
    """An image of random blocks, as PNG."""
    blocks = np.random.default_rng([seed, 7]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((40, 40), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def train(world: World, config: Config, folder: Path) -> Path:
    """Train in this process, with work/ and out/ below `folder`. Returns out/."""
    run(config, world.paths(folder))
    return folder / "out"


def pair_dataset(world: World, processor: MLRMProcessor, cache: Path) -> PairDataset:
    """The world as a dataset of pairs, with stored features."""
    return load_pair_dataset(InputReader(processor, world.inputs), world.path("pairs"), cache)


def tiny_config(training: dict[str, Any] | None = None, **model: Any) -> Config:
    """The tiny models; `training` and `model` override settings of these sections."""
    tree: dict[str, Any] = {
        "name": "test",
        "text": {"title_words": 8, "content_words": 16, "topic_words": 8},
        "model": {
            "llm": {"name": "tiny"},
            "vision": {"library": "tiny", "name": "tiny", "pretrained": None},
            "connector": {
                "num_queries": 2, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64
            },
            "projection_dim": 16,
            **model,
        },
        "training": {"num_steps": 8, "batch_pairs": 8, "precision": "fp32", "learning_rate": 1e-3, **(training or {})},
    }  # fmt: skip
    return Config(**tree)


def write_config(path: Path, config: Config) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
