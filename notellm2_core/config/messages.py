"""Settings of the messages about releases, failed runs and late logs."""

from typing import Annotated

from pydantic import Field

from notellm2_core.config.section import Section


class MessageSettings(Section):
    """Who receives messages."""

    webhook: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Address that each message is posted to, as JSON. NOTELLM2_WEBHOOK_SECRET in the environment signs "
        "it. null: nothing is posted.",
    )
    apprise: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (),
        description="Addresses of [Apprise](https://github.com/caronc/apprise), for mail, Slack, Teams and others; "
        "needs `pip install apprise`. An address that holds a password may be the name of a variable of the "
        "environment, as `$NAME`.",
    )
    max_age_days: int = Field(
        9,
        gt=0,
        description="A live release is stale when more than this many days have passed since the last day of its week.",
    )
