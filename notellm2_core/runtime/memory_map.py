"""Arrays that are written once and memory-mapped: all ranks of a machine share their pages."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from notellm2_core.runtime.files import written_whole


def memory_mapped(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """The array in `path`, of `shape` and `dtype`, read-only. A missing file is filled by `fill`, whole or not at all.

    Raises ValueError where the file is damaged, and the errors of `fill`.
    """
    if not shape[0]:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    if not path.exists():
        with written_whole(path) as draft:
            values = np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=shape)
            fill(values)
            values.flush()
    try:
        table = np.load(path, mmap_mode="r")
        if (table.shape, table.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(f"{table.dtype} {table.shape}, not {np.dtype(dtype)} {shape}")
    except (ValueError, EOFError) as e:
        raise ValueError(f"{path} is damaged ({e}); a run makes it where it is missing") from e
    return table
