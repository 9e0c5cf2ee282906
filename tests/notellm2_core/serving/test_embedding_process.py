"""The process of the model: one that cannot be loaded."""

from pathlib import Path

import pytest

from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import EmbedderDown
from notellm2_core.serving.embedding_process import EmbeddingProcess

pytestmark = pytest.mark.slow


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        EmbeddingProcess(tmp_path)
    model = EmbeddingProcess(tmp_path, waits=False)
    with pytest.raises(EmbedderDown, match="cannot be loaded"):
        model.submit(Note("x", "title", (), "")).result(300)
    assert not model.is_running
    model.close()
