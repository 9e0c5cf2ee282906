"""Settings of the release: when a new model replaces the one that is live."""

from typing import Literal

from pydantic import Field

from notellm2_core.config.section import Section


class GateSettings(Section):
    """What a release has to show."""

    k: int | None = Field(
        None,
        gt=0,
        description="The k of the recall that releases are compared by. null: the smallest of evaluation.ks.",
    )
    max_loss: float = Field(
        5.0, gt=0, description="Points of recall that a release may have lost to the champion, at most."
    )
    max_total_loss: float = Field(
        2.0,
        gt=0,
        description="Points of recall that it may have lost to the anchor, the champion of `anchor_weeks` ago: losses "
        "that are too small to show in each single week add up.",
    )
    anchor_weeks: int = Field(
        8, gt=0, description="Weeks that the anchor is older than the newest champion, at least. It changes as often."
    )
    min_pairs: int = Field(300, gt=0, description="Fewest test pairs to compare two models by.")
    min_queries: int = Field(100, gt=0, description="Fewest queries of these pairs.")


class RetentionSettings(Section):
    """Which datasets stay in the lake, and which runs in the history."""

    keep_releases: int | None = Field(
        None,
        gt=0,
        description="Releases of each configuration that stay, with what they were made from, besides champion, "
        "previous and anchor; all other datasets are removed at the end of a weekly run. null: nothing is removed.",
    )
    grace_days: float = Field(2.0, ge=0, description="A dataset that is younger stays.")
    history_days: float | None = Field(
        None,
        gt=0,
        description="Age at which finished runs are removed from Dagster, with their events, and from MLflow. null: "
        "never.",
    )


class PromotionSettings(GateSettings):
    """When a release goes live."""

    mode: Literal["auto", "approve"] = Field(
        "auto",
        description="`auto`: a release that passes its gates is promoted. `approve`: it waits for `notellm2 release "
        "promote`.",
    )
