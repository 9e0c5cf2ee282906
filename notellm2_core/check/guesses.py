"""Guesses at what a user's names and forms mean. Each is only proposed, never acted on."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

# Names of our columns elsewhere, without case and separators; the most frequent first.
SYNONYMS: Mapping[str, Sequence[str]] = {
    "note_id": ("itemid", "item", "articleid", "newsid", "productid", "parentasin", "asin", "movieid", "videoid",
                "postid", "docid", "trackid", "bookid", "businessid", "photoid", "pid", "iid", "id"),
    "user_id": ("user", "uid", "visitorid", "visitor", "customer", "member",
                "reviewerid", "customerid", "memberid", "sessionid", "session"),
    "timestamp": ("time", "ts", "eventtime", "datetime", "date", "createdat", "tdat", "unixreviewtime",
                  "eventtimestamp", "timems", "day"),
    "event": ("eventtype", "eventname", "action", "actiontype", "behavior", "behaviour", "behaviortype",
              "interaction", "interactiontype", "type", "rating", "score", "stars"),
    "title": ("name", "itemname", "producttitle", "prodname", "productname", "headline", "subject", "caption"),
    "topics": ("tags", "tag", "topic", "categories", "category", "genres", "genre", "keywords", "hashtags"),
    "content": ("description", "desc", "detaildesc", "text", "body", "abstract", "overview", "summary", "story"),
    "image_path": ("imagefile", "imagename", "imgpath", "imagefilename", "photo", "picture", "coverpath"),
}  # fmt: skip
_CLICK = re.compile(
    r"(?i)click|clk|buy|bought|purchase|order|transaction|like|fav|cart|collect|save|share|follow|download|play|read"
)
_TIME_FORMATS = (
    "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M:%S", "%m/%d/%Y %H:%M:%S",
    "%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d-%m-%Y",
    "%d-%m-%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y.%m.%d", "%Y%m%d%H%M%S",
    "%Y%m%d %H:%M:%S", "%m %d, %Y", "%b %d, %Y", "%d %b %Y", "%d-%b-%Y", "%B %d, %Y", "%a %b %d %H:%M:%S %Y",
    "%a %b %d %H:%M:%S %z %Y", "%a, %d %b %Y %H:%M:%S %z", "%d/%b/%Y:%H:%M:%S %z", "%Y-%m-%d %I:%M:%S %p",
)  # fmt: skip
_DELIMITERS = (";", "\t", "|", "::", ",")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def column_for(column: str, names: Iterable[str]) -> str | None:
    """The one of `names` that most likely is our `column`; None: none of them."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in names}
    wanted = (column.replace("_", ""), *SYNONYMS.get(column, ()))
    return next((plain[name] for name in wanted if name in plain), None)


def delimiter_in(name: str) -> str | None:
    """The delimiter in the only column of a file, which is then its whole header; None: there is none."""
    return next((delimiter for delimiter in _DELIMITERS if delimiter in name), None)


def click_names(rows_by_name: Mapping[str, int]) -> list[str]:
    """The event names that sound like clicks; if none or all do, the one with the fewest rows."""
    clicks = [name for name in rows_by_name if _CLICK.search(name)]
    if clicks and len(clicks) < len(rows_by_name):
        return clicks
    return [min(rows_by_name, key=lambda name: (rows_by_name[name], name))]


def rating_of_a_click(rows_by_name: Mapping[str, int]) -> float | None:
    """The least rating that at most 60 % of the rows reach; None where the names are not several numbers."""
    try:
        rows = sorted((float(name), num) for name, num in rows_by_name.items())
    except ValueError:
        return None
    if len(rows) < 3:
        return None
    total, above = sum(num for _, num in rows), 0
    least = rows[-1][0]
    for rating, num in reversed(rows):
        above += num
        if above > 0.6 * total:
            break
        least = rating
    return least


def time_format(texts: Sequence[str]) -> str | None:
    """The first of the usual formats that all of `texts` have; None: none."""
    return next((pattern for pattern in _TIME_FORMATS if all(_has_format(text, pattern) for text in texts)), None)


def _has_format(text: str, pattern: str) -> bool:
    try:
        datetime.strptime(text.strip(), pattern)
    except ValueError:
        return False
    return True


def image_pattern(source: Path, column: str, values: Collection[str]) -> str | None:
    """A pattern of paths, made of `column`, under which files of all `values` exist; None: none was found."""
    folders = ["", *(f"{folder.name}/" for folder in sorted(source.iterdir()) if folder.is_dir())]
    for folder in folders:
        for suffix in ("", *_IMAGE_SUFFIXES):
            if all(_is_file(source / f"{folder}{value}{suffix}") for value in values):
                return f"{folder}{{{column}}}{suffix}"
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def same_ids(ids: Collection[str], others: Collection[str]) -> tuple[str, str, str] | None:
    """How most of `ids` would be among `others`: in words, with an example of each; None: they are not."""
    forms = {
        "without leading zeros": lambda text: text.lstrip("0"),
        "without .0 at the end": lambda text: text.removesuffix(".0"),
        "without regard to case": str.lower,
        "by their digits alone": lambda text: re.sub(r"\D", "", text),
    }
    for words, form in forms.items():
        by_form = {form(text): text for text in others}
        same = [(text, by_form[form(text)]) for text in ids if form(text) and form(text) in by_form]
        if len(same) > len(ids) / 2:
            return words, *same[0]
    return None
