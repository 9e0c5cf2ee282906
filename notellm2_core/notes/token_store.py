"""The tokens of notes' fields on disk: a memory-mapped Arrow file.

All ranks and workers of a machine share its pages, and read only those of the notes that they need. The tokens are
those of the fields without the prompt around them, so one file serves all methods and all kinds of input.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_core import schema
from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.notes.note import Note
from notellm2_core.notes.note_tokenizer import FieldTokens, NoteTokenizer
from notellm2_core.runtime.files import read_errors, written_whole
from notellm2_core.schema import TOKENS_FILE

_BATCH_NOTES = 4096
_MADE_WITH = b"made_with"
_COMMAND = "python -m notellm2_core.model.tokenise"  # which makes the file


class TokenTable(Mapping[str, FieldTokens]):
    """note_id -> the tokens of its fields, in the order of the file."""

    def __init__(self, path: Path, tokenizer: NoteTokenizer, note_ids: Collection[str] | None = None) -> None:
        """`note_ids`: only these; None: all.

        Raises ValueError where a note is missing or occurs twice, the file is damaged, or `tokenizer` differs.
        """
        with read_errors(path, _COMMAND), pa.ipc.open_file(pa.memory_map(str(path))) as file:
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            made_with = (file.schema.metadata or {}).get(_MADE_WITH, b"").decode()
            if not file.schema.remove_metadata().equals(schema.NOTE_TOKENS):
                raise ValueError("its columns are not those of a token file")
        if made_with != tokenizer.tokens_id:
            raise ValueError(
                f"{path} was made with another tokenizer or other text settings than this model's; make it again with "
                f"{_COMMAND}"
            )
        self._columns = [
            [(column.offsets.to_numpy(), column.values.to_numpy()) for column in batch.columns[1:]] for batch in batches
        ]
        self._rows: dict[str, tuple[int, int]] = {}  # note_id -> its record batch, and its row in that
        selected_ids = None if note_ids is None else pa.array(sorted(set(note_ids)), pa.string())
        for number, batch in enumerate(batches):
            ids = batch.column("note_id")
            rows = np.arange(len(ids)) if selected_ids is None else np.flatnonzero(pc.is_in(ids, selected_ids))
            batch_rows = {i: (number, row) for i, row in zip(ids.take(rows).to_pylist(), rows.tolist(), strict=True)}
            if len(batch_rows) < len(rows) or not self._rows.keys().isdisjoint(batch_rows):
                raise ValueError(f"{path} has a note twice; make it again with {_COMMAND}")
            self._rows |= batch_rows
        if missing_ids := set(note_ids or ()) - self._rows.keys():
            raise ValueError(f"{len(missing_ids)} notes are not in {path}, among them {min(missing_ids)!r}.")

    def __getitem__(self, note_id: str) -> FieldTokens:
        batch, row = self._rows[note_id]
        return FieldTokens(*(values[offsets[row] : offsets[row + 1]] for offsets, values in self._columns[batch]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def write_tokens(folder: Path, tokenizer: NoteTokenizer, notes: Iterable[Note]) -> None:
    """Tokenise `notes` in batches into FOLDER/tokens.arrow, which is written whole or not at all."""
    columns = schema.NOTE_TOKENS.with_metadata({_MADE_WITH: tokenizer.tokens_id})
    with written_whole(folder / TOKENS_FILE) as draft, pa.ipc.new_file(draft, columns) as writer:
        source = iter(notes)
        while batch := list(islice(source, _BATCH_NOTES)):
            fields = zip(*tokenizer.tokenize(batch), strict=True)
            arrays = [pa.array([n.note_id for n in batch], pa.string()), *(_lists(field) for field in fields)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=columns))


def read_tokens(
    folder: Path, tokenizer: NoteTokenizer, note_ids: Collection[str] | None = None
) -> Mapping[str, FieldTokens]:
    """note_id -> tokens, from the token file in `folder`, or else tokenised from the notes there.

    `note_ids`: only these; None: all. Raises ValueError where the folder holds neither, or a note is missing.
    """
    if (folder / TOKENS_FILE).exists():
        return TokenTable(folder / TOKENS_FILE, tokenizer, note_ids)
    notes = read_notes(folder, note_ids)
    return dict(zip(notes, tokenizer.tokenize(list(notes.values())), strict=True))


def _lists(values: Iterable[np.ndarray]) -> pa.LargeListArray:
    parts = list(values)
    offsets = np.cumsum([0, *map(len, parts)])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(np.concatenate(parts), pa.int32()))
