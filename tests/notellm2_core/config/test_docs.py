"""docs/settings.md is generated from the declarations, which describe each setting in whole sentences."""

import re
from pathlib import Path

import yaml

from notellm2_core.config.docs import page, sections, settings
from notellm2_core.config.load import load_config
from notellm2_core.config.methods import METHODS
from notellm2_core.config.settings import FIRST_SETTINGS, Config

PAGE = Path("docs/settings.md")


def test_the_page_is_written_from_the_declarations() -> None:
    command = "python -m notellm2_core.config.docs > docs/settings.md"
    assert PAGE.read_text() == page(), f"docs/settings.md is not what the declarations say: run {command}"


def test_every_setting_and_section_is_described_in_sentences() -> None:
    described = {name: field.description for name, field in settings().items()}
    described |= {f"section {name}": section.__doc__ for name, section in sections()}
    assert {"name", "pairs.low", "model.lora", "model.lora.rank", "section training"} <= described.keys()
    assert [name for name, words in described.items() if not (words or "").strip().endswith(".")] == []


def test_a_setting_that_may_be_null_explains_null() -> None:
    for name, field in settings().items():
        may_be_null = type(None) in getattr(field.annotation, "__args__", ())
        assert may_be_null == ("null" in str(field.description)), name


def test_the_first_dozen_are_settings() -> None:
    assert len({*FIRST_SETTINGS}) == 12 and {*FIRST_SETTINGS} <= settings().keys()


def test_a_configuration_can_be_copied_from_the_page(tmp_path: Path) -> None:
    """The example loads. All defaults of the tables, set in the sections that the headings name, change nothing."""
    [example] = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(example)
    assert load_config(tmp_path / "mine.yaml").name == "mine"

    defaults, section = {}, ""
    for line in PAGE.read_text().partition("## Outside of sections")[2].splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ") + "."
        elif row := re.match(r"\| `(\w+)` \| `(.*?)` \|", line):
            defaults[section + row[1]] = yaml.safe_load(row[2])
    assert settings().keys() - defaults.keys() == {"name", "model.llm.name", "source.demo"}
    (tmp_path / "least.yaml").write_text("name: x\nmodel: {llm: {name: tiny}}")
    may_be_null = ("model.lora.", "source.notes.", "source.events.")
    always_there = {key: value for key, value in defaults.items() if not key.startswith(may_be_null)}
    assert load_config(tmp_path / "least.yaml", always_there) == load_config(tmp_path / "least.yaml")


def test_values_in_words() -> None:
    rows = {row[1]: (row[2], row[3]) for row in re.findall(r"((?:\| `(\w+)` \| (.*?) \| (.*?) \|))", page())}
    assert rows["validation_share"] == ("`0.1`", "number at least 0 and below 1")
    assert rows["max_user_notes"] == ("`2000`", "integer above 0 or `null`")
    assert rows["bounds"] == ("`absolute`", "`absolute`, `quantile`")
    assert rows["method"] == ("`notellm2`", ", ".join(f"`{name}`" for name in METHODS))
    assert rows["betas"] == ("`[0.9, 0.999]`", "list of 2 numbers")
    assert rows["matryoshka_dims"] == ("`[]`", "list of integers above 0")
    assert rows["lora"] == ("`null`", "section or `null`")
    assert rows["demo"] == ("its defaults", "section or `null`")
    assert rows["end"] == ("`null`", "day (YYYY-MM-DD) or `null`")
    assert Config.model_fields["name"].is_required() and ("| `name` | required | text |" in page())
