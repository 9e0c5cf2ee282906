"""Reads the settings from a YAML file and the environment. Every error is one sentence."""

import os
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from notellm2_core.config.settings import Config

RENAMED = {"model.start": "model.init", "training.parts": "training.trainable"}  # earlier names of settings
DEFAULT_CONFIG = "pipelines/configs/demo.yaml"  # relative to the repository root


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the person who wrote it."""


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read `path`; `overrides` are dotted keys ("source.path") that win over the file.

    Raises ConfigError naming the file and the setting.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"cannot read the configuration {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a mapping of settings")
    for key, value in (overrides or {}).items():
        _set(raw, key, value, path)
    try:
        return Config.model_validate(raw)
    except ValidationError as e:
        raise ConfigError(f"{path}: {'; '.join(map(_problem, e.errors()))}") from e


def _problem(error: ErrorDetails) -> str:
    """The dotted name of a setting, and what is wrong with it."""
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{name or 'settings'}: {error['msg']}"
    return f"{name}: no such setting" + (f"; it is called {RENAMED[name]} now" if name in RENAMED else "")


def config_in_force(path: str = "", source: str = "") -> Config:
    """The configuration `path`, with its source.path replaced by `source`.

    An empty `path` defaults to NOTELLM2_CONFIG, or else the demo; an empty `source` to SOURCE. Raises ConfigError as
    `load_config`.
    """
    path = path or os.environ.get("NOTELLM2_CONFIG") or DEFAULT_CONFIG
    source = source or os.environ.get("SOURCE", "")
    return load_config(Path(path), {"source.path": source} if source else None)


def week_in_force(week: str = "") -> date | None:
    """The day `week`; an empty one defaults to WEEK, or else None. Raises ConfigError where it is not a day."""
    week = week or os.environ.get("WEEK", "")
    try:
        return date.fromisoformat(week) if week else None
    except ValueError as e:
        raise ConfigError(f"week = {week} is not a day like 2025-01-19") from e


def _set(raw: dict[str, Any], key: str, value: Any, path: Path) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: {section} is not a section, so {key} cannot be set")
    raw[leaf] = value
