"""Settings of the data: window, related pairs, split, checks, and how much of a note's text is read."""

import math
from datetime import date
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from notellm2_core.config.drift import DATA_GATES, require_data_gate
from notellm2_core.config.section import Section, is_null

WordUnit = Literal["auto", "space", "character"]


class WindowSettings(Section):
    """Which days are read, in UTC. The test days come last, the training days directly before them."""

    end: date | None = Field(
        None,
        description="The day after the last test day. `make recall WEEK=...` replaces it. null: the end of the last "
        "complete week (Sunday to Saturday) of the log.",
    )
    train_days: int = Field(14, gt=0, description="Days that training pairs come from (paper: section 2.3).")
    test_days: int | None = Field(
        7,
        gt=0,
        description="Days that test pairs come from (paper: section 2.3). null: the training days, which needs "
        "`split.by: hash`.",
    )


class ClickTimeSettings(Section):
    """When a click follows a view."""

    max_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        exclude_if=is_null,
        description="Most minutes between a view and the click that follows it. null: no limit (paper).",
    )


class ScoringSettings(ClickTimeSettings):
    """How strongly two notes are related."""

    score: Literal["cooccurrence", "swing"] = Field(
        "cooccurrence", description="`cooccurrence`: Eq. 2 (paper). `swing`: Swing, which ignores the order of events."
    )
    swing_alpha: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Swing: smoothing constant in 1 / (swing_alpha + notes that two users both clicked).",
    )
    swing_max_users: int = Field(
        1000,
        gt=1,
        le=5000,
        description="Swing: most users of a note that count, those with the fewest clicks. Memory grows with its "
        "square.",
    )
    simultaneous: bool = Field(
        False,
        description="Whether a click at the same time as the view counts as subsequent. For logs with day resolution.",
    )
    max_user_notes: int | None = Field(
        2000,
        gt=0,
        description="Notes of each user that make pairs: this many with the latest first view, and this many with the "
        "latest click. null: all (paper).",
    )
    half_life_days: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        exclude_if=is_null,
        description="A click counts half as much as one that is this many days later. One at the window's end counts "
        "1, so scores become smaller. null: all clicks count the same (paper).",
    )


class FilterSettings(Section):
    """Which of the scored pairs are related."""

    low: float = Field(0.01, description="Pairs with a lower score are dropped as outliers (paper: section 2.3).")
    up: float = Field(30.0, description="Pairs with a higher score are dropped as outliers (paper: section 2.3).")
    bounds: Literal["absolute", "quantile"] = Field(
        "absolute",
        description="`absolute`: low and up are scores (paper). `quantile`: they are quantiles of the scores, in [0, "
        "1].",
    )
    top_t: int = Field(
        3, gt=0, description="Related notes of each query, those with the highest scores (paper: section 2.3)."
    )
    popularity_power: float = Field(
        0.0,
        ge=0,
        description="Popularity correction: a score is divided by (users who clicked the target) ** popularity_power. "
        "0: none (paper).",
    )
    min_users: int = Field(1, gt=0, description="Pairs with fewer users are dropped.")

    @model_validator(mode="after")
    def _bounds(self) -> "FilterSettings":
        if math.isnan(self.low) or math.isnan(self.up):
            raise ValueError(f"low = {self.low} and up = {self.up} have to be numbers")
        if self.low > self.up:
            raise ValueError(f"low = {self.low} is above up = {self.up}")
        if self.bounds == "quantile" and not (self.low >= 0 and self.up <= 1):
            raise ValueError(f"with bounds = quantile, low and up are shares in [0, 1], got {self.low} and {self.up}")
        return self


class PairSettings(FilterSettings, ScoringSettings):  # (pydantic takes the fields of the last base first)
    """Which notes are related: Eq. 2 and section 2.3."""


class HoldOutSettings(Section):
    """Which notes train, and which form the candidate pool of the test. Near-duplicates are never separated."""

    by: Literal["time", "hash"] = Field(
        "time",
        description="`time`: the pool is the notes with events in the test days that have none in the training days, "
        "nor a near-duplicate with events there. `hash`: a hash assigns each group of near-duplicates to training or "
        "to the pool.",
    )
    pool_share: float = Field(
        0.3, gt=0, lt=1, description="Share of the near-duplicate groups that form the pool, with `by: hash`."
    )
    max_pool_notes: int | None = Field(
        None, gt=1, description="Largest number of notes in the pool; a hash selects them. null: no limit."
    )


class SplitSettings(HoldOutSettings):
    """How notes and pairs are split into training, validation and test."""

    validation_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the training pairs for validation (paper: section 2.3). The two have no note in common.",
    )


class CheckSettings(Section):
    """Thresholds of the blocking asset checks, at which a run stops; `max_mean_cosine` is one of a release's gates."""

    max_dropped_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Largest share of notes and of events in quarantine, of rows without a readable time, and of "
        "unusable images.",
    )
    min_train_pairs: int = Field(50, ge=1, description="Fewest training pairs.")
    min_test_pairs: int = Field(20, ge=1, description="Fewest test pairs.")
    max_mean_cosine: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Largest mean cosine of random pairs of notes. Above it, the embeddings have collapsed.",
    )
    accepted_drift: tuple[
        Annotated[str, AfterValidator(require_data_gate), Field(json_schema_extra={"enum": [*DATA_GATES]})], ...
    ] = Field(
        (),
        description="Changes of the data that are meant: the gates that they would fail, such as `num_notes` after a "
        "catalogue was cut in half.",
    )


class WordSettings(Section):
    """How much of a note the model reads."""

    title_words: int = Field(20, gt=0, description="Words of the title that are read (paper: section 2.3).")
    content_words: int = Field(80, gt=0, description="Words of the content that are read (paper: section 2.3).")
    topic_words: int = Field(
        20, gt=0, description="Words of all topics together that are read. The paper does not truncate topics."
    )
    word_unit: WordUnit = Field(
        "auto",
        description="What counts as a word. `auto`: a Chinese or Japanese character, or text between spaces. `space`: "
        "text between spaces. `character`: a character.",
    )


class LengthSettings(Section):
    """Which notes the report calls short and long, by the tokens of their text."""

    short_tokens: int = Field(50, gt=0, description="A note with fewer tokens is short (paper: section 2.3).")
    long_tokens: int = Field(165, gt=0, description="A note with more tokens is long (paper: appendix E).")
    length_tokenizer: str | None = Field(
        None,
        description="Hub name or folder of the tokenizer that counts. Pin one to compare models. null: the LLM's.",
    )


class TextSettings(LengthSettings, WordSettings):
    """How a note's text is read and measured."""
