"""Records which settings each stage reads. Python imports this file at its start if this folder is on PYTHONPATH.

While this process, or one that it has started, publishes a dataset, the dotted name of every setting that is read is
written as a line of FOLDER/<dataset>/<process>. FOLDER is the environment variable RECORD_SETTINGS. Passing on a whole
configuration (`model_dump`) reads no setting: the process that loads it is recorded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER, STAGE = "RECORD_SETTINGS", "RECORD_SETTINGS_OF"


def _install() -> None:
    from pydantic import BaseModel

    from notellm2_core.config import load as config_file
    from notellm2_core.config.section import Section
    from notellm2_core.lake.catalog import Catalog
    from notellm2_core.lake.lake import Lake

    names: dict[int, str] = {}  # id of a section of a loaded configuration -> its dotted name
    configs: list[Any] = []  # keeps them alive, so that no other object gets one of these ids
    seen: set[tuple[str, str]] = set()

    def register(section: BaseModel, name: str) -> None:
        names[id(section)] = name
        for field in type(section).model_fields:
            if isinstance(value := section.__dict__[field], BaseModel):
                register(value, f"{name}{field}.")

    def read(section: Any, attribute: str) -> Any:
        value = object.__getattribute__(section, attribute)
        stage = os.environ.get(STAGE)
        if stage and (name := names.get(id(section))) is not None and attribute in type(section).model_fields:
            leaf = (stage, f"{name}{attribute}")
            if not isinstance(value, BaseModel) and leaf not in seen:
                seen.add(leaf)
                file = Path(os.environ[FOLDER]) / stage / str(os.getpid())
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as lines:
                    lines.write(f"{leaf[1]}\n")
        return value

    load = config_file.load_config

    def load_config(*args: Any, **options: Any) -> Any:
        config = load(*args, **options).model_copy(deep=True)  # default sections are shared: a copy has its own
        configs.append(config)
        register(config, "")
        return config

    settings = Catalog.settings

    def unrecorded(self: Catalog, name: str) -> Any:
        """Settings read for a fingerprint are not recorded: the lineage lists them, the code may not read them."""
        stage = os.environ.pop(STAGE, None)
        try:
            return settings(self, name)
        finally:
            if stage is not None:
                os.environ[STAGE] = stage

    Catalog.window = property(Catalog.window.func)  # type: ignore[assignment,attr-defined]  # each stage reads it anew

    publish = Lake.publish

    @contextmanager
    def recorded(self: Lake, name: str, *args: Any, **options: Any) -> Iterator[Any]:
        with publish(self, name, *args, **options) as draft:
            if STAGE in os.environ:  # a dataset that a stage publishes itself is part of that stage
                yield draft
                return
            os.environ[STAGE] = name
            try:
                yield draft
            finally:
                del os.environ[STAGE]

    Section.__getattribute__ = read  # type: ignore[method-assign]
    config_file.load_config = load_config
    Catalog.settings = unrecorded  # type: ignore[method-assign]
    Lake.publish = recorded  # type: ignore[method-assign]


if os.environ.get(FOLDER):
    _install()
