"""Training data: notes, pairs and features in, global batches out. What a step sees is a function of (seed, step).

Notes are numbered by their place in `note_ids`; a batch is an array of such numbers, in which rows 2k and 2k + 1 are
the query and the target of pair k.

Shapes: P pairs, B pairs per batch, N = 2B rows.
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
from notellm2_core.training.data.positives import PositiveIndex, _codes, _digest, _or_itself
from notellm2_core.training.objective.losses import BatchLabels
from notellm2_core.vision.feature_store import FeatureStore
from notellm2_core.vision.feature_table import FeatureTable
from notellm2_core.vision.pixel_table import PixelTable


class PairDataset:
    """The notes of the training and validation pairs, ready to be batched."""

    def __init__(
        self,
        processor: MLRMProcessor,
        tokens: Mapping[str, FieldTokens],
        images: Mapping[str, str | None],
        pictures: FeatureTable | PixelTable,
        train_pairs: Sequence[tuple[str, str]],
        validation_pairs: Sequence[tuple[str, str]] = (),
        hard_negatives: Path | None = None,
    ) -> None:
        """`images`: note_id -> image_id or None. `pictures`: what the model, or its encoder, reads of them.
        `hard_negatives`: what was mined for these pairs.

        Raises ValueError where a pair names a note that `tokens` lacks, or the hard negatives are of other pairs.
        """
        self.note_ids = tuple(sorted({n for pair in (*train_pairs, *validation_pairs) for n in pair}))
        missing = [n for n in self.note_ids if n not in tokens]
        if missing:
            raise ValueError(f"{len(missing)} notes of the pairs are not among the notes, the first is {missing[0]!r}")
        self._processor = processor
        self._tokens = tokens
        self._pictures = pictures
        of_notes = [-1 if (i := images.get(n)) is None else pictures.rows[i] for n in self.note_ids]
        self._picture_rows = np.array(of_notes, dtype=np.int64)  # [notes]; -1: no image
        self._has_text = np.array([any(map(len, tokens[n])) for n in self.note_ids])
        self.train_pairs = self._numbers(train_pairs)  # [P, 2]
        self.validation_pairs = self._numbers(validation_pairs)
        texts = _codes(_digest(tokens[n]) for n in self.note_ids)
        pairs = np.concatenate([self.train_pairs, self.validation_pairs])
        whole = texts * (len(pictures.rows) + 1) + self._picture_rows + 1
        self._same = {
            "multimodal": PositiveIndex(whole, pairs),
            "image": PositiveIndex(_or_itself(self._picture_rows, self._picture_rows >= 0), pairs),
            "text": PositiveIndex(_or_itself(texts, self._has_text), pairs),
        }

        self.hard_negatives = None if hard_negatives is None else read_hard_negatives(hard_negatives, self.note_ids)

    @cached_property
    def train_notes(self) -> np.ndarray:
        """The notes of the training pairs, each once."""
        return np.unique(self.train_pairs)

    def has_image(self, rows: np.ndarray) -> np.ndarray:
        return self._picture_rows[rows] >= 0

    def note_batch(self, rows: np.ndarray, inputs: Sequence[InputKind] = ("multimodal",)) -> NoteBatch:
        """The model input of these notes, padded to the longest of them; once for each kind of input, one after the
        other.
        """
        tokens = self._tokens_of(rows)
        encoded = [self._processor.lay_out(of_note, kind) for kind in inputs for of_note in tokens]
        pictures = self._picture_rows[np.tile(rows, len(inputs))]
        if isinstance(self._pictures, FeatureTable):
            return self._processor.collate(encoded, *self._pictures.take(pictures), pictures >= 0)
        read = np.where([note.reads_image for note in encoded], pictures, -1)
        return self._processor.collate(encoded, None, None, pictures >= 0, self._pictures.take(read))

    def num_tokens(self, rows: np.ndarray, inputs: Sequence[InputKind] = ("multimodal",)) -> np.ndarray:
        """[len(rows)] tokens that the model reads of each note, over all `inputs`."""
        of = self._processor.num_tokens
        return np.array([sum(of(of_note, kind) for kind in inputs) for of_note in self._tokens_of(rows)])

    def _tokens_of(self, rows: np.ndarray) -> list[FieldTokens]:
        return [self._tokens[self.note_ids[row]] for row in rows.tolist()]

    def contents(self, rows: np.ndarray) -> np.ndarray:
        """A number for the content of each note, the same for notes with the same text and image."""
        return self._same["multimodal"].code[rows]

    def with_hard_negatives(self, rows: np.ndarray, num: int, seed: Sequence[int]) -> np.ndarray:
        """The notes `rows` [2B] of a batch, and after them `num` hard negatives for each of its pairs: [(2 + num) B].

        They are drawn from those of the pair's query, without contents that the batch has already; where there are too
        few, from all training notes. Raises ValueError where none were given.
        """
        if not num:
            return rows
        if self.hard_negatives is None:
            raise ValueError("training.hard_negatives.num asks for some: give --hard-negatives, or set it to 0")
        rng = np.random.default_rng(seed)
        code = self._same["multimodal"].code
        in_batch, added = set(code[rows].tolist()), []
        for query in rows[::2].tolist():
            drawn = [*rng.permutation(self.hard_negatives[query]), *rng.choice(self.train_notes, 8 * num)]
            new: dict[int, int] = {}
            for note in drawn:
                if code[note] not in in_batch:
                    new.setdefault(code[note], note)
            chosen = [*new.values(), *drawn][:num]  # of a handful of notes, some come twice
            added += chosen
            in_batch.update(code[chosen].tolist())
        return np.concatenate([rows, added])

    def labels(
        self,
        rows: np.ndarray,
        known_positives: KnownPositives = "mask",
        num_paired: int | None = None,
        kinds: Collection[InputKind] = get_args(InputKind),
    ) -> BatchLabels:
        """Which of the notes `rows` have an image and a text, and which are known positives of each other.

        Known positives show the same, or what they show is related, in either direction, by any pair of notes that
        show it: the whole content for the multimodal input, the image or the text alone for the other `kinds`.
        """
        has = {"image": torch.from_numpy(self.has_image(rows)), "text": torch.from_numpy(self._has_text[rows])}
        if known_positives == "ignore":
            return BatchLabels(has, None, num_paired)
        known: dict[str, torch.Tensor] = {kind: torch.from_numpy(self._same[kind].known(rows)) for kind in kinds}
        return BatchLabels(has, known, num_paired, count_known=known_positives == "count")

    def _numbers(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        number = {n: i for i, n in enumerate(self.note_ids)}
        return np.array([(number[a], number[b]) for a, b in pairs], dtype=np.int64).reshape(-1, 2)


def load_pair_dataset(reader: InputReader, pairs: Path, cache: Path, hard_negatives: Path | None = None) -> PairDataset:
    """Read everything that `pairs`/{train,validation} name, and nothing else.

    `cache`: where the table of features, or of pixels, is kept. `hard_negatives`: what was mined for these pairs.

    Raises ValueError where there are no training pairs, or a note, a feature or a picture is missing.
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
    """Where converted LLM weights are kept between runs."""
    return config.lake / WORK_FOLDER / "models"


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """The (query_id, target_id) of the Parquet files of `folder`, sorted; none where there is no such folder."""
    files = parquet_files(folder)
    if not files:
        return []
    table = pads.dataset(files).to_table(columns=["query_id", "target_id"])
    return sorted(zip(table["query_id"].to_pylist(), table["target_id"].to_pylist(), strict=True))
