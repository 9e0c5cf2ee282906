"""The process of a model. What it imports has to be imported there: the process that starts it needs no torch."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from notellm2_core.config.methods import InputKind
from notellm2_core.model.weights import saved_weights_id
from notellm2_core.notes.note import Note, NoteWithImage
from notellm2_core.runtime.processes import die_with_parent

if TYPE_CHECKING:
    from notellm2_core.inference.embedder import Embedder

_LOADING_NICE = 10  # a tenth of the processor's time of those who answer
Asked = tuple[Note, bytes | None, InputKind]  # a note, its picture, and what the model reads of it


def embed_notes(pipe: Connection, model: Path, weights_id: str | None, gives_way: bool) -> None:
    """Load the model, and send None, or why it cannot be loaded. Then answer each list of notes as `embed_each` does.

    weights_id: a model with other weights is not loaded; None: any is. gives_way: loading lets others go first where
    the processor is busy, because another model answers meanwhile; embedding does not.
    """
    die_with_parent()
    # Before torch is imported. On a busy machine, threads that spin while they wait take ten times a note's own work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with ThreadPoolExecutor(1, "load", _give_way if gives_way else None) as loading:
            embedder = loading.submit(_load, model, weights_id).result()
    except (ValueError, OSError, RuntimeError) as e:
        pipe.send(f"the model {model} cannot be loaded: {e}")
        return
    pipe.send(None)
    while True:
        try:
            notes = pipe.recv()
        except EOFError:
            return
        pipe.send(embed_each(embedder, notes))


def _give_way() -> None:
    """Lower the priority of this thread."""
    if sys.platform == "linux":  # elsewhere it would be that of the whole process, for good
        with suppress(OSError):  # where it is forbidden, loading takes its share
            os.nice(_LOADING_NICE)


def _load(model: Path, weights_id: str | None) -> "Embedder":
    if weights_id is not None and (found := saved_weights_id(model)) != weights_id:
        raise ValueError(f"its weights are {found}, not {weights_id}")
    from notellm2_core.inference.embedder import Embedder

    return Embedder.from_pretrained(model)


def embed_each(embedder: "Embedder", notes: Sequence[Asked]) -> list[np.ndarray | str]:
    """Embed notes together: unit vectors [d]. Of those that cannot be embedded, a sentence that says why."""
    results: list[np.ndarray | str] = [""] * len(notes)
    places: dict[InputKind, list[int]] = {}
    for place, (_, _, inputs) in enumerate(notes):
        places.setdefault(inputs, []).append(place)
    for inputs, group in places.items():
        try:
            vectors = embedder.embed([NoteWithImage(*notes[place][:2]) for place in group], inputs)
        except (ValueError, RuntimeError, MemoryError) as e:
            for place in group:
                alone = len(group) == 1
                results[place] = (
                    f"the note cannot be embedded: {e}" if alone else embed_each(embedder, [notes[place]])[0]
                )
            continue
        for place, vector in zip(group, vectors, strict=True):
            results[place] = vector
    return results
