import pytest

from notellm2_core.config.methods import METHODS, get_method
from notellm2_core.notes.prompts import IMAGE_TOKEN, PROMPTS, VISUAL_WORD_TOKEN, Mark


def test_rows_are_the_papers() -> None:
    """The rows are those of Table 4 and section 4.1: image in the prompt, visual word, fusion, losses."""
    rows = {
        name: (
            *(Mark(t) in PROMPTS[m.prompt] for t in (IMAGE_TOKEN, VISUAL_WORD_TOKEN)), m.late_fusion, m.losses
        )
        for name, m in METHODS.items()
    }  # fmt: skip
    assert rows == {
        "basic": (True, False, False, ("multimodal",)),
        "micl": (True, True, False, ("visual", "multimodal")),
        "late_fusion": (True, False, True, ("multimodal",)),
        "notellm2": (True, True, True, ("visual", "multimodal")),
        "only_late_fusion": (False, False, True, ("multimodal",)),
        "omni_retrieval": (True, False, False, ("omni",)),
    }


def test_properties_follow_from_the_switches() -> None:
    for method in METHODS.values():
        assert method.visual_prompt == (Mark(IMAGE_TOKEN) in PROMPTS[method.prompt])
        assert "visual" not in method.losses or method.prompt == "micl"  # L_v needs n_v
        assert method.inputs == (("multimodal", "image", "text") if method.losses == ("omni",) else ("multimodal",))


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'notellm3'; choose one of basic, micl, late_fusion, notellm2, "):
        get_method("notellm3")
