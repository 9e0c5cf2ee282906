"""Tokenises notes once, for all training runs and exports with the same tokenizer and text settings.

    python -m notellm2_core.model.tokenise --config FILE --notes DIR --out DIR

writes OUT/tokens.arrow (schema.NOTE_TOKENS) and OUT/counts.json. Give OUT to the other commands as their --notes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notellm2_core.config.load import load_config
from notellm2_core.notes.lake_reader import iter_notes, num_notes
from notellm2_core.notes.note import Note
from notellm2_core.notes.note_tokenizer import NoteTokenizer
from notellm2_core.notes.token_store import TokenTable, write_tokens
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.schema import COUNTS_FILE, TOKENS_FILE


def tokenise(tokenizer: NoteTokenizer, notes: Path, out: Path) -> dict[str, Any]:
    """Write the tokens of the notes dataset `notes` into `out`. Returns counts; tokens of the prompt are not counted.

    Raises ValueError if the dataset holds no notes, or a note twice.
    """

    def with_progress() -> Iterator[Note]:
        yield from ProgressBar(iter_notes(notes), total=num_notes(notes), desc="tokens", unit="note")

    write_tokens(out, tokenizer, with_progress())
    table = TokenTable(out / TOKENS_FILE, tokenizer)
    lengths = np.array([sum(map(len, fields)) for fields in table.values()])
    counts: dict[str, Any] = {
        "notes": len(table),
        "notes_without_text": int((lengths == 0).sum()),
        "tokens": int(lengths.sum()),
    }
    if len(lengths):
        counts |= {
            "tokens_per_note": round(float(lengths.mean()), 1),
            "tokens_per_note_p95": int(np.quantile(lengths, 0.95)),
            "tokens_per_note_max": int(lengths.max()),
        }
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tokenise notes once.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of the notes dataset")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with user_errors():
        from notellm2_core.model.llm import load_tokenizer

        config = load_config(args.config)
        counts = tokenise(NoteTokenizer(load_tokenizer(config.model.llm), config.text), args.notes, args.out)
        (args.out / COUNTS_FILE).write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
