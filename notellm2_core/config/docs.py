"""docs/settings.md, written from the declarations of the settings.

python -m notellm2_core.config.docs > docs/settings.md
"""

from collections.abc import Iterator, Mapping
from inspect import cleandoc
from typing import Any, get_args

import yaml
from pydantic.fields import FieldInfo

from notellm2_core.config.section import Section
from notellm2_core.config.settings import FIRST_SETTINGS, Config

_HEAD = """\
# Settings

A configuration is one YAML file. It sets values section by section; what it leaves out has the default below. Copy a
file of `pipelines/configs/`, or begin with:

```yaml
name: mine
source: {path: /data/mine}
model:
  llm: {name: "package:smollm2", num_layers: 3}
training: {num_steps: 200, batch_pairs: 16, precision: auto, learning_rate: 5.0e-4}
```

An unknown setting or a wrong value is an error that names the setting. A setting that was changed and that nothing
reads gives a warning. Many settings may be `null`; their descriptions say what it means.

"(paper: Table 8)" says where the paper has the default, "(paper)" marks the paper's choice.

`python -m notellm2_core.config.docs > docs/settings.md` writes this page from the declarations."""
_KINDS = {"null": "`null`", "boolean": "`true`, `false`", "object": "mapping", "string": "text"}
_COLUMNS = ("setting", "default", "values", "meaning")


def page() -> str:
    """The whole page, in Markdown."""
    section_of = dict(sections())
    first = _table(*(_row(section_of[name.rpartition(".")[0]], name) for name in FIRST_SETTINGS))
    links = ", ".join(f"[{name}](#{name})" for name in section_of if name and "." not in name)
    parts = [_HEAD, f"Sections: {links}.", "## The first dozen", "What a new configuration sets first.", first]
    for name, section in section_of.items():
        parts.append(f"{'#' * (name.count('.') + 2)} {name or 'Outside of sections'}")
        for group in (section, *reversed(section.__mro__[1 : section.__mro__.index(Section)])):
            parts.append(" ".join(cleandoc(str(group.__doc__)).split()))
            if own := [key for key in group.__annotations__ if _is_setting(section.model_fields[key])]:
                parts.append(_table(*(_row(section, key) for key in own)))
    return "\n\n".join(parts) + "\n"


def sections(section: type[Section] = Config, name: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section by its dotted name; first, without a name, the whole configuration."""
    yield name, section
    for key, field in section.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind, f"{name}.{key}".lstrip("."))


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of an annotation: itself, and the arguments of a union or a list."""
    yield annotation
    for argument in get_args(annotation):
        yield from _kinds(argument)


def settings() -> dict[str, FieldInfo]:
    """Every setting by its dotted name. A section that may be null is a setting, too."""
    return {
        f"{name}.{key}".lstrip("."): field
        for name, section in sections()
        for key, field in section.model_fields.items()
        if _is_setting(field)
    }


def _is_setting(field: FieldInfo) -> bool:
    return not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))


def _table(*rows: tuple[str, ...]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _row(section: type[Section], name: str) -> tuple[str, str, str, str]:
    """The row of a setting of `section`. `name`: what the row calls it, the bare or the dotted name."""
    key = name.rpartition(".")[2]
    field, schema = section.model_fields[key], section.model_json_schema()["properties"][key]
    default = "required" if field.is_required() else _yaml(schema["default"])
    return f"`{name}`", default, _values(schema), str(field.description).replace("null:", "`null`:")


def _yaml(value: Any) -> str:
    if isinstance(value, dict) and value:  # a section
        return "its defaults"
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _values(schema: Mapping[str, Any], plural: str = "") -> str:
    """The values that a JSON schema allows, in words. `plural`: "s" for several such values."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{choice}`" for choice in choices)
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} {_values(schema['prefixItems'][0], 's')}"
    if "items" in schema:
        return f"list of {_values(schema['items'], 's')}"
    kind = schema.get("type", "section")
    kind = {"date": "day (YYYY-MM-DD)", "path": "path"}.get(schema.get("format", ""), _KINDS.get(kind, kind) + plural)
    return f"{kind} {' and '.join(_bounds(schema))}".strip()


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    for bound, word in words.items():
        if bound in schema:
            yield f"{word} {schema[bound]:.4g}"


if __name__ == "__main__":
    print(page(), end="")
