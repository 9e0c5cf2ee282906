"""The ledger of releases: every decision about one, in order, and the pointer to the champion that follows from them.

    LAKE/promotion/NAME/ledger.jsonl    a decision a line, appended and never changed: the truth
    LAKE/promotion/NAME/champion.json   the pointer: the champion after the last decision, for whoever serves it

NAME is that of the configuration: configurations that share a lake have champions of their own.

A decision is one line, written and synced before the pointer is renamed into place. A process that is killed in between
leaves an old pointer beside a complete decision; `Ledger.settle` and every later decision bring the pointer up to date.
A last line that was cut is no decision: readers leave it out, and the next decision replaces it.

Decisions are ordered by their numbers. Their times are for people: a clock may run backwards.
"""

import errno
import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from notellm2_core.runtime.files import sync, write_atomically

FOLDER = "promotion"  # in a lake
LEDGER, POINTER = "ledger.jsonl", "champion.json"

# promoted, rolled_back: `release` is the champion now; rolled_back also bans the release that was live until then.
# refused, undecided: by its verdict; the champion stays. waiting: it passed, and a person has to promote it.
# measured: a release that could not be promoted: of an earlier week, or banned.
# banned, allowed: whether `release`, and any other release of its model, may be promoted.
Action = Literal["promoted", "rolled_back", "refused", "undecided", "waiting", "measured", "banned", "allowed"]
REIGNS = ("promoted", "rolled_back")  # decisions that change the champion


class LedgerError(ValueError):
    """The ledger is damaged, or does not allow this decision."""


class Subject(NamedTuple):
    """The release that a decision is about."""

    release: str  # its id
    model: str  # the fingerprint of its checkpoint
    week: str  # the first day of the last week of its window


@dataclass(frozen=True)
class Decision:
    """One line of the ledger."""

    number: int  # 1, 2, ...
    time: str  # UTC, ISO 8601
    action: Action
    release: str  # the id of the release that it is about
    model: str  # the fingerprint of its checkpoint: a banned model does not return as another release
    week: str  # the first day of the last week of its window
    by: str  # "weekly_retrain", or the person
    why: str  # a sentence
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What follows from the decisions so far."""

    decisions: tuple[Decision, ...]
    torn: int = 0  # bytes of a cut last line
    hidden_model: str | None = None  # its releases are no champions here

    @property
    def number(self) -> int:
        """The number of decisions."""
        return len(self.decisions)

    @cached_property
    def reigns(self) -> tuple[Decision, ...]:
        """The decisions that made a release the champion, the oldest first."""
        return tuple(d for d in self.decisions if d.action in REIGNS and d.model != self.hidden_model)

    @property
    def champion(self) -> str | None:
        """The id of the release that is live."""
        return self.reigns[-1].release if self.reigns else None

    @cached_property
    def previous(self) -> str | None:
        """The release to go back to: the last champion of another model that is not banned."""
        for reign in reversed(self.reigns):
            if reign.model != self.reigns[-1].model and not self.is_banned(reign.release, reign.model):
                return reign.release
        return None

    def before(self, week: str) -> str | None:
        """The last champion of an earlier week that is not banned: what a warm start of this week trains on."""
        for reign in reversed(self.reigns):
            if reign.week < week and not self.is_banned(reign.release, reign.model):
                return reign.release
        return None

    def anchor(self, weeks: int) -> str | None:
        """The champion of `weeks` to 2 * `weeks` weeks before the newest promoted week; before there is one, the first.

        It shows losses that are too small in each single week. It is changed every `weeks` weeks, so that only it and
        the next one have to be kept (`anchors`). None: no champion yet.
        """
        anchors = self.anchors(weeks)
        return anchors[0] if anchors else None

    def anchors(self, weeks: int) -> tuple[str, ...]:
        """The anchor, and the next one."""
        promoted = [d for d in self.reigns if d.action == "promoted" and not self.is_banned(d.release, d.model)]
        if not promoted:
            return ()
        days = sorted(date.fromisoformat(d.week) for d in promoted)
        steps = (days[-1] - days[0]).days // (7 * weeks)
        ends = (days[0] + timedelta(weeks=weeks * max(0, n)) for n in (steps - 1, steps))
        return tuple([d.release for d in promoted if date.fromisoformat(d.week) <= end][-1] for end in ends)

    def is_banned(self, release: str, model: str) -> bool:
        """Whether this release may not be promoted: it, or another one of its model, was banned or rolled back."""
        return bool({release, model} & self._banned)

    @cached_property
    def _banned(self) -> set[str]:
        """Releases and models. A release that is promoted or gone back to is no longer banned."""
        banned: set[str] = set()
        live: Decision | None = None
        for decision in self.decisions:
            if decision.action == "rolled_back" and live is not None:
                banned |= {live.release, live.model}
            if decision.action == "banned":
                banned |= {decision.release, decision.model}
            elif decision.action in (*REIGNS, "allowed"):
                banned -= {decision.release, decision.model}
            live = decision if decision.action in REIGNS else live
        return banned

    def without(self, model: str) -> "State":
        """The state as if no release of this model had been live."""
        return replace(self, hidden_model=model)

    def last(self, release: str) -> Decision | None:
        """The last decision about this release."""
        return next((d for d in reversed(self.decisions) if d.release == release), None)


class Ledger:
    """The ledger of one configuration in a lake."""

    def __init__(self, lake: Path, name: str) -> None:
        self.folder = lake / FOLDER / quote(name, safe="")
        self.file, self.pointer = self.folder / LEDGER, self.folder / POINTER

    def state(self, number: int | None = None) -> State:
        """The first `number` decisions; None: all.

        Raises LedgerError naming file and line if a line other than a cut last one is damaged.
        """
        if not self.file.exists():
            return State(())
        whole, _, torn = self.file.read_bytes().rpartition(b"\n")
        lines = (whole.split(b"\n") if whole else [])[:number]
        return State(tuple(self._decision(line, number) for number, line in enumerate(lines, start=1)), len(torn))

    def _decision(self, line: bytes, number: int) -> Decision:
        try:
            decision = Decision(**json.loads(line))
        except (ValueError, TypeError) as e:
            raise LedgerError(
                f"{self.file}, line {number} is not a decision ({e}): restore the file from a backup"
            ) from e
        if decision.number != number:
            raise LedgerError(
                f"{self.file}, line {number} has the number {decision.number}: lines are missing or repeated"
            )
        return decision

    def decide(
        self,
        action: Action,
        subject: Subject,
        why: str,
        by: str | None = None,
        figures: Mapping[str, Any] | None = None,
        seen: State | None = None,
    ) -> Decision:
        """Append a decision, and bring the pointer up to date. Returns the decision.

        `seen`: the state that the decision was made on. Raises LedgerError if the champion, or what was decided about
        this release and its model, has changed since: of two promotions at once, one wins. `by`: who decided; None: the
        current user and host.
        """
        release, model, week = subject
        with self._locked():
            state = self.state()
            if seen is not None and seen.champion != state.champion:
                last = state.reigns[-1]
                raise LedgerError(
                    f"release {release} was judged beside the champion {seen.champion or 'none'}, and {last.by} has "
                    f"made {last.release} the champion since: judge it again"
                )
            if seen is not None and (
                seen.is_banned(release, model) != state.is_banned(release, model)
                or seen.last(release) != state.last(release)
            ):
                raise LedgerError(
                    f"something else was decided about release {release} meanwhile; see `notellm2 release`"
                )
            decision = Decision(
                number=state.number + 1,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                action=action,
                release=release,
                model=model,
                week=week,
                by=by or f"{getpass.getuser()}@{socket.gethostname()}",
                why=why,
                figures=dict(figures or {}),
            )
            self._append(decision, state.torn)
            self._point(State((*state.decisions, decision)))
        return decision

    def settle(self) -> State:
        """Bring the pointer up to date after a kill. Returns the state."""
        if not self.file.exists():
            return State(())
        with self._locked():
            state = self.state()
            if state.decisions and self._number_of_pointer() != state.number:
                self._point(state)
            return state

    def _append(self, decision: Decision, torn: int) -> None:
        line = json.dumps(asdict(decision), ensure_ascii=False, separators=(",", ":")) + "\n"
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if torn:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - torn)
            data, size = line.encode(), os.fstat(descriptor).st_size
            if os.write(descriptor, data) < len(data):  # the disk is full
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, "no space left on the disk for the decision", str(self.file))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(self.folder)

    def _point(self, state: State) -> None:
        write_atomically(self.pointer, json.dumps({"release": state.champion, "decisions": state.number}) + "\n")

    def _number_of_pointer(self) -> int | None:
        try:
            number: int = json.loads(self.pointer.read_text())["decisions"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return number

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
