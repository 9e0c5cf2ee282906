"""Loading from transformers, for LLMs and vision encoders alike: missing weights are errors, warnings are silenced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def require_complete(report: dict[str, Any], source: str) -> None:
    """Raises ValueError if a loading report names missing or mismatched weights, which would silently stay random."""
    for problem in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report[problem])
        if keys:
            what = "no weights for" if problem == "missing_keys" else "weights of another shape for"
            raise ValueError(f"{source} has {what} {len(keys)} tensors, among them {keys[0]}; use a complete copy.")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the table of unread weights: LM heads, text towers and dropped layers are unread on purpose."""
    from transformers.utils import logging  # here, because the import takes seconds

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def one_line(error: Exception) -> str:
    """The first line of a library's message without its full stop; the first two where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
