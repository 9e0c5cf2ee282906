"""The store of vision features, and the table of which note has which image.

A store is a folder of Parquet parts (`schema.vision_features`), one store per encoder, to which parts are only ever
added. A part is written whole or not at all. Its pages carry checksums: an error names a part that was damaged later,
and moving it away costs only its own images.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core import schema
from notellm2_core.runtime.files import parquet_files, read_errors, sweep, written_whole
from notellm2_core.schema import NOTE_IMAGES_FILE, VISION_FOLDER

_COMMAND = "python -m notellm2_core.vision.extract"  # which makes the files
_STORE_FILE = "store.json"  # the dimensions of the features
_ROW_GROUP_BYTES = 4 << 20  # small, so that a few images can be read without the whole part


@dataclass(frozen=True)
class Features:
    """The features of n images; row i belongs to `image_ids[i]`."""

    image_ids: tuple[str, ...]
    patches: np.ndarray  # float16 [n, L, h_v]
    global_feature: np.ndarray  # float16 [n, h_v]


class FeatureStore:
    """The features of one encoder."""

    def __init__(self, root: Path) -> None:
        """Raises ValueError if `root` is not a store."""
        self.root = Path(root)
        try:
            dimensions = json.loads((self.root / _STORE_FILE).read_text())
            self.num_patches: int = dimensions["num_patches"]
            self.width: int = dimensions["width"]
        except OSError as e:
            raise ValueError(f"{root} holds no vision features; compute them with {_COMMAND}") from e
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"{self.root / _STORE_FILE} is damaged ({e!r}); {_COMMAND} makes it where it is missing"
            ) from e
        self._rows: dict[str, tuple[Path, int]] = {}  # image id -> its part and row
        self._hashes: dict[str, str | None] = {}
        self._read: set[Path] = set()

    @classmethod
    def create(cls, root: Path, num_patches: int, width: int) -> "FeatureStore":
        """Open the store for writing; create it if it is missing. Raises ValueError if it has other dimensions."""
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        if not (root / _STORE_FILE).exists():
            with _written(root / _STORE_FILE) as draft:
                draft.write_text(json.dumps({"num_patches": num_patches, "width": width}))
        store = cls(root)
        if (store.num_patches, store.width) != (num_patches, width):
            raise ValueError(f"{root} holds {store.num_patches} x {store.width} features, not {num_patches} x {width}")
        return store

    def image_ids(self) -> set[str]:
        """The image ids in the store at this moment. Raises ValueError naming a damaged part."""
        for part in parquet_files(self.root):
            if part not in self._read:
                with read_errors(part, _COMMAND), pq.ParquetFile(part, page_checksum_verification=True) as file:
                    expected = schema.vision_features(self.num_patches, self.width)
                    if not file.schema_arrow.equals(expected):
                        raise ValueError("other columns than this store has")
                    ids, hashes = (c.to_pylist() for c in file.read(["image_id", "perceptual_hash"]).columns)
                for row, (image_id, image_hash) in enumerate(zip(ids, hashes, strict=True)):
                    self._rows.setdefault(image_id, (part, row))
                    self._hashes[image_id] = image_hash
                self._read.add(part)
        return set(self._rows)

    def perceptual_hash(self, image_id: str) -> str | None:
        """`images.perceptual_hash` of an image that `image_ids` has returned."""
        return self._hashes[image_id]

    def append(
        self,
        image_ids: Sequence[str],
        patches: np.ndarray,
        global_feature: np.ndarray,
        perceptual_hashes: Sequence[str | None],
    ) -> None:
        """Add one part: `patches` [n, L, h_v] and `global_feature` [n, h_v], stored in fp16.

        Raises ValueError if a value is outside the range of fp16, OSError if the part cannot be written.
        """
        n = len(image_ids)
        assert patches.shape == (n, self.num_patches, self.width) and global_feature.shape == (n, self.width)
        arrays: list[pa.Array] = [pa.array(c, pa.string()) for c in (image_ids, perceptual_hashes)]
        for values in (patches, global_feature):
            with np.errstate(over="ignore"):
                half = np.ascontiguousarray(values, dtype=np.float16).reshape(n, -1)
            if not np.isfinite(half).all():
                bad = image_ids[int(np.flatnonzero(~np.isfinite(half).all(1))[0])]
                raise ValueError(f"the vision encoder gives features beyond the range of fp16 for image {bad}")
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), half.shape[1]))
        table = pa.Table.from_arrays(arrays, schema=schema.vision_features(self.num_patches, self.width))
        rows = max(1, _ROW_GROUP_BYTES // ((self.num_patches + 1) * self.width * 2))
        name = hashlib.sha256("".join(image_ids).encode()).hexdigest()[:16]  # equal images give the same part
        with _written(self.root / f"part-{name}.parquet") as draft:
            pq.write_table(
                table, draft, row_group_size=rows, use_dictionary=False, compression="lz4",
                write_statistics=False, write_page_checksum=True,
            )  # fmt: skip

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of `image_ids`, in that order. Raises ValueError if one is missing, or a part is damaged."""
        if not all(image_id in self._rows for image_id in image_ids):
            missing = [i for i in image_ids if i not in self.image_ids()]
            if missing:
                raise ValueError(
                    f"{self.root} has no features of {len(missing)} of {len(image_ids)} images (first: {missing[0]}); "
                    "compute them with python -m notellm2_core.vision.extract"
                )
        patches = np.empty((len(image_ids), self.num_patches, self.width), np.float16)
        pooled = np.empty((len(image_ids), self.width), np.float16)
        rows_of_part: dict[Path, list[tuple[int, int]]] = {}  # part -> (row in it, row in the result)
        for i, image_id in enumerate(image_ids):
            part, row = self._rows[image_id]
            rows_of_part.setdefault(part, []).append((row, i))
        for part, pairs in rows_of_part.items():
            rows, targets = np.array(sorted(pairs)).T
            with (
                read_errors(part, _COMMAND),
                pq.ParquetFile(part, memory_map=True, page_checksum_verification=True) as file,
            ):
                first = 0
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    in_group = slice(*np.searchsorted(rows, (first, last)))
                    if in_group.start < in_group.stop:
                        table = file.read_row_group(group, ["patches", "global_feature"])
                        for column, out in (("patches", patches), ("global_feature", pooled)):
                            (chunk,) = table[column].chunks
                            values = chunk.flatten().to_numpy(zero_copy_only=True)
                            out[targets[in_group]] = values.reshape(-1, *out.shape[1:])[rows[in_group] - first]
                    first = last
        return Features(tuple(image_ids), patches, pooled)


def read_note_images(path: Path) -> dict[str, str | None]:
    """note_id -> image_id, None where the note has no usable image. `path`: the file, or its folder."""
    path = Path(path) / NOTE_IMAGES_FILE if Path(path).is_dir() else Path(path)
    with read_errors(path, _COMMAND):
        table = pq.read_table(path, columns=["note_id", "image_id"])
    return dict(zip(table["note_id"].to_pylist(), table["image_id"].to_pylist(), strict=True))


def encoder_id(images: Path) -> str:
    """The id of the vision encoder that made the features. `images`: output folder of the features command.

    Raises ValueError where the folder is another one.
    """
    file = images / VISION_FOLDER / "config.json"
    if not file.exists():
        raise ValueError(f"{file} does not exist: give --images the folder that the features command wrote")
    return str(json.loads(file.read_text())["encoder_id"])


def num_missing(images: Path, stores: Path) -> int:
    """How many images of `images` (output folder of the features command) have no features below `stores` any more.

    A part of the store may have been removed, because it was damaged or to free space. Raises ValueError naming a part
    that is damaged.
    """
    store = stores / encoder_id(images)
    stored_ids = FeatureStore(store).image_ids() if (store / _STORE_FILE).exists() else set()
    return len({image_id for image_id in read_note_images(images).values() if image_id is not None} - stored_ids)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """`written_whole`, whose OSError names `path`."""
    try:
        with written_whole(path) as draft:
            yield draft
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e}") from e
