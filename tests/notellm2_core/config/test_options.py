"""A command's options come from the declarations of settings: type, bounds, default and description are the same."""

import argparse

import pytest

from notellm2_core.config.data import FilterSettings, PairSettings, ScoringSettings
from notellm2_core.config.options import add_options, settings_from
from notellm2_core.config.source import EventSettings


def parsed(*arguments: str, group: type[PairSettings] | type[EventSettings] = PairSettings) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, group, *group.model_fields)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("group", [ScoringSettings, FilterSettings, EventSettings])
def test_options_have_the_defaults_of_the_declaration(group: type[EventSettings]) -> None:
    assert settings_from(parsed(group=group), group) == group()


def test_every_kind_of_option() -> None:
    options = parsed("--simultaneous", "--score", "swing", "--max-user-notes", "all", "--top-t", "5", "--low=-1e-3")
    assert settings_from(options, ScoringSettings) == ScoringSettings(
        simultaneous=True, score="swing", max_user_notes=None
    )
    assert settings_from(options, FilterSettings, min_users=2) == FilterSettings(low=-0.001, top_t=5, min_users=2)
    assert settings_from(parsed("--max-user-notes", "null"), ScoringSettings).max_user_notes is None
    events = parsed("--view-events", "seen, all ,", "--click-events", "all", group=EventSettings)
    assert settings_from(events, EventSettings).view_events == ("seen", "all")
    assert settings_from(events, EventSettings).click_events == ("all",)
    weights = parsed("--click-events", "like,a=b", "--event-weights", "like=2, a=b=.5", group=EventSettings)
    assert settings_from(weights, EventSettings).event_weights == {"like": 2.0, "a=b": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-t", "0"], "argument --top-t: 0: Input should be greater than 0"),
        (["--top-t", "all"], "argument --top-t: all: Input should be a valid integer"),
        (["--swing-alpha", "inf"], "argument --swing-alpha: inf: Input should be a finite number"),
        (["--max-user-notes", "some"], "argument --max-user-notes: some: Input should be a valid integer"),
        (["--bounds", "x"], "argument --bounds: x: Input should be 'absolute' or 'quantile'"),
        (["--event-weights", "buy=0"], "argument --event-weights: buy=0: Input should be greater than 0"),
        (["--event-weights", "buy=nan"], "argument --event-weights: buy=nan: Input should be"),
        (["--event-weights", "buy"], "argument --event-weights: buy: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_value_names_its_option(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        parsed(*arguments, group=EventSettings if "--event-weights" in arguments else PairSettings)
    assert message in capsys.readouterr().err


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"^low = 3.0 is above up = 2.0$"):
        settings_from(parsed("--low", "3", "--up", "2"), FilterSettings)


def test_weights_of_events_that_are_no_clicks() -> None:
    with pytest.raises(ValueError, match=r"^buy is in event_weights and not in click_events$"):
        settings_from(parsed("--event-weights", "buy=2", group=EventSettings), EventSettings)


def test_help_has_the_description_and_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, FilterSettings, "low", required=True)
    add_options(parser, FilterSettings, "top_t")
    add_options(parser, ScoringSettings, "max_user_notes", default="all")
    words = " ".join(parser.format_help().split())
    low, top_t, notes = (
        group.model_fields[name].description
        for group, name in ((FilterSettings, "low"), (FilterSettings, "top_t"), (ScoringSettings, "max_user_notes"))
    )
    assert f"--low LOW {low} --top-t TOP_T {top_t} Default: 3." in words and f"{notes} Default: all." in words
