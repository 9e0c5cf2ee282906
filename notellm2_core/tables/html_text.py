"""Plain text from text with HTML.

What is no HTML for certain stays: `a < b and c > d`, `<3`, `x<y`, `AT&T`. A tag is therefore an element of HTML with
attributes as HTML writes them, and an entity ends with a semicolon. Python's html.parser takes `x<y` for a tag, and
what it makes of broken ones differs between its patch releases.
"""

import re
from collections.abc import Iterator
from html import unescape
from html.entities import html5

# Elements within a line; all others separate what is before and behind them.
_INLINE = (
    "a|abbr|acronym|b|bdi|bdo|big|blink|cite|code|data|del|dfn|em|font|i|ins|kbd|label|mark|nobr|o:p|q|rb|rp|rt|rtc|ruby"
    "|s|samp|small|span|strike|strong|sub|sup|time|tt|u|var|wbr"
)
_BLOCK = (
    "address|applet|area|article|aside|audio|base|basefont|bgsound|blockquote|body|br|button|canvas|caption|center|col"
    "|colgroup|datalist|dd|details|dialog|dir|div|dl|dt|embed|fieldset|figcaption|figure|footer|form|frame|frameset"
    "|h[1-6]|head|header|hgroup|hr|html|iframe|img|input|legend|li|link|main|map|marquee|menu|meta|meter|nav|noframes"
    "|noscript|object|ol|optgroup|option|output|p|param|picture|pre|progress|script|search|section|select|source|style"
    "|summary|svg|table|tbody|td|template|textarea|tfoot|th|thead|title|tr|track|ul|video"
)
_FLAGS = (  # attributes without a value
    "allowfullscreen|async|autofocus|autoplay|checked|compact|controls|default|defer|disabled|download|hidden|inert"
    "|ismap|loop|multiple|muted|nohref|noresize|noshade|novalidate|nowrap|open|playsinline|readonly|required|reversed"
    "|selected"
)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s<>"'`]*+)"""
_ATTRIBUTE = rf"""(?:[\s/]++|(?<=["']))(?:[^\s<>=/"']++\s*+=\s*+{_VALUE}|(?:{_FLAGS})(?=[\s/>]))"""
_END_OF_TAG = rf"(?:{_ATTRIBUTE})*+[\s/]*+>"
_HTML = re.compile(  # begins with a set of characters, which `re` looks for fast
    rf"""
    [<&](?:
        (?<=<)(?P<inline>
            !--(?:(?!<!--).)*?--> | !doctype\s[^<>]*> | \?xml\s[^<>]*>
            | (?P<unseen>script|style){_END_OF_TAG}(?:(?!<(?P=unseen)).)*?</(?P=unseen)\s*+>
            | /?(?:{_INLINE}){_END_OF_TAG}
        )
        | (?<=<)/?(?:{_BLOCK}){_END_OF_TAG}
        | (?<=&)(?P<entity>\#[0-9]{{1,7}}|\#x[0-9a-f]{{1,6}}|[a-z][a-z0-9]{{1,31}});
    )
    """,
    re.ASCII | re.DOTALL | re.IGNORECASE | re.VERBOSE,
)
_WHITE_SPACE = " \t\r\n"


def clean_html(text: str) -> str:
    """The text that a browser shows for `text`, with the line breaks of its blocks; unchanged where it has no HTML.

    The contents of script and style are removed, and so are comments. An entity becomes its character, &nbsp; a space.
    White space stays, except around blocks.
    """
    lines: list[list[str]] = [[]]
    end = 0
    for match in _matches(text):
        lines[-1].append(text[end : match.start()])
        end = match.end()
        if match["entity"]:
            lines[-1].append(_character(match).replace("\xa0", " "))
        elif not match["inline"]:
            lines.append([])
    if not end:
        return text
    lines[-1].append(text[end:])
    shown = ("".join(line).strip(_WHITE_SPACE) for line in lines)
    return "\n".join(line for line in shown if line)


def has_html(text: str) -> bool:
    """Whether `clean_html` finds a tag, a comment or an entity in `text`."""
    return any(True for _ in _matches(text))


def _matches(text: str) -> Iterator[re.Match[str]]:
    """The tags, comments and entities in `text`."""
    if "<" in text or "&" in text:
        for match in _HTML.finditer(text):
            if not match["entity"] or _character(match) != match[0]:
                yield match


def _character(match: re.Match[str]) -> str:
    """The character of an entity; the entity itself where HTML knows none of the name."""
    name = match["entity"]
    return unescape(match[0]) if name.startswith("#") else html5.get(f"{name};", match[0])
