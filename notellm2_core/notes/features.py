"""Vision features: the frozen encoder runs once per distinct picture, and its answers are kept.

A store is a folder of Parquet parts (`schema.vision_features`), one store per encoder, to which parts are only ever
added. A part is written under a temporary name and renamed, so a killed writer leaves none half. Its pages carry
checksums: a part that was damaged later is refused by name, and deleting it costs only its own pictures.

`python -m notellm2_core.notes.features` runs the encoder over the notes' pictures; what the store knows is reused.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from notellm2_core import schema
from notellm2_core.cli_errors import one_line_errors
from notellm2_core.config import Config, load_config
from notellm2_core.notes import images

if TYPE_CHECKING:  # readers of the store need no torch
    from torch import Tensor

    from notellm2_core.model.vision import VisionEncoder

STORE_FACTS = "store.json"
_ROW_GROUP_BYTES = 4 << 20  # small, so that a few pictures can be read without the whole part
_PART_IMAGES = 512  # what a kill can cost


@dataclass(frozen=True)
class Features:
    """Row i belongs to `image_ids[i]`."""

    image_ids: tuple[str, ...]
    patches: np.ndarray  # float16 [n, L, h_v]
    global_feature: np.ndarray  # float16 [n, h_v]


class FeatureStore:
    """The features of one encoder."""

    def __init__(self, root: Path) -> None:
        """Raises ValueError if `root` is not a store."""
        self.root = Path(root)
        try:
            facts = json.loads((self.root / STORE_FACTS).read_text())
            self.num_patches: int = facts["num_patches"]
            self.width: int = facts["width"]
        except OSError as e:
            raise ValueError(
                f"{root} holds no vision features; compute them with python -m notellm2_core.notes.features"
            ) from e
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{self.root / STORE_FACTS} is damaged ({e!r}); delete it and run again") from e
        self._rows: dict[str, tuple[Path, int]] = {}  # image id -> its part and row
        self._read: set[Path] = set()

    @classmethod
    def create(cls, root: Path, num_patches: int, width: int) -> "FeatureStore":
        """Open the store for writing; begin it if it is not there. Raises ValueError if it has other dimensions."""
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        if not (root / STORE_FACTS).exists():
            text = json.dumps({"num_patches": num_patches, "width": width})
            _write_whole(root / STORE_FACTS, lambda temporary: temporary.write_text(text))
        store = cls(root)
        if (store.num_patches, store.width) != (num_patches, width):
            raise ValueError(f"{root} holds {store.num_patches} x {store.width} features, not {num_patches} x {width}")
        return store

    def known(self) -> set[str]:
        """The image ids whose features are here, as of now. Raises ValueError naming a damaged part."""
        for part in sorted(self.root.glob("part-*.parquet")):
            if part not in self._read:
                with _naming(part), pq.ParquetFile(part, page_checksum_verification=True) as file:
                    expected = schema.vision_features(self.num_patches, self.width)
                    if not file.schema_arrow.equals(expected):
                        raise ValueError("other columns than this store has")
                    ids = file.read(["image_id"])["image_id"].to_pylist()
                for row, image_id in enumerate(ids):
                    self._rows.setdefault(image_id, (part, row))
                self._read.add(part)
        return set(self._rows)

    def append(self, image_ids: Sequence[str], patches: np.ndarray, global_feature: np.ndarray) -> None:
        """Add one part: `patches` [n, L, h_v] and `global_feature` [n, h_v], kept as fp16.

        Raises ValueError if a number does not fit into fp16.
        """
        n = len(image_ids)
        assert patches.shape == (n, self.num_patches, self.width) and global_feature.shape == (n, self.width)
        arrays: list[pa.Array] = [pa.array(image_ids, pa.string())]
        for values in (patches, global_feature):
            with np.errstate(over="ignore"):
                half = np.ascontiguousarray(values, dtype=np.float16).reshape(n, -1)
            if not np.isfinite(half).all():
                bad = image_ids[int(np.flatnonzero(~np.isfinite(half).all(1))[0])]
                raise ValueError(f"the vision encoder gives features beyond the range of fp16 for image {bad}")
            arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), half.shape[1]))
        table = pa.Table.from_arrays(arrays, schema=schema.vision_features(self.num_patches, self.width))
        rows = max(1, _ROW_GROUP_BYTES // ((self.num_patches + 1) * self.width * 2))
        name = hashlib.sha256("".join(image_ids).encode()).hexdigest()[:16]  # the same pictures: the same part
        _write_whole(
            self.root / f"part-{name}.parquet",
            lambda temporary: pq.write_table(
                table, temporary, row_group_size=rows, use_dictionary=False, compression="lz4",
                write_statistics=False, write_page_checksum=True,
            ),
        )  # fmt: skip

    def load(self, image_ids: Sequence[str]) -> Features:
        """The features of `image_ids`, in that order. Raises ValueError if one is not here, or a part is damaged."""
        if not all(image_id in self._rows for image_id in image_ids):
            missing = [i for i in image_ids if i not in self.known()]
            if missing:
                raise ValueError(
                    f"{self.root} has no features of {len(missing)} of {len(image_ids)} images (first: {missing[0]}); "
                    "compute them with python -m notellm2_core.notes.features"
                )
        patches = np.empty((len(image_ids), self.num_patches, self.width), np.float16)
        pooled = np.empty((len(image_ids), self.width), np.float16)
        wanted: dict[Path, list[tuple[int, int]]] = {}  # part -> (row in it, row in the answer)
        for i, image_id in enumerate(image_ids):
            part, row = self._rows[image_id]
            wanted.setdefault(part, []).append((row, i))
        for part, pairs in wanted.items():
            rows, targets = np.array(sorted(pairs)).T
            with _naming(part), pq.ParquetFile(part, memory_map=True, page_checksum_verification=True) as file:
                first = 0
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    here = slice(*np.searchsorted(rows, (first, last)))
                    if here.start < here.stop:
                        table = file.read_row_group(group, ["patches", "global_feature"])
                        for column, out in (("patches", patches), ("global_feature", pooled)):
                            (chunk,) = table[column].chunks
                            values = chunk.flatten().to_numpy(zero_copy_only=True)
                            out[targets[here]] = values.reshape(-1, *out.shape[1:])[rows[here] - first]
                    first = last
        return Features(tuple(image_ids), patches, pooled)


def read_note_images(path: Path) -> dict[str, str | None]:
    """note_id -> image_id, None where the note has no usable picture. `path`: the file, or the folder it is in."""
    path = Path(path) / "note_images.parquet" if Path(path).is_dir() else Path(path)
    with _naming(path):
        table = pq.read_table(path, columns=["note_id", "image_id"])
    return dict(zip(table["note_id"].to_pylist(), table["image_id"].to_pylist(), strict=True))


@dataclass(frozen=True)
class _Prepared:
    """One note after its picture was looked at. `pixels` only where the encoder still has to run."""

    note_id: str
    status: images.Status
    image_id: str | None = None
    pixels: "Tensor | None" = None


def compute(
    encoder: "VisionEncoder", store: FeatureStore, notes: Path, source: Path, config: Config, part_images: int
) -> tuple[pa.Table, dict[str, Any]]:
    """Bring the store up to date with the notes' pictures: (schema.NOTE_IMAGES table, counts).

    Parts end where batches end, so a run that continues a killed one forms the same batches and gets the same bits.
    """
    import torch
    from tqdm import tqdm

    max_pixels, batch_size = config.source.max_image_pixels, config.model.vision.batch_size
    images.allow_pixels(max_pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    known = store.known()  # and whatever this run has taken on
    before = frozenset(known)
    batch: dict[str, "Tensor"] = {}
    part: list[tuple[list[str], np.ndarray, np.ndarray]] = []
    rows: list[tuple[str, str | None, str]] = []

    def prepare(note: tuple[str, str | None, bytes | None]) -> _Prepared:
        note_id, image_path, data = note
        encoded = images.fetch(source, image_path, data, max_pixels)
        if encoded.status != "ok":
            return _Prepared(note_id, encoded.status)
        image_id = encoded.image_id
        if image_id in known:
            status = images.check_header(encoded.data, max_pixels)
            return _Prepared(note_id, status, image_id if status == "ok" else None)
        status, image = images.decode(encoded.data, max_pixels)
        if image is None:
            return _Prepared(note_id, status)
        return _Prepared(note_id, "ok", image_id, encoder.preprocess(image))

    def encode() -> None:
        with torch.inference_mode():
            patches, pooled = encoder(torch.stack(list(batch.values())).to(device))
        part.append((list(batch), patches.half().cpu().numpy(), pooled.half().cpu().numpy()))
        batch.clear()

    def flush() -> None:
        ids, patches, pooled = zip(*part, strict=True)
        store.append([i for some in ids for i in some], np.concatenate(patches), np.concatenate(pooled))
        part.clear()

    total = sum(pq.read_metadata(file).num_rows for file in _note_files(notes))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        done = _in_order(pool, prepare, _read_notes(notes), ahead=2 * batch_size)
        for found in tqdm(done, total=total, desc="vision features", unit="note", mininterval=1):
            rows.append((found.note_id, found.image_id, found.status))
            if found.pixels is not None and found.image_id is not None and found.image_id not in known:
                known.add(found.image_id)
                batch[found.image_id] = found.pixels
                if len(batch) == batch_size:
                    encode()
                    if len(part) * batch_size >= part_images:
                        flush()
    if batch:
        encode()
    if part:
        flush()

    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    statuses = Counter(columns[2])
    distinct = {image_id for image_id in columns[1] if image_id}
    counts: dict[str, Any] = {"notes": len(rows)} | {status: statuses[status] for status in images.STATUSES}
    counts |= {"distinct_images": len(distinct), "computed": len(distinct - before), "reused": len(distinct & before)}
    counts |= {"encoder_id": encoder.encoder_id, "num_patches": store.num_patches, "width": store.width}
    return pa.Table.from_arrays([pa.array(c, pa.string()) for c in columns], schema=schema.NOTE_IMAGES), counts


def _in_order(pool: ThreadPoolExecutor, work: Any, items: Iterable[Any], ahead: int) -> Iterator[_Prepared]:
    """`map(work, items)` on the pool, at most `ahead` results waiting."""
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _note_files(notes: Path) -> list[Path]:
    files = sorted(notes.glob("*.parquet"))
    if not files:
        raise ValueError(f"{notes} holds no notes (no *.parquet)")
    return files


def _read_notes(notes: Path) -> Iterator[tuple[str, str | None, bytes | None]]:
    """(note_id, image_path, image) of every note; a few at a time, for the pictures may be in the table."""
    columns = ["note_id", "image_path", "image"]
    for path in _note_files(notes):
        with _naming(path), pq.ParquetFile(path) as file:
            if absent := [c for c in columns if c not in file.schema_arrow.names]:
                raise ValueError(f"no column {', '.join(absent)}")
            for batch in file.iter_batches(batch_size=64, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in what pyarrow raises."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as e:
        raise ValueError(f"{path} cannot be read ({e}); if it is damaged, delete it and run again") from e


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a name that no reader looks at, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(root: Path) -> None:
    """Remove what writers left that are no longer alive."""
    for temporary in root.glob(".*.tmp"):
        if not Path(f"/proc/{temporary.name.split('.')[-2]}").exists():
            temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run the frozen vision encoder once per distinct picture.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of Parquet in schema.NOTES")
    parser.add_argument("--source", type=Path, required=True, help="folder that image_path is relative to")
    parser.add_argument("--store", type=Path, required=True, help="parent of the stores, one per encoder")
    parser.add_argument("--out", type=Path, required=True, help="note_images.parquet, counts.json, vision/")
    parser.add_argument("--part-images", type=int, default=_PART_IMAGES, help="pictures per part: what a kill costs")
    args = parser.parse_args(argv)
    with one_line_errors():
        config = load_config(args.config)
        _note_files(args.notes)
        if not args.source.is_dir():
            raise ValueError(f"--source {args.source} is not a folder")
        from notellm2_core.model.vision import load_vision_encoder

        encoder = load_vision_encoder(config.model.vision)
        store = FeatureStore.create(args.store / encoder.encoder_id, encoder.num_patches, encoder.width)
        start = time.monotonic()
        table, counts = compute(encoder, store, args.notes, args.source, config, args.part_images)
        seconds = time.monotonic() - start
        args.out.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, args.out / "note_images.parquet")
        encoder.save_pretrained(args.out / "vision")
        (args.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
        print(json.dumps(counts), file=sys.stderr)
        print(f"{counts['computed'] / seconds:.1f} new images per second", file=sys.stderr)


if __name__ == "__main__":
    main()
