"""Settings as command-line options: the declaration gives choices, type, default and help."""

import argparse
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from notellm2_core.config.section import Section

S = TypeVar("S", bound=Section)


def add_options(
    parser: argparse.ArgumentParser, group: type[Section], *names: str, required: bool = False, default: str = ""
) -> None:
    """Add an option `--the-name` for each of the settings `names` of `group` (`num_notes`: `--notes`).

    On the command line, a list is written with commas, a mapping as `a=1,b=2`, and null may be written `all`.
    `default`: replaces the declaration's.
    """
    for name in names:
        field, flag = group.model_fields[name], f"--{name.removeprefix('num_').replace('_', '-')}"
        description = str(field.description).replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, dest=name, action="store_true", help=description)
            continue
        parser.add_argument(
            flag,
            dest=name,
            type=_reader(field),
            choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
            required=required,
            default=default or _written(field.default),
            help=description if required else f"{description} Default: %(default)s.",
        )


def settings_from(options: argparse.Namespace, group: type[S], **others: Any) -> S:
    """The settings of `group` from parsed `options`; `others` are settings that have no option.

    Raises ValueError where settings contradict each other.
    """
    parsed = {name: value for name, value in vars(options).items() if name in group.model_fields}
    try:
        return group(**parsed | others)
    except ValidationError as e:
        raise ValueError("; ".join(p["msg"].removeprefix("Value error, ") for p in e.errors())) from e


def _written(value: Any) -> str:
    return "all" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _reader(field: FieldInfo) -> Callable[[str], Any]:
    declared: Any = Annotated[field.annotation, field]  # with its bounds
    adapter = TypeAdapter(declared)
    is_list = isinstance(field.default, tuple)
    is_mapping = any(get_origin(kind) is dict for kind in get_args(field.annotation))

    def read(text: str) -> Any:
        value: Any = text
        if is_list:
            value = _words(text)
        elif is_mapping and "=" in text:
            value = {name.strip(): number for name, _, number in (word.rpartition("=") for word in _words(text))}
        try:
            return adapter.validate_python(None if value in ("null", "all") else value)
        except ValidationError as e:
            raise argparse.ArgumentTypeError(f"{text}: {e.errors()[0]['msg']}") from e

    return read


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]
