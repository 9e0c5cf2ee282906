"""A section of the settings: a frozen model in which each field declares one setting."""

from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section declares the name, type, bounds, default and description of its settings.

    The settings that one stage depends on form a group, a base class of the section: the stage's code takes the group,
    and its row in `lake/lineage.py` lists it. In YAML a group is not visible.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)

    @classmethod
    def of(cls, section: Self) -> Self:
        """The settings of this group, without the others of `section`: code that takes them can read no other."""
        return cls(**{name: getattr(section, name) for name in cls.model_fields})


def is_null(value: Any) -> bool:
    """For `Field(None, exclude_if=is_null)`: while the setting is null, no dump holds it.

    A setting that is added to a stage so leaves the fingerprints of the datasets that were made before it.
    """
    return value is None


def is_pretrained(value: Any) -> bool:
    """Likewise, for a setting that is `pretrained` by default."""
    return value == "pretrained"


def http_address(value: str | None) -> str | None:
    """`value`, unchanged. Raises ValueError for what is no address of a server, and for one with a password."""
    parts = urlsplit(value or "http://-")
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        shown = (value or "").rpartition("@")[2]
        raise ValueError(f"{shown} is no address like http://HOST:PORT, without a user or a password")
    return value


def no_address(value: Any) -> Any:
    """`value`, unchanged. Raises ValueError for an address like s3://bucket (docs/decisions/0005)."""
    if "://" in str(value):
        raise ValueError(f"{value} is an address: name a folder, where the storage is mounted")
    return value
