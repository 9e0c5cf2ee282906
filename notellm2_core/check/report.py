"""The result of a check as text for people: what was understood, what is dropped, what stops a run, what to change."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date, timedelta
from textwrap import wrap
from typing import Any

import yaml

from notellm2_core.check.findings import percent
from notellm2_core.config.source import EventSettings

_WIDTH = 110
_CELL = 28  # characters of a value
_NAMES = 12  # event names that are listed
_ROLES = {"view": "a view", "click": "a view and a click", "ignored": "ignored", "": "in no list: quarantine"}


def text_of(report: Mapping[str, Any], settings: EventSettings) -> str:
    """What `check_source` returned, in lines of at most about 110 characters."""
    sections = [
        *_tables("Notes", report["tables"]["notes"]), *_notes(report), "",
        *_tables("Events", report["tables"]["events"]), *_log(report, settings), *_windows(report),
        *_findings(report),
    ]  # fmt: skip
    return "\n".join(_printable(line).rstrip() for line in sections)


def _tables(title: str, tables: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for table in tables:
        num = f", {table['files']:,} files" if table["files"] > 1 else ""
        yield f"{title}: {table['path']} ({', '.join(table['formats'])}{num}, {_bytes(table['bytes'])})"
        if table["where"]:
            yield f"  only rows with {', '.join(f'{name} {condition}' for name, condition in table['where'].items())}"
        columns = [(c["column"], c["from"], c["type"]) for c in table["columns"]]
        yield from _aligned([("column", "read from", "type"), *columns])
        if others := table["other_columns"]:
            yield f"  not read: {_shortened(', '.join(others), _WIDTH - 12)}"
        if rows := table.get("first_rows"):
            yield "  The first rows in canonical types:"
            names = list(rows[0])
            yield from _aligned([names, *([_shortened(row[name]) for name in names] for row in rows)])
    if not tables:
        yield f"{title}: not found"


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    if (notes := report["notes"]) is None:
        return
    filled = ", ".join(f"{name} {percent(num, notes['notes'])}" for name, num in notes["filled"].items())
    yield f"  {notes['rows']:,} rows, {notes['notes']:,} usable notes; filled: {filled}"
    html = f"; HTML is cleaned from the texts of {notes['html_rows']:,}" if notes["html_rows"] else ""
    yield f"  dropped: {_counts(notes['dropped'])}{html}"
    if (images := report["images"]) is None:
        return
    if images["named"] is None:
        yield f"  images: {images['sampled']:,} in a sample of {images['rows_sampled']:,} rows"
    elif not images["named"]:
        yield "  images: no note names one"
        return
    else:
        yield f"  images: {images['named']:,} named: {_counts(images['found'], images['examples'])}"
    if images["sampled"]:
        statuses = _counts(images["statuses"], images["examples"])
        yield f"  of a sample of {images['sampled']:,} images, by their headers: {statuses}"


def _log(report: Mapping[str, Any], settings: EventSettings) -> Iterator[str]:
    if (log := report["log"]) is None:
        return
    if "first_day" in log:
        num_days = (date.fromisoformat(log["covered_until"]) - date.fromisoformat(log["first_day"])).days + 1
        late = "" if log["covered_until"] == log["last_day"] else f"; a few rows until {log['last_day']}: wrong clocks?"
        yield f"  {log['rows']:,} rows on {num_days:,} days, {log['first_day']} to {log['covered_until']} (UTC){late}"
    else:
        yield f"  {log['rows']:,} rows"
    names = [*log["events"].items()]
    rows = [
        (_shortened(name or None), f"{num:,}", percent(num, log["rows"]), _role(name, settings)) for name, num in names
    ]
    yield from _aligned([("event", "rows", "share", "counts as"), *rows[:_NAMES]], right=(1, 2))
    if len(rows) > _NAMES:
        yield f"  and {len(rows) - _NAMES:,} other names"


def _role(name: str, settings: EventSettings) -> str:
    if name in settings.click_events:
        return _ROLES["click"]
    if name in settings.view_events:
        return _ROLES["view"]
    is_ignored = settings.ignored_events is None or name in settings.ignored_events
    return _ROLES["ignored" if is_ignored else ""]


def _windows(report: Mapping[str, Any]) -> Iterator[str]:
    if (windows := report["windows"]) is None or (interactions := report["interactions"]) is None:
        return
    yield ""
    yield "Windows: the usable events"
    counted = ("events", "views", "clicks", "users", "notes")
    rows = [("", "first day", "last day", *counted)]
    for name, (first, end) in windows.items():
        last = date.fromisoformat(end) - timedelta(days=1)
        rows.append((name, first, str(last), *(f"{interactions[name][key]:,}" for key in counted)))
    yield from _aligned(rows, right=(3, 4, 5, 6, 7))
    ignored = f"; ignored: {interactions['ignored_event']:,}" if interactions["ignored_event"] else ""
    yield f"  of {interactions['rows']:,} rows on these days, or without a plausible time"
    robots = f" ({interactions['robots']:,} users are robots)" if interactions["robots"] else ""
    yield f"  dropped: {_counts(interactions['dropped'])}{robots}{ignored}"


def _findings(report: Mapping[str, Any]) -> Iterator[str]:
    for title, sentences in (("Remarks", report["remarks"]), ("A run would stop", report["stops"])):
        if sentences:
            yield ""
            yield title
            for sentence in sentences:
                yield from wrap(sentence, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
    if report["changes"]:
        yield ""
        yield "Settings to change; look at each"
        yield from ("  " + line for line in yaml_lines(report["changes"]))
    if not report["stops"]:
        yield ""
        yield "A run would read this source without stopping."


def yaml_lines(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The changes as lines of YAML, each with its reason as a comment."""
    tree: dict[str, Any] = {}
    for change in changes:
        *sections, leaf = change["setting"].split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[leaf] = change
    return list(_section_lines(tree))


def _section_lines(section: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, entry in section.items():
        if "setting" not in entry:
            yield f"{indent}{name}:"
            yield from _section_lines(entry, indent + "  ")
            continue
        value = entry["value"]
        style = None if isinstance(value, list) else False
        text = yaml.safe_dump({name: value}, default_flow_style=style, width=10_000, allow_unicode=True)
        if entry["why"]:
            yield f"{indent}# {_printable(entry['why'])}"
        yield from (indent + line for line in text.splitlines())


def _aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> Iterator[str]:
    """The rows with columns of equal width; those at the places `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (f"{v:>{w}}" if i in right else f"{v:<{w}}" for i, (v, w) in enumerate(zip(row, widths, strict=True)))
        yield "    " + "  ".join(cells)


def _shortened(text: str | None, most: int = _CELL) -> str:
    line = "(null)" if text is None else _printable(text)
    return line if len(line) <= most else line[: most - 3] + "..."


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _counts(counts: Mapping[str, int], examples: Mapping[str, Sequence[str]] | None = None) -> str:
    """The counts by name, each with the first of its examples."""
    shown = {name: f" ({_shortened(values[0])})" for name, values in (examples or {}).items()}
    return ", ".join(f"{num:,} {name}{shown.get(name, '')}" for name, num in counts.items()) or "nothing"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
