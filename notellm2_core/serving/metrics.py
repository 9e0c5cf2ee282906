"""What the service shows of itself, for Prometheus."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from notellm2_core.serving.database import LogUnavailable
from notellm2_core.serving.events import num_waiting
from notellm2_core.serving.live_index import Answer
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.service import Service
from notellm2_core.serving.timed import SECONDS, request_seconds


class Metrics:
    """Counts what is asked and answered, and reads the state of a service when it is shown."""

    def __init__(self, service: Service) -> None:
        self._service, self._registry = service, CollectorRegistry()
        self.request_seconds = request_seconds(self._registry)
        self._waited, self._took = (
            Histogram(f"notellm2_search_{name}_seconds", text, buckets=SECONDS, registry=self._registry)
            for name, text in {"wait": "That a search waits for a thread.", "run": "That it takes then."}.items()
        )
        self.refused_searches = Counter(
            "notellm2_refused_searches", "For which there was no place (429).", registry=self._registry
        )
        self._history = Counter("notellm2_history_notes", "Of recalls.", registry=self._registry)
        self._unknown = Counter("notellm2_unknown_history_notes", "Those that are not there.", registry=self._registry)
        self._short = Counter("notellm2_short_answers", "With fewer hits than asked for.", registry=self._registry)
        self._partial = Counter("notellm2_partial_answers", "At the deadline.", registry=self._registry)
        self._registry.register(self)

    def count(self, answer: Answer, num_history: int, k: int) -> None:
        """Count the answer of a recall."""
        self._history.inc(num_history)
        self._unknown.inc(len(answer.unknown))
        self._short.inc(len(answer.hits) < k)
        self._partial.inc(answer.is_partial)

    def observe_search(self, waited: float, took: float) -> None:
        """Seconds of a search. The rest of a request's time is HTTP and JSON."""
        self._waited.observe(waited)
        self._took.observe(took)

    def collect(self) -> Iterator[Metric]:
        """The state of the service now."""
        service, releases, release = self._service, self._service.releases, self._service.current
        view = release.index.delta.view
        values = {
            "notellm2_ready": (float(service.is_ready), "Whether the log has been read."),
            "notellm2_unusable_notes": (len(releases.unusable(release)), "Notes that the model cannot embed."),
            "notellm2_log_failures": (releases.num_failures, "Times that the log could not be followed."),
            "notellm2_refused_switches": (
                releases.num_refused,
                "Times that a champion or a base could not be taken.",
            ),
            "notellm2_log_lag_entries": (service.lag, "Entries of the log that are not shown yet."),
            "notellm2_new_notes": (int(view.living.sum()), "Living notes that are newer than the release."),
            "notellm2_new_notes_places": (len(view.vectors), "Their places, with those of notes that are gone."),
            "notellm2_gone_notes": (view.num_gone, "Notes of the release that are gone or were written again."),
            "notellm2_gone_share": (view.num_gone / max(1, view.num_base), "Of the notes of the release."),
            "notellm2_model_loaded": (float(release.model.is_running), "Whether new notes can be embedded."),
            "notellm2_embedding_waiting": (release.model.num_waiting, "Notes that wait for the model."),
            "notellm2_oldest_waiting_note_seconds": (
                _age(releases.follower.waits_since),
                "Since the oldest note that waits for its vector was written; 0: none waits.",
            ),
            "notellm2_releases": (len(releases.in_memory), "Releases in memory."),
        }
        with suppress(LogUnavailable):  # then these are missing, and the others are not
            values |= self._of_log(release)
        for name, (value, text) in values.items():
            yield GaugeMetricFamily(name, text, value)
        yield InfoMetricFamily(
            "notellm2_release", "The one that answers.", {"release": release.id, "week": release.week}
        )

    def _of_log(self, release: LiveRelease) -> dict[str, tuple[float, str]]:
        """What is asked of the database."""
        log = self._service.log
        first = log.first_after(release.base.seq)
        return {
            "notellm2_oldest_new_note_seconds": (
                _age(None if first is None else first.time),
                "Since the oldest note that the release, as it was compacted, does not hold was written; 0: none.",
            ),
            "notellm2_events_waiting": (num_waiting(log), "Events that are not in a file yet."),
        }

    def show(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)


def _age(time: datetime | None) -> float:
    """Seconds since then; 0 for None. Another machine's clock may be ahead."""
    return 0.0 if time is None else max(0.0, (datetime.now(UTC) - time).total_seconds())
