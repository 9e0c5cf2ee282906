"""Settings of the source: where the notes and logs are, how they are read, and which events count."""

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from notellm2_core.config.section import Section, is_null, no_address

Partition = Literal["week", "year"]
NoteColumn = Literal["note_id", "title", "topics", "content", "image_path", "image"]
EventColumn = Literal["user_id", "note_id", "timestamp", "event", "weight"]
MAX_WEIGHT = 1e9  # of a click
CONDITION = r"^(==|!=|<=|>=|<|>) *(\S.*)$"
_JOINED = ("title", "topics", "content")  # columns that several columns of a file may make up
PATTERN_FIELD = re.compile(r"\{([^{}:]+)(?::\.(\d+))?\}")  # {column} or {column:.LENGTH} in a pattern of image paths


def _as_list(value: Any) -> Any:
    """A list may be left out around its only item."""
    return [value] if isinstance(value, str | dict) else value


Character = Annotated[str, Field(min_length=1, max_length=1)]
Name = Annotated[str, Field(min_length=1)]
Condition = Annotated[str, Field(pattern=CONDITION)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_list), Field(min_length=1)]


class DemoSettings(Section):
    """The demo world (`notellm2_core.demo`), generated where `source.path` is null."""

    num_notes: int = Field(2600, ge=50, description="Number of notes.")
    num_users: int = Field(2500, ge=20, description="Number of users.")
    num_days: int = Field(21, ge=14, description="Days of behaviour logs.")
    seed: int = Field(0, description="Seed of the generator.")


class EventSettings(Section):
    """Which events of the log count."""

    view_events: tuple[str, ...] = Field(("view", "click"), description="Event names that count as a view.")
    click_events: tuple[str, ...] = Field(
        ("click",), description="Event names that count as a click. A clicked note counts as viewed, too."
    )
    ignored_events: tuple[str, ...] | None = Field(
        (),
        description="Event names that are neither. Rows with any other name go to the quarantine. null: other names "
        "are ignored, too.",
    )
    max_events_per_day: int | None = Field(
        5000,
        gt=0,
        description="A user with more events on any day is a robot, and none of its events counts. null: no limit "
        "(paper).",
    )
    event_weights: dict[str, Annotated[float, Field(gt=0, le=MAX_WEIGHT)]] | None = Field(
        None,
        exclude_if=is_null,
        description="How much a click counts, by event name of click_events, such as `{purchase: 5}`; the others count "
        "1. null: all count 1 (paper).",
    )

    @model_validator(mode="after")
    def _events(self) -> "EventSettings":
        if both := {*(self.ignored_events or ())} & {*self.view_events, *self.click_events}:
            raise ValueError(f"{min(both)} is in ignored_events and in view_events or click_events")
        if others := {*(self.event_weights or ())} - {*self.click_events}:
            raise ValueError(f"{min(others)} is in event_weights and not in click_events")
        return self

    @property
    def event_names(self) -> list[str]:
        """All event names that the settings list, sorted."""
        return sorted({*self.view_events, *self.click_events, *(self.ignored_events or ())})


def _check_columns(columns: Mapping[Any, Any] | None) -> Any:
    """`columns`, unchanged. Raises ValueError for an entry that its column cannot have."""
    for name, entry in (columns or {}).items():
        if isinstance(entry, tuple) and name not in _JOINED:
            raise ValueError(f"{name} takes one column, not a list")
        if entry is None and name in ("note_id", *get_args(EventColumn)):
            raise ValueError(f"{name} cannot be null")
        if name == "image_path" and re.search("[{}]", PATTERN_FIELD.sub("", entry or "")):
            raise ValueError(f"{entry} is no pattern such as images/{{item_id:.3}}/{{item_id}}.jpg")
    return columns


Columns = Annotated[dict[NoteColumn | EventColumn, Name | Names | None], AfterValidator(_check_columns)]


class TableSettings(Section):
    """The files of one table of the source, where they differ from the [contract](own_data.md)."""

    files: Names | None = Field(
        None,
        description="The files or folders of the table, relative to `source.path`; `*` stands for any characters. "
        "null: the file or folder of its name, `notes` or `events`.",
    )
    columns: Columns | None = Field(
        None, description="Names of columns of this table, which precede those of `source.columns`. null: those alone."
    )
    header: Names | None = Field(
        None, description="The columns, in their order, of CSV or TSV files without a header line. null: it names them."
    )
    delimiter: Character | None = Field(
        None, description="The character between the fields. null: a tab in .tsv, a comma in all others."
    )
    quote: Character | None = Field(
        '"', description="The character around a field that holds delimiters or line breaks. null: none, as in MIND."
    )
    escape: Character | None = Field(
        None,
        description="The character before a quote within a quoted field; Spark writes a backslash. null: a quote is "
        "doubled.",
    )
    null_values: Names | None = Field(
        None,
        exclude_if=is_null,
        description="Fields of CSV or TSV files that hold no value, such as `UNKNOWN`, besides empty ones and `\\N`. "
        "null: there are none.",
    )
    where: dict[str, Condition] | None = Field(
        None,
        description="Which rows count, by columns of the files, such as `{rating: '>= 4'}` or `{kind: '== photo'}`; "
        "all conditions have to hold. null: all rows.",
    )

    @field_validator("files")
    @classmethod
    def _inside(cls, files: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in files or ():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ValueError(f"{name} leads out of source.path")
            if "**" in name:
                raise ValueError(f"{name} has **: name a folder, of which all files are read")
        return files


class NoteTableSettings(TableSettings):
    """The table of notes."""

    repeated: Literal["last", "join"] = Field(
        "last",
        description="Rows with one note id. `last`: the last of them counts, the others are quarantined. `join`: they "
        "are one note, with every distinct title, topic and content, in the order of the rows.",
    )


class EventTableSettings(TableSettings):
    """A table of events."""

    event: str | None = Field(
        None, min_length=1, description="The event of all its rows. null: the column `event` names it."
    )
    extract: dict[str, str] | None = Field(
        None,
        description="Columns of text that hold several events a row: a column, and a regular expression whose named "
        "groups are columns of one event, such as `{impressions: '(?P<note_id>\\S+)-(?P<event>[01])'}`. null: there "
        "are none.",
    )

    @field_validator("extract")
    @classmethod
    def _patterns(cls, extract: dict[str, str] | None) -> dict[str, str] | None:
        for pattern in (extract or {}).values():
            try:
                groups = {*re.compile(pattern).groupindex}
            except re.error as e:
                raise ValueError(f"{pattern} is no regular expression: {e}") from e
            if not groups or not groups <= {*get_args(EventColumn)}:
                raise ValueError(f"{pattern} has to name its groups as columns of events, such as (?P<note_id>...)")
        return extract


class ReadingSettings(Section):
    """How the tables of notes and events are read."""

    columns: Columns | None = Field(
        None,
        exclude_if=is_null,
        description="Your names of the columns, such as `{note_id: item_id}`. `title`, `topics` and `content` may be "
        "lists of columns, whose values are joined; `image_path` may be a pattern, such as `images/{item_id}.jpg` "
        "(`{item_id:.3}`: the first three characters). null: there is no such column. The column `weight`, which "
        "only this setting can name, says how much a click of that row counts, times its event's weight.",
    )


class NoteReadingSettings(ReadingSettings):
    """How notes are read."""

    notes: NoteTableSettings | None = Field(
        None, exclude_if=is_null, description="The files of the notes. null: `notes`, as in the contract."
    )
    topic_delimiter: str | None = Field(
        None,
        min_length=1,
        exclude_if=is_null,
        description="What separates topics that are one text. null: `|`.",
    )
    clean_html: bool = Field(
        True,
        description="Whether titles, topics and contents lose the HTML that is found in them: tags are removed, and "
        "entities become characters. What only looks like a tag (`a < b`, `<3`) stays. false: texts are unchanged.",
    )


class EventReadingSettings(ReadingSettings):
    """How events are read."""

    events: Annotated[tuple[EventTableSettings, ...], BeforeValidator(_as_list), Field(min_length=1)] | None = Field(
        None,
        exclude_if=is_null,
        description="The files of the events: one table, or a list of tables. null: `events`, as in the contract.",
    )
    timestamp_format: str | None = Field(
        None,
        exclude_if=is_null,
        description="How timestamps are written, as Python's strptime takes it, such as `%m/%d/%Y %I:%M:%S %p`. Others "
        "are unreadable. null: any of the [usual forms](own_data.md).",
    )
    time_zone: str | None = Field(
        None,
        exclude_if=is_null,
        description="The zone of timestamps that do not say theirs, such as `Asia/Shanghai`; Unix times need none. "
        "null: UTC.",
    )

    @property
    def has_weights(self) -> bool:
        """Whether a column of the events says how much a click counts."""
        named = (self.columns, *(table.columns for table in self.events or ()))
        return any("weight" in (columns or {}) for columns in named)

    @field_validator("timestamp_format")
    @classmethod
    def _format(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            written = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC).strftime(pattern)
            try:
                datetime.strptime(written, pattern)
            except ValueError as e:
                raise ValueError(f"{pattern} is no format of strptime: {e}") from e
            if written == pattern:
                raise ValueError(f"{pattern} has no field of strptime, such as %Y")
        return pattern

    @field_validator("time_zone")
    @classmethod
    def _zone(cls, name: str | None) -> str | None:
        try:
            ZoneInfo(name or "UTC")
        except (KeyError, ValueError, OSError) as e:
            raise ValueError(f"{name} is no name of a time zone, such as Asia/Shanghai") from e
        return name


NOTE_CONTRACT, EVENT_CONTRACT = NoteReadingSettings(), EventReadingSettings()  # read as the contract says


class SourceSettings(EventSettings, NoteReadingSettings, EventReadingSettings):
    """Where the notes and logs are, and how to read them."""

    path: Annotated[str | None, BeforeValidator(no_address)] = Field(
        None,
        description="Folder of your data ([what it holds](own_data.md)). `make recall SOURCE=...` replaces "
        "it. null: the demo world.",
    )
    demo: DemoSettings | None = Field(
        DemoSettings(), description="The demo world, which replaces a missing path. null: a path is required."
    )
    first_day: date = Field(
        date(1990, 1, 1),
        description="First day of the log. Dagster's partitions begin there; nothing else depends on it.",
    )
    last_day: date | None = Field(
        None,
        description="Last day of a log that has ended: Dagster's partitions end there, and the schedule asks for no "
        "later week. null: the log goes on.",
    )
    partition: Partition = Field(
        "week", description="Length of a partition of the raw events. `year` suits logs that span decades."
    )
    max_image_pixels: int = Field(
        50_000_000, gt=0, description="Most pixels of an image. A larger one is counted as too large and never decoded."
    )
