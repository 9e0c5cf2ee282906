"""What a check found: what stops a run, what to know, and which settings to change."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """A setting to change: its dotted name, the value that fits the data, and why."""

    setting: str
    value: Any
    why: str


@dataclass
class Findings:
    """Filled while a source is checked."""

    stops: list[str] = field(default_factory=list)  # sentences; a run would stop at each
    remarks: list[str] = field(default_factory=list)  # sentences on what passes, and may not be intended
    changes: list[Change] = field(default_factory=list)

    def change(self, setting: str, value: Any, why: str) -> None:
        """Adds a change, unless the setting is to be changed for another reason already."""
        if setting not in (change.setting for change in self.changes):
            self.changes.append(Change(setting, value, why))


def percent(part: float, whole: float) -> str:
    """A share for people to read."""
    share = 100 * part / whole if whole else 0.0
    return "under 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"
