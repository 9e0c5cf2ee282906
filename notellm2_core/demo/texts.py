"""The text of one note: title, topics and content."""

from itertools import product

import numpy as np

from notellm2_core.demo.words import FILLERS, POOR_TITLES, SENTENCES, THEMES, TITLES, TOPICS

LONG_SHARE = 0.05  # of the notes have many more sentences, so that the slice of long notes is not empty
TOPIC_SHARE = 0.7  # of the notes have a phrase of their theme among their topics


def write_note(rng: np.random.Generator, theme: str) -> tuple[str, list[str], str]:
    """Title, topics and content of a note about `theme`: a few of its phrases among sentences without signal."""
    phrases = [str(p) for p in rng.permutation(THEMES[theme])]  # more than there are slots
    title = _fill(str(rng.choice(TITLES)), phrases)
    topics = [str(t) for t in rng.choice(TOPICS, size=rng.integers(1, 3), replace=False)]
    if rng.random() < TOPIC_SHARE:
        topics.insert(int(rng.integers(len(topics) + 1)), _without_article(phrases.pop()))
    # The signal comes first, so that truncating the content does not remove it.
    about = [_fill(str(s), phrases) for s in rng.choice(SENTENCES, size=rng.integers(2, 4), replace=False)]
    num_fillers = rng.integers(14, 22) if rng.random() < LONG_SHARE else rng.integers(0, 3)
    fillers = [str(s) for s in rng.choice(FILLERS, size=num_fillers, replace=False)]
    return title, topics, " ".join(about + fillers)


def poor_titles(rng: np.random.Generator, num: int) -> list[str]:
    """Titles of text-poor notes, repeated only after all are used: notes with equal text are near-duplicates."""
    titles = sorted({" ".join(w for w in words if w) for words in product(*POOR_TITLES)})
    order = rng.permutation(len(titles))
    return [titles[order[i % len(titles)]] for i in range(num)]


def _fill(template: str, phrases: list[str]) -> str:
    """Put phrases, taken from the end of the list, into the slots."""
    for slot in ("{a}", "{b}"):
        if slot in template:
            template = template.replace(slot, phrases.pop())
    return template[0].upper() + template[1:]


def _without_article(phrase: str) -> str:
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the", "my") else phrase
