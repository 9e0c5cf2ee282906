"""Trees of values by dotted names."""

from notellm2_core.runtime.nested import flatten, get_setting


def test_values_by_their_dotted_names() -> None:
    """`flatten` and `get_setting` agree. Lists are values, and an empty section has no values."""
    tree = {"a": {"b": 1, "c": {"d e": [1, {"f": 2}]}}, "g": None, "h": {}}
    flat = flatten(tree)
    assert flat == {"a.b": 1, "a.c.d e": [1, {"f": 2}], "g": None}
    assert all(get_setting(tree, name) == value for name, value in flat.items())
