"""A release beside its rivals: each model's recall on the same test pairs, those that no lineage has trained on.

A rival was trained on other days, so its training notes may be in this week's pool, and a model that was trained from
its predecessor inherits what that one saw. A pair counts only if no lineage of the models has trained on either of its
notes. The pool itself is the same for all.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import Embeddings, read_embeddings, read_note_ids
from notellm2_core.evaluation.evaluate import read_cold
from notellm2_core.evaluation.pairs import Pairs, read_pairs
from notellm2_core.evaluation.recall import Ranks, target_ranks
from notellm2_core.evaluation.slices import SLICES, load_tokenizer, slice_masks, token_lengths
from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.release.comparison import hits
from notellm2_core.release.verdict import Measured
from notellm2_core.schema import POOL_TABLE, TRAIN, VALIDATION


@dataclass(frozen=True)
class TestSet:
    """The test pairs of a week that every model may be measured on."""

    pairs: Pairs
    pool_ids: tuple[str, ...]
    slices: Mapping[str, np.ndarray]  # name -> mask over the pairs [P]
    num_left_out: int  # pairs with a note that a lineage has trained on

    @classmethod
    def read(cls, pairs: Path, notes: Path, trained: Set[str], config: Config, tokenizer: str | Path) -> "TestSet":
        """`pairs`: the dataset pair_datasets. `trained`: the notes of all lineages. `tokenizer`: counts the tokens."""
        whole = read_pairs(pairs).pairs
        ends = zip(whole.query_ids, whole.target_ids, strict=True)
        keep = [n for n, pair in enumerate(ends) if trained.isdisjoint(pair)]
        clean = Pairs(tuple(whole.query_ids[n] for n in keep), tuple(whole.target_ids[n] for n in keep))
        texts = read_notes(notes, {*clean.query_ids, *clean.target_ids})
        lengths = token_lengths(texts, load_tokenizer(config.text.length_tokenizer or tokenizer))
        pool = pairs / POOL_TABLE
        masks = slice_masks(clean, lengths, config.text.short_tokens, config.text.long_tokens, read_cold(pool))
        pool_ids = tuple(sorted(read_note_ids(pool)))
        return cls(clean, pool_ids, {name: masks[name] for name in SLICES[1:]}, len(whole) - len(clean))

    def ranks(self, embeddings: Path) -> Ranks:
        """The ranks of the targets by the embeddings in this folder. Raises ValueError if a note is missing there."""
        table = read_embeddings(embeddings, {*self.pool_ids, *self.pairs.query_ids, *self.pairs.target_ids})
        pool = Embeddings(self.pool_ids, table.vectors[table.rows(self.pool_ids)], embeddings)
        return target_ranks(table, pool, self.pairs)

    def measure(self, challenger: Ranks, rival: Path, k: int) -> Measured:
        """The hits of two models: the ranks of one, and the folder of the other's embeddings."""
        _, targets = np.unique(self.pairs.target_ids, return_inverse=True)
        return Measured(hits(challenger, k), hits(self.ranks(rival), k), challenger.queries, self.slices, targets)


def trained_note_ids(pairs: Path) -> set[str]:
    """The notes that the dataset pair_datasets trains and validates on."""
    folders = (pairs / name for name in (TRAIN, VALIDATION))
    return {note_id for folder in folders if folder.exists() for note_id in read_note_ids(folder)}


def effective_rank(vectors: np.ndarray) -> float:
    """How many directions unit vectors [N, d] use: exp of the entropy of their covariance's spectrum (Roy & Vetterli,
    2007), from 1 (one direction) to d.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    energy = np.clip(np.linalg.eigvalsh(centred.T @ centred), 0, None)
    if not energy.sum():
        return 1.0
    shares = energy[energy > 0] / energy.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
