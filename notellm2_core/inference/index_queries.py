"""What an index is searched for: a stored note, a text, an image, or a table of embeddings."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.retrieval.index import Index
from notellm2_core.retrieval.stored import stored_vector
from notellm2_core.vision.image_status import MEANINGS, UNUSABLE

_BLOCK_HITS = 1_000_000  # of the queries that are searched together


def stored_note(index: Index, note_id: str, embeddings: Path | None = None) -> Embeddings:
    """The embedding of one note: as the index holds it, or from the table `embeddings`, which may have other notes.

    Raises ValueError if the note is missing, or if the index has compressed the vectors and there is no table.
    """
    if embeddings is not None:
        table = read_embeddings(embeddings, {note_id})
        table.rows([note_id])  # raises if it is missing
        return table
    if note_id not in index.rows:
        raise ValueError(f"{index.name} holds no note {note_id!r}; for another note, name its table by --embeddings.")
    vector = stored_vector(index.faiss_index, int(index.points.of_row[index.rows[note_id]]))
    if vector is None:
        raise ValueError(
            f"{index.name} ({index.factory}) holds compressed vectors: name the table of the notes by --embeddings."
        )
    return Embeddings((note_id,), vector[None], weights_id=index.weights_id)


def new_note(model: str | Path, text: str | None, image: Path | None, dim: int) -> Embeddings:
    """The embedding of a note that no index has, by a trained model: its title is `text`.

    dim: width of the index; a model with Matryoshka dimensions may have more. Raises ValueError if the image cannot be
    used.
    """
    from notellm2_core.inference.embedder import Embedder
    from notellm2_core.model.hub import model_folder
    from notellm2_core.model.weights import weight_files, weights_id

    folder = model_folder(model)
    embedder = Embedder.from_pretrained(folder)
    vectors = embedder.embed([{"title": text or "", "image": image}], dim=dim)
    (status,) = embedder.image_statuses
    if image is not None and status in UNUSABLE:
        raise ValueError(f"the image {image} cannot be used: {status} ({MEANINGS[status]}).")
    if status == "truncated":
        warnings.warn(f"the image {image} is {status}: {MEANINGS[status]}", stacklevel=2)
    return Embeddings(("",), vectors, weights_id=weights_id(weight_files(folder), embedder.encoder.encoder_id))


def find_neighbours(
    index: Index, queries: Embeddings, k: int, params: str | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each query's note id, with its nearest notes without itself: {"note_id": ..., "score": ...}, best first."""
    k = min(k, len(index.note_ids))
    num_queries = max(1, _BLOCK_HITS // max(1, k))
    for first in range(0, len(queries.note_ids), num_queries):
        block = slice(first, first + num_queries)
        part = Embeddings(queries.note_ids[block], queries.vectors[block], queries.folder, queries.weights_id)
        note_ids, scores = index.neighbours(part, k, params)
        for query, ids, row in zip(part.note_ids, note_ids, scores, strict=True):
            hits = [{"note_id": i, "score": round(float(s), 6)} for i, s in zip(ids, row, strict=True) if i is not None]
            yield query, hits
