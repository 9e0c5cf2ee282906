"""Builds an index of note embeddings, with search parameters that keep a target recall."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core.config.settings import IndexSettings
from notellm2_core.embeddings.table import Embeddings, read_embeddings
from notellm2_core.retrieval.factory import add_vectors, can_grow, filled_index, trained_index
from notellm2_core.retrieval.index import FILES, FORMAT_VERSION, IDS, Index
from notellm2_core.retrieval.parameters import format_parameters
from notellm2_core.retrieval.points import distinct_points, moved_to_the_end
from notellm2_core.retrieval.tuning import EXHAUSTIVE_SHARE, MAX_HELD_OUT, TUNED_KS, Samples, measure, tune
from notellm2_core.runtime.files import replaced_folder, sha256_of

REPORTED_KS = (1, 10, 100)


def make_index(embeddings: Embeddings, settings: IndexSettings, num_threads: int = 1) -> Index:
    """Train (if the factory needs it), fill and tune an index.

    One thread by default, for reproducible indexes: the graph of HNSW depends on the order in which threads insert. A
    graph of NSG, which takes no vector afterwards, is built twice. Raises ValueError for no notes, and naming
    index.factory if FAISS cannot build it from these vectors.
    """
    return _make(embeddings, settings, num_threads, ())[0]


def _make(
    embeddings: Embeddings, settings: IndexSettings, num_threads: int, ks: Sequence[int]
) -> tuple[Index, dict[str, dict[str, float]]]:
    """`make_index`, and what it measures for k of `ks` (`tuning.measure`).

    Some vectors are held out until the search parameters are chosen and measured, and are added then.
    """
    if not embeddings.note_ids:
        raise ValueError(f"{embeddings.prefix}there are no notes to build an index of.")
    vectors, points = distinct_points(embeddings.vectors)
    held_out = _held_out(len(vectors))
    points = moved_to_the_end(vectors, points, held_out)
    kept, rest = np.split(vectors, [len(vectors) - len(held_out)])
    faiss_index = trained_index(vectors, settings.factory, num_threads)
    add_vectors(faiss_index, kept, settings.factory, num_threads)
    note_ids = np.array(embeddings.note_ids, dtype=object)
    index = Index(faiss_index, note_ids, points, settings.factory, weights_id=embeddings.weights_id)
    samples = Samples(index, kept, rest)
    index = replace(index, tuned=tune(samples, settings.search_k, settings.target_recall))
    measured = measure(index, samples, ks)
    if not len(rest):
        return index, measured
    if can_grow(faiss_index):
        add_vectors(faiss_index, rest, settings.factory, num_threads)
        return index, measured
    return replace(index, faiss_index=filled_index(vectors, settings.factory, num_threads)), measured


def _held_out(num_points: int) -> np.ndarray:
    """The points that are held out: one in ten, up to MAX_HELD_OUT. None where nothing depends on so few."""
    num = min(MAX_HELD_OUT, num_points // 10) if num_points >= EXHAUSTIVE_SHARE * TUNED_KS[0] else 0
    return np.random.default_rng(0).permutation(num_points)[:num]


def build_index(embeddings_dir: Path, out: Path, settings: IndexSettings, num_threads: int = 1) -> dict[str, Any]:
    """`save_index` of an embedding folder."""
    return save_index(read_embeddings(embeddings_dir), out, settings, num_threads)


def index_settings(folder: Path) -> IndexSettings:
    """The settings that the index in a folder was built with."""
    metadata = json.loads((folder / FILES[2]).read_text())
    return IndexSettings(**{name: metadata[name] for name in IndexSettings.model_fields})


def save_index(embeddings: Embeddings, out: Path, settings: IndexSettings, num_threads: int = 1) -> dict[str, Any]:
    """Build an index and save it as the folder `out`.

    Returns the content of index.json, with the recall in percent at REPORTED_KS and `search_k` against exact search,
    and the milliseconds of a search. Raises ValueError if `out` holds anything but an index.
    """
    if out.exists() and not (out.is_dir() and {f.name for f in out.iterdir()} <= {*FILES}):
        raise ValueError(f"{out} holds files that are no index; give --out a new folder.")
    ks = [k for k in sorted({*REPORTED_KS, settings.search_k}) if k < len(embeddings.note_ids)]
    index, measured = _make(embeddings, settings, num_threads, ks)
    with replaced_folder(out) as draft:
        faiss.write_index(index.faiss_index, str(draft / FILES[0]))
        columns = [pa.array(index.points.of_row), pa.array(embeddings.note_ids, pa.string())]
        pq.write_table(pa.Table.from_arrays(columns, schema=IDS), draft / FILES[1])
        metadata: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **settings.model_dump(),
            "metric": "inner_product",
            "dim": int(embeddings.vectors.shape[1]),
            "num_notes": len(embeddings.note_ids),
            "num_distinct": len(index.points.sizes),
            "weights_id": index.weights_id,
            "search": [
                {"k": search.k, "params": format_parameters(search.parameters), "recall": search.recall}
                for search in index.tuned
            ],
            "recall": measured["recall"],
            "sha256": {name: sha256_of(draft / name) for name in FILES[:2]},
        }
        (draft / FILES[2]).write_text(json.dumps(metadata, indent=1))
    return {**metadata, "latency_ms": measured["latency_ms"]}
