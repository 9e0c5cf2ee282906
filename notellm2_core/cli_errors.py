"""How a command ends when the user can mend the cause: one sentence on stderr and exit code 2, no traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ValueError or OSError into `error: <one line>` and exit code 2. Bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        line = " ".join(str(e).split())
        print("error:", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line), file=sys.stderr)
        sys.exit(2)
