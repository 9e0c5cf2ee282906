"""The canary: the model and the index are loaded as a service loads them, and answer golden queries.

    python -m notellm2_core.release.canary --model DIR --index DIR --embeddings DIR --pairs DIR --notes DIR
        --source DIR --out DIR

writes OUT/golden.json, the queries with their answers, and OUT/counts.json {queries, lowest_cosine, failed}. `failed`
is null or a sentence: a model that cannot be loaded is a finding, not a crash of this command.

A golden query is a note of the test pairs. Embedded anew, from its text and image, its vector has to be the exported
one, and the index has to answer it with the same neighbours that it gives for that one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from notellm2_core.config.source import NoteReadingSettings
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.evaluation.pairs import read_pairs
from notellm2_core.inference.embedder import Embedder
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.release.golden import NUM_QUERIES, golden_queries
from notellm2_core.retrieval.index import Index
from notellm2_core.runtime.errors import user_errors
from notellm2_core.schema import COUNTS_FILE, GOLDEN_FILE

MIN_COSINE = 0.99  # of a vector embedded anew with the exported one: batches and devices round differently
MIN_OVERLAP = 0.8  # of the neighbours of both


def ask(
    model: Path, index: Path, embeddings: Path, query_ids: Sequence[str], notes: Path, source: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The golden queries with their answers, and the counts."""
    queries: list[dict[str, Any]] = []
    counts: dict[str, Any] = {"queries": len(query_ids), "lowest_cosine": None, "failed": None}
    try:
        table = read_note_table(notes, source, set(query_ids), NoteReadingSettings(clean_html=False))
        loaded, stored = Index.load(index), read_embeddings(embeddings, set(query_ids))
        anew = Embedder.from_pretrained(model).embed(table.notes(query_ids), folder=table.images)
        exported = stored.vectors[stored.rows(query_ids)]
        queries = golden_queries(loaded, query_ids, exported)
        found = golden_queries(loaded, query_ids, anew)
    except (ValueError, OSError, RuntimeError) as e:  # RuntimeError: torch's and FAISS's
        return queries, counts | {"failed": f"The release cannot be used: {e}"}
    cosines = np.einsum("qd,qd->q", anew, exported, dtype=np.float64)
    if len(query_ids):
        lowest = int(cosines.argmin())
        counts["lowest_cosine"] = float(cosines[lowest])
        if not cosines[lowest] >= MIN_COSINE:  # NaN is none
            counts["failed"] = (
                f"Note {query_ids[lowest]!r}, embedded anew, has the cosine {cosines[lowest]:.3f} with its exported "
                "vector."
            )
        for ours, theirs in zip(found, queries, strict=True):
            common = len({*ours["neighbours"]} & {*theirs["neighbours"]})
            overlap = common / max(1, len(theirs["neighbours"]))
            if overlap < MIN_OVERLAP and theirs["neighbours"] and counts["failed"] is None:
                counts["failed"] = (
                    f"The index answers note {theirs['note_id']!r} with {overlap:.0%} of its golden neighbours."
                )
    return queries, counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.release.canary")
    for name in ("model", "index", "embeddings", "pairs", "notes", "source", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    with user_errors():
        query_ids = list(dict.fromkeys(read_pairs(args.pairs).pairs.query_ids))
        chosen = query_ids[:: max(1, len(query_ids) // NUM_QUERIES)][:NUM_QUERIES]
        golden, counts = ask(args.model, args.index, args.embeddings, chosen, args.notes, args.source)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / GOLDEN_FILE).write_text(json.dumps(golden, indent=1))
        (args.out / COUNTS_FILE).write_text(json.dumps(counts))


if __name__ == "__main__":
    main()
