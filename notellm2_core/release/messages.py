"""Messages about decisions, failed runs, late weeks and stale releases: what they say, and how they are delivered.

A message is made from figures, and has an id: the same event has the same id, so that a receiver can drop what comes
twice. A webhook gets it as JSON:

    POST URL
    X-NoteLLM2-Id: demo/decision/7
    X-NoteLLM2-Signature: sha256=<HMAC-SHA256 of the body with NOTELLM2_WEBHOOK_SECRET>, if that is set

Any answer of 200 to 299 is a delivery.
"""

import hashlib
import hmac
import http.client
import json
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from notellm2_core.config.messages import MessageSettings
from notellm2_core.lake.ledger import Decision, State
from notellm2_core.runtime.files import write_atomically

SECRET = "NOTELLM2_WEBHOOK_SECRET"  # name of the variable of the environment
TIMEOUT_SECONDS = 10
_KEPT_IDS = 5000  # of each receiver: more than one tick offers
_ALARMS = ("refused", "undecided", "rolled_back", "failed", "late", "stale")


@dataclass(frozen=True)
class Message:
    """What happened, for people (`title`, `text`) and programs (the rest)."""

    id: str
    event: str  # an action of the ledger, or failed, late, stale
    title: str
    text: str
    week: str | None = None
    release: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_alarm(self) -> bool:
        """Whether somebody should look."""
        return self.event in _ALARMS


class NotDelivered(RuntimeError):
    """A receiver did not take a message; it is sent again later."""


def of_decision(name: str, decision: Decision) -> Message | None:
    """The message about a decision; None for measured, banned and allowed, which change nothing that is live.

    `name`: that of the configuration.
    """
    if decision.action not in _TITLES:
        return None
    recalls, k = decision.figures.get("recalls", {}), decision.figures.get("k")
    shown = ", ".join(f"{who} {recall:.1f}" for who, recall in recalls.items())
    title = f"{name}: release {decision.release} of the week {decision.week} {_TITLES[decision.action]}"
    text = decision.why + (f" R@{k}: {shown}." if shown else "") + f" By {decision.by}."
    return Message(f"{name}/decision/{decision.number}", decision.action, title, text, decision.week, decision.release,
                   decision.figures)  # fmt: skip


_TITLES = {
    "promoted": "is live",
    "rolled_back": "is live again",
    "undecided": "is undecided; the champion stays",
    "refused": "is refused; the champion stays",
    "waiting": "waits for approval",
}


def of_failed_run(name: str, run_id: str, job: str, week: str | None, why: str) -> Message:
    """The message about a run that failed and is not tried again."""
    about = f" of the week {week}" if week else ""
    return Message(f"{name}/run/{run_id}", "failed", f"{name}: {job}{about} failed", f"{why} Run {run_id}.", week)


def of_late_week(name: str, week: date, missing: list[str]) -> Message:
    """The message about a week that has ended, and whose logs are not all there."""
    days = ", ".join(missing)
    return Message(f"{name}/late/{week}", "late", f"{name}: the week {week} is late",
                   f"The logs of {days} have not arrived.", str(week))  # fmt: skip


def of_stale_release(name: str, state: State, covered_until: date, today: date, max_age_days: int) -> Message | None:
    """The message that the live release knows nothing of the last days; None while it is fresh, or nothing is live.

    Its age is that of its data: a release that was made again from an old log is no younger.
    """
    if not state.reigns or (today - covered_until).days <= max_age_days:
        return None
    reign = state.reigns[-1]
    age = (today - covered_until).days
    return Message(f"{name}/stale/{reign.release}", "stale", f"{name}: the live release is {age} days old",
                   f"Release {reign.release} knows the log until {covered_until}, {age} days ago.", reign.week,
                   reign.release, {"age_days": age, "messages.max_age_days": max_age_days})  # fmt: skip


Receiver = Callable[[Message], None]  # raises NotDelivered


def receivers(settings: MessageSettings) -> dict[str, Receiver]:
    """The configured receivers, by name."""
    found: dict[str, Receiver] = {}
    if settings.webhook is not None:
        found[settings.webhook] = partial(_post, url=settings.webhook)
    for address in settings.apprise:
        found[address] = partial(_send_by_apprise, address=address)
    return found


class Outbox:
    """Remembers in LAKE/promotion/NAME/messages.json what each receiver has got.

    A message is sent twice only if the process is killed between its delivery and the note of it.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "messages.json"

    def send(self, messages: Sequence[Message], to: Mapping[str, Receiver]) -> list[str]:
        """Send to each receiver what it has not got yet, in order. Returns the failures; the next call tries again.

        A receiver that is new gets only what comes later.
        """
        sent: dict[str, list[str]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        failures = []
        for name, receive in to.items():
            is_new = name not in sent
            got = sent.setdefault(name, [])
            for message in (m for m in messages if m.id not in got):
                if not is_new:
                    try:
                        receive(message)
                    except NotDelivered as e:
                        failures.append(f"{message.id} to {name}: {e}")
                        break
                got.append(message.id)
                self._write(sent)
            if is_new:
                self._write(sent)
        return failures

    def _write(self, sent: Mapping[str, Sequence[str]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({name: ids[-_KEPT_IDS:] for name, ids in sent.items()}, indent=1))


def _post(message: Message, url: str) -> None:
    body = json.dumps(asdict(message) | {"alarm": message.is_alarm}).encode()
    headers = {"Content-Type": "application/json", "X-NoteLLM2-Id": message.id}
    if secret := os.environ.get(SECRET):
        headers["X-NoteLLM2-Signature"] = f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _OPENER.open(request, timeout=TIMEOUT_SECONDS):  # an answer of 300 and above raises
            pass
    except (OSError, http.client.HTTPException) as e:  # urllib's errors are OSErrors
        raise NotDelivered(str(getattr(e, "reason", None) or e)) from e


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET without its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _send_by_apprise(message: Message, address: str) -> None:
    try:
        import apprise
    except ImportError as e:
        raise NotDelivered("messages.apprise needs pip install apprise") from e
    to = apprise.Apprise()
    kind = apprise.NotifyType.WARNING if message.is_alarm else apprise.NotifyType.INFO
    if not to.add(os.path.expandvars(address)) or not to.notify(message.text, message.title, notify_type=kind):
        raise NotDelivered("Apprise could not send it")
