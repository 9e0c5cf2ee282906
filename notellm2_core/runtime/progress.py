"""Progress of long work on stderr: a bar in a terminal, elsewhere a line every ten seconds."""

import os
import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10
# Environment variable: stderr is a pipe, and the process behind it copies it to a terminal.
TO_TERMINAL = "NOTELLM2_STDERR_TO_TERMINAL"
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {percentage:.0f} %, {elapsed} so far, {remaining} to go{postfix}"


def in_terminal() -> bool:
    """Whether what this process writes to stderr is seen in a terminal."""
    return sys.stderr.isatty() or TO_TERMINAL in os.environ


class ProgressBar(tqdm):
    """tqdm's bar. Where stderr is no terminal, it writes lines instead: none in the first ten seconds, then at most
    one in ten seconds, and one at the end. `options`: tqdm's.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._bar_in_terminal = in_terminal()
        self._written_n: float = -1  # how much was done when the last line was written
        if not self._bar_in_terminal:
            every = {"mininterval": LINE_SECONDS, "miniters": 1, "delay": LINE_SECONDS}
            options |= {**every, "bar_format": _LINE, "leave": False}
        super().__init__(*args, **{"file": sys.stderr, **options})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar; without a terminal, write the line. `msg` "" would clear the bar."""
        if self._bar_in_terminal:
            super().display(msg, pos)
        elif msg is None:
            self.write_line(str(self))

    def show(self, text: str, values: str) -> None:
        """Write `text` above the bar; without a terminal, add `values` to the lines from now on."""
        if self._bar_in_terminal:
            self.write_line(text)
        else:
            self.set_postfix_str(values, refresh=False)

    def write_line(self, text: str) -> None:
        """Write `text` above the bar, or as this period's line."""
        if self._bar_in_terminal:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)
            self.last_print_t, self.last_print_n = time.time(), self.n
            self._written_n = self.n

    def close(self) -> None:
        lasted = not self.disable and time.time() - self.start_t >= LINE_SECONDS
        if lasted and not self._bar_in_terminal and self._written_n != self.n:
            self.display()
        super().close()
