"""The process of the model: one that cannot be loaded, how its threads wait, and that loading gives way to others."""

import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from notellm2_core.notes.note import Note
from notellm2_core.serving.embedding import EmbedderDown
from notellm2_core.serving.embedding_process import EmbeddingProcess
from tests.support.served import TwoReleases
from tests.support.waiting import wait_for

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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a priority is that of a whole process")
@pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) > 9, reason="no priority is so much lower than this one")
def test_loading_gives_way_to_others_and_embedding_does_not(two_releases: TwoReleases) -> None:
    """What threads of each priority do, in ticks of the processor, while the model loads and after that."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    model = EmbeddingProcess(two_releases.first.path / "model", waits=False, gives_way=True)
    assert model._process is not None
    threads = Path(f"/proc/{model._process.pid}/task")

    def ticks() -> Counter[int]:
        """By the difference to this process's priority."""
        work: Counter[int] = Counter()
        for thread in threads.iterdir():
            with suppress(OSError):  # it has ended meanwhile
                fields = (thread / "stat").read_text().rpartition(")")[2].split()  # proc(5), from its third field on
                work[int(fields[16]) - own] += int(fields[11]) + int(fields[12])
        return work

    try:
        wait_for(lambda: ticks().keys() == {0, 10})
        model.submit(Note("x", "title", (), "")).result(300)
        loaded = ticks()
        while (now := ticks())[0] - loaded[0] < 20:
            model.submit(Note("x", "title", (), "")).result(300)
    finally:
        model.close()
    assert now[10] - loaded[10] <= 1
