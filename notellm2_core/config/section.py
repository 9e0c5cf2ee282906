"""What a section of the settings is: a frozen model, each of whose fields is the one declaration of a setting."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section declares the name, type, bounds, default and description of its settings.

    The settings that one stage depends on form a group, a base class of the section: the stage's code takes the group,
    and its row in the stage table lists it. In YAML a group does not show.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def of(cls, section: Self) -> Self:
        """This group alone out of a section: code that is given it can read no other setting."""
        return cls(**{name: getattr(section, name) for name in cls.model_fields})


def no_address(value: Any) -> Any:
    """The folder as it came. Raises ValueError for an address like s3://bucket (docs/decisions/0005)."""
    if "://" in str(value):
        raise ValueError(f"{value} is an address: name a folder, where the storage is mounted")
    return value
