"""The process of the model: one that cannot be loaded, and how its threads wait."""

from pathlib import Path

import pytest

from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import EmbedderDown
from notellm2_core.serving.embedding_process import EmbeddingProcess

pytestmark = pytest.mark.slow


def test_a_model_that_cannot_be_loaded_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    with pytest.raises(ValueError, match="cannot be loaded"):
        EmbeddingProcess(tmp_path)
    assert "GOMP_SPINCOUNT = '0'" in capfd.readouterr().err  # threads of torch do not spin while they wait
    model = EmbeddingProcess(tmp_path, waits=False)
    with pytest.raises(EmbedderDown, match="cannot be loaded"):
        model.submit(Note("x", "title", (), "")).result(300)
    assert not model.is_running
    model.close()
