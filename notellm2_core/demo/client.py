"""A client of the service, as a platform has one: it waits where the service is busy, and counts what goes wrong."""

import base64
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from notellm2_core.demo.weeks import NewNote

PATIENCE_SECONDS = 300.0  # that a request is repeated while the service is busy, starts, or is away
_EVENTS = 1000  # of a request
_BUSY = (429, 503)
_HOPELESS = (401, 403, 404, 409)  # of what is asked again and again: a key, or the service's settings, are wrong
Events = Sequence[Mapping[str, Any]]


class ServiceClient:
    """Requests one after the other. `faults`: the answers that are errors, by what they say."""

    def __init__(self, url: str, key: str | None = None, patience: float = PATIENCE_SECONDS) -> None:
        """key: of the scope `write`. patience: seconds."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http, self._patience = httpx.Client(base_url=url, timeout=60, headers=headers), patience
        self.faults: Counter[str] = Counter()

    def wait(self) -> None:
        """Until the service has read its log. Raises ConnectionError, and ValueError for what is no service."""
        self._ask("GET", "/readyz", hopeless=_HOPELESS)

    def write(self, note: NewNote) -> bool:
        """Write a note, once. Returns whether it is found by now."""
        image = {} if note.image is None else {"image": base64.b64encode(note.image).decode()}
        text = {"title": note.title, "topics": note.topics, "content": note.content}
        body = {"note_id": note.note_id, "version": 1, **text, **image}
        answer = self._ask("POST", "/notes", body, hopeless=_HOPELESS[:3])
        return answer is not None and answer.status_code != 202

    def recall(self, user_id: str, history: Sequence[str], k: int, exclude: Sequence[str]) -> dict[str, Any] | None:
        """The answer for a history; None: an error."""
        body = {"user_id": user_id, "history": history, "k": k, "exclude": exclude, "deadline_ms": 30_000}
        answer = self._ask("POST", "/recall", body, hopeless=_HOPELESS)
        return None if answer is None else answer.json()

    def send(self, events: Events) -> bool:
        """Returns whether all of them are on the service's disk."""
        parts = [events[start : start + _EVENTS] for start in range(0, len(events), _EVENTS)]
        answers = [self._ask("POST", "/events", {"events": part}, hopeless=_HOPELESS) for part in parts]
        return None not in answers

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, hopeless: Sequence[int] = ()
    ) -> httpx.Response | None:
        """The answer; None: an error, which is counted.

        Raises ConnectionError if the service is away for too long, and ValueError for the statuses `hopeless`.
        """
        deadline, pause = time.monotonic() + self._patience, 0.1
        while True:
            try:
                answer = self._http.request(method, path, json=body)
                problem = f"it answers {answer.status_code}"
                if answer.status_code not in _BUSY:
                    break
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as e:  # nothing that could be sent
                raise ValueError(f"the service cannot be asked at {self._http.base_url}: {e}") from e
            except httpx.TransportError as e:
                problem = str(e) or type(e).__name__
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"the service at {self._http.base_url} has not answered for {self._patience:.0f} s ({problem}); "
                    "run the same command again to go on"
                )
            time.sleep(pause)
            pause = min(5.0, 2 * pause)
        if answer.is_success:
            return answer
        if answer.status_code in hopeless:
            raise ValueError(f"the service refuses {method} {path} ({answer.status_code}): {_detail(answer)}")
        self.faults[f"{method} {path}: {answer.status_code} {_detail(answer)}"] += 1
        return None

    def close(self) -> None:
        self._http.close()


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])[:200]
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
