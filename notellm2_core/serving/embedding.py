"""Who embeds the notes of a service: a process of this machine, or an embedder on another one. Both look the same."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from notellm2_core.config.methods import InputKind
from notellm2_core.notes.note import Note
from notellm2_core.vision.image_status import Status

MAX_WAITING = 256  # notes
DIED = "urn:notellm2:embedder-died"  # EmbedderDied as the type of a problem; other problems are no note's fault


class EmbedderBusy(RuntimeError):
    """So many notes wait that no more are taken."""


class EmbedderDied(RuntimeError):
    """The process ended while it embedded this note alone; a new one is started for the next."""


class EmbedderDown(RuntimeError):
    """The model cannot be used now, or was closed. It is not this note's fault."""


class BadNote(ValueError):
    """The note cannot be embedded; the message says why."""


@dataclass(frozen=True)
class Embedded:
    """The unit vector [d] of a note, and what became of its picture."""

    vector: np.ndarray
    image: Status


class Embedding(Protocol):
    """Embeds notes by one model. Any number of threads submit notes."""

    @property
    def num_waiting(self) -> int:
        """Notes that wait to be embedded."""

    @property
    def is_running(self) -> bool:
        """Whether the model is loaded."""

    def submit(self, note: Note, image: bytes | None = None, inputs: InputKind = "multimodal") -> "Future[Embedded]":
        """Embed a note by these inputs. The result has BadNote for one that cannot be embedded, and EmbedderBusy,
        EmbedderDied or EmbedderDown.

        One that is cancelled while it waits is not embedded. Raises EmbedderBusy, and EmbedderDown after `close`.
        """

    def close(self) -> None:
        """Notes that wait fail with EmbedderDown."""
