"""How a command ends when the user can mend the cause: one sentence on stderr and exit code 2, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In the environment: a file that gets the sentence as well, for whoever starts the command through a launcher, which
# has an exit code of its own and buries the sentence under words of its own (torchrun).
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
