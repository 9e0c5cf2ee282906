"""BM25 over a note's title, topics and content (bm25s, Lucene's formula, k1 = 1.5, b = 0.75).

Words are lower-cased runs of letters and digits; a Chinese or Japanese character is a word of its own. There is no
stemming and no stop list, so the baseline is the same in every language.
"""

import logging
import re
import unicodedata
from collections.abc import Mapping, Sequence

import bm25s
import numpy as np

from notellm2_core.notes.note import Note, plain_text

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana and ideographs
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
K1, B = 1.5, 0.75
logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets its logger to DEBUG


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, in order, with repetitions."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class BM25:
    """Scores of queries against the pool, whose notes are the documents and alone define the word statistics."""

    def __init__(self, notes: Mapping[str, Note], pool_ids: Sequence[str]) -> None:
        self._notes = notes
        self._num_documents = len(pool_ids)
        self._vocabulary: dict[str, int] = {}
        documents = [words(plain_text(notes[i])) for i in pool_ids]
        ids = [[self._vocabulary.setdefault(w, len(self._vocabulary)) for w in document] for document in documents]
        self._index = bm25s.BM25(k1=K1, b=B, method="lucene")
        if self._vocabulary:
            self._index.index((ids, dict(self._vocabulary)), show_progress=False)

    def rows(self, query_ids: Sequence[str]) -> np.ndarray:
        """Scores [Q, M] in fp32. Repeated words of a query count repeatedly; a query without pool words scores 0."""
        scores = np.zeros((len(query_ids), self._num_documents), dtype=np.float32)
        for row, query in zip(scores, query_ids, strict=True):
            word_ids = [self._vocabulary[w] for w in words(plain_text(self._notes[query])) if w in self._vocabulary]
            if word_ids:
                row[:] = self._index.get_scores_from_ids(word_ids)
        return scores
