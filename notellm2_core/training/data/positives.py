"""Positives of each other among the notes of a batch: the same content, or related contents."""

import hashlib
from collections.abc import Iterable

import numpy as np

from notellm2_core.notes.processor import FieldTokens


class PositiveIndex:
    """The positives of every note, for one kind of input.

    Notes with identical model input form a group, and a pair of one note is a pair of all in its group.
    """

    def __init__(self, content: np.ndarray, pairs: np.ndarray) -> None:
        """`content`: [notes], equal for notes with identical input. `pairs`: [P, 2] related notes."""
        _, self.content_ids = np.unique(content, return_inverse=True)  # [notes] int64, numbered from 0
        size = int(self.content_ids.max(initial=0)) + 1
        both = self.content_ids[np.concatenate([pairs, pairs[:, ::-1]])]
        edges = np.unique(both[:, 0] * size + both[:, 1])  # the graph of pairs, as sorted numbers
        self._related = edges % size  # those of content 0, then of content 1, ...
        self._first = np.searchsorted(edges // size, np.arange(size + 1))  # where those of each content begin

    def is_positive(self, notes: np.ndarray) -> np.ndarray:
        """[N, N] bool: which of `notes` [N] are the same or related. True on the diagonal."""
        contents, index = np.unique(self.content_ids[notes], return_inverse=True)  # [n], [N]
        is_positive = np.eye(len(contents), dtype=bool)
        for i, content in enumerate(contents):
            related = self._related[self._first[content] : self._first[content + 1]]
            columns = np.searchsorted(contents, related).clip(max=len(contents) - 1)
            is_positive[i, columns[contents[columns] == related]] = True
        return is_positive[np.ix_(index, index)]


def unique_where_missing(content: np.ndarray, has: np.ndarray) -> np.ndarray:
    """`content` [notes], with a negative number of its own for each note where `has` [notes] is false.

    Two notes without content do not have the same content.
    """
    return np.where(has, content, -1 - np.arange(len(content)))


def digest(fields: FieldTokens) -> bytes:
    """A hash of the tokens of a note, equal for equal fields."""
    blake = hashlib.blake2b(digest_size=16)
    for field in fields:
        blake.update(len(field).to_bytes(4) + field.tobytes())
    return blake.digest()


def number_distinct(values: Iterable[object]) -> np.ndarray:
    """[len(values)] int64: a number for each value, the same for equal values."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
