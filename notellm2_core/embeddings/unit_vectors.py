"""The one check of vectors, at every door through which they come in: finite, of unit length, of one model."""

from collections.abc import Sequence

import numpy as np

TOLERANCE = 1e-3  # of a length: what rounding to 16 bits leaves
OF_A_TABLE = "cosines need unit vectors: divide each by its length, or embed the notes again"
OF_A_MODEL = "the model gives NaN or zero there: check its training loss"


def require_unit_vectors(
    vectors: np.ndarray, note_ids: Sequence[str] | None = None, source: str = "", reason: str = OF_A_TABLE
) -> None:
    """Raises ValueError naming the first note whose vector is not finite or not of unit length.

    vectors: [N, d]. note_ids: of the rows; None: rows are named by number. source: the beginning of the sentence.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < TOLERANCE))  # also true for NaN
    if not len(wrong):
        return
    first, length = wrong[0], lengths[wrong[0]]
    note = f"row {first}" if note_ids is None else f"note {note_ids[first]!r}"
    fault = f"has length {length:.6g}" if np.isfinite(length) else "holds NaN or infinity"
    raise ValueError(
        f"{source}{len(wrong)} of {len(vectors)} embeddings are not unit vectors (that of {note} {fault}); {reason}."
    )


def require_same_model(queries: str | None, index: str | None, queries_name: object, index_name: object) -> None:
    """Raises ValueError if two vectors' `weights_id` are known and differ: their cosines would have no meaning."""
    if queries is not None and index is not None and queries != index:
        raise ValueError(
            f"{queries_name} holds vectors of model {queries}, {index_name} those of model {index}: vectors of two "
            "models cannot be compared; embed both with one model."
        )
