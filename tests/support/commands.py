"""A command for tests: it writes how it was started to a file, then fails or sleeps as its argument says."""

import json
import os
import sys
import time
from pathlib import Path

from notellm2_core.runtime.errors import user_errors


def main() -> None:
    how, out = sys.argv[1:]
    print("on its way", file=sys.stderr)
    start = {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "WORD": os.environ.get("WORD"),
        "SET_BY_IMPORT": os.environ.get("SET_BY_IMPORT"),
        "preloaded": "tests.support.import_marker" in sys.modules,
    }
    Path(out).write_text(json.dumps(start))
    if how == "crash":
        raise RuntimeError("a bug")
    with user_errors():
        if how == "refuse":
            raise ValueError("set x")
    if how == "sleep":
        time.sleep(300)
