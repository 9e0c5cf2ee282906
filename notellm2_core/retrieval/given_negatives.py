"""Hard negatives of the user's own, from a table of note_id and negative_id, in place of mined ones. No torch.

    python -m notellm2_core.retrieval.given_negatives --file FILE --pairs DIR --out DIR [--note-split DIR]

writes the files of `hard_negatives.py`; the rank of a negative is its place among those of its note.

As in mining, both notes have to be in the training pairs, because held-out notes must not influence training, and a
negative must be neither related to its note nor its near-duplicate. Other rows are left out, and counted.

R: rows of the table.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.retrieval.known_pairs import KnownPairs, read_known_pairs
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import write_atomically, written_whole
from notellm2_core.schema import COUNTS_FILE, HARD_NEGATIVES
from notellm2_core.tables.columns import Column, Kind
from notellm2_core.tables.table import open_table

_NAMES = ["note_id", "negative_id"]
COLUMNS = tuple(Column(name, Kind.ID, in_every_part=True) for name in _NAMES)
_IDS = pa.schema([(name, pa.string()) for name in _NAMES])


def take_over(file: Path, pairs: Path, out: Path, note_split: Path | None = None) -> dict[str, Any]:
    """Write the hard negatives of `file` for the pairs `pairs`/{train,validation} into `out`. Returns counts.json.

    Raises ValueError for a file that cannot be read, a column that is missing or holds no ids, or if no row is left.
    """
    known_pairs = read_known_pairs(pairs, note_split)
    table = read_ids(file)
    kept, rows_out = _usable(table, known_pairs)
    if not len(kept):
        raise ValueError(f"no row of {file} is a hard negative of the pairs in {pairs}: {_reasons(rows_out)}")
    notes, negatives = kept.T
    order = np.argsort(notes, kind="stable")
    notes, negatives = notes[order], negatives[order]
    first_row = np.searchsorted(notes, notes)  # of each row's note
    ids = known_pairs.note_ids
    columns = [ids.take(pa.array(notes)), ids.take(pa.array(negatives))]
    ranks = pa.array(np.arange(len(notes)) - first_row + 1, pa.int32())
    with written_whole(out / "part-00000.parquet") as draft:
        pq.write_table(pa.Table.from_arrays([*columns, ranks], schema=HARD_NEGATIVES), draft)
    num_notes = len(np.unique(notes))
    counts = {
        "rows": len(table),
        **rows_out,
        "notes": num_notes,
        "negatives": len(notes),
        "negatives_per_note": len(notes) / known_pairs.num_train,
        "notes_without_negatives": known_pairs.num_train - num_notes,
    }
    write_atomically(out / COUNTS_FILE, json.dumps(counts, indent=1) + "\n")
    if any(rows_out.values()):
        print(f"warning: {file}: {len(notes)} of {len(table)} rows are used; {_reasons(rows_out)}", file=sys.stderr)
    return counts


def read_ids(file: Path) -> pa.Table:
    """The columns note_id and negative_id of the table `file`, as text; null where a row has no id.

    Raises ValueError naming the file, and the column where one is missing or holds neither text nor whole numbers.
    """
    table = open_table(file, COLUMNS)
    batches = [batch for split in table.splits() for batch in table.read(split, _NAMES)]
    return pa.Table.from_batches([batch.select(_NAMES) for batch in batches], _IDS)


def _usable(table: pa.Table, known_pairs: KnownPairs) -> tuple[np.ndarray, dict[str, int]]:
    """The rows [kept, 2] that can be used, as numbers of notes, and how many others there are of each kind."""
    training_notes = known_pairs.note_ids[: known_pairs.num_train]
    index = [pc.index_in(table[name], value_set=training_notes) for name in _NAMES]
    rows = np.stack([column.fill_null(-1).to_numpy().astype(np.int64) for column in index], axis=1)  # [R, 2]
    is_null = np.any([table[name].is_null().to_numpy() for name in _NAMES], axis=0)  # [R]
    unknown = (rows < 0) & ~is_null[:, None]
    is_known = ~unknown.any(axis=1) & ~is_null
    known = rows[is_known]
    notes, negatives = known[:, 0], known[:, 1:]
    positive = (known_pairs.is_positive(notes, negatives) | (notes[:, None] == negatives))[:, 0]
    near = known_pairs.is_near(notes, negatives)[:, 0] & ~positive
    negative = known[~positive & ~near]
    _, first = np.unique(negative, axis=0, return_index=True)
    return negative[np.sort(first)], {
        "null_ids": int(is_null.sum()),
        "unknown_note_ids": int(unknown[:, 0].sum()),
        "unknown_negative_ids": int((unknown[:, 1] & ~unknown[:, 0]).sum()),
        "excluded_known_positives": int(positive.sum()),
        "excluded_near_duplicates": int(near.sum()),
        "duplicate_rows": len(negative) - len(first),
    }


def _reasons(rows_out: dict[str, int]) -> str:
    """How many rows are left out, in words."""
    words = {
        "null_ids": "without an id",
        "unknown_note_ids": "whose note_id is not in the training pairs",
        "unknown_negative_ids": "whose negative_id is not in the training pairs",
        "excluded_known_positives": "whose notes are the same or related",
        "excluded_near_duplicates": "whose notes are near-duplicates, or related through one",
        "duplicate_rows": "that repeat another",
    }
    return ", ".join(f"{rows_out[key]} {text}" for key, text in words.items() if rows_out[key]) or "it has no rows"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Take over hard negatives of your own for the training pairs.")
    parser.add_argument("--file", type=Path, required=True, help="table of note_id and negative_id")
    parser.add_argument("--pairs", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--note-split", type=Path, help="folder of note_split, for its near-duplicate groups")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with user_errors():
        take_over(args.file, args.pairs, args.out, args.note_split)


if __name__ == "__main__":
    main()
