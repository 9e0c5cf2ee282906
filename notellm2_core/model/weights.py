"""What identifies a model: the files that determine its vectors. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from notellm2_core.lake import lake
from notellm2_core.runtime.files import sha256_of
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.schema import VISION_FOLDER


def weight_files(model_dir: Path) -> dict[str, str]:
    """Name -> checksum of the files of a model that determine its vectors: weights, configuration, tokenizer."""
    records = ("training.json", "card.json", lake.MANIFEST)
    files = (p for p in sorted(model_dir.iterdir()) if p.suffix in (".safetensors", ".json") and p.name not in records)
    return {p.name: sha256_of(p) for p in files}


def weights_id(weights: Mapping[str, str], encoder_id: str) -> str:
    """Identifies a model, wherever it lies: its weights, of `weight_files`, and its vision encoder."""
    return fingerprint(
        [sorted(checksum for name, checksum in weights.items() if name.endswith(".safetensors")), encoder_id]
    )


def saved_weights_id(model_dir: Path) -> str:
    """The `weights_id` of a model's folder, from the bytes of its files. Raises ValueError where it holds no model."""
    try:
        encoder_id = json.loads((model_dir / VISION_FOLDER / "config.json").read_text())["encoder_id"]
        return weights_id(weight_files(model_dir), str(encoder_id))
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{model_dir} holds no model ({e!r})") from None
