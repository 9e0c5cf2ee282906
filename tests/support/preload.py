"""Imported once by the process from which ranks are forked (see ranks.py)."""

from notellm2_core.training import loop  # noqa: F401
from notellm2_core.training.engine.deepspeed import import_deepspeed

import_deepspeed()
