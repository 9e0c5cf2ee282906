"""How a process ends with whoever started it, so that nothing of a killed run goes on writing. Imports no torch."""

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_name: str | None = None) -> None:
    """Ask the kernel to kill this process when its launcher dies, however it dies: no rank is left behind.

    parent_name: what the launcher's command line must hold. Where it does not, the launcher died before this call, and
    somebody else has adopted this process. Nothing happens where there is no prctl (other systems than Linux).
    """
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        adopted = parent_name is not None and parent_name not in Path(f"/proc/{parent}/cmdline").read_text()
        if adopted or os.getppid() != parent:  # or it died between the two calls
            os.kill(os.getpid(), signal.SIGKILL)


def is_of_torchrun() -> bool:
    """Whether torchrun started this process, as one of its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ
