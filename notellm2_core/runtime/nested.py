"""Nested mappings by dotted names."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted names: {"a": {"b": 1}} -> {"a.b": 1}. Lists are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def get_setting(tree: Any, key: str) -> Any:
    """The value at a dotted name. Raises KeyError where there is none."""
    for part in key.split("."):
        tree = tree[part]
    return tree
