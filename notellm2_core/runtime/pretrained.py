"""What loading from transformers has in common for LLMs and vision encoders: no silent gaps, no noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def require_complete(report: dict[str, Any], source: str) -> None:
    """Raises ValueError if weights were missing or of another shape, so that nothing stays random in silence."""
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report[problem])
        if keys:
            what = "no weights for" if problem == "missing_keys" else "weights of another shape for"
            raise ValueError(f"{source} has {what} {len(keys)} tensors, among them {keys[0]}; use a complete copy.")


@contextmanager
def quiet() -> Iterator[None]:
    """No table of unread weights: LM heads, text towers and layers that were cut are unread on purpose."""
    from transformers.utils import logging  # here, because it takes seconds

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def one_line(error: Exception) -> str:
    """What a library says in its first line, or, where that announces more, in the next; without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
