from pathlib import Path

import numpy as np
import pytest

from notellm2_core.runtime.memory_map import memory_mapped


def test_made_once_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.npy"

    def fill(values: np.ndarray) -> None:
        values[:] = np.arange(6).reshape(3, 2)

    first = memory_mapped(path, (3, 2), np.float16, fill)
    again = memory_mapped(path, (3, 2), np.float16, lambda _: pytest.fail("the table exists"))
    assert np.array_equal(first, again) and first.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def fill(values: np.ndarray) -> None:
        raise ValueError("an image is gone")

    with pytest.raises(ValueError, match="an image is gone"):
        memory_mapped(tmp_path / "table.npy", (3, 2), np.uint8, fill)
    assert not list(tmp_path.iterdir())


def test_an_empty_array(tmp_path: Path) -> None:
    assert memory_mapped(tmp_path / "table.npy", (0, 2), np.uint8, lambda _: None).shape == (0, 2)


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_damaged_file_and_another_shape_are_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    np.save(path, np.zeros((3, 3), np.uint8))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table.npy is damaged .*a run makes it where it is missing"):
        memory_mapped(path, (3, 2), np.uint8, lambda _: None)
