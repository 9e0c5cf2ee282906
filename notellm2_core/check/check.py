"""What a run would make of a source, before anything is made: no Spark, no model, nothing written.

The tables are read as the graph reads them (`notellm2_core.tables`), and rows are dropped and judged by its rules.
"""

from datetime import date
from math import ceil
from pathlib import Path
from typing import Any

import pyarrow as pa

from notellm2_core.check import advice
from notellm2_core.check.column_advice import advise_columns, advise_files, advise_images
from notellm2_core.check.description import describe_table, first_rows
from notellm2_core.check.findings import Findings
from notellm2_core.check.interactions import Labelled, label
from notellm2_core.check.log import Log, read_log
from notellm2_core.check.notes import image_metrics, note_metrics, unusable_counts
from notellm2_core.check.verdicts import dropped_share, undated_share, unusable_images
from notellm2_core.config.data import CheckSettings, HoldOutSettings, PairSettings, SplitSettings, WindowSettings
from notellm2_core.config.section import Section
from notellm2_core.config.source import (
    EventReadingSettings,
    EventSettings,
    EventTableSettings,
    NoteReadingSettings,
    SourceSettings,
)
from notellm2_core.lake.window import ResolvedWindow, last_complete_week_end, resolved_window
from notellm2_core.notes.source_reader import NoteTable, read_note_table
from notellm2_core.tables.log import ingestion_metrics, partitions_between
from notellm2_core.tables.source import EVENTS, NOTES, event_tables, find_table, note_table, open_events, open_notes
from notellm2_core.tables.table import Table
from notellm2_core.tables.windows import no_clicks, no_events
from notellm2_core.vision.image_status import STATUSES

_HALF = 0.5  # of the rows; above it, no higher limit is proposed


class DataSettings(Section):
    """The sections of a configuration that a check depends on."""

    source: SourceSettings = SourceSettings()
    window: WindowSettings = WindowSettings()
    pairs: PairSettings = PairSettings()
    split: SplitSettings = SplitSettings()
    checks: CheckSettings = CheckSettings()


def check_source(source: Path, settings: DataSettings) -> dict[str, Any]:
    """What was understood of the notes and the events in the folder `source`, and what a run would make of them.

    Returns source; tables, the descriptions of notes and events; notes, images, log, windows and interactions, the
    counts (None where an error hides them); and the findings: stops, remarks and changes. Raises ValueError where
    `source` is no folder.
    """
    if not source.is_dir():
        raise ValueError(f"the source {source} is not a folder.")
    check = _Check(source.absolute(), settings)
    check.notes()
    check.events()
    findings, share = check.findings, max(check.shares, default=0.0)
    if not findings.changes and 0 < share < _HALF:
        why = "only if what is dropped does not matter"
        findings.change("checks.max_dropped_share", ceil(100 * share) / 100, why)
    return {
        "source": str(source), **check.report, "stops": findings.stops, "remarks": findings.remarks,
        "changes": [vars(change) for change in findings.changes],
    }  # fmt: skip


class _Check:
    """The tables, one after the other: an error in one is a finding, and the other is checked all the same."""

    def __init__(self, source: Path, settings: DataSettings) -> None:
        self.source, self.settings = source, settings
        self.findings = Findings()
        self.shares: list[float] = []  # that exceed checks.max_dropped_share
        self.note_ids: pa.Array | None = None
        self.report: dict[str, Any] = {
            "tables": {NOTES: [], EVENTS: []}, **dict.fromkeys(("notes", "images", "log", "windows", "interactions"))
        }  # fmt: skip

    def notes(self) -> None:
        reading = NoteReadingSettings.of(self.settings.source)
        try:
            if reading.notes is None or reading.notes.files is None:
                find_table(self.source, NOTES)
            table = note_table(self.source, reading)
        except ValueError as e:
            self.findings.stops.append(str(e))
            advise_files(self.source, NOTES, self.settings.source, self.findings)
            return
        try:
            self._describe(NOTES, [table])
            table = open_notes(self.source, reading)
            self.report["tables"][NOTES][0]["first_rows"] = first_rows(table)
            notes = read_note_table(self.source, reading=reading)
        except ValueError as e:
            self.findings.stops.append(str(e))
            return
        self.note_ids = pa.array(notes.note_ids, pa.string())
        self.report["notes"] = metrics = note_metrics(notes)
        passed, shown = dropped_share(metrics, self.settings.checks)
        self._stop_unless(passed, "of the notes would be dropped", shown["dropped_share"])
        try:
            self._images(notes, table)
        except ValueError as e:  # a table whose column of images holds no bytes
            self.findings.stops.append(str(e))

    def _images(self, notes: NoteTable, table: Table) -> None:
        images = image_metrics(self.source, notes, table, self.settings.source.max_image_pixels)
        self.report["images"] = images
        num_notes = self.report["notes"]["notes"]
        counts: dict[str, float] = dict.fromkeys(STATUSES, 0.0) | unusable_counts(images, num_notes)
        passed, shown = unusable_images({"notes": num_notes, **counts}, self.settings.checks)
        self._stop_unless(passed, "of the named images cannot be used", shown["unusable_share"])
        advise_images(self.source, notes, images, table, self.findings)

    def events(self) -> None:
        source = self.settings.source
        reading = EventReadingSettings.of(source)
        try:
            if any(table.files is None for table in reading.events or (EventTableSettings(),)):
                find_table(self.source, EVENTS)
            tables = event_tables(self.source, reading)
        except ValueError as e:
            self.findings.stops.append(str(e))
            advise_files(self.source, EVENTS, source, self.findings)
            return
        try:
            self._describe(EVENTS, tables)
            tables = open_events(self.source, reading)
            for table, description in zip(tables, self.report["tables"][EVENTS], strict=True):
                description["first_rows"] = first_rows(table)
            log = read_log(self.source, tables, EventSettings.of(source))
        except ValueError as e:
            self.findings.stops.append(str(e))
            return
        self._judge(log)

    def _describe(self, name: str, tables: list[Table]) -> None:
        advise_columns(name, tables, self.settings.source, self.findings)
        self.report["tables"][name] = [describe_table(self.source, table) for table in tables]

    def _judge(self, log: Log) -> None:
        """The log as a whole, then its windows."""
        source, rows = self.settings.source, sum(log.events.values())
        advice.advise_events(log, source, self.findings)
        advice.advise_undated(log, rows, self.findings)
        advice.advise_times(log.rows, self.settings.pairs, self.findings)
        self.report["log"] = {"rows": rows, "events": dict(log.events.most_common())}
        try:
            metrics = ingestion_metrics(self.source, [counts.metrics(source.partition) for counts in log.by_file])
        except ValueError as e:
            self.findings.stops.append(str(e))
            return
        self.report["log"] = metrics
        passed, shown = undated_share(metrics, self.settings.checks)
        self._stop_unless(passed, f"of the rows have no plausible time (the worst file: {shown['file']})",
                          shown["undated_share"])  # fmt: skip
        end = self.settings.window.end or last_complete_week_end(date.fromisoformat(metrics["covered_until"]))
        window = resolved_window(self.settings.window, end)
        self.report["windows"] = {"train": window.train.iso(), "test": window.test.iso()}
        try:
            for days in (window.train, window.test):
                partitions_between(days.start, days.end, source.partition, **metrics)
        except ValueError as e:
            self.findings.stops.append(f"{e}.")
            advice.advise_window(metrics, self.settings.window, self.findings)
            return
        self._judge_windows(log, metrics, window)

    def _judge_windows(self, log: Log, log_metrics: dict[str, Any], window: ResolvedWindow) -> None:
        settings = EventSettings.of(self.settings.source)
        labelled = label(log, window, self.note_ids, settings)
        self.report["interactions"] = metrics = labelled.metrics(settings)
        for name, days in (("train", window.train), ("test", window.test)):
            if not metrics[name]["events"] or not metrics[name]["clicks"]:
                self.findings.stops.append(self._why_empty(name, (days.start, days.end), metrics[name], labelled))
                break
        passed, shown = dropped_share(metrics, self.settings.checks)
        self._stop_unless(passed, "of the windows' events would be dropped", shown["dropped_share"])
        advice.advise_span(log_metrics, window, int((labelled.reasons >= 0).sum()), self.findings)
        if all(metrics[name]["clicks"] for name in ("train", "test")):
            advice.advise_split(labelled, self.settings.window, HoldOutSettings.of(self.settings.split), self.findings)
        advice.advise_robots(labelled, settings, self.findings)
        if self.note_ids is not None:
            advice.advise_ids(labelled, self.note_ids, self.findings)

    def _why_empty(self, name: str, span: tuple[date, date], counts: dict[str, int], labelled: Labelled) -> str:
        days = getattr(labelled.window, name)
        settings, names = EventSettings.of(self.settings.source), labelled.names_in(days)
        if counts["events"]:
            return no_clicks(name, span, settings, names, labelled.rows.weights is not None)
        dropped = labelled.dropped_in(days)
        return no_events(name, span, settings, dropped, names, lambda: labelled.example_ids(days, self.note_ids))

    def _stop_unless(self, passed: bool, what: str, share: float) -> None:
        if not passed:
            limit = self.settings.checks.max_dropped_share
            self.shares.append(share)
            self.findings.stops.append(f"{100 * share:.1f} % {what}; checks.max_dropped_share is {limit:g}.")
