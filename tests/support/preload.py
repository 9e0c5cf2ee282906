"""Imported once by the process from which ranks are forked (see ranks.py)."""

import gc

from notellm2_core.training import loop  # noqa: F401
from notellm2_core.training.engine.deepspeed import import_deepspeed

import_deepspeed()
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, E402  # ZeRO imports it, and with it torch._dynamo

gc.freeze()  # ZeRO-3 collects garbage: a rank looks at its own objects then, not at all of torch's
