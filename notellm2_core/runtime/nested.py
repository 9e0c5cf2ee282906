"""Nested mappings by dotted names."""

from collections.abc import Iterable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted names: {"a": {"b": 1}} -> {"a.b": 1}. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def get_settings(tree: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The values at dotted names. A name that the tree lacks has none: a dump leaves some settings out while null."""
    sections = ((name, *_section(tree, name)) for name in names)
    return {name: section[key] for name, section, key in sections if key in section}


def _section(tree: Any, name: str) -> tuple[Mapping[str, Any], str]:
    *sections, key = name.split(".")
    for section in sections:
        tree = tree[section]
    return tree, key
