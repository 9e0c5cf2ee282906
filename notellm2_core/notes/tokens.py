"""Tokenise notes once, for every training and export that reads them with the same tokenizer and text settings.

    python -m notellm2_core.notes.tokens --config FILE --notes DIR --out DIR

writes OUT/tokens.arrow (schema.NOTE_TOKENS) and OUT/counts.json. Give OUT to the other commands as their --notes.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from notellm2_core.cli_errors import one_line_errors
from notellm2_core.config_file import load_config
from notellm2_core.notes.batch import MLRMProcessor
from notellm2_core.notes.records import Note, iter_notes, num_notes
from notellm2_core.notes.token_table import TOKENS, TokenTable, write_tokens


def tokenise(processor: MLRMProcessor, notes: Path, out: Path) -> dict[str, Any]:
    """Write the tokens of the notes dataset `notes` into `out`. Returns how many there are.

    Raises ValueError where it holds no notes, or one comes twice.
    """

    def shown() -> Iterator[Note]:
        yield from tqdm(iter_notes(notes), total=num_notes(notes), desc="tokens", unit="note", mininterval=1)

    write_tokens(out, processor, shown())
    table = TokenTable(out / TOKENS, processor)
    of_text = np.array([sum(map(len, fields)) for fields in table.values()])
    whole = np.array([processor.num_tokens(fields) for fields in table.values()])
    counts: dict[str, Any] = {
        "notes": len(table),
        "notes_without_text": int((of_text == 0).sum()),
        "tokens": int(whole.sum()),
    }
    if len(whole):
        counts |= {
            "tokens_per_note": round(float(whole.mean()), 1),
            "tokens_per_note_p95": int(np.quantile(whole, 0.95)),
            "tokens_per_note_max": int(whole.max()),
        }
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tokenise notes once.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of the notes dataset")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    with one_line_errors():
        from notellm2_core.model.build import build_processor

        counts = tokenise(build_processor(load_config(args.config)), args.notes, args.out)
        (args.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
