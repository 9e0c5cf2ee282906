"""Errors that the user can fix end a command with one sentence on stderr and exit code 2, without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Environment variable: a file that the sentence is also written to. A launcher such as torchrun replaces the exit code
# and buries the sentence in its own output, so the process that started the launcher reads the file.
ERROR_FILE = "NOTELLM2_ERROR_FILE"


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError into `error: <one line>` and exit code 2. Bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(e).split()))
        print("error:", line, file=sys.stderr)
        if ERROR_FILE in os.environ:
            Path(os.environ[ERROR_FILE]).write_text(line)
        sys.exit(2)
