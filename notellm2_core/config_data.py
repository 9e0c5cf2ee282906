"""Settings of the data: the source, its days, the related pairs, the split, how much of a note is read."""

import math
from datetime import date
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from notellm2_core.config_section import Section, no_address

Partition = Literal["week", "year"]
WordUnit = Literal["auto", "space", "character"]


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
        description="Known event names that are neither. Events of any other name go to the quarantine. "
        "null: every name that is neither a view nor a click is ignored.",
    )
    max_events_per_day: int | None = Field(
        5000,
        gt=0,
        description="A user with more events on any day is a robot, and none of its events counts. "
        "null: nobody is (paper).",
    )

    @model_validator(mode="after")
    def _events(self) -> "EventSettings":
        if both := {*(self.ignored_events or ())} & {*self.view_events, *self.click_events}:
            raise ValueError(f"{min(both)} is in ignored_events and in view_events or click_events")
        return self

    @property
    def event_names(self) -> list[str]:
        """All event names that are known."""
        return sorted({*self.view_events, *self.click_events, *(self.ignored_events or ())})


class SourceSettings(EventSettings):
    """Where the notes and logs are, and how to read them."""

    path: Annotated[str | None, BeforeValidator(no_address)] = Field(
        None,
        description="Folder of your data ([its files](bring_your_own_data.md)); `SOURCE=...` replaces it. "
        "null: the demo world.",
    )
    demo: DemoSettings | None = Field(
        DemoSettings(), description="The demo world, which stands in for a missing path. null: a path is required."
    )
    first_day: date = Field(
        date(1990, 1, 1), description="First day of the log: where Dagster's partitions begin, and nothing else."
    )
    partition: Partition = Field(
        "week", description="Length of a partition of the raw events; `year` for logs that span decades."
    )
    max_image_pixels: int = Field(
        50_000_000, gt=0, description="A picture with more pixels is counted as too large and never decoded."
    )


class WindowSettings(Section):
    """Which days are read, in UTC. The test days come last, the training days right before them."""

    end: date | None = Field(
        None,
        description="The day after the last test day; `WEEK=...` replaces it. "
        "null: the end of the last complete week (Sunday to Saturday) of the source.",
    )
    train_days: int = Field(14, gt=0, description="Days that training pairs come from (paper: section 2.3).")
    test_days: int | None = Field(
        7,
        gt=0,
        description="Days that test pairs come from (paper: section 2.3). "
        "null: the training days, which needs `split.by: hash`.",
    )


class ScoringSettings(Section):
    """How strongly two notes are related."""

    score: Literal["cooccurrence", "swing"] = Field(
        "cooccurrence", description="`cooccurrence` is Eq. 2 (paper). `swing` is Swing, which knows no order of events."
    )
    swing_alpha: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="Swing: the larger, the less it counts what else two users have in common.",
    )
    swing_max_users: int = Field(
        1000,
        gt=1,
        le=5000,
        description="Swing: of a note's users, so many count, those with the fewest clicks. Memory grows with the "
        "square.",
    )
    simultaneous: bool = Field(
        False, description="Whether a click at the very time of the view follows it. For logs with times by the day."
    )
    max_user_notes: int | None = Field(
        2000,
        gt=0,
        description="Of each user, so many notes viewed last and so many clicked last make pairs. null: all (paper).",
    )


class FilterSettings(Section):
    """Which of the scored pairs are related notes."""

    low: float = Field(0.01, description="Lower scores are outliers (paper: section 2.3).")
    up: float = Field(30.0, description="Higher scores are outliers (paper: section 2.3).")
    bounds: Literal["absolute", "quantile"] = Field(
        "absolute", description="Whether low and up are scores (paper), or shares of the distribution of scores."
    )
    top_t: int = Field(3, gt=0, description="Related notes of each query: the highest scores (paper: section 2.3).")
    popularity_power: float = Field(
        0.0,
        ge=0,
        description="Scores are divided by the number of users that clicked the target, to this power. "
        "0: no correction (paper).",
    )
    min_users: int = Field(1, gt=0, description="A pair that fewer users vouch for is dropped.")

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


class SideSettings(Section):
    """Which notes train, and which form the test pool. No note, and no near-duplicate, is on both sides."""

    by: Literal["time", "hash"] = Field(
        "time",
        description="`time`: the pool is what the training days have not seen. `hash`: each group of "
        "near-duplicates has its side by hash.",
    )
    pool_share: float = Field(0.3, gt=0, lt=1, description="Share of the groups that is the pool, with `by: hash`.")
    max_pool_notes: int | None = Field(
        None, gt=1, description="The pool is cut to this number of notes, by hash. null: all."
    )


class SplitSettings(SideSettings):
    """How notes and pairs are kept apart."""

    validation_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the training pairs that validate (paper: section 2.3). No note is in both.",
    )


class CheckSettings(Section):
    """Thresholds of the blocking asset checks: where one is missed, the run stops."""

    max_dropped_share: float = Field(
        0.2, ge=0, le=1, description="Largest share of the notes, and of the events, in quarantine."
    )
    min_train_pairs: int = Field(50, ge=1, description="Fewest training pairs.")
    min_test_pairs: int = Field(20, ge=1, description="Fewest test pairs.")
    max_mean_cosine: float = Field(
        0.95, gt=0, le=1, description="Largest mean cosine of random pairs of embeddings. Above it, they collapsed."
    )


class WordSettings(Section):
    """How much of a note the model reads."""

    title_words: int = Field(20, gt=0, description="First words of the title that are read (paper: section 2.3).")
    content_words: int = Field(80, gt=0, description="First words of the content that are read (paper: section 2.3).")
    topic_words: int = Field(
        20, gt=0, description="First words of all topics together that are read. The paper does not cut topics."
    )
    word_unit: WordUnit = Field(
        "auto",
        description="What a word is. `auto`: a Chinese or Japanese character, elsewhere what stands between spaces.",
    )


class LengthSettings(Section):
    """Which notes the report calls short and long, by the tokens of their text."""

    short_tokens: int = Field(50, gt=0, description="A note with fewer tokens is short (paper: section 2.3).")
    long_tokens: int = Field(165, gt=0, description="A note with more tokens is long (paper: appendix E).")
    length_tokenizer: str | None = Field(
        None,
        description="Hub name or folder of the tokenizer that counts, the same for all models that are to be "
        "compared. null: the LLM's.",
    )


class TextSettings(LengthSettings, WordSettings):
    """How much of a note is read, and what is short."""
