"""Workarounds for torch, most of them for its CPU build. Import it before transformers, timm or open_clip.

torchvision from PyPI is a CUDA build. Beside torch's CPU build it cannot load its library, and `import torchvision`
fails with "operator torchvision::nms does not exist". We detect no boxes, so we declare the two missing operators.
Where the real operators load, nothing is declared.

oneDNN caches up to 1,024 prepared 16-bit kernels, one per shape. Packed batches have new shapes at every step, so
memory grew by 50 MB a step. 128 entries cover the shapes within a step at no cost in speed; 16 cost 25 %.

At exit, Python's garbage collector spends over a second on torch's and transformers' objects. We skip it: the process
is ending.
"""

import atexit
import gc
import importlib.util
import os
from pathlib import Path

import torch

_NUM_CACHED_SHAPES = "128"
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _torchvision_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to declare
    libraries = sorted(Path(spec.origin).parent.glob("_C*.so"))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:  # built for a CUDA runtime that is not installed
        return False
    return True


def declare_missing_operators() -> torch.library.Library | None:
    """Declare `torchvision::nms` and `qnms` where torchvision's own do not load. The result must stay referenced."""
    if _torchvision_library_loads():
        return None
    library = torch.library.Library("torchvision", "DEF")
    library.define(f"nms{_NMS}")
    library.define(f"qnms{_NMS}")
    return library


for _variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, and torch's in front of it
    os.environ.setdefault(_variable, _NUM_CACHED_SHAPES)  # early enough: both are read at the first product
_library = declare_missing_operators()
atexit.register(gc.freeze)
