"""Cures for torch, most of them for its CPU build. Import it before transformers, timm or open_clip.

Beside a CUDA build of torchvision (the one PyPI has), `import torchvision` dies with "operator torchvision::nms does
not exist": it cannot load its own library. Nothing here detects boxes, so declaring the two operators' names is enough.
Where the real operators can be loaded, nothing is done.

oneDNN, which multiplies in 16 bits, keeps what it has prepared for 1,024 shapes, with its memory. Packed notes,
and their groups in the attention, have other numbers of tokens each time, so a training grew by 50 MB a step, for as
long as one looked. About a hundred shapes are what the layers of one step share: with 16 a step takes a quarter longer,
with 1,024 no less than with 128.

At its end Python looks for cycles among the objects that torch and transformers have made: more than one of the ten
seconds of a process that does nothing but import them. They are left to the system instead.
"""

import atexit
import gc
import importlib.util
import os
from pathlib import Path

import torch

_NUM_KEPT_SHAPES = "128"
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _torchvision_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to cure
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:  # built for a CUDA runtime that is not here
        return False
    return True


def declare_missing_operators() -> torch.library.Library | None:
    """Declare `torchvision::nms` and `qnms` if the real ones cannot be had; returns what must stay alive."""
    if _torchvision_library_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define(f"nms{_NMS}")
    library.define(f"qnms{_NMS}")
    return library


for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's in front of it
    os.environ.setdefault(_variable, _NUM_KEPT_SHAPES)  # read at the first product, so it is early enough here
_library = declare_missing_operators()
atexit.register(gc.freeze)
