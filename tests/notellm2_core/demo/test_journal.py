"""The journal of a simulation: what was written stays, whatever cuts the file."""

from pathlib import Path

import pytest

from notellm2_core.demo.journal import Journal

SETTINGS = {"seed": 1, "feed": 10}


def test_records_are_there_after_a_kill_at_every_byte(tmp_path: Path) -> None:
    """A record is there, as it was, from its line's end on; the next ones are written after it."""
    file = tmp_path / "new" / "journal.jsonl"
    journal = Journal(file, SETTINGS)
    run = journal.run
    for number in range(3):
        assert journal.add({"feed": [["ä", "r"]], "n": number}, "visit", 1, number)["n"] == number
    journal.sync()
    journal.close()
    content = file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(ends[0], len(content) + 1):
        file.write_bytes(content[:cut])
        again = Journal(file, SETTINGS)
        kept = sum(end <= cut for end in ends) - 1
        assert again.run == run
        assert [again.get("visit", 1, n) for n in range(3)] == [
            {"feed": [["ä", "r"]], "n": n} if n < kept else None for n in range(3)
        ]
        again.add(True, "after", 1)
        again.close()
        assert file.read_bytes().startswith(content[: ends[kept]]) and file.read_bytes().count(b"\n") == kept + 2
    file.write_bytes(content[: ends[0] - 1])
    new = Journal(file, SETTINGS)  # not even its name was written
    assert new.run != run
    new.close()


def test_another_simulation_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    first = Journal(file, SETTINGS)
    with pytest.raises(ValueError, match=r"journal\.jsonl is in use"):
        Journal(file, SETTINGS)
    first.close()
    with pytest.raises(ValueError, match=r"of another simulation \(feed\): name a new file"):
        Journal(file, SETTINGS | {"feed": 5})
    for line in (b"{\n", b"[]\n", b'{"key": 1}\n'):
        file.write_bytes(file.read_bytes().split(b"\n")[0] + b"\n" + line)
        with pytest.raises(ValueError, match=r"line 2 is damaged"):
            Journal(file, SETTINGS)
