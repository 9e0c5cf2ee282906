"""The training data: notes, pairs and images in, global batches out. What a step sees is a function of (seed, step).

Index spaces:
- note: a position in `note_ids`. A batch is an array of notes; its rows 2k and 2k + 1 are query and target of pair k.
- content id: the same number for notes with the same content (text and image).
- image row: a position in the table of features or pixels; -1 for a note without an image.

Shapes: P pairs, B pairs per batch, N notes of a batch: 2B, and its hard negatives.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.dataset as pads
import torch

from notellm2_core.config.methods import InputKind
from notellm2_core.config.settings import Config
from notellm2_core.config.training import KnownPositives
from notellm2_core.lake.lake import WORK_FOLDER
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.notes.processor import FieldTokens, MLRMProcessor, NoteBatch
from notellm2_core.retrieval.hard_negatives import read_hard_negatives
from notellm2_core.runtime.files import parquet_files
from notellm2_core.schema import TRAIN, VALIDATION
from notellm2_core.training.data.positives import PositiveIndex, digest, number_distinct, unique_where_missing
from notellm2_core.training.objective.losses import BatchLabels
from notellm2_core.vision.feature_store import FeatureStore
from notellm2_core.vision.feature_table import FeatureTable
from notellm2_core.vision.pixel_table import PixelTable


class PairDataset:
    """The notes of the training and validation pairs, ready for batching."""

    def __init__(
        self,
        processor: MLRMProcessor,
        tokens: Mapping[str, FieldTokens],
        images: Mapping[str, str | None],
        image_table: FeatureTable | PixelTable,
        train_pairs: Sequence[tuple[str, str]],
        validation_pairs: Sequence[tuple[str, str]] = (),
        hard_negatives: Path | None = None,
    ) -> None:
        """`images`: note_id -> image_id or None. `image_table`: the images' features, or their pixels for an encoder
        that is trained. `hard_negatives`: folder of those mined for these pairs.

        Raises ValueError if a pair names a note that `tokens` lacks, or the hard negatives are of other pairs.
        """
        self.note_ids = tuple(sorted({n for pair in (*train_pairs, *validation_pairs) for n in pair}))
        missing = [n for n in self.note_ids if n not in tokens]
        if missing:
            raise ValueError(f"{len(missing)} notes of the pairs are not among the notes, the first is {missing[0]!r}")
        self._processor = processor
        self._tokens = tokens
        self._image_table = image_table
        image_rows = [-1 if (i := images.get(n)) is None else image_table.rows[i] for n in self.note_ids]
        self._image_rows = np.array(image_rows, dtype=np.int64)  # [notes]; -1: no image
        self._has_text = np.array([any(map(len, tokens[n])) for n in self.note_ids])
        self.train_pairs = self._indices(train_pairs)  # [P, 2]
        self.validation_pairs = self._indices(validation_pairs)
        texts = number_distinct(digest(tokens[n]) for n in self.note_ids)
        pairs = np.concatenate([self.train_pairs, self.validation_pairs])
        contents = texts * (len(image_table.rows) + 1) + self._image_rows + 1
        self._positives = {
            "multimodal": PositiveIndex(contents, pairs),
            "image": PositiveIndex(unique_where_missing(self._image_rows, self._image_rows >= 0), pairs),
            "text": PositiveIndex(unique_where_missing(texts, self._has_text), pairs),
        }

        self.hard_negatives = None if hard_negatives is None else read_hard_negatives(hard_negatives, self.note_ids)

    @cached_property
    def train_notes(self) -> np.ndarray:
        """[n] the notes of the training pairs, each once, in order."""
        return np.unique(self.train_pairs)

    def has_image(self, notes: np.ndarray) -> np.ndarray:
        """[len(notes)] bool."""
        return self._image_rows[notes] >= 0

    def note_batch(self, notes: np.ndarray, inputs: Sequence[InputKind] = ("multimodal",)) -> NoteBatch:
        """The model input of `notes` [N] as I N notes for I `inputs`: all notes for each kind of input in turn.

        They are padded to the longest of them.
        """
        tokens = self._tokens_of(notes)
        encoded = [self._processor.lay_out(fields, kind) for kind in inputs for fields in tokens]
        image_rows = self._image_rows[np.tile(notes, len(inputs))]
        if isinstance(self._image_table, FeatureTable):
            return self._processor.collate(encoded, *self._image_table.take(image_rows), image_rows >= 0)
        rows_to_read = np.where([note.reads_image for note in encoded], image_rows, -1)
        return self._processor.collate(encoded, None, None, image_rows >= 0, self._image_table.take(rows_to_read))

    def num_tokens(self, notes: np.ndarray, inputs: Sequence[InputKind] = ("multimodal",)) -> np.ndarray:
        """[len(notes)] tokens that the model reads of each note, over all `inputs`."""
        num_tokens = self._processor.num_tokens
        return np.array([sum(num_tokens(fields, kind) for kind in inputs) for fields in self._tokens_of(notes)])

    def _tokens_of(self, notes: np.ndarray) -> list[FieldTokens]:
        return [self._tokens[self.note_ids[note]] for note in notes.tolist()]

    def content_ids(self, notes: np.ndarray) -> np.ndarray:
        """Notes of any shape -> their content ids, int64 of that shape: equal for the same text and image."""
        return self._positives["multimodal"].content_ids[notes]

    def with_hard_negatives(self, notes: np.ndarray, num: int, seed: Sequence[int]) -> np.ndarray:
        """`notes` [2B] of a batch, followed by `num` hard negatives for each of its pairs: [(2 + num) B].

        They are drawn from the hard negatives of the pair's query, without contents that the batch has already, and
        from all training notes if there are too few. Raises ValueError if the dataset has no hard negatives.
        """
        if not num:
            return notes
        if self.hard_negatives is None:
            raise ValueError(f"training.hard_negatives.num = {num} needs --hard-negatives: give it, or set num to 0")
        rng = np.random.default_rng(seed)
        content_ids = self._positives["multimodal"].content_ids
        in_batch, added = set(content_ids[notes].tolist()), []
        for query in notes[::2].tolist():
            candidates = [*rng.permutation(self.hard_negatives[query]), *rng.choice(self.train_notes, 8 * num)]
            new: dict[int, int] = {}
            for note in candidates:
                if content_ids[note] not in in_batch:
                    new.setdefault(content_ids[note], note)
            chosen = [*new.values(), *candidates][:num]  # if the notes are too few, some are repeated
            added += chosen
            in_batch.update(content_ids[chosen].tolist())
        return np.concatenate([notes, added])

    def labels(
        self,
        notes: np.ndarray,
        known_positives: KnownPositives = "mask",
        num_paired: int | None = None,
        kinds: Collection[InputKind] = get_args(InputKind),
    ) -> BatchLabels:
        """Which of `notes` [N] have an image and a text, and which are known positives of each other.

        Two notes are known positives if they have the same content, or if a pair relates their contents, in either
        direction. The content is the whole note for the multimodal input, the image or the text alone for the other
        `kinds`. `num_paired`: 2B, if hard negatives follow the pairs.
        """
        has = {"image": torch.from_numpy(self.has_image(notes)), "text": torch.from_numpy(self._has_text[notes])}
        if known_positives == "ignore":
            return BatchLabels(has, None, num_paired)
        is_positive: dict[str, torch.Tensor] = {
            kind: torch.from_numpy(self._positives[kind].is_positive(notes)) for kind in kinds
        }
        return BatchLabels(has, is_positive, num_paired, count_known=known_positives == "count")

    def _indices(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        index = {note_id: note for note, note_id in enumerate(self.note_ids)}
        return np.array([(index[a], index[b]) for a, b in pairs], dtype=np.int64).reshape(-1, 2)


def load_pair_dataset(reader: InputReader, pairs: Path, cache: Path, hard_negatives: Path | None = None) -> PairDataset:
    """Read the pairs `pairs`/{train,validation} and their notes, and nothing else.

    `cache`: folder for the memory-mapped table of features or pixels. `hard_negatives`: folder of those mined for these
    pairs.

    Raises ValueError if there are no training pairs, or a note, a feature or an image is missing.
    """
    train, validation = read_pairs(pairs / TRAIN), read_pairs(pairs / VALIDATION)
    if not train:
        raise ValueError(f"{pairs / 'train'} holds no pairs: nothing to train on")
    notes = reader.open({note_id for pair in (*train, *validation) for note_id in pair})
    table: FeatureTable | PixelTable
    if isinstance(notes.images, FeatureStore):
        image_ids = sorted({i for i in notes.image_ids.values() if i is not None})
        table = FeatureTable.build(notes.images, image_ids, cache)
    else:
        assert reader.encoder is not None
        table = PixelTable.build(notes.images, reader.encoder.architecture.preprocess, cache)
    return PairDataset(reader.processor, notes.tokens, notes.image_ids, table, train, validation, hard_negatives)


def model_cache(config: Config) -> Path:
    """The folder of converted LLM weights, shared by all runs."""
    return config.lake / WORK_FOLDER / "models"


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """The (query_id, target_id) of the Parquet files of `folder`, sorted; [] if there is no such folder."""
    files = parquet_files(folder)
    if not files:
        return []
    table = pads.dataset(files).to_table(columns=["query_id", "target_id"])
    return sorted(zip(table["query_id"].to_pylist(), table["target_id"].to_pylist(), strict=True))
