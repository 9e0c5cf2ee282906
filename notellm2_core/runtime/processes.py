"""Processes that end with the process that started them, so that a killed run stops writing. Imports no torch."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_name: str | None = None) -> None:
    """Ask the kernel to kill this process when its launcher dies, however it dies: no rank is left behind.

    parent_name: a part of the launcher's command line. If the parent's lacks it, the launcher died before this call,
    another process adopted this one, and it ends at once. Only Linux has prctl; elsewhere this does nothing.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        adopted = parent_name is not None and parent_name not in Path(f"/proc/{parent}/cmdline").read_text()
        if adopted or os.getppid() != parent:  # the launcher died before the call, or during it
            os.kill(os.getpid(), signal.SIGKILL)


def is_torchrun_rank() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ
