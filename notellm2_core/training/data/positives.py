"""Which notes of a batch belong together: the same content, or related to it."""

import hashlib
from collections.abc import Iterable

import numpy as np

from notellm2_core.notes.processor import FieldTokens


class PositiveIndex:
    """Notes that cannot be told apart by what is read of them are one; relations are those of all of them."""

    def __init__(self, content: np.ndarray, pairs: np.ndarray) -> None:
        """`content`: [notes], equal where notes are the same. `pairs`: [P, 2] related notes."""
        _, self.code = np.unique(content, return_inverse=True)  # [notes]
        size = int(self.code.max(initial=0)) + 1
        both = self.code[np.concatenate([pairs, pairs[:, ::-1]])]
        related = np.unique(both[:, 0] * size + both[:, 1])  # the pair graph, as sorted numbers
        self._related = related % size  # of code 0, then of code 1, ...
        self._first = np.searchsorted(related // size, np.arange(size + 1))  # where those of each begin

    def known(self, rows: np.ndarray) -> np.ndarray:
        """[N, N] bool: which of the notes `rows` are the same or related."""
        codes, place = np.unique(self.code[rows], return_inverse=True)  # [n], [N]
        known = np.eye(len(codes), dtype=bool)
        for i, code in enumerate(codes):
            related = self._related[self._first[code] : self._first[code + 1]]
            found = np.searchsorted(codes, related).clip(max=len(codes) - 1)
            known[i, found[codes[found] == related]] = True
        return known[np.ix_(place, place)]


def _or_itself(content: np.ndarray, has: np.ndarray) -> np.ndarray:
    """`content` [notes], and a number of its own for a note that has none: nothing is not the same as nothing."""
    return np.where(has, content, -1 - np.arange(len(content)))


def _digest(fields: FieldTokens) -> bytes:
    """Equal for equal fields."""
    digest = hashlib.blake2b(digest_size=16)
    for field in fields:
        digest.update(len(field).to_bytes(4) + field.tobytes())
    return digest.digest()


def _codes(values: Iterable[object]) -> np.ndarray:
    """A number for each value, the same for equal ones."""
    code: dict[object, int] = {}
    return np.array([code.setdefault(v, len(code)) for v in values], dtype=np.int64)
