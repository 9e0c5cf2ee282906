import pytest

from notellm2_core.model.methods import METHODS, get_method
from notellm2_core.notes.text import PROMPTS


def test_rows_are_the_papers() -> None:
    """Section 2.2: one word, one loss. Section 3: two words, fusion, two losses."""
    basic, notellm2 = get_method("basic"), get_method("notellm2")
    assert (basic.prompt, basic.late_fusion, basic.losses) == ("basic", False, ("multimodal",))
    assert (notellm2.prompt, notellm2.late_fusion, notellm2.losses) == ("micl", True, ("visual", "multimodal"))


def test_a_visual_loss_needs_the_visual_word() -> None:
    for method in METHODS.values():
        assert method.prompt in PROMPTS
        assert "visual" not in method.losses or method.prompt == "micl"


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'notellm3'; choose one of basic, notellm2"):
        get_method("notellm3")
