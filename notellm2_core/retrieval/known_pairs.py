"""The known positives of each note: its pairs in both directions, and those of its near-duplicates. No torch.

M: notes of the training and validation pairs, B: queries, R: candidates of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from notellm2_core.runtime.files import parquet_files


@dataclass(frozen=True)
class KnownPairs:
    """The notes of the pairs by number, those of the training pairs first, and which of them are related."""

    note_ids: pa.StringArray  # [M]: the training notes, then those of the validation pairs alone; each part sorted
    num_train: int
    group: np.ndarray  # [M] int64: the same number for near-duplicates
    related: np.ndarray  # sorted numbers a * M + b of the related notes a and b, in both directions
    related_groups: np.ndarray  # likewise for their groups

    def is_positive(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """[B, R] bool: whether `candidates` [B, R] are in a pair with the `queries` [B], in either direction."""
        return self._contains(self.related, queries, candidates)

    def is_near(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """[B, R] bool: whether `candidates` [B, R] are near-duplicates of the `queries` [B], or related through one.

        A pair relates all near-duplicates of its two notes, as in the false-negative masks of training.
        """
        left, right = self.group[queries], self.group[candidates]
        is_near: np.ndarray = (left[:, None] == right) | self._contains(self.related_groups, left, right)
        return is_near

    def _contains(self, numbers: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        keys = left[:, None] * len(self.note_ids) + right
        contained: np.ndarray = numbers[np.searchsorted(numbers, keys).clip(max=len(numbers) - 1)] == keys
        return contained


def read_known_pairs(pairs: Path, note_split: Path | None = None) -> KnownPairs:
    """The pairs `pairs`/{train,validation} (schema.RELATED_PAIRS) with the groups of `note_split` (schema.NOTE_SPLIT).

    Without `note_split`, no notes are near-duplicates. Raises ValueError if there are no training pairs, or a note of
    the pairs is not in `note_split`.
    """
    train, validation = (read_columns(pairs / name, ["query_id", "target_id"]) for name in ("train", "validation"))
    if train is None or not len(train):
        raise ValueError(f"{pairs / 'train'} holds no training pairs.")
    both = train if validation is None else pa.concat_tables([train, validation])
    train_ids, all_ids = _notes(train), _notes(both)
    held_out = all_ids.filter(pc.invert(pc.is_in(all_ids, value_set=train_ids)))
    note_ids = pa.concat_arrays([train_ids, held_out])
    group = np.arange(len(note_ids)) if note_split is None else _groups(note_split, note_ids)
    query, target = (pc.index_in(both[n], value_set=note_ids).to_numpy().astype(np.int64) for n in both.column_names)
    related, related_groups = (
        np.unique(np.concatenate([a * len(note_ids) + b, b * len(note_ids) + a]))
        for a, b in ((query, target), (group[query], group[target]))
    )
    return KnownPairs(note_ids, len(train_ids), group, related, related_groups)


def read_columns(
    folder: Path, columns: Sequence[str], only: pads.Expression | None = None, dictionary: Sequence[str] = ()
) -> pa.Table | None:
    """These columns of the folder's Parquet files, filtered by `only`; the columns `dictionary` dictionary-encoded.

    None if there are no files. Raises ValueError if they lack a column.
    """
    files = parquet_files(folder)
    if not files:
        return None
    options = pads.ParquetReadOptions(dictionary_columns=list(dictionary))
    dataset = pads.dataset(files, format=pads.ParquetFileFormat(read_options=options))
    if missing := [name for name in columns if name not in dataset.schema.names]:
        raise ValueError(f"{folder} lacks the columns {missing}, it has {dataset.schema.names}.")
    return dataset.to_table(columns=list(columns), filter=only)


def _notes(pairs: pa.Table) -> pa.StringArray:
    """The notes of the pairs, each once, sorted."""
    ids = pc.unique(pa.chunked_array([chunk for column in pairs.columns for chunk in column.chunks], pa.string()))
    return ids.take(pc.array_sort_indices(ids))


def _groups(note_split: Path, note_ids: pa.StringArray) -> np.ndarray:
    """[M] int64: a number for the near-duplicate group of each note. Raises ValueError if a note has none."""
    table = read_columns(note_split, ["note_id", "group_id"], pads.field("note_id").isin(note_ids))
    if table is None:
        raise ValueError(f"{note_split} holds no note split (no *.parquet): give the folder of the note_split dataset.")
    index = pc.index_in(note_ids, value_set=table["note_id"].combine_chunks())
    if index.null_count:
        first = note_ids.filter(pc.is_null(index))[0].as_py()
        raise ValueError(f"{index.null_count} notes of the pairs are not in {note_split} (the first is {first!r}).")
    group: np.ndarray = table["group_id"].combine_chunks().take(index).dictionary_encode().indices.to_numpy()
    return group.astype(np.int64)
