"""Trees of values by dotted names."""

from notellm2_core.runtime.nested import flatten, get_settings


def test_values_by_their_dotted_names() -> None:
    """`flatten` and `get_settings` agree. Lists are values, and an empty section has no values."""
    tree = {"a": {"b": 1, "c": {"d e": [1, {"f": 2}]}}, "g": None, "h": {}}
    flat = flatten(tree)
    assert flat == {"a.b": 1, "a.c.d e": [1, {"f": 2}], "g": None}
    assert get_settings(tree, [*flat, "a.absent"]) == flat
    assert get_settings(tree, ["a", "h"]) == {"a": tree["a"], "h": {}}
