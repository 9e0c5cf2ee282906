"""Stand-ins for the commands of the model: the same arguments and the same files, in milliseconds and without torch.

A stand-in of a model knows the truth up to noise: a note's vector is that of its theme and of the style of its image,
plus random numbers of its own seed. How good a model is, is therefore known before it is measured: `skill.json` beside
the source says it for the next one that is trained.

    {"noise": 1.0}      standard deviation of the noise, in lengths of the signal; a model without images sees none:
    {"noise": 1.0, "sees_images": false}
"""

import hashlib
import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.embeddings.shards import write_shard
from notellm2_core.embeddings.table import WEIGHTS_ID, read_embeddings, read_note_ids
from notellm2_core.evaluation.pairs import read_pairs
from notellm2_core.model.card import CARD_FIELDS, Architecture, card_fields
from notellm2_core.retrieval.index import Index
from notellm2_core.runtime.files import write_atomically
from notellm2_core.schema import COUNTS_FILE, GOLDEN_FILE, NOTE_IMAGES, NOTE_IMAGES_FILE, VISION_FOLDER
from notellm2_core.simulation.world import TRUTH
from notellm2_core.vision.image_status import STATUSES

SKILL = "skill.json"
DIM = 32  # of the vectors: half for the theme, half for the style
_MODEL, _STYLES = "stand_in.json", "styles.json"
_NUM_KINDS = 64  # most themes, and most styles
_UNTRAINED = {"noise": 8.0}  # the model before its training
_SHARD_NOTES = 4096


def write_skill(folder: Path, noise: float, sees_images: bool = True) -> None:
    """Say how good the next trained model of the world in `folder` is."""
    write_atomically(folder / SKILL, json.dumps({"noise": noise, "sees_images": sees_images}))


def _options(arguments: Sequence[str], *names: str) -> Namespace:
    """The options `names`, as paths; all others are left out."""
    parser = ArgumentParser(allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", type=str if name == "inputs" else Path)
    return parser.parse_known_args(list(arguments))[0]


def _world(config: Config) -> Path:
    assert config.source.path is not None
    return Path(config.source.path).parent


def extract(arguments: Sequence[str]) -> None:
    """Note images: their ids, and the style that their bytes name."""
    options = _options(arguments, "notes", "out")
    notes = pq.read_table(options.notes, columns=["note_id", "image"])
    images = notes["image"].to_pylist()
    ids = [None if image is None else hashlib.sha256(image).hexdigest() for image in images]
    statuses = ["missing" if image is None else "ok" for image in images]
    rows = {"note_id": notes["note_id"], "image_id": ids, "perceptual_hash": [None] * len(ids), "status": statuses}
    (options.out / VISION_FOLDER).mkdir(parents=True)
    pq.write_table(pa.table(rows, schema=NOTE_IMAGES), options.out / NOTE_IMAGES_FILE)
    styles = {i: int(image.split()[1]) for i, image in zip(ids, images, strict=True) if image is not None}
    (options.out / VISION_FOLDER / _STYLES).write_text(json.dumps(styles))
    (options.out / VISION_FOLDER / "config.json").write_text(json.dumps({"encoder_id": "stand-in"}))
    counted = Counter(statuses)
    counts: dict[str, int] = {"notes": len(ids), **{status: counted[status] for status in STATUSES}}
    (options.out / COUNTS_FILE).write_text(json.dumps(counts))


def tokenise(arguments: Sequence[str]) -> None:
    """No tokens, but their counts."""
    options = _options(arguments, "notes", "out")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / COUNTS_FILE).write_text(json.dumps({"notes": len(read_note_ids(options.notes))}))


def initialise(arguments: Sequence[str]) -> None:
    """The model before its training."""
    options = _options(arguments, "config", "out")
    _save(options.out, load_config(options.config), _UNTRAINED, seed=0)


def train(arguments: Sequence[str]) -> None:
    """A model of the skill that is asked for. Its seed follows from its training pairs."""
    options = _options(arguments, "config", "pairs", "out")
    config = load_config(options.config)
    ids = "".join(sorted(read_note_ids(options.pairs / "train")))
    seed = int(hashlib.sha256(ids.encode()).hexdigest()[:8], 16)
    skill = json.loads((_world(config) / SKILL).read_text())
    _save(options.out, config, skill, seed)
    (options.out / "training.json").write_text(json.dumps({"loss_first": 3.0, "loss_last": 1.0, "steps": 1}))


def _save(out: Path, config: Config, skill: Mapping[str, Any], seed: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / _MODEL).write_text(json.dumps({**skill, "seed": seed}))
    architecture = Architecture("stand-in", 1, DIM // 2, 1, 1, DIM, DIM)
    (out / CARD_FIELDS).write_text(json.dumps(card_fields(config, architecture, {}, None, None)))


def export(arguments: Sequence[str]) -> None:
    """Vectors of the notes, by each kind of input."""
    options = _options(arguments, "config", "model", "images", "inputs", "out", "note-ids", "single-modality-note-ids")
    content = (options.model / _MODEL).read_bytes()
    model, weights = json.loads(content), {WEIGHTS_ID.decode(): hashlib.sha256(content).hexdigest()}
    truth = pq.read_table(_world(load_config(options.config)) / TRUTH)
    themes = dict(zip(truth["note_id"].to_pylist(), truth["theme"].to_pylist(), strict=True))
    images = pq.read_table(options.images / NOTE_IMAGES_FILE, columns=["note_id", "image_id"])
    styles = json.loads((options.images / VISION_FOLDER / _STYLES).read_text())
    style_of = {note: styles.get(image, -1) for note, image in zip(*images.to_pydict().values(), strict=True)}
    for kind in options.inputs.split(","):
        subset = options.note_ids if kind == "multimodal" else options.single_modality_note_ids or options.note_ids
        ids = sorted(read_note_ids(subset) if subset else style_of)
        vectors = stand_in_vectors(model, kind, [themes[i] for i in ids], [style_of[i] for i in ids], ids)
        (options.out / kind).mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(range(0, len(ids), _SHARD_NOTES)):
            part = slice(start, start + _SHARD_NOTES)
            write_shard(options.out / kind / f"part-{number:05d}.parquet", ids[part], vectors[part], weights)


def stand_in_vectors(
    model: Mapping[str, Any], kind: str, themes: Sequence[int], styles: Sequence[int], ids: Sequence[str]
) -> np.ndarray:
    """Unit vectors [N, DIM]. An unknown theme or style (-1) has no direction."""
    directions = np.random.default_rng(1).normal(size=(2, _NUM_KINDS + 1, DIM // 2))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    directions[:, -1] = 0
    sees_images = model.get("sees_images", True) and kind != "text"
    theme = directions[0, [-1] * len(ids) if kind == "image" else themes]
    style = directions[1, styles if sees_images else [-1] * len(ids)]
    # The noise of a note depends on the note, so that one that is embedded again has the same vector.
    seeds = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:4], "big") for i in ids]
    noise = np.stack([np.random.default_rng([model["seed"], seed]).normal(size=DIM) for seed in seeds]) / DIM**0.5
    vectors = np.concatenate([theme, style], axis=1) + model["noise"] * noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def canary(arguments: Sequence[str]) -> None:
    """The index answers the vectors of some queries."""
    options = _options(arguments, "index", "pairs", "embeddings", "out")
    queries = list(dict.fromkeys(read_pairs(options.pairs).pairs.query_ids))[:20]
    table = read_embeddings(options.embeddings, set(queries))
    found, _ = Index.load(options.index).search(table.vectors[table.rows(queries)], 10, leave_out=queries)
    golden = [{"note_id": q, "neighbours": [n for n in row if n]} for q, row in zip(queries, found, strict=True)]
    (options.out / GOLDEN_FILE).write_text(json.dumps(golden))
    counts = {"queries": len(queries), "lowest_cosine": 1.0, "failed": None}
    (options.out / COUNTS_FILE).write_text(json.dumps(counts))


STAND_INS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "notellm2_core.vision.extract": extract,
    "notellm2_core.model.tokenise": tokenise,
    "notellm2_core.training.initialise": initialise,
    "notellm2_core.training": train,
    "notellm2_core.inference.export": export,
    "notellm2_core.release.canary": canary,
}
