"""The topics of a note: a list, or one text that holds several."""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from notellm2_core.tables.forms import WHITE_SPACE, Forms
from notellm2_core.tables.html_text import clean_html

_QUOTED = r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_LIST_AS_TEXT = re.compile(rf"\[\s*(?:{_QUOTED}\s*(?:,\s*{_QUOTED}\s*)*,?\s*)?\]", re.DOTALL)
_LIST_WITHOUT_QUOTES = re.compile(r"""\[([^]["']*)\]""")


def trimmed_topics(topics: Sequence[Any], clean: bool) -> list[str]:
    """The topics as text, without white space at their ends, null and empty ones. `clean`: without HTML, too."""
    texts = (str(topic) for topic in topics if topic is not None)
    trimmed = ((clean_html(text) if clean else text).strip(WHITE_SPACE) for text in texts)
    return [text for text in trimmed if text]


def topics_of_text(text: str | None, forms: Forms) -> list[str] | None:
    """The topics in a text: with a delimiter between them, or the text of a list, as JSON or Python write it.

    The items of a list of numbers, [27, 9], or of texts without quotes, [tea, red kite], are between its commas.
    """
    if text is None:
        return None
    stripped = text.strip(WHITE_SPACE)
    if bare := _LIST_WITHOUT_QUOTES.fullmatch(stripped):
        return trimmed_topics(bare[1].split(","), forms.clean_html)
    if not _LIST_AS_TEXT.fullmatch(stripped):  # cleaned as a whole, because an entity may contain the delimiter
        whole = clean_html(text) if forms.clean_html else text
        return trimmed_topics(whole.split(forms.topic_delimiter), clean=False)
    try:
        return trimmed_topics(json.loads(stripped), forms.clean_html)
    except ValueError:
        return trimmed_topics(ast.literal_eval(stripped), forms.clean_html)
