"""The recall evaluation: embeddings and test pairs in, a report and a contact sheet out. No torch.

Reads datasets of the lake: a folder of pairs with test/ (RELATED_PAIRS) and pool/ (POOL), notes (NOTES), clicks
(TARGET_CLICKS), and folders of embeddings (columns in `notellm2_core.schema`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from notellm2_core.baselines.bm25 import BM25
from notellm2_core.baselines.hybrid import summed_rows
from notellm2_core.baselines.popularity import popularity_rows, random_rows, read_clicks
from notellm2_core.config.baselines import encoders
from notellm2_core.config.settings import Config
from notellm2_core.embeddings.table import Embeddings, mean_cosine, read_embeddings, read_note_ids, truncate_dims
from notellm2_core.embeddings.unit_vectors import require_same_model
from notellm2_core.evaluation.contact_sheet import ImageReader, Neighbour, SheetRow, contact_sheet
from notellm2_core.evaluation.metrics import each_pair, ranking_metrics
from notellm2_core.evaluation.oracle import KEYS, Oracle
from notellm2_core.evaluation.pairs import read_pairs
from notellm2_core.evaluation.recall import Ranks, ScoreRows, cosine_rows, count_ranks, recall_at, target_ranks
from notellm2_core.evaluation.report import Report, build_report
from notellm2_core.evaluation.slices import load_tokenizer, slice_masks, token_lengths
from notellm2_core.notes.lake_reader import read_notes
from notellm2_core.notes.note import Note
from notellm2_core.schema import POOL_TABLE
from notellm2_core.vision.images import allow_pixels, read_image

NEIGHBOURS = 5  # per row of the contact sheet


@dataclass(frozen=True)
class BaselineInputs:
    """What a baseline may know."""

    pool_ids: Sequence[str]
    texts: Mapping[str, Note]  # of the pool and of the test pairs
    clicks: Path | None  # TARGET_CLICKS
    seed: int
    encoders: Mapping[str, ScoreRows] = field(default_factory=dict)  # by name: cosines of their embeddings


def _popularity(data: BaselineInputs) -> ScoreRows:
    if data.clicks is None:
        raise ValueError("evaluation.baselines names popularity, which needs the notes' clicks; none were given.")
    return popularity_rows(read_clicks(data.clicks), data.pool_ids)


# The baselines that are no embeddings: the input they read, and their scores.
SCORES: dict[str, tuple[str, Callable[[BaselineInputs], ScoreRows]]] = {
    "random": ("", lambda data: random_rows(data.pool_ids, data.seed)),
    "popularity": ("", _popularity),
    "bm25": ("text", lambda data: BM25(data.texts, data.pool_ids).rows),
    "bm25_minilm": ("text", lambda data: summed_rows(BM25(data.texts, data.pool_ids).rows, data.encoders["minilm"])),
}


def read_cold(pool: Path) -> frozenset[str]:
    """The cold notes of the pool: no interaction in the training days. Empty if the table lacks that column."""
    if "in_train_days" not in pq.ParquetDataset(pool).schema.names:
        return frozenset()
    table = pq.read_table(pool, columns=["note_id", "in_train_days"])
    return frozenset(table.filter(pc.invert(table["in_train_days"]))["note_id"].to_pylist())


def evaluate(
    embeddings: Mapping[tuple[str, str], Path],
    notes: Path,
    pairs: Path,
    config: Config,
    tokenizer: str | Path,
    clicks: Path | None = None,
    oracle: Path | None = None,
) -> Report:
    """Exact Recall@k of every method on every slice.

    embeddings: (method, inputs) -> folder, e.g. ("notellm2", "image"); "zero_shot" and "minilm" name baselines.
    tokenizer: folder or hub name of the tokenizer that counts a note's tokens if text.length_tokenizer is not set.
    clicks: TARGET_CLICKS, which the popularity row ranks by. oracle: the source's oracle.parquet, if it has one.
    Raises ValueError for pairs that cannot be ranked, and for a popularity baseline without `clicks`.
    """
    test, pool_ids = read_pairs(pairs).pairs, sorted(read_note_ids(pairs / POOL_TABLE))
    note_ids = {*pool_ids, *test.query_ids, *test.target_ids}
    texts = read_notes(notes, note_ids)

    ranks: dict[tuple[str, str], Ranks] = {}
    cosines: dict[str, float] = {}
    encoder_rows: dict[str, ScoreRows] = {}
    named_encoders = encoders(config.evaluation.baselines)
    for (method, inputs), folder in embeddings.items():
        table = read_embeddings(folder, note_ids)
        pool = Embeddings(tuple(pool_ids), table.vectors[table.rows(pool_ids)])
        ranks[method, inputs] = target_ranks(table, pool, test)
        if method in named_encoders:
            encoder_rows[method] = cosine_rows(table, pool)
        cosines[f"{method} {inputs}"] = mean_cosine(pool.vectors)
        if (method, inputs) == (config.model.method, "multimodal"):
            for dim in config.model.matryoshka_dims:
                short, short_pool = (replace(e, vectors=truncate_dims(e.vectors, dim)) for e in (table, pool))
                name = f"{method}, {dim} of {table.vectors.shape[1]} numbers"
                ranks[name, inputs] = target_ranks(short, short_pool, test)
    baseline_inputs = BaselineInputs(pool_ids, texts, clicks, config.seed, encoder_rows)
    for name in config.evaluation.baselines:
        if name in SCORES:
            inputs, score_rows = SCORES[name]
            ranks[name, inputs] = count_ranks(score_rows(baseline_inputs), pool_ids, test)
    if oracle is not None:
        keys = Oracle(oracle)
        for inputs in KEYS:
            ranks["oracle", inputs] = count_ranks(keys.rows(inputs, pool_ids), pool_ids, test)

    lengths = token_lengths(texts, load_tokenizer(config.text.length_tokenizer or tokenizer))
    masks = slice_masks(test, lengths, config.text.short_tokens, config.text.long_tokens, read_cold(pairs / POOL_TABLE))
    ks = config.evaluation.ks
    candidates = next(iter(ranks.values())).candidates if ranks else np.zeros(0, dtype=np.int64)
    chance = {str(k): 100 * float(np.minimum(1, k / candidates).mean()) if len(candidates) else None for k in ks}
    return build_report(ranks, masks, ks, len(pool_ids), {"chance": chance, "mean_cosine": cosines})


def evaluate_embeddings(
    embeddings: Path, pairs: Path, ks: Sequence[int], queries: Path | None = None
) -> dict[str, Any]:
    """The exact metrics of one folder of embeddings, in percent, as a JSON object.

    pairs: see `evaluation.pairs`. queries: the embeddings of the queries, if they are no notes; their ids may then
    equal those of notes. The candidates are the notes of `pairs`/pool if it exists, as in `eval_recall`, else all
    embedded notes; a query that is a note is no candidate. Raises ValueError for pairs that cannot be ranked, for
    pairs without a relevant one, and for queries of another model.
    """
    table, read = read_embeddings(embeddings), read_pairs(pairs)
    test = read.pairs
    if not len(test):
        raise ValueError(f"{pairs} holds no relevant pair.")
    pool = table
    if (pairs / POOL_TABLE).is_dir():
        ids = sorted(read_note_ids(pairs / POOL_TABLE))
        pool = Embeddings(tuple(ids), table.vectors[table.rows(ids)])
    query_table = table if queries is None else read_embeddings(queries)
    require_same_model(query_table.weights_id, table.weights_id, queries, embeddings)
    ranks = target_ranks(query_table, pool, test, queries_are_notes=queries is None)
    recalls = recall_at(ranks, ks)
    return {
        "num_pairs": len(test),
        "num_queries": len(set(test.query_ids)),
        **read.left_out,
        "pool_notes": len(pool.note_ids),
        "recall": {str(r.k): r.expected for r in recalls},
        "recall_pessimistic": {str(r.k): r.pessimistic for r in recalls},
        "recall_optimistic": {str(r.k): r.optimistic for r in recalls},
        "per_pair": ranking_metrics(each_pair(ranks), ks),
        "per_query": ranking_metrics(ranks, ks),
    }


def neighbour_sheet(
    embeddings: Path, notes: Path, pairs: Path, num_queries: int, image: ImageReader, seed: int = 0
) -> bytes:
    """The contact sheet (JPEG bytes) of test queries with their nearest notes of the pool, by exact search.

    `num_queries` queries are drawn at random by `seed`, not picked.
    """
    test, pool_ids = read_pairs(pairs).pairs, sorted(read_note_ids(pairs / POOL_TABLE))
    table = read_embeddings(embeddings, {*pool_ids, *test.query_ids})
    pool = Embeddings(tuple(pool_ids), table.vectors[table.rows(pool_ids)])
    distinct = sorted(set(test.query_ids))
    chosen = [distinct[n] for n in np.random.default_rng(seed).permutation(len(distinct))[:num_queries]]
    related = set(zip(test.query_ids, test.target_ids, strict=True))
    rows = [_sheet_row(query, scores, pool_ids, related) for query, scores in _scored(chosen, table, pool)]
    sheet_ids = {i for row in rows for i in (row.query_id, *(n.note_id for n in row.neighbours))}
    texts = read_notes(notes, sheet_ids)
    return contact_sheet(rows, lambda note_id: _title(texts[note_id]), image)


def image_reader(notes: Path, source: Path, max_pixels: int) -> ImageReader:
    """A function note_id -> its image (RGB) from the notes table or the source; None if there is no usable one.

    It never reads outside the source, nor decodes an image of more than `max_pixels`.
    """
    allow_pixels(max_pixels)

    def image(note_id: str) -> Image.Image | None:
        row = pq.read_table(notes, columns=["image_path", "image"], filters=[("note_id", "==", note_id)])
        return read_image(source, row["image_path"][0].as_py(), row["image"][0].as_py(), max_pixels)[2]

    return image


def _scored(queries: Sequence[str], table: Embeddings, pool: Embeddings) -> list[tuple[str, np.ndarray]]:
    return list(zip(queries, cosine_rows(table, pool)(queries), strict=True)) if queries else []


def _sheet_row(query: str, scores: np.ndarray, pool_ids: Sequence[str], related: set[tuple[str, str]]) -> SheetRow:
    order = [n for n in np.argsort(-scores, kind="stable")[: NEIGHBOURS + 1] if pool_ids[n] != query][:NEIGHBOURS]
    return SheetRow(
        query, tuple(Neighbour(pool_ids[n], float(scores[n]), (query, pool_ids[n]) in related) for n in order)
    )


def _title(note: Note) -> str:
    return note.title or note.content or ", ".join(note.topics) or note.note_id
