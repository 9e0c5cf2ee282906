"""How values are written, where they do not say it themselves."""

from dataclasses import dataclass

WHITE_SPACE = " \t\r\n"  # trimmed from ids and topics


@dataclass(frozen=True)
class Forms:
    """How values are written, where they do not say it themselves."""

    topic_delimiter: str = "|"
    clean_html: bool = False  # whether texts lose their HTML
    timestamp_format: str | None = None  # of strptime; None: any of the forms of `times`
    time_zone: str | None = None  # of times without a zone; None: UTC


USUAL_FORMS = Forms()
